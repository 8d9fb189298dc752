"""The pictures decide: occurrence, coverage and their verdicts against plain loops."""
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cft.concepts import masks
from cft.concepts.filters import Concept, ConceptSet, refine
from cft.concepts.grounding import Grounding
from cft.concepts.language import ClassName
from cft.concepts.masks import build_masks
from cft.concepts.store import MaskStore
from cft.concepts.validation import (
    GRID,
    PAPER_THRESHOLDS,
    conclude,
    coverages,
    first_pictures,
    gather_evidence,
    iou,
    look_at_masks,
    measuring,
    occurrences,
    refuse_context,
    sweep,
    validate,
    without_context,
)
from cft.data.folders import list_folder, open_image

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools

TEXTS = ("hat", "leg", "tail", "wing")


def concept_set(owners, names=None):
    ids = sorted({o for os in owners.values() for o in os} | set(names or ()))
    classes = tuple(ClassName(i, (names or {}).get(i, f"a {i}")) for i in ids)
    return ConceptSet(classes, tuple(Concept(t, tuple(sorted(os)), ("important",)) for t, os in sorted(owners.items())))


def pictures(root, classes=("c0", "c1"), each=8):
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (6, 5), (int(c[1:]), i, 7)).save(root / c / f"{i:03d}.png")
    return list_folder(root)


class Scripted:
    """Finds what it is told to: a function of class number, picture number and phrase gives the mask (5, 6)."""

    name = "scripted"

    def __init__(self, script):
        self.script, self.asked = script, []

    def settings(self):
        return {}

    def __call__(self, image, phrases):
        red, green, _ = image.getpixel((0, 0))
        self.asked.append((red, green, tuple(phrases)))
        found = [np.asarray(self.script(red, green, p), bool) for p in phrases]
        return [Grounding(p, torch.zeros(0, 4), torch.zeros(0), torch.from_numpy(m)) for p, m in zip(phrases, found)]


def patchy(red, green, phrase):
    """Random masks that depend on everything; some are empty."""
    rng = np.random.default_rng([red, green, zlib.crc32(phrase.encode())])
    share = {"hat": 0.02, "leg": 0.1, "tail": 0.3, "wing": 0.6}.get(phrase, 0.5)
    return (rng.random((5, 6)) < share) & (rng.random() < 0.3 + share)


OWNERS = {"hat": ("c0", "c1"), "leg": ("c0", "c1"), "tail": ("c0",), "wing": ("c1",)}


@pytest.fixture
def case(tmp_path):
    folder, concepts = pictures(tmp_path / "i"), concept_set(OWNERS)
    return build_masks(folder, concepts, Scripted(patchy), tmp_path / "s", shards=2, progress=False), concepts, folder


def only_first(n, texts):
    """A script in which a phrase is found in the first n[phrase] pictures, and the class everywhere."""
    full = np.ones((5, 6), bool)
    return lambda red, green, phrase: full if phrase not in texts or green < n[phrase] else ~full


# against loops


def slow_occurrence(concepts, folder, n):
    chosen = [(p, c) for p, c, rank in masks.ranked_pictures(folder) if rank < n]
    found = {}
    for class_id, text in concepts.pairs():
        mine = [open_image(folder.root / p).getpixel((0, 0)) for p, c in chosen if c == class_id]
        found[class_id, text] = sum(bool(patchy(r, g, text).any()) for r, g, _ in mine) / len(mine)
    return found


@pytest.mark.parametrize("n", [3, 30])
def test_occurrence_against_loops(case, n):
    store, concepts, folder = case
    table = occurrences(store, concepts, n)
    slow = slow_occurrence(concepts, folder, n)
    assert {(r.class_id, r.concept): r.occurrence for r in table.itertuples()} == slow and len(set(slow.values())) > 2
    assert set(table.pictures) == {min(n, 8)} and (table.hits / table.pictures == table.occurrence).all()
    assert list(table.class_id) == sorted(table.class_id)
    assert all(g.occurrence.is_monotonic_decreasing for _, g in table.groupby("class_id"))


@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.5, 0.3), (0.7, 0.3), (1.0, 1.0)])
def test_coverage_and_verdicts_against_loops(case, thresholds):
    store, concepts, folder = case
    result, slow = validate(store, concepts, *thresholds, context=True), slow_occurrence(concepts, folder, 30)
    for class_id in ("c0", "c1"):
        left = [t for (c, t), share in slow.items() if c == class_id and share >= thresholds[0]]
        values = []
        for i in range(8):
            target = patchy(int(class_id[1:]), i, f"a {class_id}")
            both = either = 0
            for y in range(5):
                for x in range(6):
                    mine = any(patchy(int(class_id[1:]), i, t)[y, x] for t in left)
                    both += mine and target[y, x]
                    either += mine or target[y, x]
            if target.any():
                values.append(both / either)
        assert 0 < len(values) < 8, "some pictures without a class mask are part of this test"
        row = result.classes[result.classes.class_id == class_id].iloc[0]
        assert row.coverage == pytest.approx(sum(values) / len(values), abs=1e-12) and row.pictures == len(values)
        assert row.covered == (row.coverage >= thresholds[1]) and row.kept == len(left)
        assert result.kept.of(class_id) == tuple(sorted(left))


def test_every_prefix_is_the_coverage_of_its_concepts(case):
    store, concepts, _ = case
    ordered = occurrences(store, concepts)
    table = coverages(store, ordered)
    for class_id, rows in table.groupby("class_id"):
        texts = ordered[ordered.class_id == class_id].concept.tolist()
        assert rows.concepts.tolist() == list(range(len(texts) + 1)) and rows.coverage.iloc[0] == 0
        for n, value in zip(rows.concepts, rows.coverage):
            names = [p for p in store.pictures if p.startswith(class_id) and store.class_mask(p).any()]
            slow = np.mean([iou(store.union(p, texts[:n]), store.class_mask(p)) for p in names])
            assert value == pytest.approx(slow, abs=1e-12)


def test_inside_against_loops(case):
    store, concepts, _ = case
    table = validate(store, concepts, 0, 0).concepts.set_index(["class_id", "concept"])
    values = []
    for (class_id, text), row in table.iterrows():
        shares = []
        for i in range(8):
            red = int(class_id[1:])
            mask, target = patchy(red, i, text), patchy(red, i, f"a {class_id}")
            if mask.any() and target.any():
                shares.append(sum(bool(m and t) for m, t in zip(mask.flat, target.flat)) / int(mask.sum()))
        values.append(np.mean(shares) if shares else np.nan)
        assert row.inside == pytest.approx(values[-1], abs=1e-12, nan_ok=True)
    assert np.isnan(values).any() and len(set(values)) > 3


def test_context_is_left_out_unless_it_is_asked_for(tmp_path):
    half = np.arange(30).reshape(5, 6) % 6 < 3
    script = lambda red, green, phrase: {"hat": half, "leg": ~half, "tail": np.ones_like(half)}.get(phrase, half)
    folder, concepts = pictures(tmp_path / "i", ("c0",)), concept_set(dict.fromkeys(TEXTS, ("c0",)))
    store = build_masks(folder, concepts, Scripted(script), tmp_path / "s", progress=False)
    result = validate(store, concepts, context=True)
    assert result.kept == concepts == validate(store, concepts, apply=False).kept
    assert dict(zip(result.concepts.concept, result.concepts.inside)) == {"hat": 1, "leg": 0, "tail": 0.5, "wing": 1}
    left = without_context(result)
    assert left.of("c0") == ("hat", "tail", "wing")
    assert left.dropped[-1].reason == "0% of it on the class, less than 50%"
    assert without_context(result, 0.51).of("c0") == ("hat", "wing") and without_context(result, 0) == concepts
    assert validate(store, without_context(result, 0.51)).classes.coverage.tolist() == [1.0]
    assert result.classes.coverage.tolist() == [0.5]
    with pytest.raises(ValueError, match="inside must lie"):
        without_context(result, 50)
    ours = validate(store, concepts)
    assert ours.kept == left and ours.classes[["tried", "kept", "coverage"]].values.tolist() == [[4, 3, 0.5]]
    told = ours.concepts.set_index("concept")
    assert told.accepted.to_dict() == {"hat": True, "leg": False, "tail": True, "wing": True}
    assert told.reason["leg"] == left.dropped[-1].reason and ours.concepts.inside.equals(result.concepts.inside)
    nothing = concepts.without({("c0", t): "" for t in ("hat", "tail", "wing")})
    assert validate(store, nothing).classes.note.tolist() == ["no concept is left"]


def test_iou_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 4, 5)) < rng.random()
        both = sum(bool(x and y) for x, y in zip(a.flat, b.flat))
        either = sum(bool(x or y) for x, y in zip(a.flat, b.flat))
        assert iou(a, b) == (both / either if either else 1.0)


# the rule at its edge


def test_four_of_thirty_are_too_few_and_five_are_enough(tmp_path):
    n = {"hat": 4, "leg": 5, "tail": 0, "wing": 30}
    folder, concepts = pictures(tmp_path / "i", ("c0",), each=30), concept_set(dict.fromkeys(TEXTS, ("c0",)))
    store = build_masks(folder, concepts, Scripted(only_first(n, TEXTS)), tmp_path / "s", progress=False)
    result = validate(store, concepts)
    assert result.kept.of("c0") == ("leg", "wing")
    reasons = dict(zip(result.concepts.concept, result.concepts.reason))
    assert reasons["hat"] == "found in 4 of 30 pictures, fewer than 15%"
    assert reasons["leg"] == "found in 5 of 30 pictures, at least 15%"
    assert {d.text: d.reason for d in result.kept.dropped} == {"hat": reasons["hat"], "tail": reasons["tail"]}
    assert result.classes.coverage.tolist() == [1.0]  # the union is the class mask
    s = result.summary
    assert (s["phrases"], s["of phrases"], s["pairs"], s["of pairs"]) == (2, 4, 2, 4)
    assert s["mean occurrence"] == pytest.approx(35 / 60)
    twenty = validate(store, concepts, occurrence=3 / 20, pictures=20).concepts.set_index("concept")
    ranks = {p: r for p, _, r in masks.ranked_pictures(folder)}
    hits = sum(ranks[f"c0/{i:03d}.png"] < 20 for i in range(4))
    assert twenty.loc["hat", "hits"] == hits and twenty.loc["hat", "accepted"] == (hits >= 3)


def test_exactly_the_threshold_is_enough(tmp_path):
    folder, concepts = pictures(tmp_path / "i", ("c0",), each=20), concept_set({"hat": ("c0",), "leg": ("c0",)})
    half = np.zeros((5, 6), bool)
    half[:, :3] = True

    def script(red, green, phrase):
        return {"hat": half & (green < 3), "leg": half}.get(phrase, np.ones((5, 6), bool))

    store = build_masks(folder, concepts, Scripted(script), tmp_path / "s", progress=False)
    result = validate(store, concepts, 0.15, 0.5)  # 3 of 20 and half of the object
    assert result.kept == concepts and result.classes.coverage.tolist() == [0.5] and result.classes.covered.all()
    assert not validate(store, concepts, 0.15, 0.51).classes.covered.any()


def test_a_class_that_is_not_covered_keeps_its_concepts(tmp_path):
    one = np.zeros((5, 6), bool)
    one[0, 0] = True
    folder, concepts = pictures(tmp_path / "i"), concept_set(OWNERS)
    script = lambda red, green, phrase: np.ones((5, 6), bool) if phrase.startswith("a ") else one & (red == 0)
    store = build_masks(folder, concepts, Scripted(script), tmp_path / "s", progress=False)
    result = validate(store, concepts)
    assert result.kept.of("c0") == concepts.of("c0") and result.kept.of("c1") == ()
    assert result.classes.note.tolist() == ["below 20%", "no concept is left"]
    assert result.classes.coverage.tolist() == [1 / 30, 0]
    assert result.summary["classes flagged"] == 2 and result.summary["classes without concepts"] == 1
    assert "hat" in {c.text for c in result.kept.concepts}, "a concept that one owner keeps stays in the set"


def test_class_masks_from_elsewhere(tmp_path, case):
    store, concepts, folder = case
    for sample in folder.samples:
        ids = np.zeros((5, 6, 3), np.uint8)
        ids[:2] = (0, 1, 0)
        file = tmp_path / "m" / folder.name(sample)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(file)
    human = masks.import_imagenet_s(folder, tmp_path / "m", concepts, tmp_path / "h", progress=False)
    result = validate(store, concepts, class_masks=human)
    drawn, mine = np.arange(30).reshape(5, 6) < 12, [p for p in store.pictures if p.startswith("c0")]
    expected = np.mean([iou(store.union(p, result.kept.of("c0")), drawn) for p in mine])
    row = result.classes.set_index("class_id").loc["c0"]
    assert row.coverage == pytest.approx(expected, abs=1e-12) and row.pictures == 8


# what cannot be measured


def test_classes_without_pictures_or_class_masks(tmp_path):
    concepts = concept_set({"hat": ("c0", "c7"), "leg": ("c7",)}, {"c0": "a c0", "c7": "a c7", "c8": "a c8"})
    folder = pictures(tmp_path / "i", ("c0",))
    script = lambda red, green, phrase: np.full((5, 6), phrase == "hat")
    store = build_masks(folder, concepts, Scripted(script), tmp_path / "s", progress=False)
    result = validate(store, concepts)
    assert result.kept == concepts
    table, classes = result.concepts.set_index(["class_id", "concept"]), result.classes.set_index("class_id")
    assert table.loc[("c7", "leg"), "reason"] == "no pictures of the class"
    assert np.isnan(table.loc[("c7", "leg"), "occurrence"])
    assert classes.loc["c0", "note"] == "the class itself is found in no picture"
    assert np.isnan(classes.loc["c0", "coverage"])
    feedback = result.feedback()
    assert feedback.occurrence == {("c0", "hat"): 1.0} and feedback.coverage == {}
    assert "c7" in result._repr_html_() and "nan" not in repr(result).lower().replace("coverage nan%", "")


def test_pictures_set_aside_do_not_count(tmp_path):
    folder, concepts = pictures(tmp_path / "i", ("c0",)), concept_set({"hat": ("c0",)})
    for i in (1, 5):
        (tmp_path / f"i/c0/{i:03d}.png").write_bytes(b"broken")
    store = build_masks(folder, concepts, Scripted(only_first({"hat": 2}, TEXTS)), tmp_path / "s", progress=False)
    row = occurrences(store, concepts).iloc[0]
    assert (row.hits, row.pictures) == (1, 6)
    three = first_pictures(store, 3).picture.tolist()
    ranked = sorted(masks.ranked_pictures(folder), key=lambda x: x[2])
    order = [p for p, _, _ in ranked if p not in ("c0/001.png", "c0/005.png")]
    assert three == order[:3]


def test_concepts_that_were_not_looked_for(case):
    store, concepts, _ = case
    richer = concept_set(OWNERS | {"antenna": ("c1",)})
    with pytest.raises(ValueError, match="'antenna' of c1 was looked for in 0 of 8 pictures"):
        validate(store, richer)


@pytest.mark.parametrize("bad", [
    dict(occurrence=15), dict(coverage=-0.1), dict(occurrence=float("nan")), dict(pictures=0)])
def test_bad_thresholds(case, bad):
    with pytest.raises(ValueError, match="must lie in|must be at least 1"):
        validate(case[0], case[1], **bad)


# the report


def test_skipping_drops_nothing_but_measures(case):
    store, concepts, _ = case
    skipped, applied = validate(store, concepts, 0.7, apply=False), validate(store, concepts, 0.7)
    assert skipped.kept == concepts != applied.kept and "would be" in repr(skipped)
    pd.testing.assert_frame_equal(skipped.concepts, applied.concepts)


def test_the_sweep_is_validation_at_each_threshold(case):
    store, concepts, _ = case
    evidence = gather_evidence(store, concepts)
    table = sweep(evidence, [(a, b) for a in (0, 0.3, 0.5, 1) for b in (0.3, 1)])
    for row in table.itertuples():
        one = validate(store, concepts, row.occurrence, row.coverage, context=True)
        assert row.phrases == len({t for _, t in one.kept.pairs()}) and row.pairs == len(one.kept.pairs())
        assert row.covered == one.classes.covered.mean()
        assert row.mean_coverage == pytest.approx(one.classes.coverage.mean(), nan_ok=True)
    assert table.groupby("coverage").pairs.is_monotonic_decreasing.all() and table.pairs.nunique() > 2
    assert set(PAPER_THRESHOLDS) <= set(GRID)
    assert conclude(evidence, concepts).kept == validate(store, concepts, context=True).kept


def test_hostile_text_is_shown_as_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    folder, concepts = pictures(tmp_path / "i", ("c0",)), concept_set({evil: ("c0",)}, {"c0": "<script>"})
    store = build_masks(folder, concepts, Scripted(patchy), tmp_path / "s", progress=False)
    page = validate(store, concepts)._repr_html_()
    assert "<img" not in page and "<script" not in page and "&lt;img" in page and "&lt;script" in page


def test_refinement_grounds_only_what_is_new(tmp_path):
    folder, concepts = pictures(tmp_path / "i"), concept_set(OWNERS)
    n = {"hat": 0, "leg": 8, "tail": 8, "wing": 8, "crest": 8}
    grounder = Scripted(only_first(n, n))
    measured = measuring(folder, grounder, tmp_path / "rounds", pictures=5)
    first = measured(concepts)
    assert first.occurrence[("c0", "hat")] == 0 and first.occurrence[("c1", "wing")] == 1
    assert first.coverage == {"c0": 1, "c1": 1}
    before = len(grounder.asked)
    assert before == 10 and measured(concepts) == first and len(grounder.asked) == before
    richer = concept_set(OWNERS | {"crest": ("c1",)})
    assert measured(richer).occurrence[("c1", "crest")] == 1
    assert [phrases for _, _, phrases in grounder.asked[before:]] == [("crest",)] * 5
    assert len(MaskStore(tmp_path / "rounds/0", tmp_path / "rounds/1").phrases(folder.names[8])) in (0, 5)
    again = Scripted(only_first(n, n))
    resumed = measuring(folder, again, tmp_path / "rounds", pictures=5)
    assert resumed(concepts) == first and again.asked == []
    left, history = refine(concepts, measured, lambda questions: [])
    assert ("c0", "hat") not in left.pairs() and history[0].rare == 2


@pytest.fixture
def drawn_masks(tmp_path):
    """Two classes of three pictures, with an object in the middle; a function that draws the masks of each class."""
    def made(masks, objects=True):
        middle = np.zeros((64, 64), bool)
        middle[20:44, 20:44] = True
        for label, mask in masks.items():
            for k in range(3):
                own = mask if isinstance(mask, np.ndarray) else mask(k)
                for kind, value in (("i", middle), ("m", own), ("o", middle)):
                    file = tmp_path / kind / label / f"{k}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(255 * value.astype(np.uint8)).convert("RGB" if kind == "i" else "L").save(file)
        folder = list_folder(tmp_path / "i").with_masks(tmp_path / "m", tmp_path / "o" if objects else None)
        return look_at_masks(folder).set_index("class")

    return made


def test_masks_that_would_teach_the_background_are_refused_by_name(drawn_masks):
    on, sky = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    on[22:40, 22:40], sky[:40] = True, True
    found = drawn_masks({"bird": sky, "fish": on})
    overlap = 20 * 24 / (40 * 64)
    assert found.off["bird"] == pytest.approx(1 - overlap) and found.off["fish"] == 0
    assert found.picture["bird"] == 40 / 64 and list(found.doubt != "") == [True, False]
    with pytest.raises(ValueError, match=r"the masks of 1 of 2 classes would teach the background \(bird: 81% of its"):
        refuse_context(found.reset_index())
    refuse_context(found.reset_index().tail(1))


def test_masks_without_objects_are_judged_by_frame_and_likeness(drawn_masks):
    around, on = np.ones((64, 64), bool), np.zeros((64, 64), bool)
    around[16:48, 16:48], on[20:30, 20:50] = False, True
    found = drawn_masks({"bird": around, "fish": lambda k: np.roll(on, 8 * k, 0)}, objects=False)
    assert found.off.isna().all() and found.frame["bird"] == 1 and "fills 100% of the frame" in found.doubt["bird"]
    assert found.doubt["fish"] == "" and found.alike["fish"] < 0.5
    assert drawn_masks({"bird": on, "fish": on}, objects=False).doubt.str.contains("those of all other classes").all()
