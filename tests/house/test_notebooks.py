"""Every notebook runs, as papermill runs it, from a foreign folder.

The tutorial is run by its own tests, and all pages of the paper by the smoke run of the engine; two of them run here
on the published results.
"""
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(n for n in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in n.parts
                   and n.stem != "tutorial" and (n.parent.name != "paper" or n.stem in ("table1", "fig2")))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebook_runs(notebook, tmp_path):
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", cwd=tmp_path, kernel_name="python3",
                               progress_bar=False, execution_timeout=300)
