"""The tutorial keeps its promise: a folder goes in, a repaired model that plain timm loads and a report come out."""
import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.main import get_command

from cft.apps.cli import app
from cft.concepts.filters import ConceptSet
from cft.concepts.store import MaskStore
from cft.data.models import TINY, base_model

TUTORIAL = Path(__file__).parents[2] / "nbs/tutorial.ipynb"
NOTEBOOK = nbformat.read(TUTORIAL, 4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What a run of the tutorial leaves."""
    root = tmp_path_factory.mktemp("tutorial")
    (root / "elsewhere").mkdir()
    told = {"out": str(root / "work"), "device": "cpu"}
    papermill.execute_notebook(TUTORIAL, root / "executed.ipynb", told, cwd=root / "elsewhere", kernel_name="python3",
                               progress_bar=False, execution_timeout=300)
    assert not list((root / "elsewhere").iterdir()), "nothing is written where it was not asked for"
    return root / "work"


@pytest.mark.slow
def test_the_folder_is_one_as_users_have_it(work):
    for kind in ("pictures", "test"):
        files = [p for p in (work / kind).rglob("*") if p.is_file()]
        assert len({p.parent.name for p in files}) == 12 and {p.suffix for p in files} == {".jpg"}
        assert {Image.open(p).format for p in files[:5]} == {"JPEG"}
    assert (work / "start.safetensors").is_file()


@pytest.mark.slow
def test_every_step_left_its_result(work):
    proposed, kept = ConceptSet.load(work / "concepts.json"), ConceptSet.load(work / "kept.json")
    assert 0 < len(kept.pairs()) < len(proposed.pairs()) and "the sky" not in kept.of("bird")
    assert len(MaskStore(work / "store").pictures) == 144 and len(MaskStore(work / "test_store").pictures) == 120
    record = json.loads((work / "run/record.json").read_text(encoding="utf-8"))
    assert record["steps"] == 84 and record["data"]["pictures"] == 96


@pytest.mark.slow
def test_plain_timm_loads_the_result(work):
    ours = timm.create_model(TINY, num_classes=12).eval()
    ours.load_state_dict(load_file(work / "run/model.safetensors"))
    theirs = timm.create_model(TINY, num_classes=12, checkpoint_path=str(work / "run/model.safetensors")).eval()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x)) and not torch.equal(ours(x), base_model(0)(x))


@pytest.mark.slow
def test_the_report_is_one_file_about_this_run(work):
    page = (work / "report.html").read_text(encoding="utf-8")
    for words in ("leans on the background", "The gap has shrunk", "What this report does not show"):
        assert words in page
    assert "<script" not in page and not re.search(r"(src|href)=\"https?:", page)


def test_every_step_says_what_changes_for_real_data():
    cells = NOTEBOOK.cells
    code = [i for i, c in enumerate(cells) if c.cell_type == "code"]
    assert 9 <= len(code) <= 12
    for i in code[1:]:
        following = cells[i + 1].source
        assert "**Yours**" in following or "assert" in cells[i + 2].source, cells[i].source[:60]


def test_the_commands_at_the_end_parse():
    text = next(c.source for c in NOTEBOOK.cells if "The same from the shell" in c.source)
    start = re.search(r'MODEL="(.*)"', text).group(1).split()
    commands = get_command(app).commands
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("cft ")]
    assert [words[0] for words in lines] == ["concepts", "masks", "validate", "fit", "masks", "audit"]
    for name, *words in lines:
        given = [w for word in words for w in (start if word == "$MODEL" else [word])]
        assert commands[name].make_context(name, given).params
