"""Weights of concepts against explicit loops, and soft masks from the file to the loss."""
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer

from cft.data.folders import MaskedImages, Preprocess, list_folder, open_mask, read_mask
from cft.evaluate.faithfulness import blur
from cft.evaluate.importance import (
    WEIGHTINGS,
    ConceptVector,
    Examples,
    as_weights,
    cav_rates,
    concept_vectors,
    concept_weights,
    depths,
    discriminations,
    masking_responses,
    nesting,
    random_scores,
    read_examples,
    rivals_of,
    soft_mask,
    weighted_folder,
    write_weighted,
)
from cft.train.closed import Look
from cft.train.losses import LossWeights, background_loss, concept_loss, patch_mask
from cft.train.objectives import RECIPES, Batch, ThreeRegions


def make(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 4}
    model = VisionTransformer(**(settings | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="module")
def seen():
    """Three classes; two share a concept, one concept is never there, another not in all pictures."""
    rng = torch.Generator().manual_seed(3)
    owned, masks = {0: ("beak", "wing"), 1: ("wing", "wheel"), 3: ("door", "roof")}, []
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3, 3, 3])
    for k, label in enumerate(labels.tolist()):
        masks.append({name: torch.rand(16, 16, generator=rng) < 0.2 for name in owned[label]})
        for mask in masks[-1].values():
            mask[8:] = False
        if label == 3:
            masks[-1]["roof"] = torch.zeros(16, 16, dtype=torch.bool)
        if k in (1, 5):
            masks[-1]["wing"] = torch.zeros(16, 16, dtype=torch.bool)
    return Examples(torch.randn(10, 3, 16, 16, generator=rng), labels, masks)


def test_pairs_and_the_pictures_that_show_them(seen):
    assert seen.pairs() == {(0, "beak"): [0, 1, 2, 3], (0, "wing"): [0, 2, 3], (1, "wing"): [4, 6],
                            (1, "wheel"): [4, 5, 6], (3, "door"): [7, 8, 9], (3, "roof"): []}


@pytest.mark.parametrize("batch", (2, 64))
def test_masking_responses_one_picture_at_a_time(seen, batch):
    model = make()
    found = masking_responses(model, seen, batch=batch)
    assert found.keys() == seen.pairs().keys() and np.isnan(found[3, "roof"])
    for (label, name), rows in seen.pairs().items():
        falls = []
        for k in rows:
            image, other = seen.images[k].clone(), blur(seen.images[k:k + 1])[0]
            for y, x in itertools.product(range(16), range(16)):
                if seen.masks[k][name][y, x]:
                    image[:, y, x] = other[:, y, x]
            with torch.no_grad():
                falls.append((model(seen.images[k:k + 1]) - model(image[None]))[0, label].item())
        if rows:
            assert found[label, name] == pytest.approx(np.mean(falls), abs=1e-5)
    black = masking_responses(model, seen, "zeros")
    assert black[0, "beak"] != pytest.approx(found[0, "beak"], abs=1e-4)


def layer_of(model, images, block):
    kept = []
    hook = model.blocks[block].register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        model(images)
    hook.remove()
    return kept[0]


def test_concept_vectors_are_those_of_a_logistic_regression(seen, monkeypatch):
    """Where every patch without the concept is used, scikit-learn finds the same direction."""
    model = make(1)
    tokens = layer_of(model, seen.images, 1)[:, 1:].double()
    used = {}

    def remember(x, y, penalty):
        used.setdefault("all", []).append((x, y))
        return between(x, y, penalty)

    import cft.evaluate.importance as module

    between = module._between
    monkeypatch.setattr(module, "_between", remember)
    vectors = concept_vectors(model, seen, penalty=0.05)
    assert vectors.keys() == {"beak", "wing", "wheel", "door"}
    flat = {tuple(row) for row in tokens.reshape(-1, 12).tolist()}
    x, y = used["all"][-1]  # of the last name, on all pictures
    assert {tuple(row) for row in x.tolist()} <= flat and y.sum() == (~y).sum()
    held = set()  # slow: the patches that hold the wheel
    for k, masks in enumerate(seen.masks):
        shares = {(i, j): masks["wing"][4 * i:4 * i + 4, 4 * j:4 * j + 4].double().mean().item()
                  for i in range(4) for j in range(4)} if "wing" in masks else {}
        best = max(shares.values(), default=0)
        held |= {tuple(tokens[k, 4 * i + j].tolist()) for (i, j), share in shares.items()
                 if share > 0 and share >= min(best, 0.1)}
    assert {tuple(row) for row in x[y].tolist()} == held
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    twin = LogisticRegression(C=1 / (0.05 * len(x)), tol=1e-10, max_iter=10_000).fit(scaled.numpy(), y.numpy())
    direction = torch.from_numpy(twin.coef_[0]) / x.std(0, correction=0)
    assert torch.allclose(vectors["wing"].direction, direction / direction.norm(), atol=1e-4)


def test_a_concept_that_is_there_is_found_and_noise_is_not():
    rng, model = torch.Generator().manual_seed(0), make(2)
    images, masks = 0.1 * torch.randn(24, 3, 16, 16, generator=rng), []
    for k in range(24):
        mask = torch.zeros(16, 16, dtype=torch.bool)
        i, j = torch.randint(4, (2,), generator=rng).tolist()
        mask[4 * i:4 * i + 4, 4 * j:4 * j + 4] = True
        images[k][:, mask] += torch.tensor([2.0, -2.0, 2.0])[:, None]
        masks.append({"spot": mask, "nothing": torch.rand(16, 16, generator=rng) < 0.02})
    vectors = concept_vectors(model, Examples(images, torch.zeros(24, dtype=torch.long), masks))
    assert vectors["spot"].accuracy > 0.95 and vectors["nothing"].accuracy < 0.75
    assert all(v.direction.norm().item() == pytest.approx(1) for v in vectors.values())


@pytest.mark.parametrize("batch", (3, 64))
def test_tcav_is_the_sign_of_a_small_move(seen, batch):
    model = make(4).double()
    seen = seen._replace(images=seen.images.double())
    vectors = {name: ConceptVector(torch.nn.functional.normalize(torch.randn(12).double(), dim=0), 1.0)
               for name in ("beak", "wing", "wheel", "door")}
    found = cav_rates(model, seen, vectors, batch=batch)
    assert np.isnan(found[3, "roof"])
    for (label, name) in found:
        if name not in vectors:
            continue
        grows = []
        for k in [k for k in range(10) if seen.labels[k] == label]:
            said = []
            for step in (0.0, 1e-6):
                def add(_, __, out, step=step, name=name):
                    moved = out.clone()
                    for p in range(1, 17):  # 0 is the class token
                        moved[:, p] += step * vectors[name].direction
                    return moved
                hook = model.blocks[1].register_forward_hook(add)
                with torch.no_grad():
                    said.append(model(seen.images[k:k + 1])[0, label].item())
                hook.remove()
            grows.append(said[1] > said[0])
        assert found[label, name] == np.mean(grows)
    assert {value for value in found.values() if value == value} - {0.0, 1.0}


def test_layers_of_other_networks(seen):
    net = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4).eval()
    big = seen._replace(images=torch.nn.functional.interpolate(seen.images, (64, 64)), masks=[
        {name: mask.repeat_interleave(4, 0).repeat_interleave(4, 1) for name, mask in of.items()} for of in seen.masks])
    with pytest.raises(ValueError, match="ConvNeXt has no last block but one; expected the name of a layer"):
        concept_vectors(net, big)
    vectors = concept_vectors(net, big, layer="stages.1")
    assert vectors["beak"].direction.shape == (8,)
    rates = cav_rates(net, big, vectors, layer="stages.1")
    assert all(0 <= rates[pair] <= 1 for pair in rates if pair[1] != "roof")


def test_rivals_and_what_they_lack(seen):
    model = make(5)
    rivals = rivals_of(model, seen, most=1, batch=3)
    with torch.no_grad():
        shares = model(seen.images).softmax(1)
    for label in (0, 1, 3):
        means = {other: np.mean([shares[k, other].item() for k in range(10) if seen.labels[k] == label])
                 for other in (0, 1, 3) if other != label}
        assert rivals[label] == [max(means, key=means.get)]
    found = discriminations(seen, {0: [1], 1: [0, 3], 3: []})
    assert found == pytest.approx({(0, "beak"): 1.0, (0, "wing"): 3 / 4 - 2 / 3, (1, "wing"): 2 / 3 - 3 / 4,
                                   (1, "wheel"): 1.0, (3, "door"): 1.0, (3, "roof"): 0.0})
    assert as_weights(found)[1, "wing"] == 0


def test_parts_of_parts():
    """An eye within the hole that it leaves in a head; a beak that touches it; rings within rings."""
    y, x = np.mgrid[:32, :32]
    disc = lambda r, cy=16, cx=16: (y - cy)**2 + (x - cx)**2 <= r * r
    visible = {"shell": disc(12) & ~disc(8), "spiral": disc(8) & ~disc(4), "core": disc(4), "foot": disc(3, 29, 16),
               "never": disc(-1, 0, 0) & False}
    masks = {name: torch.from_numpy(mask) for name, mask in visible.items()}
    seen = Examples(torch.zeros(2, 3, 32, 32), torch.tensor([2, 2]), [masks, masks])
    parents = nesting(seen)
    assert parents == {(2, "shell"): "", (2, "spiral"): "shell", (2, "core"): "spiral", (2, "foot"): "",
                       (2, "never"): ""}
    assert depths(parents) == {(2, "shell"): 1, (2, "spiral"): 2, (2, "core"): 3, (2, "foot"): 1, (2, "never"): 1}
    for (a, b), inside in {("core", "spiral"): 1.0, ("foot", "shell"): 0.0}.items():
        filled = ndimage.binary_fill_holes(visible[b])
        slow = sum(filled[i, j] for i in range(32) for j in range(32) if visible[a][i, j]) / visible[a].sum()
        assert slow == pytest.approx(inside, abs=0.3)
    half = Examples(seen.images, seen.labels, [masks, {**masks, "core": torch.from_numpy(disc(4, 5, 5))}])
    assert nesting(half)[2, "core"] == "" and nesting(half, least=0.4)[2, "core"] == "spiral"


def test_scores_become_weights():
    nan = float("nan")
    found = as_weights({(0, "a"): 2.0, (0, "b"): -1.0, (0, "c"): nan, (0, "d"): 0.5, (1, "a"): -3.0, (1, "b"): nan})
    assert found == {(0, "a"): 1.0, (0, "b"): 0.0, (0, "c"): 0.0, (0, "d"): 0.25, (1, "a"): 1.0, (1, "b"): 1.0}
    pairs = [(0, "b"), (0, "a"), (1, "a")]
    assert random_scores(pairs, 1) == random_scores(pairs[::-1], 1) != random_scores(pairs, 2)


def test_every_kind_gives_weights(seen):
    model = make(6)
    found = {kind: concept_weights(kind, model, seen, seed=3) for kind in WEIGHTINGS}
    for weights in found.values():
        assert weights.keys() == seen.pairs().keys() and all(0 <= w <= 1 for w in weights.values())
        assert all(max(weights[pair] for pair in weights if pair[0] == label) == 1 for label in (0, 1, 3))
    responses = masking_responses(model, seen)
    assert found["weighted-masking"] == as_weights(responses)
    rates = cav_rates(model, seen, concept_vectors(model, seen))
    assert found["weighted-cav"] == as_weights({pair: 2 * rate - 1 for pair, rate in rates.items()})
    with pytest.raises(ValueError, match="weights must be one of weighted-masking, .*; got 'heavy'"):
        concept_weights("heavy", model, seen)


def test_a_soft_mask_pixel_by_pixel():
    rng = np.random.default_rng(0)
    masks, weights = {k: rng.random((5, 7)) < 0.5 for k in "abc"}, {"a": 0.2, "b": 1.0, "c": 0.6}
    found = soft_mask(masks, weights)
    for i, j in itertools.product(range(5), range(7)):
        assert found[i, j] == np.float32(max((weights[k] for k in masks if masks[k][i, j]), default=0))
    assert (soft_mask(masks, dict.fromkeys(masks, 1.0)) == np.logical_or.reduce([*masks.values()])).all()
    with pytest.raises(ValueError, match="at least one concept"):
        soft_mask({}, {})


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("a/x.png", "a/y.jpg", "b/z.png"):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(file)
        (tmp_path / "objects" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((24, 32), 255, np.uint8)).save((tmp_path / "objects" / name).with_suffix(".png"))
    return list_folder(tmp_path / "images").with_masks(object=tmp_path / "objects")


def own_masks(name):
    rng = np.random.default_rng(len(name) + ord(name[2]))
    return {"eye": rng.random((24, 32)) < 0.1, "wing": rng.random((24, 32)) < 0.4}


def test_soft_masks_go_the_way_of_pictures(folder, tmp_path):
    weights = {(label, name): w for label in (0, 1) for name, w in (("eye", 1.0), ("wing", 0.25))}
    done = write_weighted(folder, own_masks, weights, tmp_path / "soft")
    assert done == weighted_folder(folder, tmp_path / "soft") and done.digest() != folder.digest()
    images = MaskedImages(done, Preprocess(size=(24, 32), crop=1.0, margin=1.0))
    plain = MaskedImages(folder, Preprocess(size=(24, 32), crop=1.0, margin=1.0))
    for k, name in enumerate(folder.names):
        expected = soft_mask(own_masks(name), {"eye": 1.0, "wing": 0.25})
        assert torch.equal(images[k]["mask"], torch.from_numpy(expected)) and images[k]["object"].dtype == torch.bool
        assert torch.equal(images[k]["image"], plain[k]["image"])
        assert set(np.unique(expected)) == {0.0, 0.25, 1.0}
    seen = read_examples(folder, images.preprocess, own_masks)
    assert torch.equal(seen.images[2], plain[2]["image"]) and seen.labels.tolist() == [0, 0, 1]
    assert (seen.masks[1]["wing"].numpy() == own_masks("a/y.jpg")["wing"]).all()
    torch.manual_seed(0)
    flipped = MaskedImages(done, Preprocess(size=(24, 32), crop=1.0, margin=1.0), train=True)
    both = [flipped[0]["mask"] for _ in range(12)]
    first = images[0]["mask"]
    assert all(torch.equal(m, first) or torch.equal(m, first.flip(1)) for m in both)
    assert any(torch.equal(m, first.flip(1)) for m in both)


def test_files_that_are_no_soft_masks(tmp_path):
    for k, bad in enumerate((np.full((4, 6), 1.5), np.full((4, 6), np.nan), np.zeros((4, 6, 1)))):
        np.save(tmp_path / f"{k}.npy", bad)
        with pytest.raises(ValueError, match=rf"{k}\.npy holds float64 .*expected whole numbers"):
            open_mask(tmp_path / f"{k}.npy", (6, 4))
    np.save(tmp_path / "soft.npy", np.full((4, 6), 0.5))
    assert open_mask(tmp_path / "soft.npy", (6, 4)).dtype == torch.float32
    with pytest.raises(ValueError, match="4 pixels; its picture is 4 × 6"):
        open_mask(tmp_path / "soft.npy", (4, 6))
    with pytest.raises(ValueError, match="expected whole numbers"):  # where bools are expected, weights are none
        read_mask(tmp_path / "soft.npy")


def test_a_soft_mask_in_the_losses():
    """The pixel of a concept that weighs w is pulled up with w and down with 1 − w."""
    torch.manual_seed(0)
    model, images = make(7), torch.randn(2, 3, 16, 16)
    weights = torch.rand(2, 16, 16) * (torch.rand(2, 16, 16) < 0.4)
    objects = (weights > 0) | (torch.rand(2, 16, 16) < 0.3)
    batch = Batch(images, torch.tensor([1, 2]), weights, objects)
    align = RECIPES["cft"].objective
    loss, parts = align(model, model, batch)
    pooled = patch_mask(weights, (4, 4), soft=True)
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        slow = sum(weights[b, 4 * i + y, 4 * j + x].item() for y in range(4) for x in range(4)) / 16
        assert pooled[b, i, j].item() == pytest.approx(slow, abs=1e-6)
    from cft.explain.maps import relevance

    phi = relevance(model, images, batch.labels, differentiable=True).map("saturating", epsilon=0.02)
    up = -sum(pooled[b, i, j] * phi[b, i, j].log() for b in range(2) for i in range(4) for j in range(4)) / 32
    down = -sum((1 - pooled[b, i, j]) * (1 - phi[b, i, j]).log() for b in range(2) for i in range(4) for j in range(4))
    assert parts["concept"].item() == pytest.approx(up.item(), rel=1e-5)
    assert parts["background"].item() == pytest.approx(down.item() / 32, rel=1e-5)
    assert align(model, model, batch._replace(masks=objects.float()))[0].item() == pytest.approx(
        align(model, model, batch._replace(masks=objects))[0].item(), rel=1e-6)
    with pytest.raises(ValueError, match="values from 0 to 1"):
        patch_mask(2 * objects.float(), (4, 4), soft=True)
    best = torch.full((1, 1, 1), 0.3, dtype=torch.float64).requires_grad_()
    even = LossWeights(concept=1, background=1)
    soft = torch.full((1, 1, 1), 0.3)
    loss = even.concept * concept_loss(best, soft, "image") + even.background * background_loss(best, soft, "image")
    loss.backward()
    assert best.grad.abs().max() < 1e-6, "the best map has the weight's value"


@pytest.mark.parametrize("rest", ("free", "down", "kept"))
def test_three_regions_of_weights_are_those_of_masks_where_all_weigh_one(rest):
    torch.manual_seed(1)
    model, images = make(8), torch.randn(2, 3, 16, 16)
    concepts = torch.rand(2, 16, 16) < 0.3
    objects = concepts | (torch.rand(2, 16, 16) < 0.4)
    three = ThreeRegions(**vars(RECIPES["cft"].objective), rest=rest)
    hard, soft = (three(model, make(9), Batch(images, torch.tensor([0, 3]), m, objects))[0]
                  for m in (concepts, concepts.float()))
    assert hard.item() == pytest.approx(soft.item(), rel=1e-6)
    lighter = three(model, make(9), Batch(images, torch.tensor([0, 3]), 0.5 * concepts, objects))[0]
    assert lighter.item() != pytest.approx(hard.item(), rel=1e-4)


def test_the_closed_form_keeps_with_the_weight(monkeypatch):
    """Regions of a patch by loops: weights within, the background outside, and what is left between."""
    import cft.train.closed as closed

    torch.manual_seed(2)
    objects = torch.zeros(2, 16, 16, dtype=torch.bool)
    objects[:, 2:12, 2:12] = True
    weights = torch.rand(2, 16, 16) * ((torch.rand(2, 16, 16) < 0.3) & objects)
    got = {}

    def fake(model, images, regions, rule):
        got["regions"] = regions((4, 4))
        return images, [images.flatten(1)] * len(got["regions"])

    monkeypatch.setattr(closed, "relevance_features", fake)
    look = Look(inside="mask")
    for masks in (weights, weights > 0):
        look._relevance(make(), {"image": torch.zeros(2, 3, 16, 16), "mask": masks, "object": objects})
        inside, outside, between = got["regions"]
        assert torch.allclose(inside + outside + between, torch.ones(2, 4, 4).double())
        for b, i, j in itertools.product(range(2), range(4), range(4)):
            own = [masks[b, 4 * i + y, 4 * j + x].item() for y in range(4) for x in range(4)]
            some = [float(w) for w in own if w > 0]
            assert inside[b, i, j].item() == pytest.approx(np.mean(some) if some else 0.0, abs=1e-6)
            bare = not objects[b, 4 * i:4 * i + 4, 4 * j:4 * j + 4].any()
            assert outside[b, i, j].item() == bare
