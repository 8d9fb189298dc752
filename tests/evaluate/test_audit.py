"""The audit against plain loops and worlds with a known truth: models that read only the object or the background."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, scan
from cft.data.models import base_model
from cft.data.testsets import folder_set
from cft.evaluate.audit import (
    CLEARED,
    LEANS,
    LITTLE,
    UNKNOWN,
    Rule,
    audit,
    examine,
    frame_of,
    paired_interval,
    partners,
    summarise,
    variants,
)
from cft.evaluate.metrics import COLUMNS, wilson_interval
from cft.evaluate.passes import checkpoint, reading_of, run_pass
from cft.explain.maps import ATTRIBUTIONS, relevance
from cft.train.loop import fine_tune
from cft.train.objectives import RECIPES

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
EVIL = '<img src=x onerror="alert(1)">&'


class ByColour(nn.Module):
    """Names the class whose colour is nearest to one place of the picture: the middle (the object) or the corner."""

    num_classes = 3
    pretrained_cfg = dict(architecture="by colour", input_size=(3, 24, 24), crop_pct=1.0, interpolation="bilinear",
                          mean=(0.5,) * 3, std=(0.5,) * 3)

    def __init__(self, corner):
        super().__init__()
        self.place = slice(0, 2) if corner else slice(10, 14)
        self.colours = nn.Parameter(torch.tensor(COLOURS / 255 * 2 - 1).float())

    def forward(self, x):
        seen = x[:, :, self.place, self.place].mean((2, 3))
        return -(seen[:, None] - self.colours).square().sum(2)


def write(root, counts, masks=True, names=("one", "two", "three")):
    """Pictures of 24 × 24: a square in the colour of the class before a background in nearly the same colour."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(zip(names, counts)):
        for folder in ("images", "objects"):
            (root / folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = np.clip(COLOURS[label] + rng.integers(-20, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
            mask = np.zeros((24, 24), np.uint8)
            mask[7:17, 7:17] = 255
            picture[7:17, 7:17] = COLOURS[label] * 0.8
            Image.fromarray(picture).save(root / "images" / name / f"{i:03d}.png")
            Image.fromarray(mask).save(root / "objects" / name / f"{i:03d}.png")
    return scan(root / "images", objects=root / "objects" if masks else None, classes=list(names))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = backdrop.write(tmp_path_factory.mktemp("world") / "world", {"val": 5}, seed=1)
    return scan(root / "images/val", objects=root / "objects/val", classes=list(backdrop.CLASSES)).only([0, 2, 6])


# ---- pairs and intervals ----


def test_partners_are_what_they_are_called():
    rng = np.random.default_rng(0)
    seen = set()
    for seed in range(200):
        labels = rng.integers(0, 4, 12)
        same, other = partners(labels, seed)
        for i in range(12):
            alone, everyone = (labels == labels[i]).sum() == 1, (labels == labels[i]).all()
            assert (same[i] == -1) == alone and (alone or (same[i] != i and labels[same[i]] == labels[i]))
            assert (other[i] == -1) == everyone and (everyone or labels[other[i]] != labels[i])
        fixed, _ = partners([0, 0, 0, 0], seed)
        seen |= set(enumerate(fixed.tolist()))
    assert seen == {(i, j) for i in range(4) for j in range(4) if i != j}  # everyone may get everyone
    assert all(np.array_equal(a, b) for a, b in zip(partners(labels, 3), partners(labels, 3)))
    assert not np.array_equal(partners(np.arange(40) % 2, 0)[0], partners(np.arange(40) % 2, 1)[0])


def test_paired_interval_against_the_formula_and_its_promise():
    for n, b, c in ((20, 8, 1), (20, 0, 0), (7, 0, 7), (50, 25, 25), (1, 1, 0)):
        first = np.array([True] * b + [False] * c + [True] * (n - b - c))
        second = np.array([False] * b + [True] * c + [True] * (n - b - c))
        p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
        half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
        value, low, high = paired_interval(first, second)
        assert value == pytest.approx(100 * (b - c) / n)
        assert low == pytest.approx(100 * max(-1, p - q - half)) and high == pytest.approx(100 * min(1, p - q + half))
    n = 12  # how often the truth is inside, summed over all outcomes
    for p, q in ((0.02, 0.02), (0.3, 0.0), (0.5, 0.1), (0.25, 0.25), (0.05, 0.0)):
        inside = 0.0
        for b, c in itertools.product(range(n + 1), repeat=2):
            if b + c <= n:
                answers = np.array([0] * b + [1] * c + [2] * (n - b - c))
                _, low, high = paired_interval(answers != 1, answers != 0)
                ways = math.comb(n, b) * math.comb(n - b, c)
                inside += (low <= 100 * (p - q) <= high) * ways * p**b * q**c * (1 - p - q) ** (n - b - c)
        assert inside > 0.92, (p, q, inside)
    with pytest.raises(ValueError, match="equally long"):
        paired_interval(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="equally long"):
        paired_interval(np.ones(0), np.ones(0))


@pytest.mark.parametrize("gap, word", [
    ((30, 1, 60), LEANS), ((10, 0.1, 20), LEANS), ((9.9, 0.1, 20), LITTLE), ((3, 1, 5), LITTLE), ((3, 0, 9.9), CLEARED),
    ((-40, -60, -20), CLEARED), ((3, 0, 10), UNKNOWN), ((50, -1, 90), UNKNOWN), ((float("nan"),) * 3, UNKNOWN)])
def test_the_rule(gap, word):
    assert Rule().verdict(*gap) == word


def test_rules_that_cannot_be():
    for margin in (0, -1, 101, float("nan")):
        with pytest.raises(ValueError, match="margin must lie in"):
            Rule(margin)


# ---- pictures ----


def test_frame_and_variants_pixel_by_pixel(world):
    frame = frame_of(16, 24)
    for y, x in itertools.product(range(16), range(24)):
        assert frame[y, x] == (y < 2 or y >= 14 or x < 3 or x >= 21)
    images = MaskedImages(world, Preprocess.of(base_model(0)))
    picture, same, other = (default_collate([images[i]]) for i in (0, 1, 9))
    shown = variants(picture, same, other)
    assert set(shown) == {"own", "other", "blurred", "bare", "alone"}
    front = picture["object"][:, None].expand_as(picture["image"])
    assert torch.equal(shown["bare"][front], picture["image"][front]) and not shown["bare"][~front].any()
    for y, x in itertools.product(range(0, 64, 3), repeat=2):
        for name, partner in (("own", same), ("other", other)):
            if picture["object"][0, y, x]:
                assert torch.equal(shown[name][0, :, y, x], picture["image"][0, :, y, x])
            elif not partner["object"][0, max(y - 1, 0):y + 2, max(x - 1, 0):x + 2].any():
                assert torch.equal(shown[name][0, :, y, x], partner["image"][0, :, y, x])
        if picture["object"][0, y, x]:
            assert torch.equal(shown["blurred"][0, :, y, x], picture["image"][0, :, y, x])
    blind = variants({"image": picture["image"]}, {}, {})
    assert set(blind) == {"frame_blurred"}
    changed = (blind["frame_blurred"] != picture["image"])[0].any(0)
    assert not changed[8:56, 8:56].any() and changed[:8].float().mean() > 0.9


def test_examine_against_a_loop(world):
    model = base_model(0)
    images = MaskedImages(world, Preprocess.of(model))
    table = examine(model, images, batch=4, seed=5)
    same, other = partners([s.label for s in world.samples], 5)
    for i, row in table.iterrows():
        picture, a, b = (default_collate([images[j]]) for j in (i, same[i], other[i]))
        x, label = picture["image"], world.samples[i].label
        with torch.no_grad():
            odds = model(x).softmax(-1)[0]
            said = {name: int(model(v).argmax()) for name, v in variants(picture, a, b).items()}
        assert row.id == world.samples[i].path.relative_to(world.root).as_posix() and row.label == label
        assert row.predicted == odds.argmax() and row.probability == pytest.approx(float(odds.max()), abs=1e-4)
        assert row.correct == (odds.argmax() == label) and row.other_predicted == said["other"]
        assert {name: row[name] for name in said} == {name: float(guess == label) for name, guess in said.items()}
        assert row.own_from == table.id[same[i]] and row.other_from == table.id[other[i]]
        values, mask = relevance(model, x, differentiable=False).patches[0], picture["object"][0]
        off = total = 0.0
        for r, c in itertools.product(range(8), range(8)):
            positive = max(float(values[r, c]), 0.0)
            total += positive
            off += positive * (1 - mask[8 * r:8 * r + 8, 8 * c:8 * c + 8].float().mean().item())
        assert row.off == pytest.approx(100 * off / total, rel=1e-3)
        assert row.background == pytest.approx(100 - 100 * mask.float().mean().item())
    again = examine(model, images, batch=15, workers=2, seed=5)
    pd.testing.assert_frame_equal(table, again, rtol=1e-3)


def test_pictures_without_a_test_are_left_out_and_counted(tmp_path):
    folder = write(tmp_path, (5, 4, 1))
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(tmp_path / "objects" / "one" / "000.png")          # no object
    Image.fromarray(np.full((24, 24), 255, np.uint8)).save(tmp_path / "objects" / "two" / "000.png")      # nothing else
    found = audit(ByColour(corner=True), folder, progress=False)
    table = found.pictures.set_index("id")
    for name in ("one/000.png", "two/000.png"):
        assert table.loc[name, ["own", "other", "blurred", "bare", "alone", "background"]].isna().all()
        assert table.loc[name, "correct"]
    assert np.isnan(table.own["three/000.png"]) and table.own_from["three/000.png"] == ""
    text, bare = " ".join(found.unmeasured), 0
    for name, row in table.iterrows():
        if name not in ("one/000.png", "two/000.png"):
            for test in ("own", "other"):
                assert np.isnan(row[test]) == (row[f"{test}_from"] in ("", "two/000.png"))
            bare += "two/000.png" in (row.own_from, row.other_from)
    assert bare > 0 and f"{bare} pictures whose partner shows no background" in text
    assert "2 pictures whose object is out of view or fills the picture" in text
    assert "1 pictures without another one of their class" in text
    assert found.table().set_index("class").verdict["three"] == UNKNOWN


# ---- numbers ----


def test_summarise_against_counting():
    rng = np.random.default_rng(0)
    n = 40
    table = pd.DataFrame({"id": [f"{i}" for i in range(n)], "label": rng.integers(0, 3, n)})
    for column, rate in {"correct": 0.8, "own": 0.7, "other": 0.4, "blurred": 0.6, "alone": 0.2}.items():
        right = rng.random(n) < rate
        table[column] = right if column == "correct" else right.astype(float)
    table["off"], table["background"] = 100 * rng.random(n), 100 * rng.random(n)
    table.loc[:4, "own"] = np.nan
    rows = summarise(table, ("a", "b", "c"), "val")
    assert tuple(rows.columns) == COLUMNS and set(rows.set) == {"val"}
    rows = rows.set_index(["split", "metric"])
    for split in ("all", "class a", "class b", "class c"):
        part = [r for _, r in table.iterrows() if split == "all" or "abc"[r.label] == split[-1]]
        for metric, column in (("accuracy", "correct"), ("own_background", "own"), ("background_alone", "alone")):
            values = [r[column] for r in part if not np.isnan(r[column])]
            row = rows.loc[split, metric]
            assert row.n == len(values) and row.value == pytest.approx(100 * sum(values) / len(values))
            assert (row.low, row.high) == pytest.approx(wilson_interval(int(sum(values)), len(values)))
        differences = {"gap": ("own", "other"), "swap_drop": ("correct", "other"), "blur_drop": ("correct", "blurred")}
        for metric, (a, b) in differences.items():
            pairs = [(r[a], r[b]) for r in part if not np.isnan(r[a])]
            assert rows.loc[split, metric].n == len(pairs)
            assert rows.loc[split, metric].value == pytest.approx(100 * sum(x - y for x, y in pairs) / len(pairs))
        values = [r.off for r in part]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        row = rows.loc[split, "off_object"]
        assert row.value == pytest.approx(mean) and 1.9 * spread < row.high - mean < 2.5 * spread
    assert "in_frame" not in rows.index.get_level_values(1)


# ---- verdicts ----


def test_models_whose_truth_is_known(tmp_path):
    folder = write(tmp_path, (40, 40, 40))
    guilty, innocent = (audit(ByColour(corner), folder, progress=False) for corner in (True, False))
    assert guilty.verdict == LEANS and innocent.verdict == CLEARED
    assert set(guilty.table().verdict) == {LEANS} and set(innocent.table().verdict) == {CLEARED}
    numbers = {name: found.numbers[found.numbers.split == "all"].set_index("metric").value
               for name, found in (("guilty", guilty), ("innocent", innocent))}
    assert numbers["guilty"]["gap"] == 100 == numbers["guilty"]["swap_drop"] and numbers["guilty"]["blur_drop"] == 0
    assert numbers["guilty"]["background_alone"] == 100 and numbers["innocent"]["gap"] == 0
    assert "relevance:" in guilty.unmeasured[0] and "off_object" not in numbers["guilty"]
    worst = guilty.worst(3, "two")
    assert set(worst.label) == {"two"} and len(worst) == 3 and (worst.other_predicted != "two").all()
    assert len(innocent.worst()) == 0 and guilty.look("one/000.png").relevance is None
    by_path = audit(ByColour(True), tmp_path / "images", tmp_path / "objects", ("one", "two", "three"), progress=False)
    assert by_path.numbers.equals(guilty.numbers)


def test_few_pictures_are_not_cleared(tmp_path):
    found = audit(ByColour(corner=False), write(tmp_path, (4, 4, 4)), progress=False)
    assert found.numbers.query("metric == 'gap'").value.eq(0).all() and set(found.table().verdict) == {UNKNOWN}


def test_no_verdict_on_a_network_that_guesses(world):
    network = base_model(0)
    torch.manual_seed(0)
    nn.init.normal_(network.head.weight)  # as before any training
    found = audit(network, world, progress=False)
    assert "guessing gives 8.3 %" in found.doubt and set(found.verdicts().values()) == {UNKNOWN}
    assert found.unmeasured[0] == f"a verdict: {found.doubt}" and "leans" not in repr(found)


def test_the_base_leans_and_its_pictures_can_be_seen(world):
    found = audit(base_model(0), world, progress=False)
    assert found.verdict == LEANS and found.unmeasured == () and "leans on the background" in repr(found)
    table = found.table()
    assert table["class"][0] == "all" and table.gap[1:].is_monotonic_decreasing and len(table) == 4
    worst = found.worst(4)
    assert worst.off.is_monotonic_decreasing and (worst.label == worst.predicted).all()
    assert (worst.label != worst.other_predicted).all()
    row = worst.iloc[0]
    case = found.look(row.id)
    assert case.label == row.label and case.answers["other"][0] == row.other_predicted
    assert case.answers["original"][0] == row.predicted
    assert case.answers["original"][1] == pytest.approx(row.probability, abs=1e-4)
    assert case.answers["own"][0] == row.label
    original = np.asarray(Image.open(world.root / row.id)) / 255
    assert np.allclose(case.pictures["original"].permute(1, 2, 0).numpy(), original, atol=1e-5)
    assert case.object.shape == (64, 64) and case.relevance.shape == (8, 8)
    assert set(case.pictures) == set(case.answers) == {"original", "own", "other", "blurred", "bare", "alone"}
    with pytest.raises(ValueError, match="no picture 'x.png'"):
        found.look("x.png")
    with pytest.raises(ValueError, match="class must be one of"):
        found.worst(name="cloud")


def test_without_masks_there_is_no_verdict(tmp_path):
    found = audit(ByColour(corner=True), write(tmp_path, (5, 5, 5), masks=False), progress=False)
    assert found.verdict == UNKNOWN and "need object masks" in found.unmeasured[-1]
    assert set(found.numbers.metric) == {"accuracy", "frame_blurred", "frame_drop"}
    assert list(found.worst().columns[:2]) == ["id", "label"]
    assert set(found.look("one/000.png").pictures) == {"original", "frame_blurred"}
    assert json.loads(found.to_json())["verdict"] == UNKNOWN


def test_one_class_has_nothing_to_exchange_with(tmp_path):
    found = audit(ByColour(corner=True), write(tmp_path, (6, 6, 6)).only([1]), progress=False)
    assert found.verdict == UNKNOWN and "6 pictures without one of another class" in " ".join(found.unmeasured)


# ---- outside ----


def test_nothing_reaches_a_page_unescaped(tmp_path):
    found = audit(ByColour(corner=True), write(tmp_path, (4, 4, 4), names=("one", EVIL, "two")), progress=False)
    page = found._repr_html_()
    assert EVIL not in page and "<img" not in page and "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;&amp;" in page
    assert "and 2 more classes" in found._repr_html_(classes=1)


def test_json_is_plain_and_complete(tmp_path):
    found = audit(ByColour(corner=True), write(tmp_path / "data", (4, 4, 1)), progress=False)
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    read = json.loads(found.to_json(), parse_constant=refuse)
    assert read["verdict"] == found.verdict and len(read["classes"]) == 4 and len(read["numbers"]) == len(found.numbers)
    assert read["worst"][0]["id"] == found.worst().id[0] and read["rule"] == {"margin": 10.0}
    assert len(read["record"]["sha256"]) == len(read["record"]["data"]) == 64 and read["record"]["model"] == "by colour"


def test_wrong_class_names_are_refused(tmp_path):
    write(tmp_path, (2, 2, 2))
    with pytest.raises(ValueError, match="the model has 3 classes, the folder names 4"):
        audit(ByColour(True), tmp_path / "images", classes=("one", "two", "three", "four"), progress=False)


class NoFloat64(TorchDispatchMode):
    """Refuses to make float64 tensors, as Apple's MPS does."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, torch.Tensor)]
        if any(t.dtype in (torch.float64, torch.complex128) for t in made):
            raise TypeError("MPS has no float64")
        return out


def test_nothing_needs_float64_on_the_device(tmp_path):
    root = backdrop.write(tmp_path / "w", {"train": 1}, seed=1)
    images, masks, objects = (root / name / "train" for name in ("images", "masks", "objects"))
    model, folder = base_model(0), scan(images, masks, objects, list(backdrop.CLASSES)).only([0, 1])
    plain = scan(images, classes=list(backdrop.CLASSES)).only([0, 1])
    expected = audit(model, folder, progress=False).pictures
    with NoFloat64():
        pd.testing.assert_frame_equal(audit(model, folder, progress=False).pictures, expected)
        audit(model, plain, progress=False)
        run_pass(folder_set(plain), [checkpoint(model, "m")], reading_of(model))
        for name in ATTRIBUTIONS:
            relevance(model, torch.randn(1, 3, 64, 64), method=name, differentiable=False)
        for method in ("cft", "cft+", "rrda", "rrr"):
            few = MaskedImages(folder, Preprocess.of(model), train=True)
            fine_tune(model, few, replace(RECIPES[method], epochs=1, batch=2, best=False), progress=False)
