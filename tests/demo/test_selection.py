"""The rule that chose the settings, what the published trials say by it, and the masks that trials are shown."""
import numpy as np
import pandas as pd
import pytest
import torch
from chapters import from_chapter
from PIL import Image

from cft.demo import selection
from cft.demo.selection import (
    ALLOWED_LOSS,
    DEAL_TRIALS,
    TRIALS,
    TUNING_SEEDS,
    search_rates,
    select,
    swapped_batches,
    tuning_settings,
)
from cft.files import ASSETS, read_json
from cft.related import deal_metrics
from cft.related.segmil import BAG_RULES, HEAD_RATE
from cft.reproduce.settings import Work, read_settings
from cft.reproduce.steps import PaperSteps, in_order, make_steps

NAN = float("nan")

def test_selection_rule():
    rows = [("original", NAN, 90.0, 40.0), ("cft", 1e-5, 89.0, 50.0), ("cft", 1e-4, 87.5, 60.0),
            ("cft", 1e-3, 80.0, 90.0), ("plain", 1e-5, 10.0, 99.0), ("plain", 1e-4, 20.0, 50.0)]
    trials = [(m, s, r, v + d, w + d) for s, d in ((100, -1), (101, 1)) for m, r, v, w in rows]
    means = select(pd.DataFrame(trials, columns=["method", "seed", "rate", "val", "swapped"]))
    chosen = means.query("selected").set_index("method")["rate"]
    assert chosen["cft"] == 1e-4  # the best swapped among those that lose at most three points
    assert chosen["plain"] == 1e-4  # none qualifies: the best ordinary validation
    assert means["eligible"].tolist() == [True, True, True, False, False, False] and ALLOWED_LOSS == {"val": 3.0}
    assert means.set_index(["method", "rate"])["edge"][[("cft", 1e-4), ("plain", 1e-4)]].tolist() == [False, True]

def test_published_settings_follow_from_the_published_trials():
    trials, rates = pd.read_csv(ASSETS / "demo/tuning.csv"), read_settings("demo").rates["demo"]
    assert set(trials["seed"]) == set(TUNING_SEEDS) and set(TUNING_SEEDS).isdisjoint(range(100))
    assert len(trials) == 2 * (6 * len(TRIALS) + 1) and all(len(tried) == 6 for tried in TRIALS.values())
    chosen = select(trials).query("selected").set_index("method")["rate"]
    assert set(chosen.index) == set(TRIALS) and all(chosen[m] in TRIALS[m] for m in TRIALS)
    assert {m: rates[m] for m in TRIALS if "." not in m} == {m: chosen[m] for m in TRIALS if "." not in m}

def test_nothing_better_lies_below_the_smallest_rate():
    """Later trials of the methods whose best rate is the smallest."""
    means = select(pd.read_csv(ASSETS / "demo/tuning_low.csv"))
    original = means.set_index("method")["swapped"]["original"]
    assert (means["swapped"] <= original + 0.5).all()

def test_the_settings_of_the_related_systems_follow_too():
    trials = pd.read_csv(ASSETS / "related/deal_tuning.csv")
    (selected_rate,) = from_chapter("related/04_deal_metrics.ipynb", deal_metrics, "selected_rate")
    assert selected_rate(trials) == deal_metrics.DUAL_RATE and set(DEAL_TRIALS) < set(trials["method"])
    (of_heads,) = from_chapter("appendix/17_selection.ipynb", selection, "SEGMIL_TRIALS")
    tried = pd.read_csv(ASSETS / "related/segmil_tuning.csv").query("backbone_rate == 0")
    assert len(tried) == len(of_heads) == 12
    best = tried.sort_values(["val", "rate"], ascending=[False, True], kind="stable").iloc[0]
    assert (best["rate"], best["top"], best["least"]) == (HEAD_RATE, BAG_RULES.top, BAG_RULES.least)

def test_swapped_pictures_keep_their_objects():
    images, objects = torch.rand(6, 3, 16, 16), torch.zeros(6, 16, 16, dtype=torch.bool)
    objects[:, 4:9, 5:11] = True
    batches = [{"image": images[k:k + 3], "object": objects[k:k + 3], "label": torch.arange(k, k + 3)} for k in (0, 3)]
    found = swapped_batches(batches, 5, times=2)
    assert len(found) == 2 and all(torch.equal(labels, torch.arange(6)) for _, labels in found)
    for swapped, _ in found:
        assert torch.allclose(swapped[:, :, 5:8, 6:10], images[:, :, 5:8, 6:10]) and swapped.shape == images.shape
    assert not torch.equal(found[0][0], found[1][0])
    again = swapped_batches(batches, 5, times=2)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, again))

@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Two guides of a small world: what a class shows, and that with what is around it."""
    settings = read_settings("smoke", drawn_from=5, test_per_class=1, segmentation_per_class=1, per_class=5)
    steps = PaperSteps(Work(settings), tmp_path_factory.mktemp("found"))
    assert make_steps(in_order([steps.guide(3, guide) for guide in ("kept", "context", "class")]), steps.root)
    return steps

@pytest.mark.slow
def test_found_masks_are_found(steps):
    note, of_class = (read_json(steps.root / f"guides/3/{guide}.json") for guide in ("kept", "class"))
    proposed = {len(read_json(steps.root / f"{file}.json")["concepts"]) for file in ("concepts", "kept/3/kept")}
    assert 0 < min(proposed) < max(proposed) and 0.25 < note["agreement"] < 0.95 and of_class["agreement"] > 0.5
    base = steps.world.network("demo", 3)
    sets = [steps.training_images(base, "demo", method, 3) for method in ("cft", "cft.annotated", "cft.context")]
    found, annotated, context = sets
    assert found.folder.names == annotated.folder.names and set(found.folder.names) == set(note["pictures"])
    areas = [np.mean([np.asarray(Image.open(s.mask)).mean() / 255 for s in i.folder.samples]) for i in sets]
    assert areas[2] > areas[0] > 0 and areas[0] != areas[1], "context concepts cover the background"
    assert {s.label for s in found.folder.samples} == set(steps.world.tuned(3))

@pytest.mark.slow
def test_a_trial_gives_the_same_numbers_twice(tmp_path):
    small = tuning_settings(per_class=4, test_per_class=2, epochs=1, bases="shipped", pool=6)
    first, again = (search_rates(tmp_path / name, {"plain": (1e-5,)}, (1,), settings=small) for name in "ab")
    pd.testing.assert_frame_equal(first, again)
    assert first["method"].tolist() == ["original", "plain"] and first[["val", "swapped"]].stack().between(0, 100).all()
    dual = search_rates(tmp_path / "a", {"contrastive": (3e-4,), "cft": (1e-4,)}, (1,), True, small)
    assert dual["method"].tolist() == ["original", "contrastive", "cft"] and dual["val"].gt(50).all()

@pytest.mark.slow
def test_trials_of_heads(tmp_path, monkeypatch):
    trials, segmil_trials = from_chapter("appendix/17_selection.ipynb", selection, "SEGMIL_TRIALS", "segmil_trials")
    monkeypatch.setitem(segmil_trials.__globals__, "SEGMIL_TRIALS", trials[:2])
    small = tuning_settings(test_per_class=2, bases="shipped", pool=4, segmentation_per_class=1)
    found = segmil_trials(tmp_path, 1, trained=False, settings=small)
    assert found["rate"].tolist() == [1e-3, 3e-3] and found["val"].between(20, 100).all()
