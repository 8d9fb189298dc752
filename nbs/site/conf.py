"""The book as static pages, by `make site`: notebooks as they are saved, and a reference from the docstrings."""
import json
import re
import sys
from pathlib import Path

import docutils.nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
project, html_title, copyright = "cft", "cft", "the cft contributors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc, include_patterns = "README", ["*.md", "figures/README.md", "nbs/**.ipynb", "build/reference/*.rst"]
exclude_patterns = ["**.ipynb_checkpoints"]
nb_execution_mode = "off"
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "amsmath"], 4
html_theme, html_math_renderer, html_copy_source = "furo", "mathml", False
html_theme_options = {"navigation_with_keys": True}
autodoc_member_order, autodoc_typehints_format, autodoc_preserve_defaults = "bysource", "short", True
PARTS = {"": "The chapters", "related": "Related systems", "paper": "The paper's pages", "appendix": "Appendix"}


def pages_of_index() -> dict[str, list[str]]:
    """Folder below nbs → the notebooks that the index links to, in its order, without their suffix."""
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in dict.fromkeys(re.findall(r"\]\(([\w/.-]+)\.ipynb\)", text)):
        found[name.rpartition("/")[0]].append(f"nbs/{name}")
    return found


def with_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The first page gets the tree of pages that the sidebar shows."""
    if docname == root_doc:
        found = pages_of_index()
        found[""].insert(0, "nbs/index")
        trees = {PARTS[part]: pages for part, pages in found.items()}
        trees["Results and reference"] = ["figures/README", "build/reference/index", "CHANGELOG", "CONTRIBUTING"]
        for caption, pages in trees.items():
            listed = "\n".join(page for page in pages if page in app.project.docnames)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```"


def with_folds(app: Sphinx, docname: str, source: list[str]) -> None:
    """What JupyterLab folds is folded here too; see fold.py."""
    if str(app.project.doc2path(docname, absolute=False)).endswith(".ipynb"):
        page = json.loads(source[0])
        for cell in page["cells"]:
            if cell["metadata"].get("jupyter", {}).get("source_hidden"):
                cell["metadata"].setdefault("tags", []).append("hide-input")
        source[0] = json.dumps(page)


def with_style(app: Sphinx, page: str, template: str, context: dict, doctree: docutils.nodes.document | None) -> None:
    """A wide table of an output scrolls by itself, and is dark on light on dark pages too, as its cells may be pale."""
    style = (".output.text_html { overflow-x: auto } "
             "body[data-theme] .output.text_html:has(style) { background: white; color: black }")
    context["metatags"] = context.get("metatags", "") + f"<style>{style}</style>"


def write_reference(app: Sphinx) -> None:
    """A page for every module but those of commands, which tell about themselves."""
    folder = ROOT / "build/reference"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["Reference", "=========", "", ".. toctree::", ""]
    for file in sorted((ROOT / "cft").rglob("*.py"), key=lambda file: (file.parent.name, file.stem)):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if file.stem.startswith("_") or name in ("cft.apps.cli", "cft.apps.batch"):
            continue
        text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
        (folder / f"{name}.rst").write_text(text, encoding="utf-8")
        lines.append(f"   {name}")
    (folder / "index.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plain_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: what is in backticks and shapes are code, and nothing else is markup."""
    parts = re.split(r"(`[^`\n]+`|\((?:[\w ×./…-]+, )+[\w ×./…-]*\))", "\n".join(lines))
    code = lambda part: f"``{part.strip('`')}``\\ "
    lines[:] = "".join(code(part) if k % 2 else re.sub(r"([*_|\\])", r"\\\1", part)
                       for k, part in enumerate(parts)).splitlines()


def visit_math(self, node: docutils.nodes.Element) -> None:
    """MathML, which browsers show without a script."""
    display = "inline" if isinstance(node, docutils.nodes.math) else "block"
    self.body.append(convert(node.astext(), display=display))
    raise docutils.nodes.SkipNode


def setup(app: Sphinx) -> None:
    """What is no setting."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("config-inited", lambda app, config: write_reference(app))
    app.connect("source-read", with_contents)
    app.connect("source-read", with_folds)
    app.connect("html-page-context", with_style)
    app.connect("autodoc-process-docstring", plain_docstring)
