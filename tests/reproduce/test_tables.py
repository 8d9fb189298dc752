"""Tables: numbers against loops, every cell where it belongs, and nothing beside what it cannot be compared with."""
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_results import made_rows
from scipy import stats

from cft.data.backdrop import SHIFTED
from cft.reproduce import tables
from cft.reproduce.paper import (
    ARTEFACTS,
    DEMO,
    METRICS,
    PAPER,
    PAPER_ID,
    SHAPE_CLAIMS,
    Claim,
    artefact,
    claims,
    in_our_form,
    ledger,
    plan,
    reference,
    scores_of,
    verdicts,
)
from cft.reproduce.results import Found, numbers, open_results
from cft.reproduce.settings import OURS, Work, read_settings
from cft.reproduce.tables import (
    CLOSED_COLUMNS,
    DEMO_COLUMNS,
    LABELS,
    averaged_rows,
    beside,
    claim_lines,
    claims_of,
    demo_table,
    gains,
    judged,
    printed_gains,
    save_table,
    sentences,
    styled,
    table_of,
    to_latex,
    views,
    words_of,
)

ROOT = Path(__file__).parents[2]
T975 = {1: 12.7062, 2: 4.30265, 4: 2.77645}  # printed tables of the t distribution
MINE = pd.DataFrame({"model": "vit_base_patch16_224", "method": ["original", "cft-paper", "cft"], "dataset": "in-a",
                     "split": "all", "metric": "top1", "value": [16.0, 25.0, 26.0], "low": [np.nan, 24.0, 25.0],
                     "high": [np.nan, 26.0, 27.0], "n": [1, 5, 5]})


@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def made_scores(**values):
    """Scores of some methods on one column."""
    return pd.DataFrame([(method, seed, "x", v) for method, of in values.items() for seed, v in of.items()],
                        columns=["method", "seed", "column", "value"])


# ---- means and gains ----


def test_means_and_intervals_against_a_loop(small):
    rows = numbers(open_results(small, "table1"), "table1")
    means = averaged_rows(rows).set_index(["method", "dataset", "metric"])
    for method in ("rrda", "cft-paper"):
        values = [r.value for r in rows.itertuples() if (r.method, r.set, r.metric) == (method, "sketch", "top1")]
        mean = sum(values) / 5
        half = T975[4] * (sum((v - mean) ** 2 for v in values) / 4 / 5) ** 0.5
        got = means.loc[(method, "sketch", "top1")]
        expected = (mean, mean - half, mean + half, 5)
        assert (got["value"], got["low"], got["high"], got["n"]) == pytest.approx(expected, rel=1e-5)
    one = averaged_rows(rows[rows["seed"] == 0])
    assert (one["low"] == 20).all() and (one["high"] == 60).all()  # of the pictures, where there is one seed
    some = rows[(rows["seed"] == 0) | (rows["method"] != "rrda")]  # one method has a single seed
    mixed = averaged_rows(some).set_index(["method", "dataset", "metric"]).sort_index()
    assert mixed.loc["rrda", "low"].eq(20).all() and not mixed.loc["rrr", "low"].eq(20).any()
    assert (mixed.loc["rrr"] == means.sort_index().loc["rrr"]).all(axis=None)


def test_gains_are_paired_within_seeds(small):
    found = open_results(small, "table1")
    rows = found.rows.set_index(["method", "seed", "set", "metric"])["value"]
    got = gains(found, "table1").set_index(["method", "dataset"])
    apart = [rows["rrda", s, "object", "top1"] - rows["original", s, "object", "top1"] for s in range(5)]
    low, high = stats.t.interval(0.95, 4, np.mean(apart), stats.sem(apart))
    assert tuple(got.loc[("RRDA", "object"), ["value", "low", "high"]]) == pytest.approx((np.mean(apart), low, high))
    assert "Original" not in got.index.get_level_values(0)
    theirs = printed_gains("table1").set_index(["method", "dataset"])["value"]
    assert theirs["CFT", "IN-A"] == pytest.approx(27.76 - 13.26)
    assert theirs["RRDA", "IN-R"] == pytest.approx(47.12 - 30.26)
    assert printed_gains("table7").empty and len(printed_gains("table4")) == 12 and printed_gains("controls").empty


def test_words_are_those_that_are_known():
    assert words_of(PAPER.methods)["cft-paper"] == "CFT" == words_of(in_our_form(DEMO).methods)["cft"]
    assert words_of(PAPER.methods, artefact("table7").methods)["cft-paper"] == "AttnLRP"
    assert words_of(DEMO.sets, ["IN-A"])["adversarial"] == "IN-A" and words_of({}) == {}


# ---- beside the paper ----


@pytest.mark.parametrize("table", ["table1", "table3", "table4", "table7", "table9"])
def test_every_paper_cell_stands_where_it_belongs(table, strict):
    theirs, of_paper = reference(table).query("model != 'mean of four'"), f"paper ({PAPER_ID})"
    shown = beside(MINE, theirs)
    for row in theirs.itertuples():
        column = row.dataset if row.split == "all" else f"{row.dataset}, {row.split}"
        cell = shown.loc[(row.model, row.method), (column, row.metric, of_paper)]
        assert cell == f"{row.value:.2f}" + (f" ± {row.std:.2f}" if table == "table9" else "")
    neighbour = ("IN-A", "R@1", PAPER.stamp)
    if table == "table1":
        assert shown.loc[("ViT-B", "CFT"), neighbour] == "25.00 [24.00, 26.00]"
        assert shown.loc[("ViT-B", "Original"), neighbour] == "16.00"
        assert shown.loc[("DeiT", "CFT"), neighbour] == "not run"
        assert shown.loc[("ViT-B", "CFT"), ("IN-V", "R@5", PAPER.stamp)] == "not run"
        own = shown.loc[("ViT-B", "CFT, our form")]
        assert own[neighbour] == "26.00 [25.00, 27.00]" and own[("IN-A", "R@1", of_paper)] == ""
        assert shown.iloc[0][neighbour] == "seeds: 1, 5"
    if table == "table7":
        assert shown.loc[("ViT-B", "AttnLRP"), neighbour] == "25.00 [24.00, 26.00]"
    assert (beside(MINE.iloc[:0], theirs).xs(PAPER.stamp, level="source", axis=1) == "not run").all(axis=None)


def test_the_demo_never_shares_a_column(strict):
    theirs = reference("table1").query("model == 'ViT-B'")
    demo = MINE.assign(model="demo", dataset="adversarial")
    shown = beside(demo, theirs, DEMO)
    sets = {source: set(shown[source].columns.get_level_values("column")) for source in shown.columns.levels[0]}
    assert sets[DEMO.stamp] == {"adversarial"} and not sets[DEMO.stamp] & sets[f"paper ({PAPER_ID})"]
    assert "DEMO" in DEMO.stamp and shown.loc["CFT", (DEMO.stamp, "adversarial", "R@1")] == "25.00 [24.00, 26.00]"
    assert shown.iloc[0, 0] == "table1, ViT-B" and shown.iloc[0, -1] == "seeds: 1, 5"
    twice = pd.concat([demo, demo.assign(model="other")])
    for bad, rows, message in ((MINE, theirs, "in-a"), (MINE.assign(dataset="IN-A"), theirs, "IN-A"),
                               (demo, reference("table1"), "4 networks"), (demo.drop(columns="n"), theirs, "n missing"),
                               (demo.iloc[:0], theirs.iloc[:0], "got none"),
                               (twice, theirs, "repeated")):
        with pytest.raises(ValueError, match=message):
            beside(bad, rows, DEMO)


def test_where_the_paper_prints_nothing_ours_stand_alone(strict):
    nothing = reference("table1").iloc[:0]
    for ours, profile in ((MINE, PAPER), (MINE.assign(model="demo", dataset="adversarial"), DEMO)):
        shown = beside(ours, nothing, profile)
        mine = shown.xs(profile.stamp, level="source", axis=1)
        assert mine.iloc[:, 0].tolist() == ["seeds: 1, 5", "16.00", "25.00 [24.00, 26.00]", "26.00 [25.00, 27.00]"]
        assert shown.index.get_level_values("method")[-3:].tolist() == ["Original", "CFT", "CFT, our form"]


def test_the_paper_and_the_demo_share_no_column(small):
    found = open_results(small, "table1")
    table = table_of(found, "table1", metrics=("R@1",))
    sources = set(table.columns.get_level_values("source"))
    assert sources == {"paper (arXiv 2603.08309)", "DEMO, drawn pictures, not ImageNet"}
    sets = [set(table.xs(s, axis=1, level="source").columns.get_level_values(0)) for s in sources]
    assert not set.intersection(*sets) and "27.76" in table.to_string() and "seeds: 5" in table.to_string()
    ours = table_of(found, "table1", ours=True, metrics=("R@1",))
    mean = made_rows().query("method == 'cft' and set == 'sketch' and metric == 'top1'")["value"].mean()
    assert f"{mean:.2f} [" in ours.loc["CFT"].to_string()


# ---- forms ----


def test_html_is_escaped_and_tables_do_not_share_styles(strict):
    nasty = beside(MINE.assign(method=["original", "<script>alert(1)</script>", "cft"]), reference("table7"))
    html = styled(nasty, "<b>x & y</b>").to_html()
    assert "<script>" not in html and "&lt;script&gt;" in html and "&lt;b&gt;x &amp; y" in html
    assert all(tint in html for tint in tables.TINTS) and styled(nasty).to_html() == styled(nasty).to_html()
    pages = [styled(table).to_html() for table in (nasty, beside(MINE, reference("table7")))]
    names = [re.search(r'id="T_(\w+?)"', page).group(1) for page in pages]
    assert names[0] != names[1]
    made = made_scores(A={0: 1.0, 1: 2.0}, B={0: 0.0, 1: 1.0})
    page = styled(verdicts(made, [Claim("table1", "5 < 6 & 7", "A", "B", ("x",)), SHAPE_CLAIMS[0]])).to_html()
    assert "✓ holds" in page and "– not run" in page and "5 &lt; 6 &amp; 7" in page and "nan" not in page


@pytest.mark.parametrize("table", [beside(MINE, reference("table9")), ledger(), plan(),
                                   verdicts(made_scores(A={0: 1.0, 1: 2.0}, B={0: 0.0, 1: 1.0}), SHAPE_CLAIMS)],
                         ids=["beside", "ledger", "plan", "verdicts"])
def test_latex_is_well_formed(table):
    text = to_latex(table, "A caption with 50 % & more", "tab:x")
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    width = re.search(r"\\begin\{tabular\}\{(\w+)\}", text).group(1)
    for line in body.replace(r"\midrule", "").split("\\\\\n"):
        if line.strip():
            merged = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + merged + 1 == len(width), line
    assert text.count("{") == text.count("}") and text.count(r"\begin") == text.count(r"\end") == 2
    assert not re.search(r"(?<!\\)[_%#](?!\w*\})", body)
    assert body.replace("é", "").isascii(), set(body) - set(map(chr, range(128)))


def test_tables_are_saved_in_three_forms(tmp_path):
    shown, place = beside(MINE, reference("table7")), tmp_path / "deep"
    paths = save_table(shown, place / "table7", "Table 7")
    assert sorted(place.iterdir()) == sorted(paths) and {p.suffix for p in paths} == {".csv", ".html", ".tex"}
    back = pd.read_csv(place / "table7.csv", index_col=[0, 1], keep_default_na=False)
    assert back.to_numpy().tolist() == shown.to_numpy().tolist() and f"IN-A | R@1 | {PAPER.stamp}" in back
    assert (place / "table7.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_small_numbers_keep_their_digits():
    table = pd.DataFrame({"rate": [5e-7, 0.005, 0.0, 12.25]})
    for text in (styled(table).to_html(), to_latex(table)):
        assert all(shown in text for shown in ("5e-07", "0.005", "0.00", "12.25"))


# ---- claims ----


def test_claims_of_both_forms(small):
    table = claims_of(open_results(small, "table1"), "table1").set_index("claim")
    assert list(table.columns) == ["in the paper", "demo, the paper's form", "demo, our form"]
    line = table.loc["CFT raises accuracy on the shifted sets"]
    assert line.iloc[0] == "holds" and line.iloc[1].startswith("✓ holds: +") and "n = 5" in line.iloc[2]
    assert claims_of(open_results(small, "table8"), "table8").empty
    assert views(open_results(small), "demo")[0][0] == "demo" and len(views(open_results(small), "controls")) == 1


def test_claims_of_networks(tmp_path):
    """On ImageNet every network is judged alone."""
    made = [made_rows(("original", "cft-paper"), 5, ("in-v",), model) for model in PAPER.models.values()]
    rows = pd.concat(made, ignore_index=True)
    rows.loc[(rows["method"] == "cft-paper") & (rows["model"] == PAPER.models["DeiT"]), "value"] += 40
    found = Found(tmp_path, Work(read_settings("paper"), ("table9",)))
    vars(found)["rows"] = rows
    table = claims_of(found, "table9").set_index("claim")
    assert list(table.columns) == ["in the paper", *PAPER.models] and "– not run" in set(table["ViT-B"])
    home = table.loc["The deviation over seeds stays below 0.9 points at home"]
    assert home["ViT-B"] == home["DeiT"] and "n = 5" in home["ViT-B"]  # a shift of all seeds changes no deviation


def test_lines_and_sentences():
    made = made_scores(A={s: 10.0 + s for s in range(3)}, B={s: 1.0 * s for s in range(3)}, C={0: 5.0, 1: 9.0, 2: 30.0})
    say = [Claim("table1", text, a, b, ("x",)) for text, a, b in
           (("up", "A", "B"), ("down", "B", "A"), ("perhaps", "C", "A"), ("never", "A", "D"))]
    found = verdicts(made, say)
    lines = claim_lines(found).splitlines()
    assert lines[0] == "- ✓ holds: up: +10.0 points [+10.0, +10.0] (x, n = 3)" and lines[3] == "- – not run: never"
    assert claim_lines(found.iloc[:0]) == "" == sentences(found.iloc[:0])
    text = sentences(found)
    assert re.findall(r"\*\*(\w+)", text) == ["Holds", "Contradicted", "Open"] and "never" not in text
    assert "- down: -10.0 points [-10.0, -10.0] (x)." in text


# ---- the demo ----


def made_demo(values):
    """Results in which (method, seed) has the given adversarial value and 0 elsewhere."""
    rows = []
    for (method, seed), value in values.items():
        top = [(name, split, "top1", value * (name == "adversarial"))
               for name in ("val", "v2", *SHIFTED) for split in ("all", "fine-tuned", "other")]
        maps = [("segmentation", "all", METRICS[name], 1.0) for name in ("PA", "mIoU", "mAP")]
        rows += [("demo", method, seed, *line, 0.0, 0.0, 1, "", "") for line in (*top, *maps)]
    names = ["model", "method", "seed", "set", "split", "metric", "value", "low", "high", "n", "weights", "tested_on"]
    found = Found(Path("nowhere"), Work(read_settings("demo"), ("demo",)))
    keys = pd.DataFrame(values.keys(), columns=["method", "seed"]).query("method != 'original'")
    runs = keys.assign(model="demo", seconds=5.0 + keys["seed"])
    vars(found).update(rows=pd.DataFrame(rows, columns=names), runs=runs)
    return found


def test_the_demos_table_and_verdicts():
    found = made_demo({("original", s): 5.0 for s in range(5)} | {("plain", s): 10.0 + s for s in range(5)}
                      | {("cft", s): 20.0 + s + (s % 2) for s in range(5)}
                      | {("cft-paper", s): 10.0 + s * (-1) ** s for s in range(5)})
    values = scores_of(numbers(found, "demo")).set_index(["method", "seed", "column"])["value"]
    assert values["cft", 3, "OOD-7"] == pytest.approx(24 / 7) and values["plain", 2, "adversarial, other"] == 12
    judgements = judged(found, "demo")["demo"]
    table = judgements.set_index("claim")
    row = table.loc["CFT (saturating map, image means) beats plain fine-tuning on adversarial backgrounds"]
    d = np.array([10, 11, 10, 11, 10])
    half = T975[4] * d.std(ddof=1) / np.sqrt(5)
    expected = (d.mean(), d.mean() - half, d.mean() + half)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(expected, abs=1e-4)
    assert row["verdict"] == "holds"
    says = "The paper's form of CFT (min–max map, region means) beats plain fine-tuning on adversarial backgrounds"
    assert table.loc[says, "verdict"] == "open"
    assert table.loc["CFT beats the paper's form on adversarial backgrounds", "verdict"] == "holds"
    assert table.loc["CFT+ beats RRDA on adversarial backgrounds", "verdict"] == "not run"
    assert "+10.4 points" in sentences(judgements) and "Open" in sentences(judgements)
    shown = demo_table(found)
    assert shown.loc["CFT", "adversarial"] == f"{22.4:.1f} ± {np.std([20, 22, 22, 24, 24], ddof=1):.1f}"
    assert list(shown.columns) == list(DEMO_COLUMNS) and list(shown.index)[0] == "Original"
    assert shown["seconds"].to_dict() == {"Original": "0.0", **dict.fromkeys(
        ("plain fine-tuning", "CFT, the paper's form", "CFT"), "7.0 ± 1.6")}


def test_the_demos_claims_can_be_contradicted():
    found = made_demo({("plain", s): 50.0 for s in range(3)} | {("cft", s): 20.0 + s for s in range(3)})
    assert set(judged(found, "demo")["demo"]["verdict"]) >= {"contradicted", "not run"}


def test_labels_and_claims_name_the_demos_methods():
    ours = [name for key in OURS for name in artefact(key).methods]
    cue = read_settings("cue").cue
    assert set(LABELS) == {*ours, *cue.methods, *cue.weighted_methods}
    assert tuple(LABELS)[:15] == artefact("demo").methods[:15]  # heads have a page of their own, too
    assert {m for c in claims("closed") for m in (c.method, c.against)} <= set(artefact("closed").methods)
    assert len(claims("closed")) == 17 and {c for x in claims("closed") for c in x.columns} <= set(CLOSED_COLUMNS)
    assert {m for c in claims("demo") for m in (c.method, c.against)} <= set(LABELS) and len(claims("demo")) == 22
    assert {c for claim in claims("demo") for c in claim.columns} <= set(DEMO_COLUMNS)


# ---- what is published ----


def values_in(cells):
    """All numbers in some cells of text."""
    return [float(x) for cell in cells for x in re.findall(r"-?\d+\.\d+", str(cell))]


@pytest.mark.parametrize("key", [a.key for a in ARTEFACTS if a.methods and a.key not in ("fig1", "fig2", *OURS)])
def test_published_tables_and_claims_follow_from_the_published_rows(key):
    """To the last digit that is shown; rows have four, and so a tie may fall to the other side."""
    found, place = open_results(), ROOT / "figures/demo/artefacts" / key
    if key not in ("table9", "ledger"):
        metrics = ("PA", "mIoU", "mAP") if key == "table3" else ("R@1",)
        for name, ours in (("table", False), ("ours", True)):
            if (place / f"{name}.csv").is_file():
                saved = pd.read_csv(place / f"{name}.csv", dtype=str, index_col=0, keep_default_na=False)
                tables = [table[table.index != "what was run"].to_numpy().flat
                          for table in (table_of(found, key, ours, metrics), saved)]
                np.testing.assert_allclose(*map(values_in, tables), atol=0.01001)
    if (place / "claims.csv").is_file():
        saved = pd.read_csv(place / "claims.csv", dtype=str, keep_default_na=False)
        pd.testing.assert_frame_equal(claims_of(found, key), saved, check_dtype=False)
