"""Every notebook runs, as papermill runs it, from a foreign folder."""
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(n for n in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in n.parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebook_runs(notebook, tmp_path):
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", cwd=tmp_path, kernel_name="python3", progress_bar=False,
                               execution_timeout=300)
