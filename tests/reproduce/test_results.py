"""Results: what is read of a run, whose numbers they are, and the trail behind each."""
import numpy as np
import pandas as pd
import pytest
from made_results import METHODS

from cft.files import write_json
from cft.reproduce.paper import ARTEFACTS, in_our_form
from cft.reproduce.results import numbers, open_results, resolve, trail
from cft.reproduce.settings import Work, read_settings, rows_file, write_settings


def test_numbers_are_those_of_the_artefact(small):
    found = open_results(small, "table2")
    rows = numbers(found, "table2")
    assert set(rows["set"]) == {"si_location", "si_rotation", "si_size"}
    assert set(rows["method"]) == set(METHODS) - {"cft"}
    assert set(numbers(found, "table2", in_our_form(found.profile))["method"]) == set(METHODS) - {"cft-paper"}
    narrow = numbers(open_results(small, "table2", methods=("RRDA",), seeds=2), "table2")
    assert set(narrow["method"]) == {"original", "rrda"} and set(narrow["seed"]) == {0, 1}


def test_the_trail(small):
    found = open_results(small, "table2")
    line = trail(found, "table2").query("method == 'rrda' and seed == 3").iloc[0]
    assert (line.sha256, line.trained_on, line["commit"]) == ("rrda3", "d" * 64, "c" * 40)
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


def test_maps_that_were_not_made_are_named(small):
    with pytest.raises(ValueError, match="no relevance maps at demo.rrda.0.object.npz"):
        open_results(small).maps("demo", "rrda", 0, "object")
    (small / "maps").mkdir()
    np.savez(small / "maps/demo.rrda.0.object.npz", label=[1, 2])
    assert open_results(small).maps("demo", "rrda", 0, "object")["label"].tolist() == [1, 2]


def test_a_run_is_read_file_by_file(tmp_path):
    """Only the files of an artefact are read, and one that is missing is named."""
    settings = read_settings("smoke", our_form=True)
    write_settings(settings, tmp_path / "settings.yaml")
    work = Work(settings, ("table3",))
    same = {"protocol": "model", "labels": "", "targets": "", "split": "all", "metric": ["mean_iou", "other"],
            "value": 50.0, "low": 40.0, "high": 60.0, "n": 4, "sha256": "a" * 64, "data": "b" * 64}
    for model, method, seed, name in work.tested():
        path = tmp_path / rows_file(model, method, seed, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"set": name, "checkpoint": f"{model}.{method}.{seed}", "method": method, "seed": seed}
        pd.DataFrame(same | own).to_parquet(path)
    (tmp_path / "results/rows/broken--demo.x.0--model.parquet").write_bytes(b"half")
    rows = open_results(tmp_path, "table3").rows
    assert len(rows) == len(work.tested()) == 3
    assert set(rows["metric"]) == {"mean_iou"} and set(rows["model"]) == {"demo"}
    path.unlink()
    with pytest.raises(ValueError, match=f"1 of 3 results are not in .*, first {path.name}"):
        open_results(tmp_path, "table3").rows  # noqa: B018


def test_concepts_and_guides_of_a_run(tmp_path):
    write_settings(read_settings("smoke"), tmp_path / "settings.yaml")
    write_json(tmp_path / "kept/0/strict.json", {"concepts": [{"owners": ["a", "b"]}, {"owners": ["a"]}]})
    write_json(tmp_path / "guides/0/kept.json", {"pictures": ["p", "q"], "concepts": {"pairs": 3}, "agreement": 0.5})
    write_json(tmp_path / "guides/0/class.json", {"pictures": ["p"]})
    found = open_results(tmp_path)
    assert found.concepts.to_numpy().tolist() == [["0", "strict", 2, 3]]
    guides = found.guides.set_index("guide")
    assert guides.loc["kept", ["pictures", "pairs", "agreement"]].tolist() == [2, 3, 0.5]
    assert guides.loc["class"].isna().sum() == 2 and not found.is_copy
    with pytest.raises(ValueError, match="no reproduction at"):
        open_results(tmp_path / "nothing")


def test_the_published_results_are_of_the_code_in_the_checkout():
    """What figures/ holds is the demo profile, complete, and says so."""
    found = open_results(keys=[a.key for a in ARTEFACTS if a.key != "closed"])
    assert found.settings == read_settings("demo")
    have = set(found.rows[["model", "method", "seed", "set"]].itertuples(index=False, name=None))
    assert have == set(found.work.tested())
    runs = set(found.runs[["model", "method", "seed"]].itertuples(index=False, name=None))
    assert runs <= found.work.tuned()
