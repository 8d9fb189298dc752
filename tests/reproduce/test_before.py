"""Every published number is what it was before the redesign, or stands in the CHANGELOG, with the reason.

`before` holds the old numbers, as rows with the names that methods have now, and the old tables as they were. Times are
measured anew by each run, and are not compared.
"""
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
BEFORE, NOW = Path(__file__).parent / "before", ROOT / "figures/demo"
KEYS = ["method", "seed", "set", "split", "metric"]
TIMES = {"seconds", "preparing, s", "training, s", "answering, ×"}
UNUSED = {"pixel_accuracy_per_image", "mean_iou_per_image"}  # no table showed them; they are not published any more


def changed_rows():
    """Place, number, before and now of every row that has another value."""
    old, new = pd.read_parquet(BEFORE / "rows.parquet"), pd.read_csv(NOW / "rows.csv")
    related = pd.read_csv(NOW / "related.csv")
    for artefact, rows in old[~old["metric"].isin(TIMES | UNUSED)].groupby("artefact"):
        mine = related[related["artefact"] == artefact] if artefact in set(related["artefact"]) else new
        pairs = rows.merge(mine, on=KEYS, how="left", suffixes=("", "_now"))
        assert len(pairs) == len(rows)
        for row in pairs[~((pairs["value"] - pairs["value_now"]).abs() < 1e-9)].to_dict("records"):
            name = ", ".join(str(row[key]) for key in KEYS)
            yield f"{artefact} rows", name, f"{row['value']:g}", f"{row['value_now']:g}"


def changed_cells():
    """Place, cell, before and now of every cell of a table that reads otherwise."""
    for file in sorted(BEFORE.glob("*/*.csv")):
        where = file.relative_to(BEFORE)
        old, new = (pd.read_csv(f, dtype=str, keep_default_na=False) for f in (file, NOW / "artefacts" / where))
        assert len(old) == len(new), where
        for column in old.columns[0 if file.stem == "claims" else 1:]:
            if column not in TIMES and column != "artefact":
                for k in range(len(old)):
                    if old[column][k] != new[column][k]:
                        yield where.as_posix(), f"{new.iloc[k, 0]}, {column}", old[column][k], new[column][k]


def test_numbers_are_what_they_were_or_listed():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("### Numbers that changed")[1]
    lines = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*\|$", text, re.MULTILINE)[1:]]
    listed = {tuple(cell.strip() for cell in line[:4]) for line in lines if len(line) == 5 and line[4].strip()}
    assert {*changed_rows(), *changed_cells()} == listed


def test_what_is_compared_is_all_of_it():
    old = pd.read_parquet(BEFORE / "rows.parquet")
    assert old.groupby("artefact").size().to_dict() == {
        "comparison": 640, "deal": 1775, "demo": 4500, "paper": 6993, "segmil": 265}
    assert {file.parent.name for file in BEFORE.glob("*/*.csv")} >= {"demo", "deal", "comparison", "table1", "table9"}
