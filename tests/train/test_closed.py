"""Heads that are solved for: relevance features and solutions against slow twins, and what must stay."""
from dataclasses import replace

import pytest
import timm
import torch
from concept_erasure import LeaceFitter
from PIL import Image
from small_families import make_network
from torch.utils.data import DataLoader

from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, cutouts, list_folder
from cft.data.models import base_model, dinov2_vitb14, logistic
from cft.explain.maps import relevance
from cft.train.closed import (
    FORMS,
    Head,
    LayerInput,
    Look,
    Moments,
    RegionHead,
    consistent,
    erased,
    last_layer,
    leace,
    penultimate,
    relevance_features,
    with_head,
)
from cft.train.loop import fine_tune, rehearse
from cft.train.objectives import RECIPES

REGISTERS = dict(reg_tokens=3, depth=2, embed_dim=24, num_heads=2, img_size=32, patch_size=8, num_classes=4)


def networks():
    """A model for each way to read features: class token, mean with registers, both side by side, ConvNeXt."""
    torch.manual_seed(0)
    plain = "vit_base_patch16_224"
    made = {
        "class token": timm.create_model(plain, **REGISTERS, fc_norm=False),
        "mean": timm.create_model(plain, **REGISTERS, global_pool="avg"),
        "both": dinov2_vitb14(img_size=28, embed_dim=24, depth=2, num_heads=2, num_classes=4),
        "convnext": timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(4, 8, 12, 16), num_classes=4)}
    return {name: model.double().eval() for name, model in made.items()}


BY_OPERATIONS = ("se_resnet", "efficientnet", "swin", "eva02", "siglip", "torchvision_resnet", "hugging_face_vit")


@pytest.mark.parametrize("name", [*networks(), *BY_OPERATIONS])
def test_relevance_features_are_one_pullback_for_each_feature(name):
    if name in BY_OPERATIONS:
        model, images = make_network(name)
    else:
        model, size = networks()[name], {"both": 28, "convnext": 64}.get(name, 32)
        images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    random = lambda grid: (torch.rand(2, *grid, generator=torch.Generator().manual_seed(2)) < 0.4).double()
    regions = lambda grid: [random(grid), 1 - random(grid)]
    features, (inside, outside, prefix, absorbed) = relevance_features(model, images, regions, rest=True)
    assert torch.allclose(features.detach(), penultimate(model, images), atol=1e-12)
    assert (features - inside - outside - prefix - absorbed).abs().max() < 1e-10 * features.abs().max()
    unit, (weight, bias) = torch.zeros_like, last_layer(model)
    for j in range(0, features.shape[1], 7):  # a head that reads off one feature
        row = unit(weight)
        row[0, j] = 1.0
        slow = relevance(with_head(model, row, bias), images, torch.tensor([0, 0]), differentiable=False)
        for weights, fast in zip(regions(slow.grid), (inside, outside)):
            assert torch.allclose((slow.patches * weights).sum((1, 2)), fast[:, j], atol=1e-10)
        assert torch.allclose(slow.tokens[:, :slow.prefix].sum(1), prefix[:, j], atol=1e-10)
    whole = relevance(model, images, torch.tensor([1, 3]), differentiable=False)
    by_head = (inside * weight[[1, 3]]).sum(1)
    assert torch.allclose((whole.patches * regions(whole.grid)[0]).sum((1, 2)), by_head, atol=1e-10)


def test_no_gradient_of_the_network_is_taken():
    model = networks()["mean"]
    features, found = relevance_features(model, torch.randn(1, 3, 32, 32).double(), lambda g: [torch.ones(1, *g)])
    assert not features.requires_grad and not found[0].requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def rows():
    """Weights (5, 7), what is kept (9, 7) and what goes (27, 7)."""
    rng = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    return make(5, 7), make(9, 7) + 0.3, make(27, 7)


def least_squares(blocks):
    """V of min Σ ‖V x − y‖², for blocks of x (rows, features) and y (rows, classes)."""
    x, y = (torch.cat(part) for part in zip(*blocks))
    return torch.linalg.lstsq(x, y).solution.T


def test_erasing_is_the_least_squares_solution(rows):
    weight, kept, gone = rows
    a, c = kept.T @ kept / 9, gone.T @ gone / 27
    strong, near = (0.3 * a.trace() / c.trace() / 27)**0.5, (0.02 * a.diagonal().mean())**0.5
    none, one = torch.zeros(27, 5, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    slow = least_squares([(kept / 3, kept @ weight.T / 3), (strong * gone, none), (near * one, near * weight.T)])
    assert torch.allclose(weight @ erased(a, c, 0.3, 0.02), slow, atol=1e-10)


def test_consistency_is_the_least_squares_solution(rows):
    weight, own, noise = rows
    own = own.repeat(3, 1)
    swapped = own + 0.5 * noise
    second = swapped.T @ swapped / 27
    near, one = (0.02 * second.diagonal().mean())**0.5, torch.eye(7, dtype=torch.float64)
    slow = least_squares([(swapped / 27**0.5, own @ weight.T / 27**0.5), (near * one, near * weight.T)])
    assert torch.allclose(weight @ consistent(own.T @ swapped / 27, second, 0.02), slow, atol=1e-10)
    assert torch.allclose(consistent(second, second, 0.02), one, atol=1e-10)  # nothing moves


def test_after_leace_a_concept_has_no_covariance_and_no_probe_finds_it():
    rng = torch.Generator().manual_seed(3)
    z = torch.nn.functional.one_hot(torch.randint(3, (200, ), generator=rng)).double()
    x = torch.randn(200, 8, generator=rng, dtype=torch.float64)
    x = x @ torch.randn(8, 8, generator=rng, dtype=torch.float64) + 3 * z @ torch.randn(3, 8, generator=rng).double()
    pair = Moments()
    pair.add(x, z)
    own = Moments()
    own.add(x)
    P = leace(own.covariance, pair.covariance, 1e-9)
    cleaned = (x - own.mean) @ P.T
    assert (cleaned.T @ (z - z.mean(0))).abs().max() < 1e-6 * (x.T @ (z - z.mean(0))).abs().max()
    assert torch.allclose(P @ P, P, atol=1e-6) and P.trace() == pytest.approx(8 - 2, abs=1e-6)  # three values: rank two
    solution = torch.linalg.lstsq(torch.cat([cleaned, torch.ones(200, 1).double()], 1), z).solution
    assert solution[:-1].abs().max() < 1e-6
    # least change in the metric of Σ⁻¹: no other map with zero covariance moves features less
    inverse, other = torch.linalg.inv(own.covariance), pair.covariance
    q, _ = torch.linalg.qr(other)
    plain = torch.eye(8, dtype=torch.float64) - q[:, :2] @ q[:, :2].T
    moved = lambda m: torch.einsum("ij,jk,lk,il->", m - torch.eye(8), own.covariance, m - torch.eye(8), inverse)
    assert (plain @ other).abs().max() < 1e-8 and moved(P) < moved(plain)


def test_leace_is_that_of_its_authors():
    """concept-erasure, without the shrinkage and the bound on the trace that the paper's theorem does not have."""
    rng = torch.Generator().manual_seed(5)
    z = torch.nn.functional.one_hot(torch.randint(4, (300, ), generator=rng)).double()
    x = torch.randn(300, 12, generator=rng, dtype=torch.float64) @ torch.randn(12, 12, generator=rng).double()
    x = x + 2 * z @ torch.randn(4, 12, generator=rng).double()
    theirs = LeaceFitter.fit(x, z, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-6).eraser
    pair, own = Moments(), Moments()
    pair.add(x, z)
    own.add(x)
    P = leace(own.covariance, pair.covariance, 1e-12)
    assert torch.allclose(P, theirs.P, atol=1e-7)
    assert torch.allclose((x - own.mean) @ P.T + own.mean, theirs(x), atol=1e-6)


def test_moments_do_not_depend_on_batches(rows):
    _, kept, gone = rows
    whole, parts = Moments(), Moments()
    whole.add(gone)
    for part in gone.split(5):
        parts.add(part)
    assert torch.allclose(whole.second, parts.second) and torch.allclose(parts.mean, gone.mean(0))
    assert torch.allclose(parts.covariance, torch.cov(gone.T, correction=0))


def test_strengths_that_cannot_be_are_refused(rows):
    one, zero = torch.eye(7, dtype=torch.float64), torch.zeros(7, 7, dtype=torch.float64)
    for bad in (lambda: erased(one, one, 0), lambda: erased(one, one, 1, -1), lambda: consistent(one, one, 0),
                lambda: leace(one, one, 0)):
        with pytest.raises(ValueError, match="must be above 0"):
            bad()
    with pytest.raises(ValueError, match="nothing to erase"):
        erased(one, zero, 1)
    with pytest.raises(ValueError, match="form must be one of"):
        Head("magic")
    with pytest.raises(ValueError, match="linear last layer"):
        last_layer(timm.create_model("vit_base_patch16_224", **(REGISTERS | {"num_classes": 0})))


def test_logistic_is_the_minimum_and_stays_near(rows):
    weight, kept, gone = rows
    labels = torch.arange(27) % 5
    bias = torch.zeros(5, dtype=torch.float64)
    v, b = logistic(gone, labels, weight, bias, 0.1)
    v, b = v.requires_grad_(), b.requires_grad_()
    apart = ((v - weight) * gone.std(0, correction=0)).square().sum()
    loss = torch.nn.functional.cross_entropy(gone @ v.T + b, labels) + 0.1 * apart
    assert max(g.abs().max() for g in torch.autograd.grad(loss, (v, b))) < 1e-4
    free, tied = logistic(gone, labels % 2, weight, bias, 1e6), logistic(gone, labels % 2, weight, bias, 1e6, tied=True)
    assert torch.allclose(free[0], weight, atol=1e-4) and free[1][2:].max() < free[1][:2].min() - 3
    assert torch.allclose(tied[0], weight, atol=1e-4) and torch.allclose(tied[1], bias, atol=1e-4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two pictures of each class with object and concept masks."""
    world = backdrop.write(tmp_path_factory.mktemp("closed") / "w", {"val": 2}, seed=0)
    folder = list_folder(world / "images/val", list(backdrop.CLASSES))
    folder = folder.with_masks(object=world / "objects/val", mask=world / "masks/val")
    return MaskedImages(folder, Preprocess.of(base_model(0)), train=True)


def test_what_is_seen_is_what_the_names_say(images):
    model = base_model(0)
    look = Look(times=3, batch=9)
    seen = look(model, images, {"swaps", "contexts", "relevance", "rows", "plain"})
    still = cutouts(DataLoader(MaskedImages(images.folder, images.preprocess), 5))
    own = penultimate(model, still.pictures)
    assert seen["own"].count == seen["inside"].count == 24 and seen["swapped"].count == 72
    assert torch.allclose(seen["own"].mean, own.mean(0), atol=1e-6)
    assert torch.allclose(seen["context"].mean, penultimate(model, still.scenes).mean(0), atol=1e-6)
    before = lambda shade: torch.where(still.objects[:, None], still.pictures, (shade - 0.5) / 0.25)
    shades = [penultimate(model, before(shade)) for shade in (0, 0.5, 1)]
    assert torch.allclose(seen["plain"].mean, torch.stack(shades).mean((0, 1)), atol=1e-5)
    assert seen["moved"].mean.abs().max() < 1e-6 and seen["moved"].count == 96
    together = (24 * seen["own"].second + 72 * seen["swapped"].second) / 96  # = steady + moved
    assert torch.allclose(seen["steady"].second + seen["moved"].second, together, atol=1e-5)
    rows, labels, pictures = (torch.cat(seen.rows[name]) for name in ("features", "label", "picture"))
    assert len(rows) == len(labels) == 96 and torch.equal(labels, images_labels(images)[pictures])
    assert torch.allclose(rows[:9], own[:9], atol=1e-6)
    again = look(model, images, {"swaps"})
    assert torch.equal(again["swapped"].second, seen["swapped"].second) and not again.rows
    with pytest.raises(ValueError, match="nothing reads 'magic'"):
        look(model, images, {"magic"})
    with pytest.raises(ValueError, match="at least two pictures"):
        look(model, MaskedImages(images.folder.choose(images.folder.names[:1]), images.preprocess), {"swaps"})


def test_what_is_kept_does_not_grow_with_the_pictures(images):
    reads = {"swaps", "plain", "contexts", "relevance"}
    numbers = []
    for many in (6, 12):
        some = MaskedImages(images.folder.choose(images.folder.names[::24 // many]), images.preprocess)
        seen = Look(times=1)(base_model(0), some, reads)
        sums = [m for name, m in seen.of.items() if name != "swapped and scene"]  # which has a column a class
        numbers.append(sum(t.numel() for m in sums for t in (m.x, m.y, m.products)))
    assert numbers[0] == numbers[1] and not seen.rows


def test_scenes_that_are_given_are_swapped_with(images, tmp_path):
    """One grey scene: every swapped picture is the object before it."""
    for k in range(2):
        (tmp_path / "b/scene").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / f"b/scene/{k}.png")
    model, scenes = base_model(0), list_folder(tmp_path / "b")
    given = MaskedImages(images.folder, images.preprocess, backgrounds=scenes)
    seen = Look(times=2, batch=9)(model, given, {"swaps"})
    still, grey = MaskedImages(images.folder, images.preprocess), MaskedImages(scenes, images.preprocess)[0]["image"]
    items = [still[i] for i in range(24)]
    wanted = penultimate(model, torch.stack([torch.where(item["object"], item["image"], grey) for item in items]))
    assert seen["swapped"].count == 48 and torch.allclose(seen["swapped"].mean, wanted.mean(0), atol=1e-6)
    assert seen["swapped and scene"].products.shape == (wanted.shape[1], 1), "a column for each kind of scene"
    with pytest.raises(ValueError, match="two pictures to swap backgrounds between, got 1"):
        one = scenes.choose(["scene/0.png"])
        Look()(model, MaskedImages(images.folder, images.preprocess, backgrounds=one), {"swaps"})


def images_labels(images):
    """By number."""
    return torch.tensor([s.label for s in images.folder.samples])


def test_two_masks_make_three_regions(images):
    """With concepts inside and objects outside, what lies on the object without a concept is in neither."""
    model, sums = base_model(0), {}
    for inside in ("object", "mask"):
        look = Look(inside=inside)
        seen = look(model, images, {"relevance"})
        sums[inside] = seen["inside"].mean, seen["outside"].mean
        assert Head("relevance-head", look).needs == {inside, "object"}
    assert torch.equal(sums["object"][1], sums["mask"][1]) and not torch.allclose(sums["object"][0], sums["mask"][0])


@pytest.mark.parametrize("rest", ["free", "down", "kept"])
def test_a_head_in_three_regions_is_the_least_squares_solution(images, rest):
    """Regions patch by patch, from a pullback of its own for each; rows of moments stacked."""
    model, head = base_model(0), RegionHead("relevance-head", rest=rest)
    weight, _ = last_layer(model)
    found, bias = head.weights(model, head.look(model, images, head.reads), 0.1)
    items = next(iter(DataLoader(MaskedImages(images.folder, images.preprocess), 24)))
    some = lambda name, grid: torch.tensor([
        [[bool(m[8 * i:8 * i + 8, 8 * j:8 * j + 8].double().mean() >= 0.02) for j in range(grid[1])]
         for i in range(grid[0])] for m in items[name]])
    sets = {"inside": lambda g: some("mask", g), "outside": lambda g: ~some("object", g),
            "between": lambda g: some("object", g) & ~some("mask", g)}
    assert (sum(of((8, 8)).int() for of in sets.values()) == 1).all(), "they part the picture"
    rows = {name: relevance_features(model, items["image"], lambda g, of=of: [of(g).double()])[1][0].double()
            for name, of in sets.items()}
    centred = {name: (x - x.mean(0)) / len(x)**0.5 for name, x in rows.items()}
    kept = [centred["inside"], penultimate(model, items["image"]).mean(0, keepdim=True)]
    kept += [centred["between"]] if rest == "kept" else []
    gone = torch.cat([centred["outside"], *([centred["between"]] if rest == "down" else [])])
    kept = torch.cat(kept)
    a, c = (kept.T @ kept), (gone.T @ gone)
    near = (0.01 * a.diagonal().mean())**0.5 * torch.eye(len(a), dtype=a.dtype)
    none = torch.zeros(len(gone), len(weight), dtype=a.dtype)
    slow = least_squares([(kept, kept @ weight.T), ((0.1 * a.trace() / c.trace())**0.5 * gone, none),
                          (near, near @ weight.T)])
    assert torch.allclose(found, slow, atol=1e-4) and torch.equal(bias, last_layer(model)[1])
    assert not torch.allclose(found, weight, atol=1e-2) and head.needs == {"mask", "object"}


def test_regions_that_cannot_be_are_refused():
    for bad in (dict(rest="up"), dict(look=Look()), dict(form="leace")):
        with pytest.raises(ValueError, match="three regions are those of a relevance-head"):
            RegionHead(**{"form": "relevance-head"} | bad)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_a_method_like_others(name, images, tmp_path):
    model = base_model(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = replace(RECIPES[name], average=0.5)
    assert recipe.needs == Head(name).needs >= {"object"}
    found = fine_tune(model, images, recipe, tmp_path / name, progress=False)
    assert found.record["steps"] == 0 and found.record["epochs"] == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    changed = {key for key, value in found.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"head.weight"} <= changed <= {"head.weight", "head.bias"}
    again = fine_tune(model, images, recipe, tmp_path / name, progress=False)  # from the folder
    assert torch.equal(again.model.head.weight, found.model.head.weight)
    whole = fine_tune(model, images, replace(recipe, average=1.0), progress=False).model
    half = torch.lerp(model.head.weight, whole.head.weight, 0.5)
    assert torch.allclose(found.model.head.weight, half, atol=1e-6)
    with pytest.raises(TypeError, match="has no loss"):
        recipe.objective(model, model, None)


def test_masks_that_a_form_needs_are_asked_for_and_its_time_is_told(images):
    bare = MaskedImages(replace(images.folder, samples=tuple(replace(s, object=None) for s in images.folder.samples)),
                        images.preprocess)
    with pytest.raises(ValueError, match="needs object masks"):
        fine_tune(base_model(0), bare, RECIPES["relevance-head"], progress=False)
    price = rehearse(base_model(0), images, RECIPES["relevance-head"])
    assert price["steps"] == 0 and 0 < price["seconds"] < 60


def test_a_head_first_and_then_steps(images):
    """The steps start from the solved head, and the share of the way is counted from there."""
    model = base_model(0)
    first = RECIPES["swap-consistent"]
    recipe = replace(RECIPES["rrda"], first=first, rate=1e-12, epochs=1, weight_decay=0.0)
    assert recipe.as_dict()["first"]["objective"]["form"] == "swap-consistent"
    assert "first" not in RECIPES["rrda"].as_dict()
    found = fine_tune(model, images, recipe, progress=False).model
    solved = fine_tune(model, images, first, progress=False).model
    assert torch.allclose(found.head.weight, solved.head.weight, atol=1e-6)
    assert not torch.allclose(found.head.weight, model.head.weight, atol=1e-3)


def test_what_nothing_moves_stays():
    seen, rng = LayerInput(), torch.Generator().manual_seed(0)
    own = torch.randn(30, 6, generator=rng, dtype=torch.float64)
    seen["own"].add(own), seen["swapped"].add(own), seen["own and swapped"].add(own, own)
    model = torch.nn.Linear(6, 3).double()
    model.get_classifier = lambda: model
    weight, bias = Head("swap-consistent").weights(model, seen, 0.01)
    assert torch.allclose(weight, model.weight, atol=1e-10) and torch.equal(bias, model.bias)
