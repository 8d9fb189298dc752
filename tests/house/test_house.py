"""The repository keeps its own rules."""
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import graph
import pytest
import yaml
from matplotlib import colormaps

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(n for n in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in n.parts)
PATH, APPENDIX, RELATED = ([n for n in NOTEBOOKS if n.parent.name == room and n.stem[0].isdigit()]
                           for room in ("nbs", "appendix", "related"))
ENGINE = next(i for i, n in enumerate(APPENDIX) if n.stem == "13_runner")  # it makes the related systems too
FIRST = [n for n in APPENDIX if n.stem in ("00_files", "18_checkpoints")]  # they stand below all chapters
ORDER = list(dict.fromkeys([*FIRST, *PATH, *APPENDIX[:ENGINE], *RELATED, *APPENDIX[ENGINE:]]))  # imports look back


def cells(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The notebooks and the package in a place where they may be written."""
    root = tmp_path_factory.mktemp("copy")
    left = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", "cft", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=left)
    for file in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root)
    return root


def same(a, b, pattern):
    left, right = ({p.relative_to(r): p.read_bytes() for p in sorted(r.rglob(pattern))
                    if ".ipynb_checkpoints" not in p.parts} for r in (a, b))
    return [str(k) for k in left.keys() | right.keys() if left.get(k) != right.get(k)]


def test_the_package_is_what_the_notebooks_export(copy):
    for file in (copy / "cft").rglob("*.py"):
        if file.name != "__init__.py":
            file.unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    assert same(ROOT / "cft", copy / "cft", "*.py") == []


def test_notebooks_are_clean_and_their_long_cells_folded(copy):
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True, capture_output=True)
    subprocess.run([sys.executable, "nbs/site/fold.py"], cwd=copy, check=True)
    assert same(ROOT / "nbs", copy / "nbs", "*.ipynb") == []


@pytest.mark.slow  # `make lint`, and so `make quick`, run them too
@pytest.mark.parametrize("tool", (["ruff", "check", "nbs", "tests", "benchmarks", "setup.py"], ["basedpyright"]),
                         ids=lambda words: words[0])
def test_lint(tool):
    done = subprocess.run([BIN / tool[0], *tool[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_house_is_small_and_stands_in_floors():
    """The limits that the redesign set; `benchmarks/graph.py` draws what it measures."""
    modules = graph.read_package(ROOT / "cft")
    assert sum(module.lines for module in modules.values()) <= 22_000  # then photographs, cues, labs, weights
    assert [name for name, module in modules.items() if module.lines > 600] == []
    assert graph.cycles(modules) == []
    assert [remark for module in modules.values() for remark in module.remarks] == []  # private names, importlib


def test_a_name_means_one_thing():
    """A public name stands for one thing in the whole package; a command of the command line is that thing."""
    where = {}
    for path in sorted((ROOT / "cft").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if listed and path.name != "__init__.py":
                for name in ast.literal_eval(node.value):
                    where.setdefault(name, []).append(path.stem)
    twice = {name: rooms for name, rooms in where.items() if len(rooms) > 1 and not {"cli", "batch"} & {*rooms}}
    assert not twice


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_assets(copy, tmp_path):
    """The wheel is built from the source distribution, and so from what that holds."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, copy]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"cft/apps/cli.py", "cft/demo/toy_grounder.py", "cft/assets/bases.json", "cft/assets/base_4.safetensors",
            "cft/py.typed", "cft/assets/report/report.html.j2", "cft/assets/report/report.css"} <= names
    assert not [name for name in names if name.startswith("benchmarks")]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import cft.apps.cli, cft.data.models; "
            "assert cft.__file__.startswith(sys.argv[1]); cft.data.models.base_model(0); "
            "assert not {'nbdev', 'fastcore', 'execnb'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "site")], check=True, cwd=tmp_path)


def code_of(notebook):
    return "\n".join(source(c) for c in cells(notebook) if c["cell_type"] == "code")


def module_of(notebook):
    """The module that a chapter exports, as room.stem; None for a page without one."""
    found = re.search(r"#\| default_exp ([\w.]+)", code_of(notebook))
    return found and found.group(1)


@pytest.mark.parametrize("notebook", ORDER, ids=lambda n: n.stem)
def test_a_chapter_is_its_module_and_imports_only_earlier_ones(notebook):
    name, code = module_of(notebook), code_of(notebook)
    if name:
        assert name.rpartition(".")[2] == notebook.stem.split("_", 1)[1]
        assert (ROOT / "cft" / f"{name.replace('.', '/')}.py").exists()
    else:
        assert "#| export" not in code
        return  # a page reads what all chapters have made
    used = set(re.findall(r"(?:from|import) cft\.(\w+\.\w+)", code))
    rooms = re.findall(r"from cft\.(\w+) import ([^(\n]+)", code)
    used |= {f"{room}.{word.split()[0]}" for room, line in rooms for word in line.split(",")}
    later = {module_of(n) for n in ORDER[ORDER.index(notebook) + 1:]}
    assert not used & later, f"{notebook.stem} uses later chapters"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_is_a_page(notebook):
    assert notebook.stat().st_size < 300_000
    content = cells(notebook)
    first = source(content[0])
    assert first.startswith("# ") and "\n> " in first, "a title and a promise"
    pictures = json.dumps(content).count('"image/')
    assert pictures <= 6
    run = streak = 0
    for cell in content:
        streak = streak + 1 if cell["cell_type"] == "code" else 0
        run = max(run, streak)
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", f"a warning in {source(cell)[:60]!r}"
    assert run <= 4, "prose between the code"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_refuses_parameters_that_it_does_not_have(notebook):
    """By a call in a cell of its own, behind the parameters if there are some."""
    content = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    named = [k for k, cell in enumerate(content) if "parameters" in cell["metadata"].get("tags", ())]
    own = [source(cell) for cell in content[named[-1] + 1 if named else 0:] if "#| export" not in source(cell)]
    assert len(named) < 2 and any(re.search(r"^(found = open_page|check_parameters)\(", c, re.MULTILINE) for c in own)
    assert named or not any(re.match('(root|out) = "', source(cell)) for cell in content), "the tag is missing"


def test_no_machine_is_named():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    private = re.compile(r"/wor" r"k/|/roo" r"t/|/hom" r"e/\w|file:/" r"/|pypi\.or" r"g|\.\./share" r"d")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix not in (".png", ".npz", ".safetensors", ".parquet") and path.is_file():
            found = private.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found.group()}"


def test_public_names_are_typed_and_documented():
    for module in (*(ROOT / "cft").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        if module.name.startswith("_"):
            continue
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module.name}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                bare = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None]
                assert not bare, f"{module.name}: {node.name} has untyped {bare}"


def test_settings_pins_and_versions_agree():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    import cft

    assert cft.__version__ == settings["version"]
    assert f"version: {settings['version']}" in (ROOT / "CITATION.cff").read_text()
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    needs = [need for key in settings if key.endswith("requirements") for need in settings[key].split()]
    wanted = {re.split(r"[<>=]", need)[0].lower() for need in needs}
    assert wanted <= pins
    assert wanted >= {"jupyterlab", "nbdev", "torch", "timm", "segment-anything", "groundingdino-py", "openai",
                      "ipywidgets", "seaborn", "papermill"}


def text_of(page):
    """What a page says, without its code."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    return "\n".join(source(cell) for cell in cells(page) if cell["cell_type"] == "markdown")


def test_what_the_chapters_cite_stands_in_the_citation():
    works = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    assert all({"type", "title", "authors"} <= set(work) for work in works)
    cited = {person.get("family-names") for work in works for person in work["authors"]}
    named = {name for page in NOTEBOOKS for name in re.findall(r"(\w+) et al\b", text_of(page))}
    assert len(named) > 15 and named <= cited


@pytest.mark.parametrize("notebook", [*PATH, *APPENDIX, *RELATED], ids=lambda n: n.stem)
def test_a_chapter_has_a_picture(notebook):
    assert '"image/' in notebook.read_text(encoding="utf-8")


def test_letters_in_figures_have_eight_points():
    """As they are drawn; test_notebooks.py measures them as they are shown."""
    set_in_style = r'"(?:font\.size|size|\w+\.(?:label|title|font)size)"\]?(?: =|:) ([\d.]+)'
    size = re.compile(rf"(?:font|label|title)_?size=([\d.]+)|{set_in_style}")
    drawn = {page: [float("".join(found)) for found in size.findall(code_of(page))] for page in NOTEBOOKS}
    assert sum(map(len, drawn.values())) > 40 and {p.name: min(s) for p, s in drawn.items() if s and min(s) < 8} == {}


def test_relevance_is_shown_in_one_colour_language():
    """Red for, blue against, white for nothing, with a bar; masks are grey, shares blue."""
    shown = 0
    for page in NOTEBOOKS:
        for code in (source(cell) for cell in cells(page) if cell["cell_type"] == "code"):
            if "imshow(" not in code:
                continue
            tree = [*ast.walk(ast.parse(code))]
            texts = {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            assert texts & {*colormaps} <= {"RdBu_r", "Greys", "Greys_r", "Blues", "tab10"}, page
            assert "RdBu_r" not in texts or ".colorbar(" in code, page
            for call in (node for node in tree if isinstance(node, ast.Call)):
                how = {word.arg: ast.unparse(word.value) for word in call.keywords}
                if how.get("cmap") == "'RdBu_r'":
                    assert how["vmin"] == f"-{how['vmax']}", page
                    shown += 1
    assert shown > 10


def test_every_link_leads_somewhere():
    pages = [*ROOT.glob("*.md"), ROOT / "figures/README.md", *NOTEBOOKS]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s:#]+)[)#]", text_of(page))]
    assert len(links) > 150 and [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_every_page_shows_the_ways():
    """Back, index, on: in the order of the index, at the end of each page."""
    index = ROOT / "nbs/index.ipynb"
    named = {link: name for name, link in re.findall(r"\[([^]]+)\]\(([\w/.-]+\.ipynb)\)", text_of(index))[::-1]}
    order = list(dict.fromkeys(re.findall(r"\]\(([\w/.-]+\.ipynb)\)", text_of(index))))
    assert {ROOT / "nbs" / link for link in order} == {*NOTEBOOKS} - {index}
    for k, link in enumerate(order):
        page, up = ROOT / "nbs" / link, "../" * link.count("/")
        ways = [f"[index]({up}index.ipynb)"]
        if k:
            ways.insert(0, f"[← {named[order[k - 1]]}]({up}{order[k - 1]})")
        if k + 1 < len(order):
            ways.append(f"[{named[order[k + 1]]} →]({up}{order[k + 1]})")
        last = cells(page)[-1]
        assert last["cell_type"] == "markdown" and source(last).splitlines()[-1] == " · ".join(ways), page
