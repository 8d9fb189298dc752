"""The comparison in small: every kind of method from both starting points, on a few pictures, and the parts against loops."""

import numpy as np
import pandas as pd
import pytest
import torch

from cft.data import backdrop
from cft.data.backdrop import CLASSES
from cft.data.models import base_model
from cft.demo.experiment import LABELS as OF_DEMO
from cft.demo.experiment import read_set
from cft.explain.maps import relevance
from cft.related import comparison
from cft.related.comparison import (
    BASES,
    CLAIMS,
    DUALS,
    LABELS,
    comparison_scores,
    comparison_table,
    relevance_on_object,
    run_comparison,
)
from cft.related.segmil import SegMilRecipe
from cft.reproduce.paper import verdicts


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
    assert set(LABELS) == {*BASES, "segmil", *DUALS} and set(BASES) <= set(OF_DEMO)
    assert {c.method for c in CLAIMS} | {c.against for c in CLAIMS} <= set(LABELS)


def test_the_comparison_runs_and_goes_on(tmp_path, monkeypatch):
    def small(root, seed):
        return backdrop.write(root, {"train": 3, "val": 3, "adversarial": 1}, seed=60000 + seed)

    real, real_deal = comparison.settings, comparison.deal_settings
    short = lambda recipe: recipe.__class__(**{**recipe.__dict__, "epochs": 1})
    monkeypatch.setattr(comparison, "write_world", small)
    monkeypatch.setattr(comparison, "settings", lambda *a: short(real(*a)))
    monkeypatch.setattr(comparison, "deal_settings", lambda *a: short(real_deal(*a)))
    monkeypatch.setattr(comparison, "DEMO_RECIPE", SegMilRecipe(rate=1e-3, backbone_rate=0, epochs=2))
    methods = ("original", "cft", "segmil", "dual contrastive")
    rows = run_comparison(tmp_path / "out", (1,), methods, tmp_path / "work", progress=False)
    wide = comparison_scores(rows).pivot(index="method", columns="column", values="value")
    assert list(dict.fromkeys(rows["method"])) == list(methods) and (tmp_path / "out/comparison.csv").is_file()
    assert (wide["answering, ×"] > 0).all() and wide["on object"].between(0, 100).all() and wide["groups, worst group"].le(wide["groups"]).all()
    assert (wide["training, s"] > 0).to_dict() == {m: m != "original" for m in methods}
    assert (wide["preparing, s"] > 0).to_dict() == {m: m in ("cft", "segmil") for m in methods}
    assert wide.loc["segmil", "answering, ×"] > 1.5  # it grounds every picture and runs on every segment
    model, world = base_model(1), tmp_path / "work/pictures_1"
    hits = [int(model(item["image"][None]).argmax()) == item["label"] for item in (read_set(world, "val", model)[k] for k in range(3 * len(CLASSES)))]
    assert wide.loc["original", "val"] == pytest.approx(100 * np.mean(hits), abs=1e-3)
    assert not wide.loc["original"].equals(wide.loc["cft"])
    monkeypatch.setattr(comparison, "_Seed", None)
    assert run_comparison(tmp_path / "out", (1,), methods, tmp_path / "work", progress=False).equals(rows), "nothing is run twice"
    with pytest.raises(ValueError, match="expected some of original, plain.*; got magic"):
        run_comparison(tmp_path / "out", (1,), ("magic",))
    table = comparison_table(rows)
    assert table.loc["SEG-MIL-CBM", "on object"] == f"{wide.loc['segmil', 'on object']:.1f}" and table.loc["Original", "training, s"] == "0.0"
    assert (verdicts(comparison_scores(rows), CLAIMS)["verdict"] == "not run").sum() >= 1


def test_claims_read_the_rows():
    rows = pd.DataFrame([{"method": m, "seed": s, "set": "groups", "split": "worst group", "metric": "top1", "value": v + s, "n": 5}
                         for m, v in (("original", 10.0), ("cft", 20.0), ("segmil", 25.0)) for s in range(4)]
                        + [{"method": m, "seed": s, "set": "groups", "split": "all", "metric": "on_object", "value": v, "n": 5}
                           for m, v in (("original", 20.0), ("cft", 20.0)) for s in range(4)])
    found = verdicts(comparison_scores(rows), CLAIMS).set_index("claim")["verdict"]
    assert found["CFT helps the worst group"] == "holds" and found["CFT beats SEG-MIL-CBM in the worst group"] == "contradicted"
    assert found["CFT moves evidence onto the object"] == "open" and found["DEAL moves evidence onto the object"] == "not run"
