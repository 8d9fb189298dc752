"""Rows of the bench, and the CSV file that keeps them."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch

from cft.files import write_csv

COLUMNS = ("name", "value", "unit", "goal", "peer", "note")
Row = dict[str, str | float]


def row(name: str, value: float, unit: str, goal: str = "", peer: str = "", note: str = "") -> Row:
    """One line of the bench. goal: "<= 2" or ">= 2"; peer: who is compared with; note: the circumstances, in words."""
    return dict(zip(COLUMNS, (name, round(float(value), 3), unit, goal, peer, note), strict=True))


def device() -> str:
    """Where steps are measured: cuda if there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def place(on: str) -> str:
    """A device in words, for notes."""
    return torch.cuda.get_device_name() if on == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV file, every value as the text that stands there; none without a file."""
    if not Path(path).is_file():
        return []
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return [{str(column): value for column, value in line.items()} for line in table.to_dict("records")]


def write_rows(rows: Iterable[Row], path: str | Path) -> Path:
    """Write rows as CSV, whole or not at all."""
    return write_csv(path, pd.DataFrame(list(rows), columns=pd.Index(COLUMNS)))


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The old rows, each in its place, with the new ones instead of those of the same name, and what is new behind."""
    return list(({line["name"]: line for line in old} | {line["name"]: line for line in new}).values())
