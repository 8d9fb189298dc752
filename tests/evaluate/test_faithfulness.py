"""Curves, pointing and rank correlation against loops over single pictures, cells and pixels."""
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from torch import nn

import cft.evaluate.faithfulness as f
from cft.data.models import TINY, load_model


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return load_model(TINY)[0]


def images(batch=3, size=(64, 64), seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def maps(batch=3, size=(8, 8), seed=2):
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


# --- slow references ------------------------------------------------------------------------------------------------


def slow_scores(model, image, values, target, base, steps, direction, score):
    """One picture; cells are moved one by one, and the model is asked after every step."""
    rows, columns = values.shape
    cells = sorted(((float(values[i, j]), i, j) for i in range(rows) for j in range(columns)), reverse=True)
    high, wide = image.shape[1] // rows, image.shape[2] // columns
    picture, source = (base.clone(), image) if direction == "insertion" else (image.clone(), base)
    scores, moved = [], 0
    for k in range(steps + 1):
        while moved < round(k * len(cells) / steps):
            _, i, j = cells[moved]
            place = slice(None), slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            picture[place] = source[place]
            moved += 1
        with torch.no_grad():
            logits = model(picture[None])[0].double().numpy()
        value = logits[target] if score == "logit" else math.exp(logits[target]) / sum(math.exp(z) for z in logits)
        scores.append(value)
    return scores


def slow_area(scores, fractions):
    return sum((fractions[k] - fractions[k - 1]) * (scores[k] + scores[k - 1]) / 2 for k in range(1, len(scores)))


def slow_ranks(values):
    """1 + how many are smaller, plus half of the others that are equal."""
    return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def slow_blur(image, sigma):
    """A channel of numbers as lists: weights exp(−d²/2σ²) up to 2σ, mirrored at the edges without repeating them."""
    reach = int(2 * sigma)
    weights = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
    weights = [w / sum(weights) for w in weights]
    mirror = lambda i, n: -i if i < 0 else 2 * (n - 1) - i if i >= n else i
    at = lambda row, i: sum(w * row[mirror(i + d - reach, len(row))] for d, w in enumerate(weights))
    line = lambda row: [at(row, i) for i in range(len(row))]
    return np.array([line(column) for column in np.array([line(row) for row in image]).T]).T


# --- baselines and orders -------------------------------------------------------------------------------------------


def test_baselines():
    x = images(2, (16, 24))
    assert f.baseline_of(x, "zeros").abs().max() == 0
    for i, c in itertools.product(range(2), range(3)):
        centre = torch.tensor(np.mean(x[i, c].double().numpy())).float()
        assert torch.allclose(f.baseline_of(x, "mean")[i, c], centre, atol=1e-6)
        np.testing.assert_allclose(f.baseline_of(x, "blur")[i, c], slow_blur(x[i, c].double().numpy(), 2.0), atol=1e-5)
    own = torch.full((3, 1, 1), 7.0)
    assert torch.equal(f.baseline_of(x, own), torch.full_like(x, 7.0))


def test_order_is_by_value_and_random_among_ties():
    values = maps()
    order = f.order_of(values)
    for v, o in zip(values.flatten(1), order.flatten(1)):
        assert [int(k) for k in o] == [int((v > x).sum()) for x in v]
    tied = torch.zeros(200, 2, 2)
    tied[:, 1, 1] = 1
    order = f.order_of(tied)
    assert (order[:, 1, 1] == 0).all()
    seen = {tuple(o.flatten()[:3].tolist()) for o in order}
    assert seen == set(itertools.permutations((1, 2, 3)))
    assert torch.equal(order, f.order_of(tied)) and not torch.equal(order, f.order_of(tied, seed=1))


# --- curves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid,steps", [((8, 8), 16), ((4, 8), 5), ((64, 64), 3)])
@pytest.mark.parametrize("name", ["insertion", "deletion"])
def test_curves_agree_with_a_loop(tiny, name, grid, steps):
    x, values, target = images(), maps(3, grid), torch.tensor([1, 5, 0])
    for baseline, score in (("zeros", "probability"), ("blur", "logit")):
        curve = getattr(f, name)(tiny, x, values, target, baseline=baseline, steps=steps, score=score, batch=2)
        base = f.baseline_of(x, baseline)
        cells = values[0].numel()
        fractions = [round(k * cells / steps) / cells for k in range(steps + 1)]
        assert curve.fraction.tolist() == pytest.approx(fractions)
        for i in range(3):
            slow = slow_scores(tiny, x[i], values[i], int(target[i]), base[i], steps, name, score)
            assert curve.score[i].tolist() == pytest.approx(slow, abs=2e-5)
            assert curve.area[i].item() == pytest.approx(slow_area(slow, fractions), abs=2e-5)


def test_curves_explain_the_predicted_class_and_leave_the_model_alone(tiny):
    x, values = images(), maps()
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    tiny.train()
    try:
        tiny.eval()
        predicted = tiny(x).argmax(1)
        tiny.train()
        first, second = f.deletion(tiny, x, values, steps=2), f.deletion(tiny, x, values, predicted, steps=2)
        assert torch.equal(first.score, second.score) and not first.score.requires_grad
        assert tiny.training and all(p.grad is None for p in tiny.parameters())
    finally:
        tiny.eval()
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())


def test_no_order_deletes_a_linear_model_faster_than_its_contributions():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3, bias=False)).eval()
    x = torch.randn(1, 1, 1, 5)
    truth = (model[1].weight[2].detach() * x.flatten()).view(1, 1, 5)
    target = torch.tensor([2])
    area = f.deletion(model, x, truth, target, steps=5, score="logit").area.item()
    areas = [f.deletion(model, x, torch.tensor([[p]]).float(), target, steps=5, score="logit").area.item()
             for p in itertools.permutations(range(5))]
    assert area == pytest.approx(min(areas), abs=1e-6) and area < np.median(areas)
    assert f.insertion(model, x, truth, target, steps=5, score="logit").area.item() > np.median(areas)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_widen_against_distances():
    masks = torch.zeros(2, 9, 11, dtype=torch.bool)
    masks[0, 4, 5] = masks[1, 0, 10] = masks[1, 8, 0] = True
    for radius in (0, 1, 2.5, 4):
        wide = f.widen(masks, radius)
        for n, i, j in itertools.product(range(2), range(9), range(11)):
            near = min(math.hypot(i - a, j - b) for a, b in masks[n].nonzero().tolist())
            assert bool(wide[n, i, j]) == (near <= radius)


def test_pointing_and_share_against_pixels():
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.integers(-2, 3, (20, 4, 4))).float()  # many ties
    masks = torch.tensor(rng.random((20, 16, 16)) < 0.3)
    hits, shares = f.pointing(values, masks), f.share_inside(values, masks)
    for i in range(20):
        pixels = values[i].numpy().repeat(4, 0).repeat(4, 1)
        at_top = masks[i].numpy()[pixels == pixels.max()]
        assert hits[i].item() == pytest.approx(at_top.mean(), abs=1e-6)
        positive = np.maximum(pixels, 0)
        assert shares[i].item() == pytest.approx((positive * masks[i].numpy()).sum() / positive.sum(), abs=1e-6)


def test_pointing_on_pixels_is_the_usual_game():
    values, masks = maps(4, (16, 16)), torch.zeros(4, 16, 16, dtype=torch.bool)
    top = [divmod(int(v.argmax()), 16) for v in values]
    masks[0][top[0]] = True
    masks[1, (top[1][0] + 3) % 16, top[1][1]] = True
    far = (top[1][0] + 3) % 16 - top[1][0]
    assert f.pointing(values, masks).tolist() == [1, 0, 0, 0]
    assert f.pointing(values, masks, abs(far)).tolist() == [1, 1, 0, 0]


def test_a_map_without_positive_relevance_has_no_share():
    assert f.share_inside(-torch.rand(1, 2, 2), torch.ones(1, 4, 4, dtype=torch.bool)).isnan().all()


# --- rank correlation -----------------------------------------------------------------------------------------------


def test_ranks_and_correlation_against_counting_and_scipy():
    rng = np.random.default_rng(1)
    a, b = (torch.tensor(rng.integers(0, 6, (10, 4, 5))).double() for _ in range(2))
    a[3] = torch.rand(4, 5, dtype=torch.float64)
    found = f.rank_correlation(a, b)
    for i in range(10):
        x, y = a[i].flatten().tolist(), b[i].flatten().tolist()
        assert f.ranks(a[i].flatten()).tolist() == slow_ranks(x) == rankdata(x).tolist()
        slow = np.corrcoef(slow_ranks(x), slow_ranks(y))[0, 1]
        assert found[i].item() == pytest.approx(slow, abs=1e-12) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_correlation_of_constants_is_undefined():
    assert f.rank_correlation(torch.ones(1, 2, 2), maps(1, (2, 2))).isnan().all()


# --- tables ---------------------------------------------------------------------------------------------------------


def test_table_is_tidy_and_summary_averages(tiny):
    x, masks = images(4), torch.rand(4, 64, 64, generator=torch.Generator().manual_seed(3)) < 0.3
    both = f.all_maps(tiny, x, methods=["attnlrp", "gae"])
    both["nothing"] = -torch.ones(4, 8, 8)
    scores = f.faithfulness_table(tiny, x, both, masks, steps=2)
    assert list(scores.columns) == ["method", "metric", "picture", "value"] and len(scores) == 3 * 4 * 4
    one = scores[(scores["method"] == "gae") & (scores["metric"] == "insertion")]["value"]
    assert one.tolist() == pytest.approx(f.insertion(tiny, x, both["gae"], steps=2).area.tolist())
    means = f.summary(scores).set_index(["method", "metric"])
    assert means.loc[("gae", "insertion"), "value"] == pytest.approx(one.mean())
    assert ("nothing", "inside") not in means.index and means.loc[("nothing", "pointing"), "n"] == 4
    pairs = f.agreement({name: both[name] for name in ("attnlrp", "gae")})
    same = pairs[pairs["method"] == pairs["other"]]["value"]
    assert len(pairs) == 2 * 2 * 4 and same.tolist() == pytest.approx([1] * 8)


def test_all_maps_explain_one_class(tiny):
    from cft.explain.maps import ATTRIBUTIONS, Method, relevance

    x = images(2)
    found = f.all_maps(tiny, x, methods={"quick": Method("iia", steps=1), "cp": "cp"})
    assert list(found) == ["quick", "cp"]
    assert torch.equal(found["cp"], relevance(tiny, x, tiny(x).argmax(1), "cp", differentiable=False).patches)
    most = [m for m in ATTRIBUTIONS if m != "iia"]
    assert list(f.all_maps(tiny, x, torch.tensor([1, 2]), most)) == most


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call,message", [
    (lambda m: f.deletion(m, images(), maps(2)), "sides are multiples"),
    (lambda m: f.deletion(m, images(), maps(3, (8, 9))), "sides are multiples"),
    (lambda m: f.deletion(m, images(), maps(), steps=0), "steps must lie between 1 and 64"),
    (lambda m: f.deletion(m, images(), maps(), score="loss"), "score must be"),
    (lambda m: f.deletion(m, images(), maps(), torch.zeros(3)), "target must be integers"),
    (lambda m: f.deletion(m, images(), maps(), torch.full((3,), 12)), "target must lie in"),
    (lambda m: f.insertion(m, images(), maps(), baseline="grey"), "baseline must be"),
    (lambda m: f.insertion(m, images(), maps() * math.nan), "finite"),
    (lambda m: f.order_of(torch.zeros(2, 2)), "got \\(2, 2\\)"),
    (lambda m: f.pointing(maps(), torch.zeros(3, 64, 64)), "masks must be bool"),
    (lambda m: f.pointing(maps(), torch.zeros(3, 64, 64, dtype=torch.bool), -1), "tolerance"),
    (lambda m: f.share_inside(maps(), torch.zeros(2, 64, 64, dtype=torch.bool)), "masks must be bool \\(3"),
    (lambda m: f.rank_correlation(maps(), maps(3, (4, 4))), "share one shape"),
])
def test_bad_input(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)
