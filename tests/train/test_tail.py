"""The last blocks alone: the same answers, relevance and gradients as the whole network has."""
from dataclasses import replace

import pytest
import timm
import torch
from torch.nn.functional import one_hot

from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, scan, swap_background, without_object
from cft.explain.anatomy import split
from cft.explain.maps import relevance, run
from cft.explain.rules import Tape
from cft.train.loop import Sampler, fine_tune
from cft.train.objectives import CFT, RECIPES, Batch
from cft.train.tail import Tail, TokenBatches, entering, tail_of, with_tail

FORMS = {"token": {}, "registers": {"reg_tokens": 3}, "mean": {"global_pool": "avg", "class_token": False},
         "scaled": {"init_values": 0.1, "pre_norm": True}}


@pytest.fixture(scope="module", params=FORMS)
def model(request):
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5, **FORMS[request.param]).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = backdrop.write(tmp_path_factory.mktemp("w") / "b", {"train": 3}, seed=1)
    folder = scan(root / "images/train", root / "masks/train", root / "objects/train", list(backdrop.CLASSES))
    return MaskedImages(folder.only([0, 2, 4]), Preprocess(size=(64, 64), crop=1.0), train=True)


def test_the_tail_answers_and_explains_as_the_whole(model):
    x, target = torch.randn(3, 3, 64, 64), torch.tensor([4, 0, 2])
    tokens, tail = entering(model, x, 2), tail_of(model, 2)
    assert tokens.dtype == torch.float16 and tokens.shape[0] == 3 and isinstance(tail, Tail)
    with torch.no_grad():
        parts = split(model, x, 2)
        z = run(parts.steps[:2], parts.x, Tape())[0]
        exact = z.transpose(1, 2)[..., None]
        torch.testing.assert_close(tokens.float(), exact, atol=4e-3, rtol=1e-3)
        torch.testing.assert_close(tail(exact), model(x))
        _, pullbacks = run(parts.steps[2:], z, Tape("attnlrp"))
        g = one_hot(target, 5).float()
        for pullback in reversed(pullbacks):
            g = pullback(g)
    found = relevance(tail, exact, target, differentiable=False)
    torch.testing.assert_close(found.tokens, (z * g).sum(-1), atol=1e-5, rtol=1e-4)
    assert found.grid == (4, 4) and found.prefix == model.num_prefix_tokens
    assert torch.equal(with_tail(model, tail)(x), model(x))
    with torch.no_grad():
        tail.blocks[0].attn.proj.weight.mul_(2)
    changed = with_tail(model, tail)(x)
    assert (changed - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(tail(exact), changed)


def test_its_gradients_are_those_of_the_whole(model):
    x = torch.randn(4, 3, 64, 64)
    tokens, tail = entering(model, x, 2).float(), tail_of(model, 2)
    batch = Batch(x, torch.tensor([0, 1, 2, 3]))
    for network, seen in (model, batch), (tail, batch._replace(images=tokens)):
        network.zero_grad()
        RECIPES["plain"].objective(network, network, seen)[0].backward()
    pairs = zip(model.blocks[-1].named_parameters(), tail.blocks[-1].named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(b.grad, a.grad, atol=2e-3 * a.grad.abs().max().item() + 1e-8, rtol=2e-2, msg=name)


def test_batches_hold_the_tokens_of_pictures_and_of_swapped_ones(model, images):
    recipe = replace(RECIPES["rrda"], batch=4, epochs=2, seed=3)
    cached, sampler = TokenBatches(model, images, recipe, 2, times=2), Sampler(images, recipe)
    still = MaskedImages(images.folder, images.preprocess)
    items = [still[i] for i in range(len(still))]
    pictures, objects = (torch.stack([item[key] for item in items]) for key in ("image", "object"))
    scenes, labels = without_object(pictures, objects), [item["label"] for item in items]
    possible = {i: entering(model, torch.stack([swap_background(pictures[i:i + 1], objects[i:i + 1], scenes[j:j + 1])[0]
                                                for j in range(len(items)) if labels[j] != labels[i]]), 2)
                for i in range(len(items))}
    for step in range(2 * cached.per_epoch):
        batch = cached.batch(step)
        assert cached.names(step) == sampler.names(step)
        for k, i in enumerate(sampler.indices(step)):
            torch.testing.assert_close(batch.images[k:k + 1], entering(model, pictures[i:i + 1], 2).float(), atol=2e-3,
                                       rtol=1e-3)
            off = (possible[i].float() - batch.moved[k]).flatten(1).abs().amax(1)
            assert off.min() < 5e-3 < off.max(), "one of the other classes' backgrounds"
            assert torch.equal(batch.objects[k], objects[i]) and batch.labels[k] == labels[i]
    assert torch.equal(batch.swapped(), batch.moved)
    assert cached.identity()["cached"] == {"blocks": 2, "times": 2}
    assert cached.at(replace(recipe, seed=9)).names(0) == Sampler(images, replace(recipe, seed=9)).names(0)


def test_the_loop_tunes_a_tail(model, images, tmp_path):
    objective = replace(CFT, guide="object", swap=0.5)
    recipe = replace(RECIPES["cft"], objective=objective, rate=1e-3, epochs=2, batch=4)
    cached, tail = TokenBatches(model, images, recipe, 1), tail_of(model, 1)
    tuned, record = fine_tune(tail, cached, recipe, progress=False)
    whole = with_tail(model, tuned)
    same = {n for (n, a), b in zip(model.named_parameters(), whole.parameters()) if torch.equal(a, b)}
    first = {"cls_token", "pos_embed", "reg_token", "patch_embed", "norm_pre"}
    assert {n.split(".")[0] for n in same} <= first | {"blocks"}
    assert not any(n.startswith("blocks.3.") for n in same) and any(n.startswith("blocks.2.") for n in same)
    assert record["steps"] == 2 * cached.per_epoch and record["cached"]["blocks"] == 1


def test_bad_input(model):
    for blocks in (0, 5):
        with pytest.raises(ValueError, match="at least"):
            tail_of(model, blocks)
    with pytest.raises(ValueError, match="got ConvNeXt"):
        tail_of(timm.create_model("convnextv2_atto", num_classes=2), 1)
