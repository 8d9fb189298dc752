"""The import graph of a package as floors: a module stands one floor above the highest of those that it imports.

    python benchmarks/graph.py [--root cft]

Imports count wherever they stand, also inside functions and by `importlib.import_module` of a literal name; those for
types only, under `if TYPE_CHECKING:`, do not. The exit code is 1 if there is a cycle or a private name crosses modules.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Module(NamedTuple):
    """What one file says about others."""

    lines: int
    imports: set[str]  # modules of the package, by their full names
    remarks: list[str]  # "private: …" for a private name of another module, "import_module: …" for a hidden import


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it in the order of the source, but for what stands under `if TYPE_CHECKING:`."""
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        node = ast.Module(node.orelse, [])
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child)


def read_module(text: str, name: str, is_package: bool, known: set[str]) -> Module:
    """Read the source of module `name`; `known`: the modules of its package. Raises SyntaxError if it is no Python."""
    found, bound = Module(text.count("\n"), set(), []), dict[str, str]()  # bound: what names of this file stand for
    ours = lambda target: target.partition(".")[0] == name.partition(".")[0]

    def use(target: str, node: ast.stmt | ast.expr, alias: str = "", kind: str = "private") -> None:
        bound[alias or target] = target
        last = target.rpartition(".")[2]
        if kind != "private" or last.startswith("_") and not last.endswith("__"):
            found.remarks.append(f"{kind}: {name}, line {node.lineno}: {target}")
        while target not in known and "." in target:
            target = target.rpartition(".")[0]
        found.imports.update({target} & known - {name})

    for node in _nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in (each for each in node.names if ours(each.name)):
                use(alias.name, node, alias.asname or "")
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[:len(name.split(".")) + is_package - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names if ours(base) else ():
                use(f"{base}.{alias.name}", node, alias.asname or alias.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            target = ast.unparse(node.args[0]).strip("f'\"") if node.args else ""
            if target.startswith(".") or ours(target):
                use(target, node, kind="import_module")
        elif isinstance(node, ast.Attribute) and (target := bound.get(ast.unparse(node.value))) in known:
            use(f"{target}.{node.attr}", node)
    return found


def read_package(root: Path) -> dict[str, Module]:
    """The modules of the package in folder `root` by name, without nbdev's index and empty `__init__` files."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py")) if path.name != "_modidx.py"}
    dotted = lambda path: ".".join([root.name, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
    named = {dotted(path): path for path, text in texts.items() if text.strip()}
    return {name: read_module(texts[path], name, path.stem == "__init__", set(named)) for name, path in named.items()}


def reachable(modules: dict[str, Module]) -> dict[str, set[str]]:
    """What each module imports, directly or not."""
    reach = {name: set(module.imports) for name, module in modules.items()}
    for middle in modules:
        for name in modules:
            reach[name] |= reach[middle] if middle in reach[name] else set()
    return reach


def cycles(modules: dict[str, Module]) -> list[tuple[str, ...]]:
    """Groups of modules each of which imports all of its group, directly or not."""
    reach = reachable(modules)
    return sorted({tuple(b for b in sorted(reach[a]) if a in reach[b]) for a in modules if a in reach[a]})


def floors(modules: dict[str, Module]) -> list[list[str]]:
    """The modules by floor, from the ground up; imports within a cycle do not lift."""
    reach = reachable(modules)

    @cache
    def floor(name: str) -> int:
        return max((1 + floor(other) for other in modules[name].imports if name not in reach[other]), default=0)

    return [[name for name in modules if floor(name) == k] for k in range(1 + max(map(floor, modules), default=-1))]


def main(arguments: list[str] | None = None) -> int:
    """Print the floors and what is wrong with them; 1 if something is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1] / "cft", help="folder of the package")
    modules = read_package(parser.parse_args(arguments).root.resolve())
    for k, names in reversed(list(enumerate(floors(modules)))):
        lines = ", ".join(f"{name.partition('.')[2] or name} {modules[name].lines}" for name in names)
        print(f"floor {k:2}  {len(names):2} modules  {lines}")
    print(len(modules), "modules,", sum(m.lines for m in modules.values()), "lines,",
          sum(len(m.imports) for m in modules.values()), "arrows")
    remarks = [f"cycle: {' ↔ '.join(group)}" for group in cycles(modules)]
    remarks += sorted((remark for m in modules.values() for remark in m.remarks), reverse=True)
    print("\n".join(remarks), end="\n" * bool(remarks))
    return int(any(not remark.startswith("import_module") for remark in remarks))


if __name__ == "__main__":
    sys.exit(main())
