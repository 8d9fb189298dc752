"""Ask every pretrained network of timm for relevance, and write the table that `cft.evaluate.support` reads.

    python benchmarks/support.py            # an hour of one core; what the table has is not asked again
    python benchmarks/support.py resnet18   # some networks, printed
"""
import sys

import pandas as pd
import timm
import torch
from cost import peak_bytes
from tqdm.auto import tqdm

from cft.evaluate.support import by_family, cost_of, flops, survey, tags_of_timm
from cft.files import ASSETS


def size(name: str) -> int:
    """Number of weights of a network of timm."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def with_costs(found: pd.DataFrame) -> pd.DataFrame:
    """The table with what a step costs in flops and memory, for the smallest supported network of every family."""
    for _, part in tqdm(found[found["refused"] == ""].groupby("family")):
        if "flops" in part and part["flops"].ne("").any():
            continue
        name = min(part["model"], key=size)
        for column, measure in (("flops", flops), ("memory", peak_bytes)):
            found.loc[found["model"] == name, column] = f"{cost_of(name, measure):.2f}"
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
        found = with_costs(pd.read_csv(table, keep_default_na=False))
        found.to_csv(table, index=False)
    print(by_family(found).to_string())


if __name__ == "__main__":
    main()
