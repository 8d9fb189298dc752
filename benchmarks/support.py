"""Ask every pretrained network of timm for relevance, and write the table that `cft.evaluate.support` reads.

    python benchmarks/support.py            # an hour of one core; what the table has is not asked again
    python benchmarks/support.py resnet18   # some networks, printed
"""
import sys

import pandas as pd
from tqdm.auto import tqdm

from cft.evaluate.support import by_family, survey, tags_of_timm
from cft.files import ASSETS


def main() -> None:
    """Ask for all networks, or for those that are named."""
    table = ASSETS / "support.csv"
    if names := sys.argv[1:]:
        found = survey(names)
    else:
        for name in tqdm(tags_of_timm()):
            known = pd.read_csv(table, keep_default_na=False) if table.exists() else pd.DataFrame({"model": []})
            if name not in set(known["model"]):
                rows = pd.concat([known, survey([name], progress=False)])
                rows.sort_values(["family", "model"]).to_csv(table, index=False)
        found = pd.read_csv(table, keep_default_na=False)
    print(by_family(found).to_string())


if __name__ == "__main__":
    main()
