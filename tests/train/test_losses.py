"""The losses of Eq. 3–7 against loops over pixels in double precision, and gradients against finite differences."""

import math
import random
import warnings

import pytest
import torch

from cft.train.losses import (
    LossWeights,
    alignment_loss,
    background_loss,
    between_loss,
    cft_loss,
    classification_loss,
    concept_loss,
    distillation_loss,
    patch_mask,
)

NORMS = ("region", "image")


# ---- slow references: Python floats, one pixel at a time ----


def slow_term(phi, mask, norm, background=False):
    """Eq. 3 (or Eq. 4) by loops; phi and mask are nested lists."""
    total = 0.0
    for picture, region in zip(phi, mask):
        cost, area, pixels = 0.0, 0.0, 0
        for phi_row, mask_row in zip(picture, region):
            for value, inside in zip(phi_row, mask_row):
                weight = 1 - inside if background else inside
                cost += -weight * math.log(1 - value if background else value)
                area += weight
                pixels += 1
        if norm == "image":
            total += cost / pixels
        elif area > 0:
            total += cost / area
    return total / len(phi)


def slow_softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def slow_cross_entropy(logits, target=None):
    total = 0.0
    for i, scores in enumerate(logits):
        label = scores.index(max(scores)) if target is None else target[i]
        total -= math.log(slow_softmax(scores)[label])
    return total / len(logits)


def slow_divergence(logits, original):
    total = 0.0
    for now, before in zip(logits, original):
        total += sum(q * math.log(q / p) for p, q in zip(slow_softmax(now), slow_softmax(before)))
    return total / len(logits)


def slow_patch_mask(mask, rows, columns):
    """Area pooling with floor/ceil borders, counted pixel by pixel."""
    height, width = len(mask), len(mask[0])
    pooled = []
    for i in range(rows):
        line = []
        for j in range(columns):
            ys = range(i * height // rows, -(-(i + 1) * height // rows))
            xs = range(j * width // columns, -(-(j + 1) * width // columns))
            line.append(sum(mask[y][x] for y in ys for x in xs) / (len(ys) * len(xs)))
        pooled.append(line)
    return pooled


def batch(seed=0, shape=(3, 4, 5), kind="fraction"):
    """A map strictly inside (0, 1) and a mask, float64."""
    generator = torch.Generator().manual_seed(seed)
    phi = 0.02 + 0.96 * torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "binary":
        mask = (mask > 0.7).double()
    elif kind == "empty and full":
        mask[0], mask[1] = 0, 1
    return phi, mask


def finite_difference(function, at, step=1e-6):
    """Central differences of a scalar function, one entry at a time."""
    slope = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros(at.numel(), dtype=at.dtype)
        shift[index] = step
        shift = shift.view(at.shape)
        slope.view(-1)[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return slope


def gradient(function, at):
    at = at.clone().requires_grad_(True)
    return torch.autograd.grad(function(at), at)[0]


# ---- Eq. 3–5 ----


def slow_between(phi, region, before, norm):
    """The divergence of two maps over a region by loops; before: nested lists, or None for Eq. 4 over the region."""
    total = 0.0
    for picture, part, then in zip(phi, region, before or phi):
        cost, area, pixels = 0.0, 0.0, 0
        for rows in zip(picture, part, then):
            for p, inside, q in zip(*rows):
                each = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) if before else -math.log(1 - p)
                cost, area, pixels = cost + inside * each, area + inside, pixels + 1
        total += cost / pixels if norm == "image" else cost / area if area else 0.0
    return total / len(phi)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["fraction", "binary", "empty and full"])
def test_a_third_region_equals_loops(kind, norm):
    phi, region = batch(3, kind=kind)
    before = batch(4)[0]
    down, kept = (between_loss(phi, region, how, before, norm).item() for how in ("down", "kept"))
    assert down == pytest.approx(slow_between(phi.tolist(), region.tolist(), None, norm), rel=1e-12)
    assert kept == pytest.approx(slow_between(phi.tolist(), region.tolist(), before.tolist(), norm), rel=1e-12)
    assert between_loss(phi, region, "free", norm=norm) == 0 == between_loss(phi, region, "kept", phi, norm)
    assert not gradient(lambda at: between_loss(at, region, "free", norm=norm), phi).any()
    assert gradient(lambda at: between_loss(at, region, "kept", phi, norm), phi).abs().max() < 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_three_regions_are_loops_and_two_of_them_the_paper_again(norm):
    (phi, mask), logits = batch(5), torch.randn(3, 4, dtype=torch.float64)
    between = 0.4 * (1 - mask)
    total, parts = cft_loss(phi, mask, logits, norm=norm, between=between)
    outside = (1 - mask - between).tolist()
    assert parts["background"].item() == pytest.approx(slow_between(phi.tolist(), outside, None, norm), rel=1e-12)
    assert parts["concept"].item() == pytest.approx(slow_term(phi.tolist(), mask.tolist(), norm), rel=1e-12)
    if norm == "image":  # means over all pixels add up
        whole = cft_loss(phi, mask, logits, norm=norm)[0]
        assert (total + 0.8 * 1.2 * between_loss(phi, between, "down", norm=norm)).item() == pytest.approx(whole.item())
    with pytest.raises(ValueError, match="must not overlap; together they cover up to 1.5 of a pixel"):
        cft_loss(phi, mask * 0 + 1, logits, between=mask * 0 + 0.5)


@pytest.mark.parametrize("how", ["down", "kept"])
def test_gradient_of_a_third_region(how):
    (phi, region), before = batch(6, (2, 2, 3), "empty and full"), batch(7, (2, 2, 3))[0]
    term = lambda at: between_loss(at, region, how, before)
    assert torch.allclose(gradient(term, phi), finite_difference(term, phi), rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(term, phi.requires_grad_(True))


def test_bad_third_regions():
    phi, region = batch()
    for words, call in {"how must be one of": lambda: between_loss(phi, region, "up"), "expected the original's map":
                        lambda: between_loss(phi, region, "kept"), "must lie strictly inside":
                        lambda: between_loss(phi, region, "kept", phi * 0)}.items():
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("kind", ["fraction", "binary", "empty and full"])
@pytest.mark.parametrize("norm", NORMS)
def test_alignment_terms_equal_loops(norm, kind):
    for seed in range(5):
        phi, mask = batch(seed, kind=kind)
        concept = slow_term(phi.tolist(), mask.tolist(), norm)
        background = slow_term(phi.tolist(), mask.tolist(), norm, background=True)
        assert concept_loss(phi, mask, norm).item() == pytest.approx(concept, rel=1e-12)
        assert background_loss(phi, mask, norm).item() == pytest.approx(background, rel=1e-12)
        weights = LossWeights(concept=0.3, background=2.0)
        expected = 0.3 * concept + 2.0 * background
        assert alignment_loss(phi, mask, weights, norm).item() == pytest.approx(expected, rel=1e-12)


def test_default_is_the_paper():
    weights = LossWeights()
    assert (weights.concept, weights.background, weights.align, weights.classify) == (0.5, 1.2, 0.8, 0.2)
    phi, mask = batch()
    assert alignment_loss(phi, mask) == alignment_loss(phi, mask, weights, "region")
    assert alignment_loss(phi, mask) != alignment_loss(phi, mask, weights, "image")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["fraction", "empty and full"])
@pytest.mark.parametrize("term", [concept_loss, background_loss, alignment_loss])
def test_gradient_of_map_equals_finite_differences(term, kind, norm):
    phi, mask = batch(1, (3, 3, 3), kind)
    fast = gradient(lambda at: term(at, mask, norm=norm), phi)
    assert torch.allclose(fast, finite_difference(lambda at: term(at, mask, norm=norm), phi), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_alignment_passes_gradcheck_twice(norm):
    phi, mask = batch(2, (2, 2, 3), "empty and full")
    phi.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda at: alignment_loss(at, mask, norm=norm), phi)
    assert torch.autograd.gradgradcheck(lambda at: alignment_loss(at, mask, norm=norm), phi)


@pytest.mark.parametrize("area", [0.05, 0.25, 0.8])
def test_undecided_map(area):
    phi = torch.full((2, 10, 10), 0.5, dtype=torch.float64)
    mask = (torch.arange(100) < 100 * area).double().view(1, 10, 10).expand(2, -1, -1)
    assert concept_loss(phi, mask).item() == pytest.approx(math.log(2), rel=1e-12)
    assert background_loss(phi, mask).item() == pytest.approx(math.log(2), rel=1e-12)
    assert alignment_loss(phi, mask).item() == pytest.approx(1.17835, abs=1e-6)
    assert 0.8 * alignment_loss(phi, mask).item() == pytest.approx(0.94268, abs=1e-6)
    by_area = 0.8 * math.log(2) * (0.5 * area + 1.2 * (1 - area))
    assert 0.8 * alignment_loss(phi, mask, norm="image").item() == pytest.approx(by_area, rel=1e-12)


def test_empty_region_is_zero_counts_in_the_mean_and_has_finite_gradient():
    phi, mask = batch(3, (2, 4, 4))
    mask[0] = 0
    assert concept_loss(phi, mask).item() == pytest.approx(concept_loss(phi[1:], mask[1:]).item() / 2, rel=1e-12)
    slope = gradient(lambda at: concept_loss(at, mask), phi)
    assert slope.isfinite().all() and (slope[0] == 0).all() and (slope[1] != 0).all()
    mask[0] = 1
    expected = background_loss(phi[1:], mask[1:]).item() / 2
    assert background_loss(phi, mask).item() == pytest.approx(expected, rel=1e-12)


def test_tiny_fraction_is_a_region_too():
    """An object that covers a hundredth of one patch: divided by its own area, however small."""
    phi, mask = batch(15, (1, 3, 3))
    mask[:] = 0
    mask[0, 1, 1] = 0.01
    assert concept_loss(phi, mask).item() == pytest.approx(-math.log(phi[0, 1, 1].item()), rel=1e-12)
    assert background_loss(phi, 1 - mask).item() == pytest.approx(-math.log1p(-phi[0, 1, 1].item()), rel=1e-9)


def test_region_ignores_size_of_object_and_image_does_not():
    """Doubling both sides of every pixel changes nothing; adding background pixels scales only `image`."""
    phi, mask = batch(4, (2, 3, 3), "binary")
    mask[:, 0, 0] = 1
    large_phi, large_mask = (value.repeat_interleave(2, 1).repeat_interleave(2, 2) for value in (phi, mask))
    for norm in NORMS:
        expected = alignment_loss(phi, mask, norm=norm).item()
        assert alignment_loss(large_phi, large_mask, norm=norm).item() == pytest.approx(expected, rel=1e-12)
    wide_phi = torch.cat([phi, torch.full_like(phi, 0.3)], 2)
    wide_mask = torch.cat([mask, torch.zeros_like(mask)], 2)
    assert concept_loss(wide_phi, wide_mask).item() == pytest.approx(concept_loss(phi, mask).item(), rel=1e-12)
    halved = concept_loss(phi, mask, "image").item() / 2
    assert concept_loss(wide_phi, wide_mask, "image").item() == pytest.approx(halved, rel=1e-12)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float64])
def test_binary_mask_of_any_dtype(kind):
    phi, mask = batch(5, kind="binary")
    assert alignment_loss(phi, mask.to(kind)) == alignment_loss(phi, mask)


def test_dark_background_keeps_its_digits():
    phi = torch.full((1, 2, 2), 1e-6)
    exact = -math.log1p(-phi[0, 0, 0].item())
    assert background_loss(phi, torch.zeros(1, 2, 2)).item() == pytest.approx(exact, rel=1e-6)


def test_gradient_reaches_the_mask_of_nobody():
    """The mask is data: no gradient is needed there, and the map's own is left alone by the checks."""
    phi, mask = batch(6)
    phi.requires_grad_(True)
    loss = alignment_loss(phi, mask)
    loss.backward()
    assert mask.grad is None and phi.grad.abs().sum() > 0 and loss.shape == ()


@pytest.mark.parametrize("norm", NORMS)
def test_free_map_moves_onto_the_mask(norm):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, 6, 6)
    mask[0, 2:4, 2:5] = 1
    free = torch.randn(1, 6, 6, generator=generator).requires_grad_(True)
    bounded = lambda: 0.02 + 0.96 * free.sigmoid()
    before = (bounded() * mask).sum() / bounded().sum()
    optimizer = torch.optim.Adam([free], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        alignment_loss(bounded(), mask, norm=norm).backward()
        optimizer.step()
    after = (bounded() * mask).sum() / bounded().sum()
    assert before < 0.4 and after > 0.8
    assert bounded()[mask == 1].min() > 0.9 > 0.1 > bounded()[mask == 0].max()


# ---- Eq. 6 and the divergence ----


def random_logits(seed=0, rows=4, classes=5):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_classification_equals_loops():
    for seed in range(5):
        logits, labels = random_logits(seed), [random.Random(seed + i).randrange(5) for i in range(4)]
        assert classification_loss(logits).item() == pytest.approx(slow_cross_entropy(logits.tolist()), rel=1e-12)
        expected = slow_cross_entropy(logits.tolist(), labels)
        for kind in (torch.int64, torch.int32, torch.uint8):
            actual = classification_loss(logits, torch.tensor(labels, dtype=kind)).item()
            assert actual == pytest.approx(expected, rel=1e-12)


def test_gradient_of_eq6_is_softmax_minus_onehot():
    logits = random_logits(1)
    expected = []
    for scores in logits.tolist():
        probability = slow_softmax(scores)
        winner = scores.index(max(scores))
        expected.append([(p - (i == winner)) / len(logits) for i, p in enumerate(probability)])
    slope = gradient(classification_loss, logits)
    assert torch.allclose(slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(slope, finite_difference(classification_loss, logits), atol=1e-8)


def test_own_prediction_is_the_current_one():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert classification_loss(logits) == classification_loss(logits, torch.tensor([0, 1]))
    assert classification_loss(logits) == classification_loss(logits.flip(1))       # follows the model wherever it goes
    assert classification_loss(logits, torch.tensor([1, 0])) > classification_loss(logits)


def test_distillation_equals_loops_and_is_a_divergence():
    for seed in range(5):
        logits, original = random_logits(seed), random_logits(seed + 100)
        expected = slow_divergence(logits.tolist(), original.tolist())
        assert distillation_loss(logits, original).item() == pytest.approx(expected, rel=1e-12)
        assert expected > 0.01
        assert distillation_loss(logits, original) != distillation_loss(original, logits)     # the order matters
        assert abs(distillation_loss(logits, logits).item()) < 1e-12


def test_gradient_of_distillation_and_none_through_the_target():
    logits, original = random_logits(2), random_logits(3).requires_grad_(True)
    slope = gradient(lambda at: distillation_loss(at, original), logits)
    expected = [[(p - q) / len(logits) for p, q in zip(slow_softmax(now), slow_softmax(before))]
                for now, before in zip(logits.tolist(), original.tolist())]
    assert torch.allclose(slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-10)
    live = logits.clone().requires_grad_(True)
    distillation_loss(live, original).backward()
    assert original.grad is None and live.grad is not None


def test_confident_original_stays_finite():
    logits, original = torch.tensor([[0.0, 500.0]]), torch.tensor([[500.0, 0.0]])
    assert distillation_loss(logits, original).item() == pytest.approx(500.0)


# ---- Eq. 7 ----


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["own", "labels", "original"])
def test_total_equals_loops(kind, norm):
    phi, mask = batch(7, (4, 3, 3))
    logits, original, labels = random_logits(8), random_logits(9), torch.tensor([0, 3, 4, 1])
    weights = LossWeights(concept=0.7, background=0.9, align=1.3, classify=0.4)
    concept = slow_term(phi.tolist(), mask.tolist(), norm)
    background = slow_term(phi.tolist(), mask.tolist(), norm, background=True)
    classify = {"own": slow_cross_entropy(logits.tolist()),
                "labels": slow_cross_entropy(logits.tolist(), labels.tolist()),
                "original": slow_divergence(logits.tolist(), original.tolist())}[kind]
    align = 0.7 * concept + 0.9 * background
    expected = {"concept": concept, "background": background, "align": align, "classify": classify,
                "total": 1.3 * align + 0.4 * classify}
    total, parts = cft_loss(phi, mask, logits, labels if kind == "labels" else None,
                            original if kind == "original" else None, weights, norm)
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, rel=1e-12)
    assert total.item() == parts["total"].item()


def test_parts_are_detached_and_total_reaches_both_inputs():
    phi, mask = batch(10, (4, 3, 3))
    phi.requires_grad_(True)
    logits = random_logits(11).requires_grad_(True)
    total, parts = cft_loss(phi, mask, logits)
    assert total.shape == () and not any(value.requires_grad for value in parts.values())
    total.backward()
    assert torch.allclose(phi.grad, 0.8 * gradient(lambda at: alignment_loss(at, mask), phi.detach()))
    assert torch.allclose(logits.grad, 0.2 * gradient(classification_loss, logits.detach()))


def test_weight_zero_switches_a_term_off():
    phi, mask = batch(12, (4, 3, 3))
    logits = random_logits(13)
    total, _ = cft_loss(phi, mask, logits, weights=LossWeights(align=0.0, classify=1.0))
    assert total.item() == pytest.approx(classification_loss(logits).item(), rel=1e-12)
    only_background = LossWeights(concept=0.0, background=1.0)
    assert alignment_loss(phi, mask, only_background).item() == pytest.approx(background_loss(phi, mask).item())


def test_half_precision_maps_agree_roughly():
    phi, mask = batch(14)
    expected = alignment_loss(phi, mask).item()
    assert alignment_loss(phi.bfloat16(), mask.bfloat16()).item() == pytest.approx(expected, rel=0.05)


# ---- patch masks ----


@pytest.mark.parametrize("size, grid", [((8, 8), (4, 4)), ((9, 7), (4, 3)), ((5, 11), (5, 2)), ((6, 6), (6, 6)),
                                        ((7, 5), (1, 1)), ((16, 10), (3, 7))])
def test_patch_mask_equals_counting(size, grid):
    masks = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) > 0.6
    expected = torch.tensor([slow_patch_mask(mask, *grid) for mask in masks.int().tolist()])
    for kind in (torch.bool, torch.uint8, torch.float64):
        pooled = patch_mask(masks.to(kind), grid)
        assert pooled.dtype == torch.float32 and torch.allclose(pooled, expected, atol=1e-6)


def test_patch_mask_keeps_area_and_extremes():
    masks = torch.rand(2, 224, 224, generator=torch.Generator().manual_seed(1)) > 0.3
    assert torch.allclose(patch_mask(masks, (14, 14)).mean((1, 2)), masks.float().mean((1, 2)), atol=1e-6)
    for size in (30, 37, 64, 99):
        for grid in (3, 7, 14):
            full = patch_mask(torch.ones(1, size, size + 3), (grid, grid))
            assert full.min() == full.max() == 1                # a mask the losses accept, not 1.0000001
            assert patch_mask(torch.zeros(1, size, size), (grid, grid)).abs().max() == 0


# ---- bad input ----


@pytest.mark.parametrize("field", ["concept", "background", "align", "classify"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_weights(field, value):
    with pytest.raises(ValueError, match=f"LossWeights.{field}"):
        LossWeights(**{field: value})


def test_weights_are_frozen():
    with pytest.raises(AttributeError):
        LossWeights().concept = 1.0


@pytest.mark.parametrize("loss", [concept_loss, background_loss, alignment_loss,
                                  lambda phi, mask: cft_loss(phi, mask, torch.zeros(len(phi), 3))])
@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, 1.1, float("nan"), float("inf"), -float("inf")])
def test_bad_map_values(loss, bad):
    phi, mask = batch()
    phi[1, 2, 3] = bad
    with pytest.raises(ValueError, match="phi must lie strictly inside"):
        loss(phi, mask)


@pytest.mark.parametrize("loss", [concept_loss, background_loss, alignment_loss])
@pytest.mark.parametrize("bad", [-0.1, 1.1, 255.0, float("nan"), float("inf")])
def test_bad_mask_values(loss, bad):
    phi, mask = batch()
    mask[0, 0, 0] = bad
    with pytest.raises(ValueError, match="mask must lie in"):
        loss(phi, mask)


@pytest.mark.parametrize("loss", [concept_loss, background_loss, alignment_loss])
def test_bad_shapes_and_norm(loss):
    phi, mask = batch()
    for shape in [(1, 4, 5), (3, 4), (3, 5, 4), (3, 1, 5)]:
        with pytest.raises(ValueError, match="share one shape"):
            loss(phi, torch.zeros(shape))
    with pytest.raises(ValueError, match="share one shape"):
        loss(phi[0], mask[0])
    with pytest.raises(ValueError, match="share one shape"):
        loss(phi[:0], mask[:0])
    with pytest.raises(ValueError, match="floating point"):
        loss(torch.ones(3, 4, 5, dtype=torch.int64), mask)
    with pytest.raises(ValueError, match="norm must be one of"):
        loss(phi, mask, norm="pixel")


def test_bad_logits_and_labels():
    logits = random_logits()
    for bad in (float("nan"), float("inf")):
        spoiled = logits.clone()
        spoiled[0, 0] = bad
        for loss, arguments in ((classification_loss, (spoiled,)), (distillation_loss, (logits, spoiled)),
                                (distillation_loss, (spoiled, logits))):
            with pytest.raises(ValueError, match="must be finite"):
                loss(*arguments)
    for call in (lambda: classification_loss(logits[0]), lambda: classification_loss(logits[:0]),
                 lambda: classification_loss(logits.long())):
        with pytest.raises(ValueError, match="floating point"):
            call()
    for labels in ([5, 0, 0, 0], [-1, 0, 0, 0]):
        with pytest.raises(ValueError, match="target must lie in 0…4"):
            classification_loss(logits, torch.tensor(labels))
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.zeros(4, dtype=torch.bool),
                   torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="target must be integers"):
            classification_loss(logits, labels)
    with pytest.raises(ValueError, match="share one shape"):
        distillation_loss(logits, logits[:, :4])


def test_bad_total():
    phi, mask = batch(shape=(4, 3, 3))
    with pytest.raises(ValueError, match="got both"):
        cft_loss(phi, mask, random_logits(), torch.zeros(4, dtype=torch.int64), random_logits())
    with pytest.raises(ValueError, match="share one batch"):
        cft_loss(phi, mask, random_logits(rows=3))


def test_bad_patch_masks():
    mask = torch.zeros(2, 8, 8)
    for bad in (0.5, 255.0, -1.0, float("nan")):
        spoiled = mask.clone()
        spoiled[1, 3, 3] = bad
        with pytest.raises(ValueError, match="only 0 and 1"):
            patch_mask(spoiled, (4, 4))
    for grid in [(9, 4), (4, 9), (0, 4), (4, -1)]:
        with pytest.raises(ValueError, match="grid must have"):
            patch_mask(mask, grid)
    for shape in [(8, 8), (1, 1, 8, 8), (0, 8, 8)]:
        with pytest.raises(ValueError, match="height, width"):
            patch_mask(torch.zeros(shape), (4, 4))


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phi, mask = batch(kind="empty and full")
        cft_loss(phi, mask, torch.zeros(3, 2, dtype=torch.float64))
