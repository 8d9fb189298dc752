"""Objectives against their definitions, and their gradients against finite differences."""
import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import directional_error

from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, scan
from cft.data.models import TINY, base_model
from cft.explain.maps import Method, relevance
from cft.train.loop import Sampler
from cft.train.losses import LossWeights
from cft.train.objectives import RECIPES, Align, Batch, GradMask, Recipe, RightReasons, ThreeRegions, repainted


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = backdrop.write(tmp_path_factory.mktemp("w") / "b", {"train": 2}, seed=1)
    folder = scan(root / "images/train", root / "masks/train", root / "objects/train", list(backdrop.CLASSES))
    folder = folder.only([0, 2, 4])
    return MaskedImages(folder, Preprocess.of(timm.create_model(TINY), margin=1.0), train=True, cached=True)


@pytest.fixture(scope="module")
def batch(images):
    torch.manual_seed(0)
    return Sampler(images, Recipe(RECIPES["cft+"].objective, batch=6)).batch(0)


def loss_of(name, batch, model=None):
    model = model or base_model(0)
    torch.manual_seed(0)
    return RECIPES[name].objective(model, copy.deepcopy(model), batch)


def test_controls(batch):
    model = base_model(0)
    logits = model(batch.images)
    assert torch.allclose(loss_of("plain", batch)[0], F.cross_entropy(logits, batch.labels))
    assert torch.allclose(loss_of("lcls-only", batch)[0], F.cross_entropy(logits, logits.argmax(1)))


def test_swap_is_half_and_half(batch):
    model = base_model(0)
    front = batch.objects[:, None].float()
    swapped = model(batch.images * front + batch.contexts * (1 - front))
    expected = (F.cross_entropy(model(batch.images), batch.labels) + F.cross_entropy(swapped, batch.labels)) / 2
    assert torch.allclose(loss_of("rrda", batch)[0], expected)


@pytest.mark.parametrize(("name", "norm"), [("cft-paper", "region"), ("cft", "image")])
def test_cft_is_equation_7(batch, name, norm):
    model = base_model(0)
    result = relevance(model, batch.images, batch.labels, differentiable=False)
    r = result.patches.double()
    if name == "cft":
        phi = r.clamp(min=0) / (r.clamp(min=0) + 0.5 * r.abs().mean((1, 2), keepdim=True))
    else:
        r = F.interpolate(r[:, None], (64, 64), mode="bilinear")[:, 0]
        phi = (r - r.amin((1, 2), keepdim=True)) / (r.amax((1, 2), keepdim=True) - r.amin((1, 2), keepdim=True))
    phi = 0.02 + 0.96 * phi
    total = 0.0
    for p, m, z in zip(phi, batch.masks, result.logits.double()):
        n, side = len(p), 64 // len(p)
        part = [slice(side * i, side * (i + 1)) for i in range(n)]
        share = [[m[i, j].double().mean().item() for j in part] for i in part]
        cells = [(p[i, j].item(), share[i][j]) for i in range(n) for j in range(n)]
        inside, outside = sum(s for _, s in cells), sum(1 - s for _, s in cells)
        inside, outside = (inside, outside) if norm == "region" else (n * n, n * n)
        concept = sum(-s * math.log(q) for q, s in cells) / inside
        background = sum(-(1 - s) * math.log(1 - q) for q, s in cells) / outside
        total += 0.8 * (0.5 * concept + 1.2 * background) + 0.2 * (z.logsumexp(0) - z.max()).item()
    assert loss_of(name, batch)[0].item() == pytest.approx(total / len(phi), rel=1e-4)


def test_keep_original_ignores_the_swap(batch):
    objective = replace(RECIPES["cft+"].objective, swap=0.0, weights=LossWeights(align=0.0, classify=1.0))
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
    small = Batch(*(t[:2].double() if t.is_floating_point() else t[:2] for t in batch if t is not None))
    objective = Align(grid=grid, normalize="saturating", norm="image", anchor="labels")
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


def test_the_class_that_is_explained(batch):
    model = base_model(0)
    guess = model(batch.images).argmax(1)
    batch = batch._replace(labels=(guess + 1) % 12)
    told = Align(anchor="original")(model, model, batch._replace(labels=guess))[0]
    assert Align(anchor="original", explain="predicted")(model, model, batch)[0].item() == told.item()
    assert Align(anchor="original")(model, model, batch)[0].item() != told.item()


def test_frozen_coefficients_change_the_gradient_and_not_the_value(batch):
    model, values, gradients = base_model(0), [], []
    for method in ("attnlrp", Method(frozen=True)):
        objective = Align(method=method, grid="patch", normalize="sigmoid", weights=LossWeights(classify=0.0))
        loss, _ = objective(model, model, batch)
        values.append(loss.item())
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert 0.1 < F.cosine_similarity(*gradients, dim=0) < 0.95
    logits = relevance(model, batch.images, batch.labels, Method(frozen=True), differentiable=True).logits
    ours = torch.autograd.grad(logits.sum(), model.head.weight)[0]
    assert torch.allclose(ours, torch.autograd.grad(model(batch.images).sum(), model.head.weight)[0], atol=1e-5)


def test_every_alignment_trains_every_layer(batch):
    objectives = {name: RECIPES[name].objective for name in ("cft-paper", "cft", "cft+")}
    for name, objective in {**objectives, "object": replace(RECIPES["cft"].objective, guide="object")}.items():
        model = base_model(0)
        objective(model, model, batch)[0].backward()
        # a key's bias shifts all attention logits of a query alike: its gradient is zero up to rounding
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()), name


def doubled(batch, size=2):
    return Batch(*(t[:size].double() if t.is_floating_point() else t[:size] for t in batch if t is not None))


def test_gradmask_and_rrr_against_their_definitions(batch):
    model, small = base_model(0).double(), doubled(batch)
    pixel, h = (0, 1, 10, 20), 1e-5  # picture, channel, row, column
    outside = ~small.objects[:, None].expand_as(small.images)
    for objective, of in ((GradMask(), lambda z, y: z[y]),
                          (RightReasons(), lambda z, y: (z.softmax(0) + 1e-11).log().sum())):
        images = small.images.clone().requires_grad_()
        scalar = sum(of(z, y) for z, y in zip(model(images), small.labels))
        g = torch.autograd.grad(scalar, images)[0]
        ends = []
        for sign in (1, -1):
            moved = small.images.clone()
            moved[pixel] += sign * h
            ends.append(of(model(moved)[pixel[0]], small.labels[pixel[0]]).item())
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(g[pixel].item(), rel=1e-5)
        cells = [v**2 if out else 0.0 for v, out in zip(g.flatten().tolist(), outside.flatten().tolist())]
        ce = sum((z.logsumexp(0) - z[y]).item() for z, y in zip(model(small.images), small.labels)) / 2
        penalty = 50 * sum(cells) / len(cells) if isinstance(objective, GradMask) else 5e-5 * sum(cells) / 2 * 8
        expected = penalty + (0.1 if isinstance(objective, GradMask) else 1) * ce
        assert objective(model, model, small)[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", [GradMask(), RightReasons(weight=1.0)])
def test_second_order_gradients_against_finite_differences(batch, objective):
    model, small = base_model(0).double(), doubled(batch)
    for name in ("blocks.3.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "head.weight"):
        weight = model.get_parameter(name)
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
        ours = torch.autograd.grad(objective(model, model, small)[0], weight)[0]
        constant = torch.autograd.grad(replace(objective, second_order=False)(model, model, small)[0], weight)[0]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-6 * direction
            ends.append(objective(model, model, small)[0].item())
            with torch.no_grad():
                weight -= sign * 1e-6 * direction
        numeric = (ends[0] - ends[1]) / 2e-6
        assert numeric == pytest.approx((ours * direction).sum().item(), rel=1e-5, abs=1e-9)
        apart = abs(numeric - (constant * direction).sum().item())
        assert apart > 1e-3 * abs(numeric), "the released code's variant is another"


def test_first_order_is_plain_fine_tuning(batch):
    model, small = base_model(0).double(), doubled(batch)
    for objective, scale in ((GradMask(second_order=False), 0.1), (RightReasons(second_order=False), 1.0)):
        ours = torch.autograd.grad(objective(model, model, small)[0], list(model.parameters()))
        plain = torch.autograd.grad(RECIPES["plain"].objective(model, model, small)[0], list(model.parameters()))
        for a, b in zip(ours, plain):
            torch.testing.assert_close(a, scale * b, rtol=1e-8, atol=1e-12)


def test_checkpointed_is_the_same(batch):
    model = base_model(0)
    losses = [replace(RECIPES["cft"].objective, checkpointed=c)(model, model, batch)[0] for c in (False, True)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert torch.allclose(*losses) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_three_regions_with_the_rest_down_are_the_two_of_the_paper(batch):
    model, other = base_model(0), base_model(1)
    regions = RECIPES["three-regions"].objective
    down, two = replace(regions, rest="down"), RECIPES["cft"].objective
    inner = batch._replace(masks=batch.masks & batch.objects)
    assert torch.allclose(down(model, other, inner)[0], two(model, other, inner)[0])
    free = regions(model, other, inner)
    assert free[1]["between"] == 0 and free[0] < two(model, other, inner)[0]
    assert replace(regions, rest="kept")(model, model, inner)[1]["between"] < 1e-6
    assert regions.needs == {"mask", "object"} and isinstance(regions, ThreeRegions)
    for bad in (dict(rest="up"), dict(rest_weight=-1), dict(guide="object")):
        with pytest.raises(ValueError, match="must be one of|three regions are those"):
            replace(regions, **bad)


@pytest.mark.parametrize("rest", ["free", "down", "kept"])
@pytest.mark.parametrize("grid", ["patch", "pixel"])
def test_gradient_of_three_regions_against_finite_differences(batch, grid, rest):
    model, other, small = base_model(0).double(), base_model(1).double(), doubled(batch)
    objective = ThreeRegions(grid=grid, normalize="saturating", norm="image", anchor="labels", rest=rest)
    loss = lambda: objective(model, other, small)[0]
    loss().backward()
    for name in ("blocks.1.attn.qkv.weight", "patch_embed.net.0.weight"):
        weight = model.get_parameter(name)
        assert directional_error(loss, [weight], [torch.randn_like(weight)], 1e-6) < 1e-5


def test_repainting_by_loops(batch):
    body = batch.objects & ~batch.masks
    coins = [[c, c * 97 % 1, c * 9409 % 1] for c in batch.coins.tolist()]
    colours = torch.tensor([[4 * value - 2 for value in three] for three in coins])
    fast = repainted(batch.images, body, colours)
    for image, where, colour, found in zip(batch.images, body, colours, fast):
        slow = image.clone()
        for channel in range(3):
            values = image[channel][where]
            moved = values - values.mean() + colour[channel]
            slow[channel][where] = moved.clamp(image.min().item(), image.max().item())
        assert torch.allclose(found, slow, atol=1e-5)
    model, front = base_model(0), batch.objects[:, None].float()
    before = fast * front + batch.contexts * (1 - front)
    for name, shown in (("repaint", fast), ("repaint+", before)):
        terms = [F.cross_entropy(model(x), batch.labels).item() for x in (batch.images, shown)]
        assert loss_of(name, batch)[0].item() == pytest.approx(sum(terms) / 2, abs=2e-3)  # colours in single precision


def test_bad_settings():
    for bad in (dict(rate=0), dict(epochs=0), dict(batch=0), dict(average=0)):
        with pytest.raises(ValueError, match="expected rate > 0"):
            replace(RECIPES["cft"], **bad)
    for bad in (dict(grid="hex"), dict(anchor="?"), dict(guide="?"), dict(swap=2)):
        with pytest.raises(ValueError, match="must be"):
            replace(RECIPES["cft"].objective, **bad)
    for bad in (dict(precision="fp8"), dict(chunk=-1), dict(schedule="line")):
        with pytest.raises(ValueError, match="precision no or bf16, schedule"):
            replace(RECIPES["cft"], **bad)
    with pytest.raises(ValueError):
        LossWeights(align=-1)


def test_a_batch_says_what_it_lacks(batch):
    assert batch.given("masks") is batch.masks
    bare = Batch(batch.images, batch.labels)
    for name, lack in {"rrda": "objects", "cft": "masks", "cft+": "coins"}.items():
        with pytest.raises(ValueError, match=f"needs a batch with {lack}, got none"):
            loss_of(name, bare)
