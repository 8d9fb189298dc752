"""Ask every pretrained network of timm for relevance, and write the table that `cft.evaluate.support` reads.

    python benchmarks/support.py            # an hour of one core; what the table has is not asked again
    python benchmarks/support.py resnet18   # some networks, printed
"""
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from cost import LiveBytes
from tqdm.auto import tqdm

from cft.evaluate.support import by_family, cost_of, flops, survey, tags_of_timm
from cft.files import ASSETS


def arithmetic_and_memory(step: Callable[[], None]) -> np.ndarray:
    """Operations, and most bytes alive at a time, of one call."""
    with LiveBytes() as memory:
        return np.array([flops(step), memory.peak])


def with_costs(found: pd.DataFrame, table: Path) -> pd.DataFrame:
    """The table with what a step costs, for the supported network of every family that has the most tags."""
    for _, part in tqdm(found[found["refused"] == ""].groupby("family")):
        if "flops" not in part or part["flops"].eq("").all():
            name = part.sort_values("tags", ascending=False, kind="stable")["model"].iloc[0]
            costs = [f"{cost:.2f}" for cost in cost_of(name, arithmetic_and_memory)]
            found.loc[found["model"] == name, ["flops", "memory"]] = costs
            found.fillna("").to_csv(table, index=False)
    return found.fillna("")


def main() -> None:
    """Ask for all networks, or for those that are named."""
    table = ASSETS / "support.csv"
    if names := sys.argv[1:]:
        found = survey(names)
    else:
        for name in tqdm(tags_of_timm()):
            known = pd.read_csv(table, keep_default_na=False) if table.exists() else pd.DataFrame({"model": []})
            if name not in set(known["model"]):
                rows = pd.concat([known, survey([name], progress=False)]).fillna("")
                rows.sort_values(["family", "model"]).to_csv(table, index=False)
        found = with_costs(pd.read_csv(table, keep_default_na=False), table)
    print(by_family(found).to_string())


if __name__ == "__main__":
    main()
