"""Floors, cycles and private names, on packages that were made up for it."""

import pytest
from graph import cycles, floors, main, read_package


@pytest.fixture
def made(tmp_path):
    """A function that writes a package of files and reads it."""
    def make(files):
        for name, text in files.items():
            path = tmp_path / "house" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read_package(tmp_path / "house")

    return make


SOUND = {
    "__init__.py": '__version__ = "1"\n',
    "_modidx.py": "import house.roof\n",
    "base/__init__.py": "",
    "base/stone.py": "import os\nfrom collections import deque\n\nimport house\n",
    "base/sand.py": "x = 1\n",
    "wall.py": "from .base import sand, stone as rock\nfrom house.base.stone import deque\n",
    "rooms/__init__.py": "from .hall import door\n",
    "rooms/hall.py": "from ..base.sand import x\n\n\ndef door():\n    from house.wall import deque\n    return deque\n",
    "roof.py": "from typing import TYPE_CHECKING\n\nimport house.rooms as r\n\n"
               "if TYPE_CHECKING:\n    from house.top import flag\n\nr.door()\n",
    "top.py": "from . import roof\n\nflag = roof\n",
}


def test_floors_are_longest_paths(made, tmp_path, capsys):
    modules = made(SOUND)
    names = ("", ".base.stone", ".base.sand", ".wall", ".rooms", ".rooms.hall", ".roof", ".top")
    assert set(modules) == {f"house{name}" for name in names}
    assert modules["house.wall"].imports == {"house.base.sand", "house.base.stone"}
    assert modules["house.rooms.hall"].imports == {"house.base.sand", "house.wall"}, "also inside a function"
    assert modules["house.roof"].imports == {"house.rooms"}, "an import for types does not"
    assert [set(names) for names in floors(modules)] == [
        {"house", "house.base.sand"}, {"house.base.stone"}, {"house.wall"}, {"house.rooms.hall"}, {"house.rooms"},
        {"house.roof"}, {"house.top"}]
    assert cycles(modules) == [] and not any(module.remarks for module in modules.values())
    assert main(["--root", str(tmp_path / "house")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "floor  6   1 modules  top 3"
    assert lines[-2].startswith("floor  0   2 modules  house 1, base.sand 1")
    assert lines[-1] == "8 modules, 26 lines, 8 arrows"


def test_a_cycle_is_found_however_it_hides(made, tmp_path, capsys):
    modules = made({"a.py": "from .b import x\n", "b.py": "def x():\n    from . import c\n", "d.py": "import house.a\n",
                    "c.py": "import importlib\n\n\ndef late():\n    return importlib.import_module('house.a').x\n",
                    "e.py": "", "f.py": "y = 1\n"})
    assert cycles(modules) == [("house.a", "house.b", "house.c")]
    assert [set(names) for names in floors(modules)] == [{"house.a", "house.b", "house.c", "house.f"}, {"house.d"}]
    assert main(["--root", str(tmp_path / "house")]) == 1
    out = capsys.readouterr().out
    assert "cycle: house.a ↔ house.b ↔ house.c\n" in out and "import_module: house.c, line 5: house.a\n" in out


def test_private_names_stay_at_home(made, tmp_path, capsys):
    modules = made({"a.py": "_x, y = 1, 2\n", "b.py": "from .a import _x, y\n_own = _x\n",
                    "c.py": "from . import a\n\nprint(a._x, a.__name__, a.y._z)\n",
                    "d.py": "import house.a as q\nfrom os import _exit\n\nq._x.y, q.y\n",
                    "e.py": "from .a import y as _y\n"})
    found = [remark for module in modules.values() for remark in module.remarks]
    assert found == [f"private: house.{name}: house.a._x" for name in ("b, line 1", "c, line 3", "d, line 4")]
    assert main(["--root", str(tmp_path / "house")]) == 1
    assert capsys.readouterr().out.count("private: ") == 3


def test_hidden_imports_are_told_but_allowed(made, tmp_path, capsys):
    calls = "import_module('house.a'), i.import_module('json'), import_module(m), i.import_module(f'house.{m}')"
    text = f"import importlib as i\nfrom importlib import import_module\n\nm = 'house.a'\n{calls}\n"
    modules = made({"a.py": "x = 1\n", "b.py": text})
    assert modules["house.b"].remarks == [f"import_module: house.b, line 5: house.{name}" for name in ("a", "{m}")]
    assert modules["house.b"].imports == {"house.a"} and main(["--root", str(tmp_path / "house")]) == 0
    assert capsys.readouterr().out.count("import_module: ") == 2


def test_what_is_no_python_is_said(made):
    with pytest.raises(SyntaxError):
        made({"a.py": "def\n"})
