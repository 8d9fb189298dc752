"""Every published number is what it was before the redesign, or stands in the CHANGELOG, with the reason.

`before` holds the old numbers, as rows with the names that methods have now, and the old tables as they were. They were
made on another machine, where sums are rounded otherwise: a number is the same here within one picture, and within
0.002 where pixels are averaged. Times are measured anew by each run, and are not compared.
"""
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
BEFORE, NOW = Path(__file__).parent / "before", ROOT / "figures/demo"
KEYS = ["method", "seed", "set", "split", "metric"]
TIMES = {"seconds", "preparing", "training", "answering"}
UNUSED = {"pixel_accuracy_per_image", "mean_iou_per_image"}  # no table of the demo showed them; they are not published
COUNTED = ("top1", "top5", "top1_by_name", "pointing", "pointing_swapped")
NUMBER = re.compile(r"[-+−]?\d+\.\d+")


def rows_now(artefact):
    related = pd.read_csv(NOW / "related.csv")
    return related[related["artefact"] == artefact] if artefact in ("segmil", "deal", "comparison") else None


def changed_rows():
    """Place, number, before and now of every row that differs by more than another machine does."""
    old, rows = pd.read_parquet(BEFORE / "rows.parquet"), pd.read_csv(NOW / "rows.csv")
    for artefact, part in old[~old["metric"].isin(TIMES)].groupby("artefact"):
        part = part[~part["metric"].isin(UNUSED)] if artefact == "demo" else part
        now = rows_now(artefact)
        pairs = part.merge(rows if now is None else now, on=KEYS, how="left", suffixes=("", "_now"))
        assert len(pairs) == len(part)
        bound = (100.01 / pairs["n"]).where(pairs["metric"].isin(COUNTED), 0.002)
        for row in pairs[~((pairs["value"] - pairs["value_now"]).abs() <= bound)].to_dict("records"):
            name = ", ".join(str(row[key]) for key in KEYS)
            yield f"{artefact} rows", name, f"{row['value']:g}", f"{row['value_now']:g}"


def same(old, new):
    """Whether two cells say the same: the same words, and numbers that differ in the last digits only."""
    if old == new or NUMBER.sub("#", old) == NUMBER.sub("#", new) == "#":
        return old == new or abs(float(old.replace("−", "-")) - float(new.replace("−", "-"))) <= 0.2
    a, b = (NUMBER.findall(cell) for cell in (old, new))
    near = all(abs(float(x.replace("−", "-")) - float(y.replace("−", "-"))) <= 0.2 for x, y in zip(a, b))
    return NUMBER.sub("#", old) == NUMBER.sub("#", new) and near


def changed_cells():
    """Place, cell, before and now of every cell of a table that says something else."""
    for file in sorted(BEFORE.glob("*/*.csv")):
        where = file.relative_to(BEFORE)
        old, new = (pd.read_csv(f, dtype=str, keep_default_na=False) for f in (file, NOW / "artefacts" / where))
        assert len(old) == len(new), where
        for column in old.columns[0 if file.stem == "claims" else 1:]:
            if column.split(",")[0] not in TIMES and column != "artefact":
                for k in range(len(old)):
                    if not same(old[column][k], new[column][k]):
                        yield where.as_posix(), f"{new.iloc[k, 0]}, {column}", old[column][k], new[column][k]


def test_numbers_are_what_they_were_or_listed():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("### Numbers that changed")[1].split("###")[0]
    lines = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*\|$", text, re.MULTILINE)[1:]]
    listed = {tuple(cell.strip() for cell in line[:4]) for line in lines if len(line) == 5 and line[4].strip()}
    assert {*changed_rows(), *changed_cells()} == listed


def test_most_are_equal_to_the_last_digit():
    old, rows = pd.read_parquet(BEFORE / "rows.parquet"), pd.read_csv(NOW / "rows.csv")
    pairs = old[(old["artefact"] == "paper")].merge(rows, on=KEYS, suffixes=("", "_now"))
    assert len(pairs) == 6993 and ((pairs["value"] - pairs["value_now"]).abs() < 1e-9).mean() > 0.98


def test_what_is_compared_is_all_of_it():
    old = pd.read_parquet(BEFORE / "rows.parquet")
    assert old.groupby("artefact").size().to_dict() == {
        "comparison": 640, "deal": 1775, "demo": 4500, "paper": 6993, "segmil": 265}
    assert {file.parent.name for file in BEFORE.glob("*/*.csv")} >= {"demo", "deal", "comparison", "table1", "table9"}
