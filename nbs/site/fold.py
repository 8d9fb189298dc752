"""Prose before code: long exported cells open folded, in JupyterLab and on the site. Run by `make export`."""
import re
from pathlib import Path

from execnb.nbio import read_nb, write_nb

LONG = 25  # lines; a formula that fits on half a screen stays open


def folds(cell) -> bool:
    """Whether a cell is exported and long, or exported and nothing but imports."""
    if cell["cell_type"] != "code" or not cell["source"].startswith("#| export"):
        return False
    lines = cell["source"].strip().splitlines()
    return len(lines) > LONG or not re.search(r"^(def|class|@|\w+( *:.*)? = )", cell["source"], re.MULTILINE)


def fold(notebook: Path) -> None:
    """Set what JupyterLab reads; nbs/site/conf.py hides the same cells on the site."""
    pages = read_nb(notebook)
    for cell in pages.cells:
        cell["metadata"].pop("jupyter", None)
        if folds(cell):
            cell["metadata"]["jupyter"] = {"source_hidden": True}
    write_nb(pages, notebook)


if __name__ == "__main__":
    for found in Path("nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in found.parts:
            fold(found)
