"""Publishing: how a page is executed, what it leaves, what is copied, and what the README says of it."""
import json
import re
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from papermill.exceptions import PapermillExecutionError

from cft.reproduce import publish as module
from cft.reproduce.paper import ARTEFACTS, INCONSISTENCIES
from cft.reproduce.publish import (
    end_page,
    main_table,
    make_page,
    markdown,
    notebook_of,
    open_page,
    publish,
    run_page,
    save_page,
    scoreboard,
    write_readme,
)
from cft.reproduce.results import open_results
from cft.reproduce.settings import RELATED, Work, read_settings, write_settings
from cft.reproduce.tables import table_of

ROOT = Path(__file__).parents[2]


def test_what_a_page_leaves(small, tmp_path, capsys):
    found = open_results(small, "table2")
    figure, _ = plt.subplots()
    out = save_page(found, "table2", tmp_path / "kept", {"figure": figure}, table=table_of(found, "table2"), ours=None)
    plt.close(figure)
    wanted = [f"{name}.{ending}" for name in ("table", "claims") for ending in ("csv", "html", "tex")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*wanted, "figure.png", "figure.pdf", "trail.csv"])
    assert "DEMO, drawn pictures, not ImageNet" in (out / "table.html").read_text()
    assert "Table 2: SI-Score: claims" in (out / "claims.html").read_text()
    assert len(pd.read_csv(out / "trail.csv")) == 5 * 5 * 3 * 2
    assert save_page(found, "table2", table=table_of(found, "table2")) == small / "artefacts/table2"
    assert not (small / "artefacts").exists()  # published results are not written to by reading them
    end_page(found, "table2", table=table_of(found, "table2"))
    said = "25 fine-tunes and 90 evaluations; to make it again: cft reproduce --only table2"
    assert said in capsys.readouterr().out


def test_the_page_of_a_related_system_brings_its_claims(small, tmp_path):
    made = pd.DataFrame({"claim": ["A beats B"], "verdict": ["open"]})
    out = save_page(open_results(small, "segmil"), "segmil", tmp_path / "segmil", table=made, claims=made)
    assert pd.read_csv(out / "claims.csv", index_col=0).index.tolist() == ["A beats B"]
    assert {p.stem for p in out.iterdir()} == {"claims", "table"} and "? open" in (out / "claims.html").read_text()


def test_published_numbers_are_the_runs_numbers(small, tmp_path):
    place = "artefacts/table1"
    for name in (f"{place}/table.csv", f"{place}/figure.pdf", f"{place}/trail.csv", "maps/a.npz"):
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        (small / name).write_text("x")
    copy = publish(small, tmp_path / "copy")
    a, b = open_results(copy), open_results(small)
    assert np.allclose(a.rows["value"], b.rows["value"], atol=1e-4) and len(a.rows) == len(b.rows)
    for name in ("runs", "concepts"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))
    assert a.guides["agreement"].tolist() == [0.5197] and a.settings == b.settings
    files = sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file())
    tables = ["concepts.csv", "guides.csv", "maps/a.npz", "rows.csv", "runs.csv", "settings.yaml"]
    assert files == ["artefacts/table1/table.csv", *tables]
    with pytest.raises(ValueError, match="no reproduction at"):
        publish(tmp_path / "nothing", tmp_path / "x")
    write_settings(read_settings("smoke"), tmp_path / "empty/settings.yaml")
    with pytest.raises(ValueError, match="results are not in"):
        publish(tmp_path / "empty", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- pages as notebooks ----


def test_every_artefact_has_a_page_that_states_what_it_must():
    for a in ARTEFACTS:
        text = notebook_of(a.key).read_text()
        assert f'key = \\"{a.key}\\"' in text and a.question.split(",")[0][:20] in text
        assert f"{'save' if a.key == 'demo' else 'end'}_page(found, key" in text
        assert set(a.inconsistencies) <= {i.number for i in INCONSISTENCIES}
        for parameter in ("root", "models", "methods", "seeds", "profile", "out", "device"):
            assert f'"{parameter} = ' in text
    assert {notebook_of(key).parent.name for key in RELATED} == {"related"}
    with pytest.raises(ValueError, match="no page for 'table10'; expected table10.ipynb"):
        notebook_of("table10")


def made_page(path, *cells, first="x = 1"):
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    parameters = nbformat.v4.new_code_cell(first, metadata={"tags": ["parameters"]})
    nb.cells = [parameters, *map(nbformat.v4.new_code_cell, cells)]
    nbformat.write(nb, path)
    return path


def test_what_a_page_shows(small, tmp_path, monkeypatch, capfd):
    """Saved results, or what the engine makes first; a program that tells its words stands for Python here."""
    assert open_page("table1", small).root == small and open_page("closed").root.name == "closed"
    with pytest.raises(ValueError, match="out and device go with profile"):
        open_page("table1", device="cpu")
    with pytest.raises(ValueError, match="root and profile exclude each other"):
        open_page("table1", small, profile="smoke")
    engine = tmp_path / "python"
    engine.write_text('#!/bin/sh\nshift 2; echo "$@"; echo "cft: told" >&2; exit $CODE\n')
    engine.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(engine))
    monkeypatch.setenv("CODE", "0")
    found = open_page("table1", "", ["ViT-B"], ["CFT", "RRR"], 2, "smoke", str(small), "cuda")
    assert found.root == small and found.work.methods == ("CFT", "RRR")
    words = f"--profile=smoke --only=table1 --out={small} --models=ViT-B --methods=CFT,RRR --seeds=2 --device=cuda"
    assert capfd.readouterr().out == f"reproduce {words}\ncft: told\n", "what it says is shown"
    monkeypatch.setenv("CODE", "1")
    with pytest.raises(RuntimeError, match="not all that table1 shows could be made: cft: told"):
        open_page("table1", profile="smoke", out=str(small))


@pytest.mark.slow
def test_executing_a_page(tmp_path):
    page = made_page(tmp_path / "p.ipynb", "print(x + 1)", "assert x < 5, 'too large'")
    done = run_page(page, tmp_path / "out/p.ipynb", {"x": 2})
    assert "3" in done.read_text() and [p.name for p in done.parent.iterdir()] == ["p.ipynb"]
    with pytest.raises(ValueError, match="p.ipynb has no parameter y; it has x"):
        run_page(page, tmp_path / "out/q.ipynb", {"y": 2})
    with pytest.raises(PapermillExecutionError) as failed:
        run_page(page, tmp_path / "out/q.ipynb", {"x": 7})
    assert failed.value.exec_count and "too large" in failed.value.evalue
    assert not (tmp_path / "out/q.ipynb").exists() and (tmp_path / "out/q.failed.ipynb").exists()
    assert run_page(page, tmp_path / "out/q.ipynb", {"x": 0}).is_file()
    assert not (tmp_path / "out/q.failed.ipynb").exists()


def test_a_page_without_a_table_is_no_page(tmp_path, monkeypatch):
    given = []

    def run(notebook, out, parameters):
        given.append((notebook.name, parameters))
        out.parent.mkdir(exist_ok=True)
        out.touch()
        return out

    monkeypatch.setattr(module, "run_page", run)
    work = Work(read_settings("smoke"), ("table1", "deal"), models=("ViT-B",))
    with pytest.raises(RuntimeError, match="left no table in artefacts/table1"):
        make_page(work, tmp_path, "table1")
    assert not (tmp_path / "pages/table1.ipynb").exists()
    for key in ("table1", "deal"):
        (tmp_path / "artefacts" / key).mkdir(parents=True)
        (tmp_path / "artefacts" / key / "table.csv").touch()
        make_page(work, tmp_path, key)
        assert (tmp_path / f"pages/{key}.ipynb").is_file()
    assert given[1:] == [("table1.ipynb", {"root": str(tmp_path), "models": ["ViT-B"]}),
                         (notebook_of("deal").name, {"root": str(tmp_path)})]  # which has one network of its own


# ---- the README ----


def test_the_scoreboard_has_every_artefact(small):
    (small / "artefacts/table1").mkdir(parents=True)
    (small / "artefacts/table1/table.csv").touch()
    board = scoreboard(open_results(small)).set_index("artefact")
    assert len(board) == len(ARTEFACTS) and (board["status"] == "not run").sum() == len(ARTEFACTS) - 1
    line = board.loc["[Table 1: accuracy under shift](../nbs/paper/table1.ipynb)"]
    assert line["command"] == "`cft reproduce --profile demo --only table1`" and line["profile"] == "DEMO"
    assert line["run time"] == "75 s"  # of five methods, five seeds each
    counts = [[int(word.split()[-2]) for word in part.split(",")] for part in line["claims"].split(";")]
    assert line["claims"].startswith("paper's form: ") and "; our form: " in line["claims"]
    assert [sum(part) for part in counts] == [10, 10]
    assert board.loc["[The demo: does it work, and what does it cost?](../nbs/24_demo.ipynb)", "claims"] == ""


def test_markdown():
    table = pd.DataFrame({"a": ["x | y", "z"], "b": [1, 2]})
    assert markdown(table) == "| a | b |\n|---|---|\n| x \\| y | 1 |\n| z | 2 |"


@pytest.mark.slow
def test_the_readme_shows_the_published_results(tmp_path):
    (tmp_path / "figures").mkdir()
    pages = [Path(shutil.copy(ROOT / name, tmp_path / name)) for name in ("README.md", "figures/README.md")]
    write_readme(pages[0], ROOT / "figures/demo")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text == (ROOT / page.relative_to(tmp_path)).read_text(encoding="utf-8") and "| CFT+ |" in text
        for link in re.findall(r"\]\(([^):#]+)[)#]", text):
            assert ((ROOT / page.relative_to(tmp_path)).parent / link).exists(), link
    assert "**Holds**" in text and len(pages[0].read_text(encoding="utf-8").splitlines()) <= 165
    pages[1].write_text("<!-- scoreboard --><!-- /scoreboard -->")
    with pytest.raises(ValueError, match="results"):
        write_readme(pages[0], ROOT / "figures/demo")


def test_the_main_table_stands_side_by_side():
    of = lambda **columns: pd.DataFrame(columns, index=["Original", "CFT+"])
    demo = of(**{"OOD-7": ["1", "2"]})
    closed = of(**{"val": ["3", "4"], "OOD-7": ["5", "6"], "adversarial, other": ["7", "8"]})
    photographs = pd.DataFrame({"home": ["9"], "away": ["10"]}, index=["Original"])
    table = main_table(demo, closed, photographs)
    assert table.loc["Original"].tolist() == ["1", "3", "5", "7", "9", "10"]
    assert table.loc["CFT+"].tolist() == ["2", "4", "6", "8", "", ""] and not table.loc["CFT"].any()


def test_a_page_in_a_folder_with_braces_by_this_python(tmp_path, monkeypatch):
    """Papermill fills in braces; and somebody may have installed another Python as the kernel python3."""
    spec = {"argv": ["/gone/python", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
    (tmp_path / "jupyter/kernels/python3").mkdir(parents=True)
    (tmp_path / "jupyter/kernels/python3/kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    (tmp_path / "of {x}").mkdir()
    page = made_page(tmp_path / "of {x}/p.ipynb", "import sys; print(sys.executable)")
    done = run_page(page, tmp_path / "runs {y} {x}/p.ipynb", {"x": 2})
    assert done.parent.name == "runs {y} {x}" and sys.executable in done.read_text()
