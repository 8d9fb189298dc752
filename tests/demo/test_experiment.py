"""The demo: its rule, its statistics, and a small run from end to end."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cft.data import backdrop
from cft.demo import experiment as demo
from cft.demo.experiment import (
    ANNOTATED,
    BORROWED,
    CLAIMS,
    LABELS,
    QUICK,
    SETTINGS,
    TRIALS,
    select,
    settings,
)

ROOT = Path(__file__).parents[2]


def test_selection_rule():
    rows = [("original", np.nan, 90.0, 40.0), ("cft", 1e-5, 89.0, 50.0), ("cft", 1e-4, 87.5, 60.0), ("cft", 1e-3, 80.0, 90.0),
            ("plain", 1e-5, 10.0, 99.0), ("plain", 1e-4, 20.0, 50.0)]
    trials = pd.DataFrame([(m, s, r, v + d, w + d) for s, d in ((100, -1), (101, 1)) for m, r, v, w in rows],
                          columns=["method", "seed", "rate", "val", "swapped"]).assign(average=np.nan)
    chosen = select(trials).query("selected").set_index("method")["rate"]
    assert chosen["cft"] == 1e-4  # the best swapped among those that lose at most three points
    assert chosen["plain"] == 1e-4  # none qualifies: the best ordinary validation


def test_settings_are_among_the_trials_and_all_methods_have_six():
    assert set(SETTINGS) == set(TRIALS) and set(BORROWED.values()) <= set(SETTINGS)
    assert set(LABELS) == {"original", *SETTINGS, *BORROWED} and set(QUICK) <= set(LABELS) and set(ANNOTATED) <= set(LABELS)
    for method, trials in TRIALS.items():
        assert len(trials) == 6 and SETTINGS[method] in trials
        assert settings(method, 0).rate == SETTINGS[method]["rate"]
    for method, lender in BORROWED.items():  # a variant differs in one thing alone
        a, b = settings(method, 3), settings(lender, 3)
        assert a == b or replace(a, objective=b.objective) == b and not a.objective.weights.align
    assert {m for _, m, a, _ in CLAIMS for m in (m, a)} <= set(LABELS)


def test_published_settings_follow_from_the_published_trials():
    trials = pd.read_csv(ROOT / "figures/full/tuning.csv")
    assert set(trials["seed"]).isdisjoint(demo.SEEDS) and len(trials) == 2 * (6 * len(TRIALS) + 1)
    chosen = select(trials).query("selected").set_index("method")
    for method in TRIALS:
        values = SETTINGS[method]
        assert all(chosen.loc[method, key] == value for key, value in values.items()), method


def test_found_masks_are_found(tmp_path):
    world = backdrop.write(tmp_path / "w", {"train": 8}, seed=5)
    line = demo.find_concepts(world, 3, tmp_path / "found").iloc[0]
    assert 0 < line["kept"] < line["proposed"] and 0.25 < line["masks_iou"] < 0.95 and line["objects_iou"] > 0.5
    audit = pd.read_csv(tmp_path / "found/concepts.csv")
    assert set(audit["accepted"]) == {True, False} and (audit["pictures"] == 8).all()
    chosen = json.loads((tmp_path / "found/chosen.json").read_text())
    base = demo.base_model(3)
    found, annotated, context = (demo.training_images(world, 3, base, m, tmp_path / "found") for m in ("cft", "cft annotated", "cft context"))
    assert [s.path for s in found.folder.samples] == [s.path for s in annotated.folder.samples] and len(found) == len(chosen)
    areas = [np.mean([np.asarray(Image.open(s.mask)).mean() / 255 for s in i.folder.samples]) for i in (found, annotated, context)]
    assert areas[2] > areas[0] > 0 and areas[0] != areas[1], "context concepts cover the background"
    assert {s.label for s in found.folder.samples} == set(demo.tuned_classes(3))


def test_a_small_demo_end_to_end_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TEST_PER_CLASS", 2)
    monkeypatch.setattr(demo, "SEGMENTATION_PER_CLASS", 1)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "write_world", lambda root, seed: backdrop.write(
        root, {"train": 6, **dict.fromkeys(demo.TESTS, 2), "segmentation": 1}, seed=60000 + seed))
    methods = ("original", "plain", "cft")
    tables = demo.run_demo(tmp_path / "out", [0, 1], methods, workers=1, work=tmp_path / "work")
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {"results.csv", "table.csv", "claims.csv", "masks.csv", "demo.json", "results.png", "relevance.png"}
    scores = tables["results"]
    assert scores.groupby(["method", "seed"]).size().nunique() == 1 and set(scores["method"]) == set(methods)
    original = scores[(scores["method"] == "original") & (scores["metric"] == "top1") & (scores["split"] == "all")]
    assert original.set_index(["set", "seed"])["value"]["val"].min() > 70
    assert json.loads((tmp_path / "out/demo.json").read_text())["masks"] == "found"
    (tmp_path / "work/complete").unlink()  # as if it had been killed at the very end: everything is read back
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("scores.csv")}
    again = demo.experiment(tmp_path / "work", [0, 1], methods, 1)
    pd.testing.assert_frame_equal(again, scores, atol=1e-4)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("scores.csv")}
