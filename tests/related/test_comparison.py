"""The comparison in small: every kind of method from both starting points, and the parts against loops."""

import numpy as np
import pandas as pd
import pytest
import torch

from cft.data import backdrop
from cft.data.backdrop import CLASSES
from cft.data.folders import MaskedImages, Preprocess, list_folder
from cft.data.models import base_model
from cft.evaluate.metrics import COLUMNS
from cft.explain.maps import relevance
from cft.related import comparison
from cft.related.comparison import (
    BASES,
    COMPARED,
    DUALS,
    comparison_scores,
    comparison_steps,
    comparison_table,
    relevance_on_object,
)
from cft.reproduce.paper import claims, verdicts
from cft.reproduce.settings import Work, read_settings
from cft.reproduce.steps import PaperSteps, in_order, make_steps
from cft.reproduce.tables import LABELS

CLAIMS = claims("comparison")

def read_set(world, name, model):
    folder = list_folder(world / "images" / name, list(CLASSES)).with_masks(object=world / "objects" / name)
    return MaskedImages(folder, Preprocess.of(model))

def test_relevance_on_the_object_against_pixels(tmp_path):
    world = backdrop.write(tmp_path / "world", {"val": 1, "adversarial": 1}, seed=3)
    model, shares = base_model(1), []
    for name in ("val", "adversarial"):
        images = read_set(world, name, model)
        for k in range(len(images)):
            picture, mask = images[k]["image"][None], images[k]["object"].numpy()
            with torch.no_grad():
                predicted = model(picture).argmax(-1)
            patches = relevance(model, picture, predicted).patches[0].detach().numpy()
            inside = whole = 0.0
            for r in range(8):
                for c in range(8):
                    positive = max(float(patches[r, c]), 0.0)
                    whole += positive
                    inside += positive * mask[8 * r:8 * r + 8, 8 * c:8 * c + 8].mean()
            shares.append(inside / whole)
    assert relevance_on_object(model, world) == pytest.approx(100 * np.mean(shares), abs=1e-3)
    assert relevance_on_object(model, world, ("val",)) == pytest.approx(100 * np.mean(shares[:12]), abs=1e-3)

def test_who_takes_part():
    assert set(COMPARED) == {*BASES, "segmil", *(f"dual.{m}" for m in DUALS)} and set(BASES) <= set(LABELS)
    assert {c.method for c in CLAIMS} | {c.against for c in CLAIMS} <= set(COMPARED)

@pytest.mark.slow
def test_the_comparison_runs(tmp_path, monkeypatch):
    names = ("original", "cft", "segmil", "dual.contrastive")
    fewer = {"COMPARED": {m: COMPARED[m] for m in names}, "BASES": ("cft",), "DUALS": ("contrastive",)}
    for what, methods in fewer.items():
        monkeypatch.setattr(comparison, what, methods)
    settings = read_settings("smoke", pool=3, test_per_class=3, segmentation_per_class=1)
    steps = PaperSteps(Work(settings, ("comparison",)), tmp_path)
    (step,) = comparison_steps(steps, (1,))
    row = lambda metric, value, part="all": ("segmil", 1, "groups", part, metric, value, None, None, 36)
    made = [row("top1", 50.0), row("top1", 20.0, "worst group"), row("attention", 70.0), row("preparing", 2.0)]
    table = pd.DataFrame([*made, row("training", 3.0), row("answering", 9.0)], columns=["method", "seed", *COLUMNS])
    (tmp_path / "related/segmil").mkdir(parents=True)
    table.to_csv(tmp_path / "related/segmil/1.csv", index=False)  # as if SEG-MIL-CBM had run
    needs = [need for need in step.needs if need.kind != "segmil"]
    assert len(needs) == len(step.needs) - 1 and make_steps(in_order(needs), tmp_path)
    step.make("1")
    rows = pd.read_csv(tmp_path / step.writes[0])
    wide = comparison_scores(rows).pivot(index="method", columns="column", values="value")
    assert set(rows["method"]) == set(names) and set(rows["seed"]) == {1}
    assert (wide["answering, ×"] > 0).all() and wide["on object"].between(0, 100).all()
    assert wide["groups, worst group"].le(wide["groups"]).all() and wide.loc["segmil", "on object"] == 70
    assert (wide["training, s"] > 0).to_dict() == {m: m != "original" for m in names}
    assert (wide["preparing, s"] > 0).to_dict() == {m: m in ("cft", "segmil") for m in names}
    images = read_set(tmp_path / "worlds/1", "val", model := base_model(1))
    hits = [int(model(item["image"][None]).argmax()) == item["label"] for item in map(images.__getitem__, range(36))]
    assert wide.loc["original", "val"] == pytest.approx(100 * np.mean(hits), abs=1e-3)
    assert not wide.loc["original"].equals(wide.loc["cft"])
    table = comparison_table(rows)
    assert table.loc["SEG-MIL-CBM", "on object"] == "70.0" and table.loc["Original", "training, s"] == "0.0"
    assert (verdicts(comparison_scores(rows), CLAIMS)["verdict"] == "not run").sum() >= 1

def test_claims_read_the_rows():
    columns = ["method", "seed", "set", "split", "metric", "value", "n"]
    worst, evidence = {"original": 10.0, "cft": 20.0, "segmil": 25.0}, {"original": 20.0, "cft": 20.0}
    rows = [(m, s, "groups", "worst group", "top1", v + s, 5) for m, v in worst.items() for s in range(4)]
    rows += [(m, s, "groups", "all", "on_object", v, 5) for m, v in evidence.items() for s in range(4)]
    found = verdicts(comparison_scores(pd.DataFrame(rows, columns=columns)), CLAIMS).set_index("claim")["verdict"]
    assert found["CFT helps the worst group"] == "holds"
    assert found["CFT beats SEG-MIL-CBM in the worst group"] == "contradicted"
    assert found["CFT moves evidence onto the object"] == "open"
    assert found["DEAL moves evidence onto the object"] == "not run"
