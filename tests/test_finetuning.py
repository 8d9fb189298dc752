"""Objectives against their definitions, the loop's schedule, resuming, divergence."""
import copy
import json
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from cft import backdrop
from cft.data import MaskedImages, Preprocess, scan
from cft.finetuning import METHODS, Align, Batch, CrossEntropy, Diverged, Recipe, Sampler, averaged, fine_tune
from cft.losses import LossWeights
from cft.models import TINY, base_model
from cft.relevance import relevance


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = backdrop.write(tmp_path_factory.mktemp("w") / "b", {"train": 2}, seed=1)
    folder = scan(root / "images/train", root / "masks/train", root / "objects/train", list(backdrop.CLASSES)).only([0, 2, 4])
    return MaskedImages(folder, Preprocess.of(timm.create_model(TINY), margin=1.0), train=True, keep=True)


@pytest.fixture(scope="module")
def batch(images):
    torch.manual_seed(0)
    return Sampler(images, Recipe(METHODS["cft+"].objective, batch=6)).batch(0)


def loss_of(name, batch, model=None):
    model = model or base_model(0)
    torch.manual_seed(0)
    return METHODS[name].objective(model, copy.deepcopy(model), batch)


def test_controls(batch):
    model = base_model(0)
    logits = model(batch.images)
    assert torch.allclose(loss_of("plain", batch)[0], F.cross_entropy(logits, batch.labels))
    assert torch.allclose(loss_of("self", batch)[0], F.cross_entropy(logits, logits.argmax(1)))


def test_swap_is_half_and_half(batch):
    model = base_model(0)
    front = batch.objects[:, None].float()
    swapped = model(batch.images * front + batch.contexts * (1 - front))
    expected = (F.cross_entropy(model(batch.images), batch.labels) + F.cross_entropy(swapped, batch.labels)) / 2
    assert torch.allclose(loss_of("swap", batch)[0], expected)


@pytest.mark.parametrize(("name", "norm"), [("cft-paper", "region"), ("cft", "image")])
def test_cft_is_equation_7(batch, name, norm):
    model = base_model(0)
    result = relevance(model, batch.images, batch.labels, differentiable=False)
    r = result.patches.double()
    if name == "cft":
        phi = r.clamp(min=0) / (r.clamp(min=0) + 0.5 * r.abs().mean((1, 2), keepdim=True))
    else:
        phi = (r - r.amin((1, 2), keepdim=True)) / (r.amax((1, 2), keepdim=True) - r.amin((1, 2), keepdim=True))
    phi = 0.02 + 0.96 * phi
    total = 0.0
    for p, m, z in zip(phi, batch.masks, result.logits.double()):
        share = [[m[8 * i:8 * i + 8, 8 * j:8 * j + 8].double().mean().item() for j in range(8)] for i in range(8)]
        cells = [(p[i, j].item(), share[i][j]) for i in range(8) for j in range(8)]
        inside, outside = (sum(s for _, s in cells), sum(1 - s for _, s in cells)) if norm == "region" else (64, 64)
        concept = sum(-s * math.log(q) for q, s in cells) / inside
        background = sum(-(1 - s) * math.log(1 - q) for q, s in cells) / outside
        total += 0.8 * (0.5 * concept + 1.2 * background) + 0.2 * (z.logsumexp(0) - z.max()).item()
    assert loss_of(name, batch)[0].item() == pytest.approx(total / len(phi), rel=1e-4)


def test_keep_original_ignores_the_swap(batch):
    objective = replace(METHODS["cft+ without alignment"].objective, swap=0.0)
    model, other = base_model(0), base_model(1)
    loss, _ = objective(model, other, batch)
    p, q = other(batch.images).softmax(1), model(batch.images).softmax(1)
    assert loss.item() == pytest.approx((p * (p.log() - q.log())).sum(1).mean().item(), rel=1e-4)
    torch.manual_seed(0)
    swapped, _ = replace(objective, swap=1.0)(model, other, batch)
    front = batch.objects[:, None].float()
    q = model(batch.images * front + batch.contexts * (1 - front)).softmax(1)
    assert swapped.item() == pytest.approx((p * (p.log() - q.log())).sum(1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("grid", ["patch", "pixel"])
def test_alignment_gradient_against_finite_differences(batch, grid):
    model = base_model(0).double()
    small = Batch(*(t[:2].double() if t.is_floating_point() else t[:2] for t in batch))
    objective = Align(grid=grid, normalize="saturating", norm="image", keep="labels")
    loss = lambda: objective(model, model, small)[0]
    loss().backward()
    for name in ("blocks.1.attn.qkv.weight", "blocks.2.mlp.fc1.weight", "head.weight", "patch_embed.net.0.weight"):
        weight = model.get_parameter(name)
        direction = torch.randn_like(weight)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-6 * direction
                ends.append(loss().item())
                weight -= sign * 1e-6 * direction
        numeric = (ends[0] - ends[1]) / 2e-6
        assert numeric == pytest.approx((weight.grad * direction).sum().item(), rel=1e-5, abs=1e-9)


def test_every_alignment_trains_every_layer(batch):
    for name in ("cft-paper", "cft", "cft-object", "cft+"):
        model = base_model(0)
        loss_of(name, batch, model)[0].backward()
        # a key's bias shifts all attention logits of a query alike: its gradient is zero up to rounding
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()), name


def test_schedule_and_order(images):
    recipe = replace(METHODS["plain"], epochs=50, batch=1, rate=1.0)
    sampler = Sampler(images, recipe)
    assert sampler.steps == 300 and sorted(i for s in range(6) for i in sampler.indices(s)) == list(range(6))
    assert [sampler.indices(s) for s in range(6)] != [sampler.indices(s) for s in range(6, 12)]
    rates = []
    model = base_model(0)

    class Spy(CrossEntropy):
        def __call__(self, model, original, batch):
            rates.append(optimizer_rate())
            return super().__call__(model, original, batch)

    import cft.finetuning as module

    seen = {}
    adamw = torch.optim.AdamW
    optimizer_rate = lambda: seen["o"].param_groups[0]["lr"]
    try:
        torch.optim.AdamW = lambda *a, **k: seen.setdefault("o", adamw(*a, **k))
        module.fine_tune(model, images, replace(recipe, objective=Spy(), rate=1e-6), progress=False)
    finally:
        torch.optim.AdamW = adamw
    slow = [1e-6 * 0.85 ** (epoch // 2) for epoch in range(50) for _ in range(6)]  # the released code's schedule
    assert rates == pytest.approx(slow)


def test_contexts_come_from_other_classes(images):
    sampler = Sampler(images, METHODS["swap"])
    labels = torch.tensor([s.label for s in images.folder.samples])
    assert all((labels[sampler._others[k]] != k).all() for k in (0, 2, 4))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_head_only_means_head_only(images, name):
    model = base_model(0)
    tuned, record = fine_tune(model, images, replace(METHODS[name], rate=1e-4, epochs=1), progress=False)
    changed = {n for (n, a), b in zip(model.named_parameters(), tuned.parameters()) if not torch.equal(a, b)}
    assert changed == {"head.weight", "head.bias"} if name == "last-layer" else len(changed) > 20
    assert math.isfinite(record["epochs"][0]["loss"]) and json.dumps(record)
    assert not tuned.training and all(p.requires_grad for p in tuned.parameters())


def test_resume_is_bit_equal(images, tmp_path):
    recipe = replace(METHODS["cft+"], rate=1e-4, epochs=4, batch=2)
    whole = fine_tune(base_model(0), images, recipe, progress=False).model
    for stop in (0, 5, 10):
        def cut(step, _, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        run = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(base_model(0), images, recipe, run, progress=False, save_every=3, on_step=cut)
        resumed, record = fine_tune(base_model(0), images, recipe, run, progress=False)
        assert record["resumed_at"] == stop // 3 * 3 + (3 if stop % 3 == 2 else 0)
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
        assert not (run / "state.pt").exists() and len(record["epochs"]) == 4


def test_random_state_and_model_are_left_alone(images):
    model = base_model(0)
    weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    fine_tune(model, images, replace(METHODS["cft+"], rate=1e-3, epochs=1), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values()))


def test_another_job_is_refused(images, tmp_path):
    recipe = replace(METHODS["plain"], epochs=1)
    fine_tune(base_model(0), images, recipe, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="finished run of another job"):
        fine_tune(base_model(0), images, replace(recipe, rate=1e-3), tmp_path / "a", progress=False)

    def cut(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(base_model(0), images, replace(recipe, epochs=3), tmp_path / "b", progress=False, save_every=1, on_step=cut)
    with pytest.raises(ValueError, match="unfinished run of another job"):
        fine_tune(base_model(0), images, replace(recipe, rate=1e-3, epochs=3), tmp_path / "b", progress=False)


def test_divergence_names_the_pictures(images, tmp_path):
    recipe = replace(METHODS["plain"], rate=1e20, epochs=20, batch=3)
    with pytest.raises(Diverged, match=r"step \d+: .*batch: .*\.png") as error:
        fine_tune(base_model(0), images, recipe, tmp_path / "r", progress=False, save_every=1)
    step = int(str(error.value).split(":")[0].split()[1])
    state = torch.load(tmp_path / "r/state.pt", weights_only=True)
    assert state["step"] == step


def test_averaging():
    a, b = base_model(0), base_model(1)
    target = [p.detach() * 0.3 + q.detach() * 0.7 for p, q in zip(a.parameters(), b.parameters())]
    averaged(a, b, 0.7)
    assert all(torch.allclose(p, t, atol=1e-6) for p, t in zip(b.parameters(), target))


def test_missing_masks_and_bad_settings(images):
    bare = MaskedImages(replace(images.folder, samples=tuple(replace(s, mask=None) for s in images.folder.samples)), images.preprocess)
    with pytest.raises(ValueError, match="needs mask masks"):
        fine_tune(base_model(0), bare, METHODS["cft"])
    for bad in (dict(rate=0), dict(epochs=0), dict(batch=0), dict(average=0)):
        with pytest.raises(ValueError, match="expected rate > 0"):
            replace(METHODS["cft"], **bad)
    for bad in (dict(grid="hex"), dict(keep="?"), dict(guide="?"), dict(swap=2)):
        with pytest.raises(ValueError, match="must be"):
            replace(METHODS["cft"].objective, **bad)
    with pytest.raises(ValueError):
        LossWeights(align=-1)
