"""Pages: numbers against loops, the trail, and how a page is executed."""
import json
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from papermill.exceptions import PapermillExecutionError
from scipy import stats

from cft.reproduce import pages
from cft.reproduce.pages import (
    averaged_rows,
    claims_of,
    flips,
    gains,
    inconsistencies_of,
    keep_page,
    notebook_of,
    numbers,
    open_results,
    printed_gains,
    publish,
    resolve,
    run_page,
    table_of,
    trail,
)
from cft.reproduce.paper import ARTEFACTS, INCONSISTENCIES, PAPER, in_our_form, reference
from cft.reproduce.settings import Work, read_settings, rows_file, write_settings

ROOT = Path(__file__).parents[2]
SETS = ("val", "v2", "adversarial", "rendition", "sketch", "object", "si_location", "si_rotation", "si_size")


def made_rows(methods, seeds, sets=SETS, model="demo", splits=("all",)):
    """Numbers that are a function of their keys."""
    def value(m, s, name, split):
        return 30 + 5 * methods.index(m) * (name != "val") + s + len(name) / 7 + (split == "other") * 3 + (hash_of(m, s, name) % 10) / 5

    rows = [(model, m, s, name, split, metric, value(m, s, name, split) + (metric == "top5") * 20, 20.0, 60.0, 100, f"{m}{s}", "")
            for m in methods for s in range(seeds) for name in sets for split in splits for metric in ("top1", "top5")]
    return pd.DataFrame(rows, columns=list(pages.ROW_COLUMNS))


def hash_of(*parts):
    return sum(ord(c) * (i + 3) for i, c in enumerate("".join(map(str, parts))))


RECIPES = ["original", "gradmask", "rrr", "swap", "cft-paper", "cft"]


@pytest.fixture
def small(tmp_path):
    """A published folder with made-up numbers for Tables 1 and 2."""
    write_settings(read_settings("demo"), tmp_path / "settings.yaml")
    made_rows(RECIPES, 5).to_csv(tmp_path / "rows.csv", index=False)
    runs = [("demo", m, s, f"{m}{s}", 1.0, 120, "d" * 64, json.dumps({"rate": 1e-5}), "c" * 40, "0.1") for m in RECIPES[1:] for s in range(5)]
    pd.DataFrame(runs, columns=list(pages.RUN_COLUMNS)).to_csv(tmp_path / "runs.csv", index=False)
    pd.DataFrame({"pool": ["0"], "guide": ["kept"], "unique": [10], "pairs": [12]}).to_csv(tmp_path / "concepts.csv", index=False)
    return tmp_path


def test_numbers_are_those_of_the_artefact(small):
    found = open_results(small, "table2")
    rows = numbers(found, "table2")
    assert set(rows["set"]) == {"si_location", "si_rotation", "si_size"} and set(rows["method"]) == set(RECIPES) - {"cft"}
    assert set(numbers(found, "table2", in_our_form(found.profile))["method"]) == set(RECIPES) - {"cft-paper"}
    narrow = open_results(small, "table2", methods=("RRDA",), seeds=2)
    assert set(numbers(narrow, "table2")["method"]) == {"original", "swap"} and set(numbers(narrow, "table2")["seed"]) == {0, 1}


def test_means_and_intervals_against_a_loop(small):
    found = open_results(small, "table1")
    rows = numbers(found, "table1")
    means = averaged_rows(rows).set_index(["method", "dataset", "metric"])
    for method in ("swap", "cft-paper"):
        values = [r.value for r in rows.itertuples() if (r.method, r.set, r.metric) == (method, "sketch", "top1")]
        mean = sum(values) / 5
        half = 2.776445 * (sum((v - mean) ** 2 for v in values) / 4 / 5) ** 0.5
        got = means.loc[(method, "sketch", "top1")]
        assert (got["value"], got["low"], got["high"], got["n"]) == pytest.approx((mean, mean - half, mean + half, 5), rel=1e-5)
    one = averaged_rows(rows[rows["seed"] == 0])
    assert (one["low"] == 20).all() and (one["high"] == 60).all()  # of the pictures, where there is one seed


def test_gains_are_paired_within_seeds(small):
    found = open_results(small, "table1")
    rows = found.rows.set_index(["method", "seed", "set", "metric"])["value"]
    got = gains(found, "table1").set_index(["method", "dataset"])
    differences = np.array([rows["swap", s, "object", "top1"] - rows["original", s, "object", "top1"] for s in range(5)])
    low, high = stats.t.interval(0.95, 4, differences.mean(), stats.sem(differences))
    assert tuple(got.loc[("RRDA", "object"), ["value", "low", "high"]]) == pytest.approx((differences.mean(), low, high))
    assert "Original" not in got.index.get_level_values(0)
    theirs = printed_gains("table1").set_index(["method", "dataset"])["value"]
    assert theirs["CFT", "IN-A"] == pytest.approx(27.76 - 13.26) and theirs["RRDA", "IN-R"] == pytest.approx(47.12 - 30.26)
    assert printed_gains("table7").empty and len(printed_gains("table4")) == 12


def test_the_paper_and_the_demo_share_no_column(small):
    table = table_of(open_results(small, "table1"), "table1", metrics=("R@1",))
    sources = set(table.columns.get_level_values("source"))
    assert sources == {"paper (arXiv 2603.08309)", "DEMO, drawn pictures, not ImageNet"}
    sets = {s: set(table.xs(s, axis=1, level="source").columns.get_level_values(0)) for s in sources}
    assert not set.intersection(*sets.values()) and "27.76" in table.to_string() and "seeds: 5" in table.to_string()
    ours = table_of(open_results(small, "table1"), "table1", ours=True, metrics=("R@1",))
    mean = made_rows(RECIPES, 5).query("method == 'cft' and set == 'sketch' and metric == 'top1'")["value"].mean()
    assert f"{mean:.2f} [" in ours.loc["CFT"].to_string()


def test_claims_of_both_forms(small):
    table = claims_of(open_results(small, "table1"), "table1").set_index("claim")
    assert list(table.columns) == ["in the paper", "demo, the paper's form", "demo, our form"]
    line = table.loc["CFT raises accuracy on the shifted sets"]
    assert line.iloc[0] == "holds" and line.iloc[1].startswith("✓ holds: +") and "n = 5" in line.iloc[2]
    assert claims_of(open_results(small, "table8"), "table8").empty


def test_the_trail(small):
    found = open_results(small, "table2")
    line = trail(found, "table2").query("method == 'swap' and seed == 3").iloc[0]
    assert (line.sha256, line.trained_on, line["commit"]) == ("swap3", "d" * 64, "c" * 40)
    rows = pd.read_csv(small / "rows.csv")
    rows.assign(weights=rows["weights"].where(rows["seed"] != 2, "other")).to_csv(small / "rows.csv", index=False)
    with pytest.raises(ValueError, match="rows of table2 were measured on other weights .*gradmask, seed 2, on"):
        trail(open_results(small, "table2"), "table2")
    assert resolve(found, "demo", "rrr", 1)["recipe"] == {"rate": 1e-5}
    with pytest.raises(ValueError, match="no run of rrr on demo with seed 9"):
        resolve(found, "demo", "rrr", 9)
    (small / "models/demo/rrr/1").mkdir(parents=True)
    (small / "models/demo/rrr/1/model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed since it was recorded"):
        resolve(found, "demo", "rrr", 1)


def test_what_a_page_leaves(small, tmp_path):
    found = open_results(small, "table2")
    out = keep_page(found, "table2", tmp_path / "kept", table=table_of(found, "table2"))
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{n}.{e}" for n in ("table", "claims") for e in ("csv", "html", "tex")) + ["trail.csv"]
    assert "DEMO, drawn pictures, not ImageNet" in (out / "table.html").read_text() and len(pd.read_csv(out / "trail.csv")) == 5 * 5 * 3 * 2
    assert keep_page(found, "table2", table=table_of(found, "table2")) == small / "artefacts/table2"
    assert not (small / "artefacts").exists()  # published results are not written to by reading them


def test_flips(small):
    (small / "maps").mkdir()
    for method, predicted in (("original", [0, 1, 2, 3]), ("cft", [0, 9, 2, 5])):
        np.savez(small / f"maps/demo.{method}.0.object.npz", label=[0, 9, 7, 3], predicted=predicted)
    found = open_results(small, "fig2")
    assert flips(found, "original", "cft", "object") == ([1], [3])
    with pytest.raises(ValueError, match="no relevance maps at demo.swap.0.object.npz"):
        found.maps("demo", "swap", 0, "object")


def test_a_run_is_read_file_by_file(tmp_path):
    """Only the files of an artefact are read, and one that is missing is named."""
    settings = read_settings("smoke").model_copy(update={"our_form": True})
    write_settings(settings, tmp_path / "settings.yaml")
    work = Work(settings, ("table3",))
    for model, method, seed, name in work.tested():
        path = tmp_path / rows_file(model, method, seed, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"set": name, "protocol": "model", "labels": "", "targets": "", "split": "all", "metric": ["mean_iou", "other"], "checkpoint": f"{model}.{method}.{seed}",
                      "method": method, "seed": seed, "value": 50.0, "low": 40.0, "high": 60.0, "n": 4, "sha256": "a" * 64, "data": "b" * 64}).to_parquet(path)
    (tmp_path / "results/rows/broken--demo.x.0--model.parquet").write_bytes(b"half")
    found = open_results(tmp_path, "table3")
    assert len(found.rows) == len(work.tested()) == 3 and set(found.rows["metric"]) == {"mean_iou"} and set(found.rows["model"]) == {"demo"}
    path.unlink()
    with pytest.raises(ValueError, match=f"1 of 3 results are not in .*, first {path.name}"):
        open_results(tmp_path, "table3").rows  # noqa: B018


def test_one_original_stands_beside_every_seed_on_imagenet(tmp_path):
    """The published networks are the same for all seeds; their halves of the classes are not."""
    from cft.reproduce.jobs import open_world

    settings = read_settings("paper", classes=500)
    write_settings(settings, tmp_path / "settings.yaml")
    world = open_world(settings, tmp_path)
    model = "vit_base_patch16_224"
    rows = pd.concat([made_rows(["original"], 1, ("in-a",), model, ("all", "fine-tuned", "other")), made_rows(["original", "cft-paper"], 5, ("in-a",), model).query("method == 'cft-paper'")])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rng, n = np.random.default_rng(0), 400
    targets, right = rng.integers(1000, size=n), rng.random(n) < 0.5
    pictures = pd.DataFrame({"id": range(n), "group": "g", "targets": [(int(t),) for t in targets], **{f"{s}_predicted": 0 for s in ("full", "subset")},
                             **{f"{s}_{k}{r}": right for s in ("full", "subset") for k in ("top", "first") for r in (1, 5)}})
    (tmp_path / "results/pictures").mkdir(parents=True)
    pictures.to_parquet(tmp_path / f"results/pictures/in-a--{model}.original.0--model.parquet")
    got = numbers(open_results(tmp_path, "table4", models=("ViT-B",)), "table4")
    got = got[(got["method"] == "original") & (got["metric"] == "top1")].set_index(["seed", "split"])["value"]
    for seed in (0, 3):
        inside = np.isin(targets, world.tuned(seed))
        assert got[seed, "fine-tuned"] == pytest.approx(100 * right[inside].mean()) and got[seed, "other"] == pytest.approx(100 * right[~inside].mean())
        assert got[seed, "all"] == got[0, "all"]


def test_published_numbers_are_the_runs_numbers(small, tmp_path):
    copy = publish(small, tmp_path / "copy")
    assert np.allclose(open_results(copy).rows["value"], open_results(small).rows["value"], atol=1e-4)
    assert sorted(p.name for p in copy.iterdir()) == ["concepts.csv", "rows.csv", "runs.csv", "settings.yaml"]
    with pytest.raises(ValueError, match="no reproduction at"):
        publish(tmp_path / "nothing", tmp_path / "x")


# ---- pages as notebooks ----


def test_every_artefact_has_a_page_that_states_what_it_must():
    for a in ARTEFACTS:
        text = notebook_of(a.key).read_text()
        assert f'key = \\"{a.key}\\"' in text and "inconsistencies_of(key)" in text and a.question.split(",")[0][:20] in text
        assert {i.number for i in inconsistencies_of(a.key)} == set(a.inconsistencies) <= {i.number for i in INCONSISTENCIES}
    with pytest.raises(ValueError, match="no page for 'table10'"):
        notebook_of("table10")


def made_page(path, *cells):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nb.cells = [nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}), *(nbformat.v4.new_code_cell(c) for c in cells)]
    nbformat.write(nb, path)
    return path


def test_executing_a_page(tmp_path):
    page = made_page(tmp_path / "p.ipynb", "print(x + 1)", "assert x < 5, 'too large'")
    done = run_page(page, tmp_path / "out/p.ipynb", {"x": 2})
    assert "3" in done.read_text() and sorted(p.name for p in done.parent.iterdir()) == ["p.ipynb"]
    with pytest.raises(ValueError, match="p.ipynb has no parameter y; it has x"):
        run_page(page, tmp_path / "out/q.ipynb", {"y": 2})
    with pytest.raises(PapermillExecutionError) as failed:
        run_page(page, tmp_path / "out/q.ipynb", {"x": 7})
    assert failed.value.exec_count and "too large" in failed.value.evalue
    assert not (tmp_path / "out/q.ipynb").exists() and (tmp_path / "out/q.failed.ipynb").exists()


def test_a_page_without_a_table_is_no_page(tmp_path, monkeypatch):
    page = made_page(tmp_path / "table1.ipynb", "root = 1", "print(root)")
    nb = nbformat.read(page, 4)
    nb.cells[0].source = 'root = ""'
    nbformat.write(nb, page)
    monkeypatch.setattr(pages, "notebook_of", lambda key: page)
    with pytest.raises(RuntimeError, match="left no table in artefacts/table1"):
        pages.make_page(read_settings("smoke"), tmp_path, "table1")
    assert not (tmp_path / "pages/table1.ipynb").exists()


def test_the_published_results_are_of_the_code_in_the_checkout():
    """What figures/ holds is the demo profile, complete, and says so."""
    found = open_results()
    assert found.settings == read_settings("demo")
    have = set(found.rows[["model", "method", "seed", "set"]].itertuples(index=False, name=None))
    assert have == found.work.tested() and set(found.runs[["model", "method", "seed"]].itertuples(index=False, name=None)) == found.work.tuned()
    for a in ARTEFACTS:
        assert list((found.root / "artefacts" / a.key).glob("*.csv")), a.key
    assert set(reference()["table"]) >= {a.key for a in ARTEFACTS} - {"fig1", "fig2", "controls", "definitions", "ledger"} and shutil and PAPER
