"""Every notebook runs from a foreign folder, cell by cell.

The tutorial is run by its own tests, and all pages of the paper, by papermill, by the smoke run of the engine; two of
them run here on the published results. A notebook is run in a fork of a process that has imported what they all need.
"""
import multiprocessing
import os
from pathlib import Path

import papermill
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(n for n in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in n.parts
                   and n.stem != "tutorial" and (n.parent.name != "paper" or n.stem in ("table1", "fig2")))
# No `cft`: what a chapter says of it is run anew.
NEEDED = ["torchvision", "timm", "accelerate", "pandas.io.formats.style", "pyarrow.parquet", "scipy.stats", "seaborn",
          "sklearn.metrics", "transformers", "pydantic", "execnb.shell"]


def execute(notebook: Path, folder: Path) -> None:
    """Run the cells of a notebook, to the first error; in a child."""
    from execnb.shell import CaptureShell

    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)
    CaptureShell(path=folder, mpl_format="png").execute(notebook, exc_stop=True)


@pytest.fixture(scope="module")
def warm():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebook_runs(notebook, warm, tmp_path):
    child = warm.Process(target=execute, args=(notebook, tmp_path))
    child.start()
    child.join(300)
    child.kill()
    assert child.exitcode == 0


@pytest.mark.slow
def test_an_error_in_a_cell_is_one(warm, tmp_path):
    bad = tmp_path / "bad.ipynb"
    bad.write_text((ROOT / "nbs/index.ipynb").read_text().replace("from IPython.display", "from nowhere"))
    child = warm.Process(target=execute, args=(bad, tmp_path))
    child.start()
    child.join(300)
    assert child.exitcode == 1


@pytest.mark.slow
def test_papermill_runs_a_chapter(tmp_path):
    papermill.execute_notebook(ROOT / "nbs/18_metrics.ipynb", tmp_path / "out.ipynb", cwd=tmp_path,
                               kernel_name="python3", progress_bar=False, execution_timeout=300)
