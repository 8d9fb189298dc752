"""What a chapter defines for its reader and keeps to itself, for tests that need it too."""
import ast
import json
from pathlib import Path
from types import ModuleType
from typing import Any

NBS = Path(__file__).parents[1] / "nbs"


def from_chapter(notebook: str, module: ModuleType, *names: str) -> list[Any]:
    """Functions, classes and constants of nbs/`notebook`, which may use its `module`. The rest does not run."""
    cells = json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"]
    tree = [node for cell in cells if cell["cell_type"] == "code" for node in ast.parse("".join(cell["source"])).body]
    space = dict(vars(module))
    for node in tree:
        targets = [getattr(target, "id", None) for target in getattr(node, "targets", ())]
        defined = {getattr(node, "name", None), *targets}
        if isinstance(node, (ast.Import, ast.ImportFrom)) or defined & set(names):
            exec(compile(ast.Module([node], []), notebook, "exec"), space)
    return [space[name] for name in names]
