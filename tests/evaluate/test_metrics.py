"""Metrics and intervals against plain Python: loops, sorting and counting, and nothing of scipy or torchmetrics."""

import math
import random
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cft.evaluate.intervals import deviation_bound, over_seeds, paired_difference, pairs_needed, power_of
from cft.evaluate.metrics import (
    accuracy_table,
    average_precision,
    doubt_about,
    evaluating,
    foreground,
    image_scores,
    near_chance,
    other_order,
    pooled,
    predict,
    segmentation_scores,
    summarize,
    top_k,
    wilson_interval,
)

# quantiles of the t distribution at 97.5 %, from printed tables; the key is the degrees of freedom
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045}


# ---- slow references ----


def slow_top_k(scores, label, k):
    """Sort the classes by score, equal scores by number, and look for the label among the first k."""
    ranking = sorted(range(len(scores)), key=lambda c: (-scores[c], c))
    return label in ranking[:k]


def slow_wilson(hits, n):
    """Ends of the interval by bisection on the test it inverts: |p̂ − p| = z·sqrt(p(1 − p)/n)."""
    z, share = 1.959963984540054, hits / n
    surprise = lambda p: abs(share - p) - z * math.sqrt(p * (1 - p) / n)

    def bisect(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if surprise(middle) <= 0 else (inside, middle)
        return inside

    return 100 * (0.0 if hits == 0 else bisect(share, 0.0)), 100 * (1.0 if hits == n else bisect(share, 1.0))


def slow_average_precision(scores, truth):
    """Area under the precision-recall steps: collect everything at or above each distinct score."""
    total, previous, area = sum(truth), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [label for score, label in zip(scores, truth) if score >= threshold]
        precision, recall = sum(taken) / len(taken), sum(taken) / total
        area += (recall - previous) * precision
        previous = recall
    return area


def slow_segmentation(maps, masks):
    """The whole protocol on nested lists, pixel by pixel."""
    pooled, accuracies, ious, precisions = [0, 0, 0, 0], [], [], []

    def iou(counts):
        tp, fp, fn, tn = counts
        parts = [inter / (inter + fp + fn) for inter in (tp, tn) if inter + fp + fn > 0]
        return sum(parts) / len(parts)

    for picture, mask in zip(maps, masks):
        values, truth = sum(picture, []), sum(mask, [])
        low, high = min(values), max(values)
        values = [(value - low) / (high - low) if high > low else 0.0 for value in values]
        mean = math.fsum(values) / len(values)
        counts = [0, 0, 0, 0]
        for value, inside in zip(values, truth):
            found = value > mean
            counts[0 if found and inside else 1 if found else 2 if inside else 3] += 1
        pooled = [a + b for a, b in zip(pooled, counts)]
        accuracies.append((counts[0] + counts[3]) / len(values))
        ious.append(iou(counts))
        precisions.append(slow_average_precision([1 - value for value in values] + values,
                                                 [not inside for inside in truth] + truth))
    average = lambda values: 100 * math.fsum(values) / len(values)
    return {"pixel_accuracy": 100 * (pooled[0] + pooled[3]) / sum(pooled), "mean_iou": 100 * iou(pooled),
            "mean_average_precision": average(precisions), "pixel_accuracy_per_image": average(accuracies),
            "mean_iou_per_image": average(ious)}


def slow_t_interval(values):
    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = T_TABLE[n - 1] * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


class Answers(nn.Module):
    """A model that looks its logits up: an image is the number of a row."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.norm, self.dropout = nn.BatchNorm1d(logits.shape[1]), nn.Dropout(0.5)

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return self.dropout(self.logits[images])


def answers(n=12, classes=6, seed=0, size=5):
    """A model, its logits, labels, and batches for it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return Answers(logits), logits, labels, list(zip(torch.arange(n).split(size), labels.split(size)))


# ---- top-k ----


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_top_k_equals_sorting(classes):
    generator = torch.Generator().manual_seed(classes)
    smooth = torch.randn(50, classes, generator=generator)
    tied = torch.randint(3, (50, classes), generator=generator).float()         # full of ties
    labels = torch.randint(classes, (50,), generator=generator)
    for logits in (smooth, tied, smooth.masked_fill(tied == 0, -torch.inf), smooth.double(), smooth.bfloat16()):
        for k in (1, 2, 5, 20):
            expected = [slow_top_k(row, label, k) for row, label in zip(logits.tolist(), labels.tolist())]
            actual = top_k(logits, labels, k)
            assert actual.dtype == torch.bool and actual.tolist() == expected
            assert k < classes or actual.all()


def test_dead_model_earns_chance():
    labels = torch.arange(10)
    assert top_k(torch.zeros(10, 10), labels).float().mean().item() == pytest.approx(0.1)
    assert top_k(torch.zeros(10, 10), labels, 5).float().mean().item() == pytest.approx(0.5)


# ---- predict ----


def test_predict_returns_everything_in_order():
    model, logits, labels, batches = answers()
    got_logits, got_labels = predict(model, iter(batches))
    assert torch.equal(got_logits, logits) and torch.equal(got_labels, labels)
    assert not got_logits.is_inference() and not got_logits.requires_grad
    (got_logits * torch.ones(1, requires_grad=True)).sum().backward()          # usable in autograd


def test_predict_restores_the_state_of_every_module():
    model, _, _, batches = answers()
    model.train()
    model.norm.eval()
    predict(model, batches)
    assert model.training and not model.norm.training and model.dropout.training

    def failing():
        yield batches[0]
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        predict(model, failing())
    assert model.training and not model.norm.training and model.dropout.training
    model.eval()
    predict(model, batches)
    assert not any(module.training for module in model.modules())


def test_evaluating_restores_the_states_of_all_models():
    first, second = answers()[0].train(), answers()[0].train()
    second.dropout.eval()
    with pytest.raises(RuntimeError, match="gone"), evaluating(first, second):
        assert not any(module.training for model in (first, second) for module in model.modules())
        raise RuntimeError("gone")
    assert first.training and first.norm.training and first.dropout.training
    assert second.training and second.norm.training and not second.dropout.training


def test_predict_sends_images_to_the_device_of_the_model_or_the_given_one():
    class Probe(nn.Module):
        def forward(self, images):
            seen.append(images.device.type)
            return torch.zeros(len(images), 2)

    seen, batches = [], [(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))]
    predict(Probe(), batches)                       # no parameters: the CPU
    predict(Probe(), batches, device="meta")
    probe = Probe()
    probe.weight = nn.Parameter(torch.zeros(1, device="meta"))
    predict(probe, batches)
    assert seen == ["cpu", "meta", "meta"]


def test_progress_bar_only_when_asked(capsys):
    model, _, _, batches = answers()
    predict(model, batches)
    assert capsys.readouterr().err == ""
    predict(model, batches, progress=True)
    assert "3/3" in capsys.readouterr().err


# ---- Wilson ----


def test_wilson_equals_bisection():
    for n in (1, 2, 7, 60, 360):
        for hits in {0, 1, n // 3, n // 2, n - 1, n}:
            assert wilson_interval(hits, n) == pytest.approx(slow_wilson(hits, n), abs=1e-6)


def test_wilson_at_a_known_value():
    """81 of 263: 0.2553 to 0.3662, the example of Newcombe, Statistics in Medicine 1998."""
    assert wilson_interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.006)


def test_wilson_keeps_its_promise():
    """Exact coverage by binomial sums, averaged over the true accuracy, is 95 % within a point."""
    kept = []
    for p in (0.05, 0.1, 0.3, 0.5, 0.77, 0.9, 0.95):
        n, covered = 60, 0.0
        for hits in range(n + 1):
            low, high = wilson_interval(hits, n)
            covered += math.comb(n, hits) * p**hits * (1 - p) ** (n - hits) * (low <= 100 * p <= high)
        kept.append(covered)
        assert covered > 0.90
    assert sum(kept) / len(kept) == pytest.approx(0.95, abs=0.015)


# ---- tables of accuracies ----


def slow_summary(frame, by):
    """Counting with dictionaries: group -> metric -> (value, low, high, n)."""
    groups = {}
    for row in frame.to_dict("records"):
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    return {key: {metric: (100 * sum(row[metric] for row in rows) / len(rows),
                           *slow_wilson(sum(row[metric] for row in rows), len(rows)), len(rows))
                  for metric in frame.columns if metric.startswith("top")} for key, rows in groups.items()}


def images_of(name="val", fine_tuned=(), seed=0, n=80, classes=7):
    """One row per image of a made-up set."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator) + 1.2 * torch.nn.functional.one_hot(labels, classes)
    split = ["fine-tuned" if label in fine_tuned else "other" for label in labels.tolist()]
    return pd.DataFrame({"set": name, "split": split, "label": labels.numpy(),
                         **{f"top{k}": top_k(logits, labels, k).numpy() for k in (1, 5)}})


@pytest.mark.parametrize("by", [["set"], ["set", "split"], ["label"]])
def test_summaries_equal_counting(by):
    frame = pd.concat([images_of(name, [0, 2], seed) for seed, name in enumerate("ab")])
    expected = slow_summary(frame, by)
    tidy, wide = summarize(frame, by), accuracy_table(frame, by)
    assert list(tidy.columns) == [*by, "metric", "value", "low", "high", "n"]
    assert len(tidy) == 2 * len(expected) and len(wide) == len(expected)
    for row in tidy.to_dict("records"):
        key = tuple(row[column] for column in by)
        actual = (row["value"], row["low"], row["high"], row["n"])
        assert actual == pytest.approx(expected[key][row["metric"]], abs=1e-6)
    for row in wide.to_dict("records"):
        key = tuple(row[column] for column in by)
        for metric in ("top1", "top5"):
            actual = (row[metric], row[f"{metric}_low"], row[f"{metric}_high"], row["n"])
            assert actual == pytest.approx(expected[key][metric], abs=1e-6)


def test_grouping_by_one_name():
    frame = images_of().assign(topic="birds")  # not a metric, whatever its name
    pd.testing.assert_frame_equal(summarize(frame, "set"), summarize(frame, ["set"]))
    pd.testing.assert_frame_equal(accuracy_table(frame, "set"), accuracy_table(frame, ["set"]))


# ---- segmentation ----


def random_pictures(seed=0, n=4, size=(5, 6), levels=None, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(n, *size, generator=generator, dtype=torch.float64)
    if levels:
        maps = (maps * levels).round() / levels             # few distinct values: ties in the ranking
    return maps, torch.rand(n, *size, generator=generator) < share


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_segmentation_equals_loops(levels, share):
    for seed in range(4):
        maps, masks = random_pictures(seed, levels=levels, share=share)
        expected = slow_segmentation(maps.tolist(), masks.tolist())
        assert segmentation_scores(maps, masks) == pytest.approx(expected)
        assert segmentation_scores(maps.float(), masks)["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"])


def test_counts_and_precision_per_image():
    maps, masks = random_pictures(5, n=6)
    table = image_scores(maps, masks)
    for i in range(6):
        expected = slow_segmentation(maps[i:i + 1].tolist(), masks[i:i + 1].tolist())
        assert table.average_precision[i] == pytest.approx(expected["mean_average_precision"])
        right = table.true_positive[i] + table.true_negative[i]
        assert 100 * right / 30 == pytest.approx(expected["pixel_accuracy"])
    found = foreground(maps)
    assert (table.true_positive + table.false_positive).tolist() == found.sum((1, 2)).tolist()
    assert (table.true_positive + table.false_negative).tolist() == masks.sum((1, 2)).tolist()


def test_perfect_inverted_and_constant_maps():
    _, masks = random_pictures(6, share=0.4)
    perfect, inverted = (segmentation_scores(maps.float(), masks) for maps in (masks, ~masks))
    assert perfect == {metric: 100.0 for metric in perfect} and len(perfect) == 5
    assert all(inverted[metric] == 0 for metric in inverted if metric != "mean_average_precision")
    share = masks.float().mean().item()
    for level in (0.0, 0.1, 0.3, 1.0):
        maps = torch.full(masks.shape, level)
        assert not foreground(maps).any()
        constant = segmentation_scores(maps, masks)
        assert all(math.isfinite(value) for value in constant.values())
        assert constant["pixel_accuracy"] == pytest.approx(100 * (1 - share))
        assert constant["mean_iou"] == pytest.approx(50 * (1 - share))
        shares = masks.float().mean((1, 2)).tolist()
        precision = sum((1 - f) ** 2 + f / 2 for f in shares) / len(shares)
        assert constant["mean_average_precision"] == pytest.approx(100 * precision)


def test_mean_iou_is_bound_by_pixel_accuracy():
    for seed in range(60):
        maps, masks = random_pictures(seed, n=1 + seed % 5, share=(seed % 9 + 1) / 10)
        if seed % 2:
            maps = 0.5 * maps + 0.5 * masks
        scores = segmentation_scores(maps, masks)
        accuracy = scores["pixel_accuracy"] / 100
        assert scores["mean_iou"] <= 100 * accuracy / (2 - accuracy) + 1e-9
    half = torch.zeros(2, 4, 4, dtype=torch.bool)
    half[:, :2] = True
    extremes = segmentation_scores(torch.stack([half[0], ~half[1]]).float(), half)
    assert extremes["mean_iou"] == pytest.approx(100 / 3) and extremes["mean_iou_per_image"] == pytest.approx(50)


def test_regions_that_never_occur():
    """All background in the mask and in the map: the object has no IoU, and nothing is NaN."""
    masks = torch.zeros(2, 3, 3, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = segmentation_scores(torch.zeros(2, 3, 3), masks)
    assert scores["mean_iou"] == scores["mean_iou_per_image"] == scores["pixel_accuracy"] == 100
    spot = torch.zeros(2, 3, 3)
    spot[0, 0, 0] = 1
    assert segmentation_scores(spot, masks)["mean_iou"] == pytest.approx(50 * (17 / 18))


def test_only_the_shape_of_a_map_matters():
    """Stretching each map makes scale and offset irrelevant."""
    maps, masks = random_pictures(7, levels=16)
    expected = segmentation_scores(maps, masks)
    assert segmentation_scores(0.25 + 0.5 * maps, masks) == pytest.approx(expected, abs=1e-4)


def test_weights_count_images_as_often_as_they_say():
    maps, masks = random_pictures(8, n=5)
    weights = np.array([[1, 1, 1, 1, 1], [0, 3, 0, 1, 1], [0, 0, 2, 0, 0]])
    found = pooled(image_scores(maps, masks), weights.astype(float))
    for row, counts in enumerate(weights):
        drawn = np.repeat(np.arange(5), counts)
        expected = segmentation_scores(maps[drawn], masks[drawn])
        assert {metric: values[row] for metric, values in found.items()} == pytest.approx(expected)


def test_speed_of_a_demonstration_set():
    """360 maps of 64×64 take about a second; ten times that on a busy machine would still be a fault."""
    maps, masks = random_pictures(10, n=360, size=(64, 64))
    start = time.process_time()
    segmentation_scores(maps.float(), masks)
    assert time.process_time() - start < 10


# ---- over seeds ----


@pytest.mark.parametrize(("difference", "deviation", "n"), [(2.0, 2.5, 5), (2.0, 2.5, 19), (-1, 1.5, 12), (0, 3.0, 8)])
def test_power_is_how_often_simulated_seeds_exclude_zero(difference, deviation, n):
    rng, hits, trials = np.random.default_rng(3), 0, 1500
    for _ in range(trials):
        values = pd.Series(rng.normal(difference, deviation, n))
        found = paired_difference(values, 0 * values)
        hits += found.low > 0 or found.high < 0
    assert power_of(difference, deviation, n) == pytest.approx(hits / trials, abs=0.035)


def test_power_is_known_however_small_the_deviation_is():
    for n in (12, 20):
        found = [power_of(2, deviation, n) for deviation in np.linspace(0.02, 3, 300)]
        assert (np.diff(found) < 1e-9).all() and found[0] == 1 and 0 < found[-1] < 1


def test_the_fewest_pairs():
    for deviation in (0.5, 2.5, 4.0):
        n = pairs_needed(2, deviation)
        assert power_of(2, deviation, n) >= 0.9 and (n == 2 or power_of(2, deviation, n - 1) < 0.9)
        assert pairs_needed(-2, deviation) == n == pairs_needed(20, 10 * deviation)
    for bad in (lambda: pairs_needed(0, 1), lambda: pairs_needed(1, 0), lambda: pairs_needed(1, 1, 1.0),
                lambda: power_of(1, 1, 1)):
        with pytest.raises(ValueError, match="expected a d"):
            bad()
    rng = np.random.default_rng(0)
    seen = rng.normal(0, 2.0, (4000, 5)).std(1, ddof=1)
    assert np.mean([deviation_bound(s, 5) > 2.0 for s in seen]) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 30])
def test_paired_difference_equals_printed_quantiles(n):
    dice = random.Random(n)
    a, b = ([dice.gauss(50, 5) for _ in range(n)] for _ in range(2))
    got = paired_difference(pd.Series(a), pd.Series(b))
    expected = slow_t_interval([x - y for x, y in zip(a, b)])
    width = expected[2] - expected[1]
    assert tuple(got[:3]) == pytest.approx(expected, abs=1e-3 * width) and got.n == n


def test_t_quantile_for_five_seeds():
    a, b = pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]), pd.Series(np.zeros(5))
    got = paired_difference(a, b)
    assert (got.high - got.mean) / math.sqrt(2.5 / 5) == pytest.approx(2.776, abs=5e-4)
    assert (got.high + got.low) / 2 == pytest.approx(got.mean) == 3


def test_pairs_follow_the_seed_not_the_position():
    a = pd.Series([10.0, 20.0, 30.0], index=[2, 0, 1])
    b = pd.Series([19.0, 29.0, 9.0], index=[0, 1, 2])
    assert tuple(paired_difference(a, b)) == (1.0, 1.0, 1.0, 3)
    forth, back = paired_difference(a, 1.5 * b), paired_difference(1.5 * b, a)
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_over_seeds_equals_loops():
    dice = random.Random(0)
    rows = [{"method": method, "set": name, "split": "all", "metric": "top1", "seed": seed, "value": dice.gauss(60, 9)}
            for method in "xy" for name in "ab" for seed in range(5)]
    dice.shuffle(rows)
    table = over_seeds(pd.DataFrame(rows), by=["method", "set", "split", "metric"])
    assert len(table) == 4
    for row in table.to_dict("records"):
        values = [other["value"] for other in rows if (other["method"], other["set"]) == (row["method"], row["set"])]
        mean, low, high = slow_t_interval(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
        assert (row["value"], row["std"], row["n"]) == pytest.approx((mean, deviation, 5))
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-2)


def test_single_seed_has_no_spread():
    runs = pd.DataFrame({"set": ["a"], "split": ["all"], "metric": ["top1"], "seed": [0], "value": [50.0]})
    row = over_seeds(runs).iloc[0]
    assert row["value"] == 50 and row["n"] == 1 and np.isnan([row["std"], row["low"], row["high"]]).all()


# ---- bad input ----


def test_bad_logits_and_labels():
    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 3])
    cases = [("got an empty set", logits[:0], labels[:0], 1), ("k must be at least 1", logits, labels, 0),
             ("expected logits", logits[0], labels, 1), ("expected logits", logits, labels[:2], 1),
             ("expected logits", logits, labels[:, None], 1), ("must be integers", logits, labels.float(), 1),
             ("must be integers", logits, labels > 0, 1), ("classes of the model", logits, labels + 1, 1),
             ("classes of the model", logits, labels - 1, 1),
             ("must not hold NaN, got 1", logits.index_fill(0, labels[:1], float("nan")), labels, 1)]
    for message, bad_logits, bad_labels, k in cases:
        with pytest.raises(ValueError, match=message):
            top_k(bad_logits, bad_labels, k)
    for hits, n in [(-1, 5), (6, 5), (0, 0)]:
        with pytest.raises(ValueError, match="expected 0 ≤ hits ≤ n"):
            wilson_interval(hits, n)


def test_bad_sets():
    model, logits, labels, batches = answers()
    broken, _, _, _ = answers()
    with torch.no_grad():
        broken.logits[3, 2] = float("nan")
    foreign = [(images, target + 1) for images, target in batches]
    cases = [(model, [], "empty set"), (model, iter([]), "empty set"), (broken, batches, "NaN"),
             (model, foreign, "classes of the")]
    for bad_model, bad, message in cases:
        with pytest.raises(ValueError, match=message):
            predict(bad_model, bad)
    spent = iter(batches)
    predict(model, spent)
    with pytest.raises(ValueError, match="empty set"):
        predict(model, spent)


def test_bad_tables():
    frame = images_of()
    for call in (summarize, accuracy_table):
        with pytest.raises(ValueError, match="group by"):
            call(frame, [])
        with pytest.raises(ValueError, match="group by"):
            call(frame.drop(columns=["top1", "top5"]).assign(topic="birds"))
        with pytest.raises(ValueError, match="group by"):
            call(frame.drop(columns="top5").assign(top1=0.5))
        with pytest.raises(ValueError, match="without"):
            call(frame, ["set", "seed"])
        with pytest.raises(ValueError, match="empty table"):
            call(frame[:0])


def test_bad_maps():
    maps, masks = random_pictures()
    nan, negative = maps.clone(), maps.clone()
    nan[1, 2, 3], negative[0, 0, 0] = float("nan"), -0.01
    cases = [("in \\[0, 1\\] and hold no NaN", nan, masks), ("in \\[0, 1\\]", negative, masks),
             ("in \\[0, 1\\]", maps * 255, masks), ("share one shape", maps[:, :, :5], masks),
             ("share one shape", maps[:2], masks), ("share one shape", maps[:0], masks[:0]),
             ("share one shape", maps[0], masks[0]), ("masks bool", maps, masks.int()), ("masks bool", masks, masks)]
    for call in (image_scores, segmentation_scores):
        for message, bad_maps, bad_masks in cases:
            with pytest.raises(ValueError, match=message):
                call(bad_maps, bad_masks)


def test_bad_seeds():
    a = pd.Series([1.0, 2.0, 3.0])
    for bad in (a[:2], a.set_axis([0, 1, 4])):
        with pytest.raises(ValueError, match="the same seeds"):
            paired_difference(a, bad)
    with pytest.raises(ValueError, match="at least two"):
        paired_difference(a[:1], a[:1])
    with pytest.raises(ValueError, match="repeated seeds in b"):
        paired_difference(a, a.set_axis([0, 1, 1]))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            paired_difference(a, pd.Series([1.0, bad, 2.0]))


def test_bad_runs():
    runs = pd.DataFrame({"set": "a", "split": "all", "metric": "top1", "seed": [0, 1], "value": [50.0, 60.0]})
    with pytest.raises(ValueError, match="is a column missing"):
        over_seeds(pd.concat([runs, runs]))
    with pytest.raises(ValueError, match="without \\['seed'\\]"):
        over_seeds(runs.drop(columns="seed"))
    with pytest.raises(ValueError, match="empty table"):
        over_seeds(runs[:0])
    with pytest.raises(ValueError, match="got none"):
        over_seeds(runs, by=[])
    with pytest.raises(ValueError, match="finite"):
        over_seeds(runs.assign(value=[1.0, float("nan")]))


def test_no_warnings():
    maps, masks = random_pictures()
    model, _, _, batches = answers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, batches)
        summarize(images_of())
        segmentation_scores(torch.full_like(maps, 0.5), masks)
        paired_difference(pd.Series([1.0, 1.0]), pd.Series([0.0, 0.0]))


# ---- chance, and the order of the classes ----


def guesses(share, k=12, n=20, seed=0):
    """Labels (k · n,), and answers of which about so many are right, the others anything."""
    rng, labels = np.random.default_rng(seed), np.repeat(np.arange(k), n)
    return np.where(rng.random(len(labels)) < share, labels, rng.integers(k, size=len(labels))), labels


@pytest.mark.parametrize(("right", "n", "outputs", "told"), [
    (29, 240, 12, True), (20, 240, 12, True), (1, 240, 1000, True), (0, 20, 12, True), (50, 100, 2, True),
    (80, 240, 12, False), (223, 240, 12, False), (12, 240, 1000, False), (3, 6, 2, False), (0, 1, 2, False),
    (75, 100, 2, False), (1, 10, 1000, False)])
def test_what_is_near_chance(right, n, outputs, told):
    """12 % of 240 where guessing gives 8.3 % is; 5 % of a thousand classes is not; six pictures tell nothing."""
    assert near_chance(right, n, outputs) is told


def test_an_order_that_fits_better_is_found_on_pictures_that_had_no_say():
    predicted, labels = guesses(0.9)
    order = np.random.default_rng(1).permutation(12)
    before, after, held = other_order(order[predicted], labels, 12)
    assert held == 120 and before < 30 and after == other_order(predicted, labels, 12)[0] > 100
    noise, labels = guesses(0.0, n=6)
    before, after, held = other_order(noise, labels, 12)
    assert held == 36 and after < 12, "an order fitted to noise does not hold on other pictures"


def test_doubts():
    predicted, labels = guesses(0.9)
    swapped = np.array([1, 0, *range(2, 12)])[predicted]  # two classes only: far from chance
    turned = np.roll(np.arange(12), 1)[predicted]
    assert not doubt_about(predicted, labels, 12) and not doubt_about(predicted, labels, 12, "the folders")
    assert "guessed (the folders)" in (said := doubt_about(turned, labels, 12, "the folders"))
    assert "another order" in said and "--classes FILE" in said
    assert not doubt_about(swapped, labels, 12) and "another order" in doubt_about(
        *map(np.tile, (swapped, labels), (9, 9)), 12, "the folders")
    assert "guessing gives 8.3 %" in doubt_about(turned, labels, 12), "a known order at chance: no order is blamed"
    assert not doubt_about(np.zeros(6, int), np.repeat([0, 1], 3), 2, "the folders"), "six pictures tell nothing"


def test_average_precision_of_ties_and_extremes():
    scores, truth = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([True, False, False, True])
    assert average_precision(scores, truth) == 0.5
    assert average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, True, False])) == 1.0
    assert average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([False, False, True])) == pytest.approx(1 / 3)
