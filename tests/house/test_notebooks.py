"""Every notebook runs from a foreign folder, cell by cell, and what is saved of it is what it says now.

The tutorial is run by its own tests, and all pages of the paper, by papermill, by the smoke run of the engine; two of
them run here on the published results. Letters in figures are large enough to be read on a page. A notebook is run in a
fork of a process that has imported what they all need.
"""
import json
import math
import multiprocessing
import os
import re
from pathlib import Path

import papermill
import pytest
from letters import SMALLEST, letters

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(n for n in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in n.parts
                   and n.stem != "tutorial" and (n.parent.name != "paper" or n.stem in ("table1", "fig2")))
# No `cft`: what a chapter says of it is run anew.
NEEDED = ["torchvision", "timm", "accelerate", "pandas.io.formats.style", "pyarrow.parquet", "scipy.stats", "seaborn",
          "sklearn.metrics", "transformers", "pydantic", "execnb.shell"]


def execute(notebook: Path, folder: Path) -> None:
    """Run the cells of a notebook, to the first error, and save it in `folder`; in a child."""
    import pandas
    from execnb.shell import CaptureShell
    from matplotlib.backend_bases import FigureCanvasBase

    small, shown = [], FigureCanvasBase.print_figure

    def measured(canvas, *args, **options):
        small.extend(pair for pair in letters(canvas.figure).items() if pair[1] < SMALLEST)
        return shown(canvas, *args, **options)

    FigureCanvasBase.print_figure = measured
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)
    shell = CaptureShell(path=folder, mpl_format="png")
    pandas.set_option("display.max_columns", 20)  # as in Jupyter; here it would be the width of a terminal
    shell.execute(notebook, folder / "executed.ipynb", exc_stop=True)
    assert not small, f"letters too small for a page: {small}"


def said(notebook: Path) -> list[tuple[str, str]]:
    """Cell by cell, what a notebook prints and the text that it shows; not its pictures, nor the commit it ran at."""
    told = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        printed = shown = ""  # apart: execnb has what is printed first
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if output.get("name") == "stdout":
                printed += "".join(output["text"])
            elif not any(kind.startswith("image/") for kind in data):
                text = next((data[k] for k in ("text/markdown", "text/html", "text/plain") if k in data), "")
                shown += re.sub(r"<style.*?</style>|<[^>]*>| at 0x\w+", " ", "".join(text), flags=re.DOTALL)
        words = " ".join((printed + shown).split())
        told.append(("".join(cell["source"]), re.sub(r"\b[0-9a-f]{40,64}\b", "…", words)))
    return told


def alike(one: str, other: str) -> bool:
    """Whether texts are the same up to what another processor rounds otherwise: 2 %, or one in the last place."""
    number = r"[-+−]?\d+\.\d+(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+"
    pairs = zip(*(re.findall(number, text.replace("−", "-")) for text in (one, other)))
    return re.sub(number, "#", one) == re.sub(number, "#", other) and all(
        math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=1.01 * 10.0**-max(len(a.partition(".")[2]), 1))
        if "e" not in a + b else math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=1e-5) for a, b in pairs)


@pytest.fixture(scope="module")
def warm():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_runs_and_is_saved_as_it_is(notebook, warm, tmp_path):
    child = warm.Process(target=execute, args=(notebook, tmp_path))
    child.start()
    child.join(300)
    child.kill()
    assert child.exitcode == 0
    pairs = zip(said(notebook), said(tmp_path / "executed.ipynb"))
    stale = [(old, new) for old, new in pairs if old[0] != new[0] or not alike(old[1], new[1])]
    assert not stale, "`make pages` saves it anew"


def test_what_another_processor_rounds_is_alike():
    assert alike("loss 0.123, 3e-15 off, 4 of 5", "loss 0.124, 8e-15 off, 4 of 5") and alike("87.41 %", "87.40 %")
    for stale in ("loss 0.323, 3e-15 off, 4 of 5", "loss 0.123, 3e-2 off, 4 of 5", "loss 0.123, 3e-15 off, 3 of 5"):
        assert not alike("loss 0.123, 3e-15 off, 4 of 5", stale)
    assert not alike("rate 0.0000", "rate 0.0010")


@pytest.mark.slow
def test_an_error_in_a_cell_is_one(warm, tmp_path):
    bad = tmp_path / "bad.ipynb"
    bad.write_text((ROOT / "nbs/index.ipynb").read_text().replace("from IPython.display", "from nowhere"))
    child = warm.Process(target=execute, args=(bad, tmp_path))
    child.start()
    child.join(300)
    assert child.exitcode == 1


@pytest.mark.slow
def test_papermill_is_told_of_a_parameter_that_a_chapter_does_not_have(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="this notebook has no parameter colour; it has none"):
        papermill.execute_notebook(ROOT / "nbs/17_intervals.ipynb", tmp_path / "out.ipynb", {"colour": "red"},
                                   cwd=tmp_path, kernel_name="python3", progress_bar=False, execution_timeout=300)


@pytest.mark.slow
def test_small_letters_are_an_error(warm, tmp_path):
    bad, page = tmp_path / "bad.ipynb", json.loads((ROOT / "nbs/index.ipynb").read_text())
    code = next(cell for cell in page["cells"] if cell["cell_type"] == "code")
    for width, expected in ((7, 0), (10, 1)):
        draw = f"plt.subplots(figsize=({width}, 2))[1].set_title('a', size=9)"
        code["source"] = f"import matplotlib.pyplot as plt\n{draw}"
        bad.write_text(json.dumps(page | {"cells": [code]}))
        child = warm.Process(target=execute, args=(bad, tmp_path))
        child.start()
        child.join(300)
        assert child.exitcode == expected
