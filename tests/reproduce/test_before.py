"""Every published number is what the code from before the redesign gives, or stands in the CHANGELOG, with the reason.

`before/rows.parquet` holds the old numbers by the names that methods have now: `value`, as they were published, and
`again`, what the same old code gave on the machine on which `figures/demo` was made, where sums are rounded otherwise
(not known for some methods of the demo: they may differ by two pictures).
Beside it stand the old tables, as they were. Times are measured anew by each run, and are not compared.
"""
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
BEFORE, NOW = Path(__file__).parent / "before", ROOT / "figures/demo"
KEYS = ["method", "seed", "set", "split", "metric"]
TIMES = {"seconds", "preparing", "training", "answering"}
NEW = {"demo/table.csv": 3, **dict.fromkeys((f"table5/{name}.csv" for name in ("claims", "ours", "table")), 5)}  # below
UNUSED = {"pixel_accuracy_per_image", "mean_iou_per_image", "same_weights_as_contrastive"}  # no table shows them
EXACT = ("top1", "top5", "top1_by_name", "pointing", "pointing_swapped")  # counted; the others are means over pixels
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?")


def pairs_of():
    """Old rows with the value that is published now."""
    old, rows = pd.read_parquet(BEFORE / "rows.parquet"), pd.read_csv(NOW / "rows.csv")
    related = pd.read_csv(NOW / "related.csv")
    for artefact, part in old[~old["metric"].isin(TIMES | UNUSED)].groupby("artefact"):
        now = related[related["artefact"] == artefact] if artefact in set(related["artefact"]) else rows
        pairs = part.merge(now[[*KEYS, "value"]], on=KEYS, how="left", suffixes=("", "_now"))
        assert len(pairs) == len(part)
        yield artefact, pairs


def changed_rows():
    """Place, number, before and now of every number that the old code does not give, neither there nor here."""
    for artefact, pairs in pairs_of():
        bound = pd.Series(0.001, pairs.index).mask(pairs["metric"].isin(EXACT), 1e-4)
        loose = (200.01 / pairs["n"]).where(pairs["metric"].isin(EXACT), 0.1)  # two pictures
        there = pairs["again"].where(pairs["again"].notna(), pairs["value"])
        near = [(pairs["value_now"] - pairs["value"]).abs() <= bound,
                (pairs["value_now"] - there).abs() <= bound.where(pairs["again"].notna(), loose)]
        for row in pairs[~(near[0] | near[1])].to_dict("records"):
            name = ", ".join(str(row[key]) for key in KEYS)
            yield f"{artefact} rows", name, f"{row['value']:g}", f"{row['value_now']:g}"


def same(old, new):
    """Whether two cells say the same: the same words; numbers may differ, since their rows are compared."""
    return NUMBER.sub("#", old) == NUMBER.sub("#", new)


def table(file):
    """A table in one form: once what was run stood in the heads, now in a row; the demo's claims had columns."""
    found = pd.read_csv(file, dtype=str, keep_default_na=False)
    found = found[found.iloc[:, 0] != "what was run"].reset_index(drop=True)
    if "demo" in found:
        found["verdict"] = found["demo"].str.extract(r"(holds|open|contradicted|not run|$)", expand=False)
    return found


def changed_cells():
    """Place, cell, before and now of every cell with other words, such as a verdict; chapters have new names."""
    for file in sorted(BEFORE.glob("*/*.csv")):
        where = file.relative_to(BEFORE)
        old, new = table(file), table(NOW / "artefacts" / where)
        shared = [column for column in old.columns if column in new.columns and column not in ("artefact", "where")]
        names = dict(zip(shared, shared)) if len(shared) > 1 else dict(zip(old.columns, new.columns, strict=True))
        assert len(old) + NEW.get(where.as_posix(), 0) == len(new), where
        for column, now in names.items():
            for k in range(len(old) if file.stem == "claims" or column != old.columns[0] else 0):
                if not same(old[column][k], new[now][k]):
                    yield where.as_posix(), f"{new.iloc[k, 0]}, {column}", old[column][k], new[now][k]


def test_numbers_are_what_they_were_or_listed():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("### Numbers that changed")[1].split("###")[0]
    lines = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*\|$", text, re.MULTILINE)[1:]]
    listed = {tuple(cell.strip() for cell in line[:4]) for line in lines if len(line) == 5 and line[4].strip()}
    assert {*changed_rows(), *changed_cells()} == listed


@pytest.mark.parametrize("artefact, share", [("paper", 0.98), ("demo", 0.98), ("deal", 0.98), ("comparison", 0.8)])
def test_most_are_equal_to_those_of_the_other_machine(artefact, share):
    pairs = dict(pairs_of())[artefact]
    assert ((pairs["value"] - pairs["value_now"]).abs() < 1e-3).mean() > share


def test_what_is_compared_is_all_of_it():
    old = pd.read_parquet(BEFORE / "rows.parquet")
    assert old.groupby("artefact").size().to_dict() == {
        "comparison": 640, "deal": 1775, "demo": 4500, "paper": 6993, "segmil": 265}
    assert {file.parent.name for file in BEFORE.glob("*/*.csv")} >= {"demo", "deal", "comparison", "table1", "table9"}
