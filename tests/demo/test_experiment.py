"""The demo: its rule, its statistics, and a small run from end to end."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
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
    SHIFTED,
    TRIALS,
    claims_table,
    headline,
    results_table,
    select,
    sentences,
    settings,
)

ROOT = Path(__file__).parents[2]


def made_up(values):
    """Scores in which (method, seed) has the given adversarial value and 0 elsewhere."""
    rows = []
    for (method, seed), value in values.items():
        for name in ("val", "v2", *SHIFTED):
            for split in ("all", "fine-tuned", "other"):
                rows.append((method, seed, name, split, "top1", value if name == "adversarial" else 0.0))
        rows += [(method, seed, "segmentation", "all", m, 1.0) for m in ("pixel_accuracy", "mean_iou", "mean_average_precision")]
    return pd.DataFrame(rows, columns=["method", "seed", "set", "split", "metric", "value"])


def test_headline_and_verdicts():
    scores = made_up({("plain", s): 10.0 + s for s in range(5)} | {("cft", s): 20.0 + s + (s % 2) for s in range(5)}
                     | {("cft-paper", s): 10.0 + s * (-1) ** s for s in range(5)})
    values = headline(scores).set_index(["method", "seed", "column"])["value"]
    assert values["cft", 3, "OOD-7"] == pytest.approx(24 / 7) and values["plain", 2, "adversarial, other"] == 12
    claims = claims_table(scores).set_index("claim")
    row = claims.loc["CFT (saturating map, image means) beats plain fine-tuning on adversarial backgrounds"]
    d = np.array([10, 11, 10, 11, 10])
    half = 2.7764451 * d.std(ddof=1) / np.sqrt(5)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half), abs=1e-6)
    assert row["verdict"] == "holds"
    assert claims.loc["The paper's form of CFT (min–max map, region means) beats plain fine-tuning on adversarial backgrounds", "verdict"] == "open"
    assert claims.loc["CFT beats the paper's form on adversarial backgrounds", "verdict"] == "holds"
    assert "+10.4 points" in sentences(claims_table(scores)) and "Open" in sentences(claims_table(scores))
    assert results_table(scores).loc["CFT", "adversarial"] == f"{22.4:.1f} ± {np.std([20, 22, 22, 24, 24], ddof=1):.1f}"


def test_a_claim_can_be_contradicted():
    scores = made_up({("plain", s): 50.0 for s in range(3)} | {("cft", s): 20.0 + s for s in range(3)})
    assert set(claims_table(scores)["verdict"]) >= {"contradicted"}


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


@pytest.mark.parametrize(("folder", "methods"), [("demo", QUICK), ("full", LABELS)])
def test_published_tables_follow_from_the_published_results(folder, methods):
    home = ROOT / "figures" / folder
    scores = pd.read_csv(home / "results.csv")
    assert set(scores["seed"]) == set(demo.SEEDS) and list(dict.fromkeys(scores["method"])) == list(methods)
    pd.testing.assert_frame_equal(results_table(scores).reset_index(drop=True), pd.read_csv(home / "table.csv", index_col=0).reset_index(drop=True))
    pd.testing.assert_frame_equal(claims_table(scores), pd.read_csv(home / "claims.csv"), atol=1e-3)


def test_the_quick_and_the_full_table_agree():
    quick, full = (pd.read_csv(ROOT / "figures" / folder / "results.csv") for folder in ("demo", "full"))
    keys = ["method", "seed", "set", "split", "metric"]
    both = quick[quick["metric"] != "seconds"].merge(full, on=keys, suffixes=("", "_full"))
    assert len(both) == (quick["metric"] != "seconds").sum()
    np.testing.assert_allclose(both["value"], both["value_full"], atol=1e-3)


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


def test_the_readme_shows_the_published_results(tmp_path):
    root = ROOT
    copy = tmp_path / "README.md"
    copy.write_text((root / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    demo.write_readme(copy, root / "figures/full")
    assert copy.read_text(encoding="utf-8") == (root / "README.md").read_text(encoding="utf-8")
    assert "| CFT+ |" in copy.read_text(encoding="utf-8")
