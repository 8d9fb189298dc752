"""The paper's numbers are whole, their arithmetic is right, and claims are judged as loops judge them."""
import csv
import itertools
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cft.data import backdrop
from cft.data.testsets import CARDS
from cft.reproduce import paper
from cft.reproduce.paper import (
    ARTEFACTS,
    DEMO,
    DEVIATIONS,
    INCONSISTENCIES,
    PAPER,
    SHAPE_CLAIMS,
    Claim,
    artefact,
    claims,
    in_our_form,
    in_paper,
    ledger,
    needed,
    plan,
    reference,
    regime,
    runs,
    scores_of,
    verdicts,
)
from cft.train.objectives import RATES, RECIPES

ROOT = Path(__file__).parents[2]
ROWS = {
    "table1": 240, "table2": 120, "table3": 24, "table4": 216, "table5": 54, "table6": 54, "table7": 8, "table8": 80,
    "table9": 48, "thresholds": 9, "no-validation": 4, "deal1": 108, "deal2": 48, "deal3": 12, "deal4": 15, "deal5": 15,
    "segmil": 4, "timm": 100}
KEYS = ["table", "model", "method", "dataset", "split", "metric"]
T975 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}  # printed tables of the t distribution
CHI4 = (11.1433, 0.48442)  # and of chi-square with 4 degrees of freedom, 97.5 % and 2.5 %


@cache
def lines():
    """The numbers by their keys, read from the CSV files line by line."""
    folder = ROOT / "cft/assets/paper"
    rows = [
        row for file in ("cft", "deal", "segmil", "timm")
        for row in csv.DictReader((folder / f"{file}.csv").open(encoding="utf-8"))]
    found = {tuple(row[k] for k in KEYS): row for row in rows}
    assert len(found) == len(rows)
    return found


def number(table, model, method, dataset, metric="R@1", split="all", column="value"):
    """One number as it stands in the file."""
    return float(lines()[table, model, method, dataset, split, metric][column])


# ---- the numbers ----


def test_every_table_has_all_of_its_rows():
    assert reference().groupby("table", sort=False).size().to_dict() == ROWS
    for table, n in ROWS.items():
        assert len(reference(table)) == n
    with pytest.raises(ValueError, match="no table 'table10'; expected some of table1"):
        reference("table10")


def test_rows_are_whole():
    rows = reference()
    assert list(rows) == [*KEYS, "value", "std"] and not rows.duplicated(KEYS).any()
    missing = rows[rows.value.isna()]
    assert missing.groupby("table").size().to_dict() == {"table8": 32, "deal5": 1}
    accuracies = rows[rows.metric.isin(["R@1", "R@5", "PA", "mIoU", "mAP"]) & (rows.method != "CFT − Original")]
    assert accuracies.value.between(1, 100).all() and set(rows.split) == {"all", "fine-tuned", "other"}
    assert rows[rows["std"].notna()].table.value_counts().to_dict() == {"table9": 48, "deal4": 15}
    wide = rows[rows.metric.isin(["R@1", "R@5"]) & rows.table.isin(["table1", "table2", "table4", "table9"]) &
                (rows.model != "mean of four")]
    wide = wide.pivot(index=KEYS[:-1], columns="metric", values="value")
    assert (wide["R@5"] > wide["R@1"]).all()


@pytest.mark.parametrize("where, value",
                         [(("table1", "CNv2", "CFT", "IN-Sketch", "R@5"), 70.81),
                          (("table1", "DINOv2", "RRDA", "ObjectNet"), 52.42),
                          (("table2", "DeiT", "RRR", "SI-rotation", "R@5"), 63.88),
                          (("table3", "DeiT", "CFT", "ImageNet-Segmentation", "mAP"), 88.16),
                          (("table4", "CNv2", "CFT", "IN-A", "R@5", "other"), 55.63),
                          (("table5", "DINOv2", "Segmentation", "SI-size"), 62.85),
                          (("table6", "ViT-B", "w/o L_cls", "IN-V"), 79.82),
                          (("table7", "ViT-B", "IIA", "IN-R"), 47.58),
                          (("table8", "DINOv2", "RRR", "ImageNet", "lambda_cls"), 2e-8),
                          (("table8", "CNv2", "GradMask", "ImageNet", "learning_rate"), 0.05),
                          (("thresholds", "ViT-B", "CFT, thresholds 5/10", "IN-R"), 44.92),
                          (("no-validation", "ViT-B", "CFT", "IN-A"), 27.92),
                          (("thresholds", "", "CFT", "ImageNet, 500 classes", "concepts"), 1852),
                          (("deal1", "ViT-B/32", "DEAL", "EuroSAT", "accuracy"), 77.4),
                          (("deal3", "RN50", "DEAL", "PartImageNet", "part mIoU"), 10.04),
                          (("segmil", "", "SEG-MIL-CBM", "Waterbirds", "worst-group accuracy"), 72.0),
                          (("timm", "deit3_base_patch16_224.fb_in1k", "Original", "IN-A, 200 classes"), 38.92)])
def test_numbers_are_those_printed(where, value):
    assert number(*where) == value
    table, model, method, dataset, *rest = where
    rows = reference(table)
    rows = rows[(rows.model == model) & (rows.method == method) & (rows.dataset == dataset) &
                (rows.metric == (rest or ["R@1"])[0])]
    assert value in set(rows.value)


def test_table9_repeats_table1_and_averages_recompute():
    for row in reference("table9").itertuples():
        assert row.value == number("table1", row.model, "CFT", row.dataset, row.metric)
    averages = reference("table4").query("method == 'CFT − Original'")
    assert len(averages) == 24
    for row in averages.itertuples():
        gains = [
            number("table4", m, "CFT", row.dataset, row.metric, row.split) -
            number("table4", m, "Original", row.dataset, row.metric, row.split) for m in PAPER.models]
        assert abs(sum(gains) / 4 - row.value) <= 0.005 + 1e-9
    deal = reference("deal1")
    for (method, metric), group in deal.groupby(["method", "metric"]):
        values = group.set_index("dataset").value
        assert abs(values.drop("Avg").mean() -
                   values["Avg"]) <= (0.05 if metric == "accuracy" else 0.0005) + 1e-9, (method, metric)


# ---- inconsistencies ----


def test_pooled_miou_is_bounded_over_all_small_confusion_matrices():
    n = 14
    best = {}
    for tp, tn, fp in itertools.product(range(n + 1), repeat=3):
        fn = n - tp - tn - fp
        if fn >= 0 and tp + fp + fn and tn + fp + fn:
            best[tp + tn] = max(best.get(tp + tn, 0), (tp / (tp + fp + fn) + tn / (tn + fp + fn)) / 2)
    for correct, miou in best.items():
        p = correct / n
        assert miou <= p / (2 - p) + 1e-12
        if correct % 2 == 0 and 0 < correct:
            assert math.isclose(miou, p / (2 - p))  # attained
    violated = [(m, method) for m in PAPER.models for method in ("Original", "CFT")
                if number("table3", m, method, "ImageNet-Segmentation", "mIoU") /
                100 > (p := number("table3", m, method, "ImageNet-Segmentation", "PA") / 100) / (2 - p)]
    table = INCONSISTENCIES[6].check()
    assert len(violated) == 6 and table.index[table.possible == "no"].tolist() == violated


def test_every_inconsistency_shows_itself():
    assert [i.number for i in INCONSISTENCIES] == list(range(1, 17))
    assert {i.number for i in INCONSISTENCIES if i.check is None} == {8, 9, 13, 15, 16}
    for i in INCONSISTENCIES:
        html = i._repr_html_()
        assert i.statement[:20].split("&")[0] in html and ("<table" in html) == (i.check is not None)
        if i.check:
            assert len(i.check()) and not i.check().isna().all(axis=None)


def test_recomputed_numbers_are_those_of_loops():
    checks = {i.number: i.check() for i in INCONSISTENCIES if i.check}
    assert checks[1].loc["IN-V2"].dropna().tolist() == [68.32, (71.39 + 71.33) / 2, 71.13, 71.15]
    assert checks[2].loc["IN-A", ["table1", "table5", "table6", "table7", "no-validation"]].tolist() == [
        27.76, 26.05, 24.11, 27.82, 27.92]
    assert math.isclose(checks[3].loc["IN-A", "table4"], (24.10 + 21.42) / 2)
    assert checks[4].loc[("table1", "CNv2"), ("IN-V", "R@5")].item() == 95.05
    finals = [number("table1", m, "CFT", "IN-A") for m in PAPER.models]
    assert math.isclose(checks[5].loc[("IN-A", "table1"), "CFT"], max(finals) - min(finals))
    halves = [
        sum(number("table4", m, "CFT", "IN-R", split=s) for s in ("fine-tuned", "other")) / 2 for m in PAPER.models]
    assert math.isclose(checks[5].loc[("IN-R", "table4"), "CFT"], max(halves) - min(halves))
    assert (checks[10].loc["w/o L_concept", ["IN-A", "SI-location"]] < 0.06).all()
    assert (checks[11].loc["CFT, thresholds 5/10"] < checks[11].loc["CFT, no validation"]).all()
    flagged = checks[12].remark.str.contains("outside")
    assert flagged.index[flagged].tolist() == [("RRR", "DINOv2"), *(("GradMask", m) for m in PAPER.models),
                                               ("RRDA", "DINOv2")]
    assert checks[12].remark.str.contains("equals").sum() == 1 and checks[12].remark.str.contains("without").sum() == 8
    larger = sum(
        number("table9", m, "CFT", d, "R@5", column="std") > number("table9", m, "CFT", d, "R@1", column="std")
        for m in PAPER.models for d in artefact("table9").sets)
    assert larger == 13 == checks[14]["networks with R@5 above R@1"].sum()
    assert math.isclose(checks[14].loc["IN-V", "mean std of R@1"], (0.28 + 0.61 + 0.44 + 0.43) / 4)


def test_sentences_against_tables_say_what_the_tables_say():
    said = INCONSISTENCIES[5].check()["the tables"].tolist()
    gap = min(
        number("table1", m, "CFT", "IN-R") - number("table1", m, "Original", "IN-R") -
        number("table1", m, "CFT", "IN-A") + number("table1", m, "Original", "IN-A") for m in PAPER.models)
    assert gap > 0 and f"{gap:.1f} points" in said[0]
    least = min(
        number("table1", m, b, d) - number("table1", m, "Original", d) for m in PAPER.models
        for b in ("GradMask", "RRR", "RRDA") for d in ("IN-A", "ObjectNet"))
    assert least > 0 and f"{least:.1f}" in said[1]
    down = [
        1 for m in PAPER.models for s in ("fine-tuned", "other") for d in ("IN-V", "IN-V2")
        if number("table4", m, "CFT", d, split=s) < number("table4", m, "Original", d, split=s)]
    assert f"in {len(down)} of 16" in said[2] and len(down) == 3
    assert "3 of 24" in said[4] and "DINOv2 on IN-V," in said[4] and "-1.71" in said[5]
    assert f"DINOv2 {82.80 - 84.09:+.2f}" in said[6]


def test_regime_is_the_mean_absolute_difference():
    measured = {"IN-A": 16.0, "IN-R": 34.0, "unknown": 1.0}
    found = regime(measured).set_index("table")
    assert math.isclose(found.distance["table1"], (abs(16 - 13.26) + abs(34 - 30.26)) / 2) and found.sets.eq(2).all()
    assert found.index[-1] == "table1" and math.isclose(found.distance["table5"], (0.09 + 0.19) / 2)
    assert regime({"IN-A": 15.4, "IN-R": 32.1}, "DeiT").table[0] == "table1"
    for bad in ({}, {"val": 90.0}):
        with pytest.raises(ValueError, match="expected sets"):
            regime(bad)
    with pytest.raises(ValueError, match="which has none"):
        regime(measured, "ResNet")


# ---- what is needed ----


def slow_runs(wanted, models, methods, seeds, own_bases):
    """Checkpoints and evaluations one by one."""
    tuned, evaluated = set(), set()
    for model in wanted.models:
        for method in wanted.methods:
            for seed in range(seeds):
                if methods.get(method, method) == "original":
                    checkpoint = (models[model], "original", seed if own_bases else 0)
                else:
                    checkpoint = (models[model], methods.get(method, method), seed)
                    tuned.add(checkpoint)
                for name in wanted.sets:
                    evaluated.add((checkpoint, name))
    return len(tuned), len(evaluated)


def test_counts_of_runs():
    for wanted in ARTEFACTS:
        assert runs(wanted) == slow_runs(wanted, PAPER.models, PAPER.methods, wanted.seeds, False)
        seeds = 1 if wanted.key.startswith("fig") else 5 if wanted.seeds == 5 else 3
        assert runs(wanted, DEMO) == slow_runs(wanted, DEMO.models, DEMO.methods, seeds, True)
    assert {k: runs(artefact(k)) for k in ("fig1", "table1", "table2", "table3", "table8", "table9")} == {
        "fig1": (1, 4), "table1": (80, 504), "table2": (80, 252), "table3": (20, 24), "table8": (0, 0),
        "table9": (20, 120)}
    assert runs(artefact("table1"), DEMO) == (20, 150) and runs(artefact("demo"), DEMO) == (85, 900)
    new = plan()["new fine-tunes"]
    keys = [*(f"table{k}" for k in range(1, 10)), "thresholds", "no-validation"]
    # the figures' checkpoint is one of Table 1's eighty
    assert new[["fig1", "fig2"]].tolist() == [1, 0] and new[keys].tolist() == [79, 0, 0, 0, 14, 4, 3, 0, 0, 2, 1]
    assert plan()["new evaluations"][:-1].sum() == plan().loc["total", "evaluations"]
    tuned, evaluated = needed(artefact("table7"))
    assert ("vit_base_patch16_224", "cft-paper", 0) in tuned
    assert ("vit_base_patch16_224", "original", 0, "in-a") in evaluated
    with pytest.raises(ValueError, match="fig1, fig2"):
        artefact("table10")
    ours, _ = needed(artefact("table6"), in_our_form(DEMO))
    changes = ("", ".no-classify", ".no-background", ".no-concept", ".labels")
    assert ours == {("demo", f"cft{change}", seed) for change in changes for seed in range(3)}
    both = [needed(artefact("table1"), profile)[0] for profile in (in_our_form(DEMO), DEMO)]
    assert both[0] - both[1] == {("demo", "cft", seed) for seed in range(5)}


def test_artefacts_claims_and_ledger_fit_together():
    assert [a.key for a in ARTEFACTS] == [
        "fig1", "fig2", *(f"table{k}" for k in range(1, 10)), "thresholds", "no-validation", "controls", "definitions",
        "ledger", "demo", "closed"]
    numbers = {i.number for i in INCONSISTENCIES}
    assert set().union(*(a.inconsistencies for a in ARTEFACTS)) == numbers  # each is stated on some page
    for a in ARTEFACTS:
        assert set(a.models) <= set(PAPER.models) and set(a.sets) <= set(PAPER.sets) == set(DEMO.sets)
        assert len(set(a.methods)) == len(a.methods) and a.question and a.title
        if a.key in ROWS and a.key not in ("table8", "thresholds", "no-validation"):  # it needs what the paper prints
            rows = reference(a.key).query("model != 'mean of four'")
            assert set(rows.method) <= set(a.methods) and set(rows.dataset) == set(a.sets)
            assert set(rows.model) == set(a.models)
    for claim in SHAPE_CLAIMS:
        wanted = artefact(claim.artefact)
        assert {claim.method, claim.against} - {""} <= set(wanted.methods) and claim.sign in (1, -1), claim
        assert all(c.partition(", ")[0] in wanted.sets or c in paper.METRICS for c in claim.columns)
        assert bool(claim.against) == (claim.bound is None) and not claim.table
    assert len({c.sentence for c in SHAPE_CLAIMS}) == len(SHAPE_CLAIMS)
    tables = {*(f"table{k}" for k in (1, 2, 3, 4, 5, 6, 7, 9)), "thresholds", "no-validation"}
    assert {c.artefact for c in SHAPE_CLAIMS} >= tables
    measurable = {d.variant for d in DEVIATIONS} - {""}
    assert measurable <= set(artefact("ledger").methods) and len({d.topic for d in DEVIATIONS}) == len(DEVIATIONS) >= 20
    assert all(d.paper and d.code and d.ours and d.against in artefact("ledger").methods + ("RRDA",)
               for d in DEVIATIONS)


def test_our_terms_exist():
    assert set(PAPER.models.values()) == set(RATES)
    assert {slug.partition(".")[0] for slug in PAPER.methods.values()} <= {"original", *RECIPES}
    assert set(PAPER.sets.values()) == set(CARDS)
    assert set(DEMO.sets.values()) - {"segmentation"} <= set(backdrop.SETS)
    assert DEMO.set("IN-A, other") == "adversarial, other" and PAPER.set("mIoU") == "mIoU"


def test_the_ledger_names_chapters_that_exist():
    chapters = {path.stem for path in (ROOT / "nbs").glob("*.ipynb")}
    assert {d.where for d in DEVIATIONS} - {""} <= chapters


# ---- verdicts ----


def slow_interval(differences):
    n = len(differences)
    mean = sum(differences) / n
    half = T975[n - 1] * math.sqrt(sum((d - mean)**2 for d in differences) / (n - 1) / n)
    return mean, mean - half, mean + half


def made_scores(**values):
    """Scores of two methods on two columns: the second column is the first plus 10."""
    return pd.DataFrame([(method, seed, column, v + shift) for method, of in values.items() for seed, v in of.items()
                         for column, shift in (("x", 0), ("y", 10))], columns=["method", "seed", "column", "value"])


def test_verdicts_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    seen = set()
    for shift, sign in itertools.product((-3.0, 0.0, 0.3, 3.0), (1, -1)):
        a, b = rng.normal(30 + shift, 1, 5), rng.normal(30, 1, 5)
        scores = made_scores(A=dict(zip(range(5), a)), B=dict(zip([4, 3, 2, 1, 0], b)))
        found = verdicts(scores, [Claim("table1", "a claim", "A", "B", ("x", "y"), sign)]).iloc[0]
        mean, low, high = slow_interval([x - y for x, y in zip(a, reversed(b))])
        np.testing.assert_allclose([found.difference, found.low, found.high], [mean, low, high], rtol=1e-4)
        expected = "open" if low <= 0 <= high else "holds" if (mean > 0) == (sign > 0) else "contradicted"
        assert found.verdict == expected and found.seeds == 5 and found.column == "x + y"
        seen.add(expected)
    assert seen == {"holds", "contradicted", "open"}


def test_a_deviation_below_a_bound():
    values = [30.0, 31.0, 30.5, 29.8, 30.2]
    s = np.std(values, ddof=1)
    scores = made_scores(CFT=dict(enumerate(values)))
    for bound, expected in ((0.1, "contradicted"), (0.5, "open"), (2.0, "holds")):
        found = verdicts(scores, [Claim("table9", "steady", "CFT", "", ("x",), -1, bound)]).iloc[0]
        np.testing.assert_allclose([found.low + bound, found.high + bound], [s * math.sqrt(4 / c) for c in CHI4],
                                   rtol=1e-4)
        assert found.verdict == expected and math.isclose(found.difference, s - bound)


def test_what_was_not_run_is_not_judged():
    claim = Claim("table1", "a claim", "A", "B", ("x", "y"))
    both = made_scores(A={0: 1.0, 1: 2.0, 2: 4.0}, B={0: 0.0, 1: 1.5, 2: 2.0})
    for scores in (both[both.method == "A"], both[both.seed == 0], both[both.column == "x"], both.iloc[:0],
                   both.assign(value=both.value.where(both.column == "x"))):
        assert verdicts(scores, [claim]).verdict.tolist() == ["not run"]
    one_lost = both[~((both.method == "B") & (both.seed == 1))]
    found = verdicts(one_lost, [claim]).iloc[0]
    assert found.seeds == 2 and math.isclose(found.difference, 1.5)
    for bad, message in ((both.drop(columns="seed"), "seed missing"), (pd.concat([both, both]), "repeated")):
        with pytest.raises(ValueError, match=message):
            verdicts(bad, [claim])
    with pytest.raises(ValueError, match="finite"):
        verdicts(both.assign(value=math.inf), [claim])
    assert "seeds" in verdicts(both, [])


def test_claims_come_from_both_files():
    assert [c.sentence for c in claims("table5")][0] == "Concept masks guide better than object masks"
    assert [c.against for c in claims("table5")][1:] == [
        "random part", "body only", "others' masks", "centred ellipse", "repainting"]
    demo = claims("demo")
    assert len(demo) == 22 and {(c.sign, c.bound, c.table) for c in demo} == {(1, None, "")}
    assert {m for c in demo for m in (c.method, c.against)} <= set(artefact("demo").methods)
    assert {c.table for c in claims("deal")} == {"deal3", "deal4", ""} and claims("table8") == []
    assert {in_paper(c) for c in demo if not math.isnan(in_paper(c))} == set()


def test_the_mean_of_the_shifted_sets():
    """OOD-7 is there for each method and seed that has all seven, and only then."""
    rng = np.random.default_rng(0)
    rows = [(m, s, name, split, metric, rng.uniform(0, 100)) for m in "ab" for s in range(2)
            for name in ("val", *backdrop.SHIFTED) for split in ("all", "other") for metric in ("top1", "top5")]
    rows = pd.DataFrame(rows, columns=["method", "seed", "set", "split", "metric", "value"])
    found = scores_of(rows).query("column == 'OOD-7'").set_index(["method", "seed"])["value"]
    for m, s in itertools.product("ab", range(2)):
        values = [r.value for r in rows.itertuples() if (r.method, r.seed, r.split, r.metric) == (m, s, "all", "top1")
                  and r.set != "val"]
        assert len(values) == 7 and math.isclose(found[m, s], sum(values) / 7)
    lost = rows[~((rows["method"] == "a") & (rows["set"] == "sketch"))]
    scores = scores_of(lost)
    assert set(scores.query("column == 'OOD-7'")["method"]) == {"b"}
    assert len(scores) == (lost["metric"] == "top1").sum() + 2
    assert not scores.duplicated(["method", "seed", "column"]).any()
    assert list(scores_of(rows.iloc[:0])) == ["method", "seed", "column", "value"]


def test_profiles_translate_what_the_demo_saved():
    rows, ours = pd.read_csv(ROOT / "figures/demo/rows.csv"), in_our_form(DEMO)
    rows = rows[rows["method"].isin(["original", "plain", "rrda", "cft"])]
    asked = [Claim("controls", "one set", "CFT", "plain", ("IN-A",)),
             Claim("table4", "a half", "CFT", "RRDA", ("IN-A, other",)),
             Claim("table3", "maps", "CFT", "Original", ("mIoU",))]
    theirs = [("plain", "adversarial", "all", "top1"), ("rrda", "adversarial", "other", "top1"),
              ("original", "segmentation", "all", "mean_iou")]
    for row, (against, *where) in zip(verdicts(scores_of(rows), asked, ours).itertuples(), theirs):
        values = {(r.method, r.seed): r.value for r in rows.itertuples() if [r.set, r.split, r.metric] == where}
        expected = slow_interval([values["cft", seed] - values[against, seed] for seed in range(5)])
        np.testing.assert_allclose([row.difference, row.low, row.high], expected, rtol=1e-4)
    everything = verdicts(scores_of(rows), profile=DEMO)
    assert set(everything.verdict) <= {"holds", "contradicted", "open", "not run"}
    assert (everything[everything.artefact == "table9"].verdict == "not run").all()  # a bound in points of ImageNet


def test_the_papers_own_numbers_for_claims():
    found = {c.sentence: in_paper(c) for c in SHAPE_CLAIMS}
    gains = [
        number("table1", m, "CFT", d) - number("table1", m, "RRDA", d) for m in PAPER.models
        for d in ("IN-A", "ObjectNet", "IN-R", "IN-Sketch")]
    assert math.isclose(found["CFT beats RRDA on the shifted sets"], sum(gains) / 16)
    assert math.isclose(found["Validation helps"], (27.92 - 26.01 + 48.51 - 47.19) / 2)
    assert math.isclose(found["Thresholds 15/20 beat 5/10"], (27.92 - 25.13 + 48.51 - 44.92) / 2)
    assert math.isclose(found["The deviation over seeds stays below 0.9 points at home"],
                        (0.28 + 0.61 + 0.44 + 0.43) / 4 - 0.9)
    for claim in SHAPE_CLAIMS:
        if claim.artefact in ("controls", "definitions"):
            assert math.isnan(found[claim.sentence])
        else:
            assert (found[claim.sentence] * claim.sign < 0) == claim.sentence.startswith("In the text"), claim


def test_ledger_measures_only_what_was_run():
    assert (ledger().measured == "").all() and len(ledger()) == len(DEVIATIONS)
    scores = pd.DataFrame([(method, seed, "adversarial", base + seed * (1 + (method == "cft-paper") / 10))
                           for method, base in (("cft-paper", 30), ("cft-paper.image-means", 35))
                           for seed in range(3)], columns=["method", "seed", "column", "value"])
    table = ledger(scores, profile=DEMO).set_index("topic").measured
    assert table[table != ""].index.tolist() == ["averages of the loss"]
    mean, low, high = slow_interval([5 - 0.1 * seed for seed in range(3)])
    assert table["averages of the loss"] == f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] on adversarial, demo"


# ---- the module ----


def test_reading_the_module_is_light():
    code = ("import cft.reproduce.paper, sys; "
            "print(sorted({'torch', 'matplotlib.pyplot', 'seaborn', 'scipy.stats'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
