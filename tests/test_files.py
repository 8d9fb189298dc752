"""Files written whole: kills at random moments, two writers, a full disk, a folder that may not be written."""
import errno
import fcntl
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cft import files
from cft.files import (
    append_bytes,
    check_parameters,
    check_writable,
    legible,
    locked,
    need,
    read_json,
    reason,
    replace_part,
    sha256,
    write_csv,
    write_json,
    write_png,
    write_text,
    written,
    written_folder,
)

LARGE = 200_000  # bytes: more than one buffer
WRITER = """
import itertools, sys
from cft.files import written
for letter in itertools.cycle(sys.argv[1]):
    with written(sys.argv[2]) as file:
        for _ in range(10):
            file.write(letter.encode() * (int(sys.argv[3]) // 10))
            file.flush()
    print("x", flush=True)
"""
FOLDER_WRITER = """
import sys
from cft.files import written_folder
while True:
    with written_folder(sys.argv[2]) as half:
        for k in range(5):
            (half / f"{k}.txt").write_text(sys.argv[1])
    print("x", flush=True)
"""


@contextmanager
def writers(letters, path, code=WRITER):
    """Processes that write one path again and again, each its letters in turn; all have written once at the start."""
    commands = [[sys.executable, "-c", code, letter, path, str(LARGE)] for letter in letters]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    try:
        for process in started:
            process.stdout.read(1)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def is_whole(path):
    content = path.read_bytes()
    return len(content) == LARGE and len(set(content)) == 1


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path, rng, drafts = tmp_path / "file", random.Random(0), 0
    for _ in range(10):
        with writers(["ab"], path) as (process,):
            time.sleep(rng.random() * 0.05)
            process.kill()
        assert is_whole(path) and path.read_bytes()[:1] in (b"a", b"b")
        drafts += len(names(tmp_path)) - 1
        assert len(names(tmp_path)) <= 2, "what is left behind does not pile up"
    assert drafts, "at least one of ten kills hit the middle of a write"
    write_text(path, "new")
    assert names(tmp_path) == ["file"] and path.read_text() == "new"


def test_two_writers_take_turns(tmp_path):
    path, seen = tmp_path / "file", set()
    with writers("ab", path) as both:
        end = time.monotonic() + 20
        while len(seen) < 2 and time.monotonic() < end or time.monotonic() < end - 19:
            assert is_whole(path)
            seen.add(path.read_bytes()[:1])
        both[0].kill()  # its lock ends with it
        both[0].wait()
        for _ in range(2):
            os.read(both[1].stdout.fileno(), 1 << 16)
        assert is_whole(path) and path.read_bytes()[:1] == b"b"
    assert seen == {b"a", b"b"}


def test_an_error_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), written(tmp_path / "file") as file:
            file.write(b"new")
            raise error
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def try_to_write(path, size):
    """What a write that does not fit gets, and that it changes nothing."""
    write_text(path, "old")
    with pytest.raises(OSError) as caught, written(path) as file:
        for _ in range(size // 1000):
            file.write(b"n" * 1000)
    assert names(path.parent) == [path.name] and path.read_text() == "old"
    return caught.value


def test_a_full_disk(tmp_path):
    """A file system of 64 kB where that can be mounted, or else a limit to the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
        try:
            assert "space" in str(try_to_write(disk / "file", 100_000))
            write_text(disk / "file", "n" * 20_000)  # and there is room again
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, hard))
        try:
            assert "large" in str(try_to_write(disk / "file", 100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_may_not_be_written():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "file", "old")
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with pytest.raises(PermissionError):
                write_text(folder / "file", "new")
            with pytest.raises(PermissionError), written_folder(folder / "pages"):
                pytest.fail("there is nothing to fill")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert names(folder) == ["file"] and (folder / "file").read_text() == "old"


def draft_of(path):
    """The name of a draft: it is there while the file is written."""
    with written(path):
        return next(p for p in path.parent.iterdir() if p.suffix == ".draft")


def test_a_draft_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    draft, victim = draft_of(tmp_path / "folder/file"), tmp_path / "victim"
    victim.write_text("precious")
    for target in (victim, tmp_path / "nowhere"):
        draft.symlink_to(target)
        with pytest.raises(OSError, match=draft.name):
            write_text(tmp_path / "folder/file", "new")
        draft.unlink()
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_file_that_is_a_link_is_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "old" and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["n" * 250, "é" * 125, "a b'c\nd", os.fsdecode(b"caf\xe9")])
def test_names_of_files(tmp_path, name):
    write_text(tmp_path / "deep/er" / name, "text")
    assert names(tmp_path / "deep/er") == [name] and (tmp_path / "deep/er" / name).read_text() == "text"
    assert draft_of(tmp_path / "deep/er" / name).name != draft_of(tmp_path / "deep/er/other").name


def test_pictures_and_masks_come_back_as_they_were(tmp_path):
    drawn = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    for k, values in enumerate((drawn, drawn[..., 0], drawn[..., 1] > 99)):
        write_png(tmp_path / f"new/{k}.png", values)
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"new/{k}.png")), values)
    with pytest.raises(TypeError):
        write_png(tmp_path / "new/0.png", np.zeros((2, 2, 5)))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new/0.png")), drawn), "an error leaves what was there"


def test_without_locks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    write_text(tmp_path / "file", "text")
    assert names(tmp_path) == ["file"]


def test_new_files_have_the_modes_that_the_user_wants(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_folders(tmp_path):
    for word in ("old", "new"):
        with written_folder(tmp_path / "deep/pages") as half:
            assert half.parent == tmp_path / "deep" and names(half) == []
            (half / word).write_text(word)
    assert names(tmp_path / "deep") == ["pages"] and names(tmp_path / "deep/pages") == ["new"]
    with pytest.raises(RuntimeError), written_folder(tmp_path / "deep/pages") as half:
        (half / "third").write_text("third")
        raise RuntimeError
    assert names(tmp_path / "deep") == ["pages"] and names(tmp_path / "deep/pages") == ["new"]
    write_text(tmp_path / "file", "text")
    with pytest.raises(OSError), written_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "text" and names(tmp_path) == ["deep", "file"]


def test_folders_are_whole_after_kills_and_between_two_writers(tmp_path):
    path, rng = tmp_path / "pages", random.Random(1)
    for _ in range(8):
        with writers("ab", path, FOLDER_WRITER) as both:
            time.sleep(rng.random() * 0.05)
            for process in both:
                process.kill()
        places = [one for one in (path, *tmp_path.glob(".*.old")) if one.exists()]  # replacing takes two renames
        assert any(names(one) == [f"{k}.txt" for k in range(5)] for one in places)
        if path.exists():
            assert names(path) == [f"{k}.txt" for k in range(5)] and len({p.read_text() for p in path.iterdir()}) == 1
    with written_folder(path) as half:
        (half / "last").write_text("last")
    assert names(tmp_path) == ["pages"] and names(path) == ["last"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_older_one(tmp_path, monkeypatch):
    with written_folder(tmp_path / "pages") as half:
        (half / "old").touch()
    rename, calls = Path.rename, []

    def fail(self, target):
        calls.append(self.suffix)
        if self.suffix == ".half":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk gone"), written_folder(tmp_path / "pages") as half:
        (half / "new").touch()
    assert calls == ["", ".half"] and [names(p) for p in tmp_path.iterdir()] == [["old"]]


def test_texts_tables_and_digests(tmp_path):
    assert write_text(tmp_path / "t", "Größe → 1\n") == tmp_path / "t"
    assert (tmp_path / "t").read_bytes() == "Größe → 1\n".encode()
    assert read_json(write_json(tmp_path / "j", {"a": [1, None], "ü": 0.1})) == {"a": [1, None], "ü": 0.1}
    assert (tmp_path / "j").read_text().endswith("\n") and json.loads((tmp_path / "j").read_text())["a"] == [1, None]
    table = pd.DataFrame({"x": [0.125, 2.0]}, index=["a", "b"])
    assert write_csv(tmp_path / "c", table).read_bytes() == b"x\n0.125\n2.0\n"
    assert write_csv(tmp_path / "c", table, index=True, digits=1).read_bytes() == b",x\na,0.1\nb,2.0\n"
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # in the standard, FIPS 180
    assert sha256(write_text(tmp_path / "s", "abc")) == of_abc


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[1] 2"])
def test_what_is_no_json_is_named(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(ValueError, match="j is no sound JSON: "):
        read_json(tmp_path / "j")


@pytest.mark.parametrize(("read", "text"), [(files.read_json, '{"a": {"b": 1, "b": 2}}'),
                                            (files.read_yaml, "a: {b: 1, b: 2}"), (files.read_yaml, "b: 1\nb: 1")])
def test_a_key_that_is_there_twice_is_refused_by_name(tmp_path, read, text):
    (tmp_path / "odd").write_text(text)
    with pytest.raises(ValueError, match="odd is no sound .*the key 'b' is there twice"):
        read(tmp_path / "odd")


TABLE = "id,name\nn1,käfer\nn2,bee\n"


@pytest.mark.parametrize("content", [
    TABLE.encode("utf-8-sig"), TABLE.encode("utf-16"), TABLE.replace(",", ";").encode(),
    TABLE.replace(",", "\t").encode(), TABLE.replace("\n", "\r\n").encode(),
    TABLE.replace("id,name", "id, name").encode(), TABLE.encode() + b",\n"])
def test_tables_as_other_tools_write_them(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    assert files.read_rows(tmp_path / "t.csv") == [{"id": "n1", "name": "käfer"}, {"id": "n2", "name": "bee"}]


@pytest.mark.parametrize("content", [b"", b"\n\n", TABLE.encode("cp1252"), b"id,id\n1,2\n", b"id,name\n1\n",
                                     b"\xff\xfe\0", b"id,name\n1,\"" + 200_000 * b"x" + b"\"\n", b"id,name\n1,\"x"])
def test_what_is_no_table_is_named(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match="t.csv(:| is no table of text:) .+"):
        files.read_rows(tmp_path / "t.csv")


def test_parts_of_a_text(tmp_path):
    page = write_text(tmp_path / "p.md", "a <!-- n -->\nold\n<!-- /n --> b <!-- m --><!-- /m -->\n")
    replace_part(page, "n", r"\1 new \n")
    assert page.read_text() == "a <!-- n -->\n\n\\1 new \\n\n\n<!-- /n --> b <!-- m --><!-- /m -->\n"
    for text in ("none", "<!-- n -->", "<!-- n --><!-- n --><!-- /n -->"):
        write_text(page, text)
        with pytest.raises(ValueError, match="p.md must have <!-- n --> and <!-- /n --> once each"):
            replace_part(page, "n", "new")
        assert page.read_text() == text


def test_assets_and_extras():
    assert (files.ASSETS / "bases.json").is_file()
    assert need("json", "json", "cft[all]", "this test") is json
    with pytest.raises(ImportError, match=r"it needs nothing-like-it; install it with: pip install 'cft\[rare\]'"):
        need("nothing_like_it", "nothing-like-it", "cft[rare]", "it")


def test_a_draft_that_is_another_file_is_not_written(tmp_path):
    (tmp_path / "folder").mkdir()
    draft, victim = draft_of(tmp_path / "folder/file"), tmp_path / "victim"
    victim.write_text("precious")
    os.link(victim, draft)
    with pytest.raises(FileExistsError, match="another file where a draft belongs"):
        write_text(tmp_path / "folder/file", "new")
    draft.unlink()
    os.mkfifo(draft)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "folder/file", "new")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch, number):
    with locked(tmp_path / "a/lock") as mine, locked(tmp_path / "a/lock") as again:
        assert (mine, again) == (True, False)

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "a/lock") as mine:
        assert mine
    write_text(tmp_path / "file", "text")
    assert names(tmp_path) == ["a", "file"]


def test_a_lock_that_was_left_over_or_cannot_be_opened(tmp_path):
    (tmp_path / "lock").write_text("of a process that is gone")
    with locked(tmp_path / "lock") as mine:
        assert mine
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "victim").exists()


def test_who_waits_says_so_after_ten_seconds(tmp_path, monkeypatch, caplog):
    now, waited = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sleep(seconds):
        waited.append(seconds)
        now[0] += 3
        if len(waited) == 9:
            number.close()

    monkeypatch.setattr(time, "sleep", sleep)
    number = (tmp_path / "lock").open("w")
    fcntl.flock(number, fcntl.LOCK_EX)
    with locked(tmp_path / "lock", "a\x1bb") as mine:
        assert mine and len(waited) == 9
    assert caplog.messages == [r"waiting for a\x1bb"]


def test_what_will_be_written_is_tried(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, folder, words in (("file", True, "it is no folder"), (".", False, "it is no file"),
                                ("file/x", False, "Not a directory"), ("n" * 300, True, "File name too long")):
        with pytest.raises(ValueError, match=f"cannot be written: {words}; give another --out"):
            check_writable(tmp_path / path, "--out", folder)
    for path, folder in (("new/er/x", False), ("new/er", True), ("file", False), (".", True)):
        check_writable(tmp_path / path, "--out", folder)
    assert names(tmp_path) == ["file"]
    monkeypatch.setattr(os, "fsync", lambda _: os.read(-1, 1))
    with pytest.raises(ValueError, match="Bad file descriptor"):
        check_writable(tmp_path / "x", "--out")


def test_words_of_the_system_are_kept_and_names_are_shown_whole():
    assert reason(OSError(errno.ENOSPC, "No space left on device; wait")) == "the disk is full; wait"
    assert reason(OSError(errno.EIO, "Input/output error")) == "Input/output error" and reason(OSError("odd")) == "odd"
    assert legible("a b\u00e9 \u7259") == "a b\u00e9 \u7259"
    assert legible("\x1b[2J\n\u202e\udce9") == r"\x1b[2J\n\u202e\udce9"


def test_json_of_another_kind(tmp_path):
    (tmp_path / "j").write_text("[1]")
    with pytest.raises(ValueError, match="j holds a list; expected a dict"):
        read_json(tmp_path / "j", dict)
    (tmp_path / "j").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="j is no sound JSON"):
        read_json(tmp_path / "j")
# ---------------------------------------------------------------- appending, and trying first

def test_appending_is_all_or_nothing(tmp_path, monkeypatch):
    path, write, room = tmp_path / "a", os.write, [5]

    def full(number, data):
        if not room:
            raise OSError(errno.ENOSPC, "full")
        return write(number, data[:room.pop()])
    append_bytes(path, b"one\n")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        append_bytes(path, b"two and more\n")
    monkeypatch.setattr(os, "write", lambda number, data: 0)
    with pytest.raises(OSError, match="No space"):
        append_bytes(path, b"three\n")
    monkeypatch.setattr(os, "write", lambda number, data: write(number, data[:2]))
    append_bytes(path, b"four\n")
    assert path.read_bytes() == b"one\nfour\n"


def test_appending_beyond_a_limit_of_the_system(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    append_bytes(tmp_path / "a", b"x" * 90)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError):
            append_bytes(tmp_path / "a", b"y" * 90)
        with pytest.raises(ValueError, match="b cannot be written: .*--out"):
            check_writable(tmp_path / "b", "--out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a").read_bytes() == b"x" * 90


def test_whether_a_file_can_be_written_is_tried_without_a_trace(tmp_path):
    (tmp_path / "there").write_text("kept")
    (tmp_path / "folder").mkdir()
    for good in ("there", "new", "deep/new"):
        check_writable(tmp_path / good, "--out")
    assert (tmp_path / "there").read_text() == "kept" and sorted(os.listdir(tmp_path)) == ["folder", "there"]
    for bad in ("folder", "there/x", "n" * 300):
        with pytest.raises(ValueError, match="cannot be written: .*; give another --out"):
            check_writable(tmp_path / bad, "--out")
    for bad in ("/proc/x", "/dev/null"):
        with pytest.raises(ValueError, match="cannot be written"):
            check_writable(bad, "--out")


def test_a_parameter_that_a_notebook_does_not_have_is_an_error(monkeypatch):
    import IPython

    check_parameters()
    ran = ["", "import this", "seeds = 5\nout = ''", "# Parameters\nseeds = 2\n", "check_parameters()"]
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns={"In": ran}))
    check_parameters()
    ran[3] += "sedes = 3\n"
    with pytest.raises(ValueError, match="this notebook has no parameter sedes; it has out, seeds"):
        check_parameters()
