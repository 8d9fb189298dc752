"""What every command shares: it checks its options first, says each failure in one true sentence, and obeys no name."""
import errno
import inspect
import io
import json
import logging
import os
import re
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from typer.main import get_command

from cft.apps import cli, shell
from cft.apps.cli import app, main
from cft.apps.shell import CORES, PANELS, command, run_app, say, tell
from cft.files import choose_device

EVIL = "\x1b]0;title\x07\nright \u202eto left\r"


@pytest.fixture(autouse=True)
def _logs(tmp_path, monkeypatch):
    """Logs of tracebacks go to a folder of the test."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def outcome(action, capsys, *words):
    """The exit code of a command that does something, what it prints, and what it says went wrong."""
    one = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    def act() -> None:
        action()

    command(one)(act)
    with pytest.raises(SystemExit) as end:
        run_app(one, [*words])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def failing(error):
    def fail():
        raise error

    return fail


def deep(n=0):
    return deep(n + 1)


SENTENCES = {
    "disk full": (failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/a")), 2, "run/a: the disk is full$"),
    "read-only": (failing(OSError(errno.EROFS, os.strerror(errno.EROFS), "a")), 2, "a: the file system is read-only$"),
    "kept words": (failing(OSError(errno.ENOSPC, "No space left on device; go on", "a")), 2, "a: the disk is full; go"),
    "no right": (failing(PermissionError(errno.EACCES, "Permission denied", "a")), 2, "a: Permission denied$"),
    "long name": (lambda: Path("n" * 300).open(), 2, "n: File name too long$"),
    "disk broken": (failing(OSError(errno.EIO, os.strerror(errno.EIO), "a")), 2, "a: Input/output error$"),
    "another pipe": (failing(BrokenPipeError(errno.EPIPE, "Broken pipe")), 2, "Broken pipe$"),
    "no memory": (failing(MemoryError()), 2, "not enough memory; give a smaller --batch"),
    "torch": (failing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9")), 2,
              "not enough memory"),
    "recursion": (deep, 1, "an unforeseen RecursionError: maximum recursion depth exceeded"),
    "no text": (lambda: b"\xff".decode(), 1, "an unforeseen UnicodeDecodeError"),
    "the end of a file": (failing(EOFError()), 1, "an unforeseen EOFError; the traceback is in"),
    "an exit": (failing(SystemExit(3)), 1, "an unforeseen SystemExit: 3; the traceback is in"),
    "a mistake of a library": (lambda: re.compile("("), 1, "an unforeseen error: missing"),
    "Ctrl-C": (failing(KeyboardInterrupt()), 130, "interrupted; the same command goes on"),
    "nobody answers": (lambda: typer.confirm("Pay?"), 2, "a question got no answer"),
    "of the package": (lambda: choose_device("banana"), 2, "torch finds no device 'banana' here"),
    "several lines": (failing(ImportError("a\nb", name="papermill")), 2, r"a b; install it with: pip install 'cft\[ba")}


@pytest.mark.parametrize("case", SENTENCES)
def test_a_failure_is_one_true_sentence(case, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    action, code, words = SENTENCES[case]
    found, _, said = outcome(action, capsys)
    assert found == code and re.search(words, said), said
    assert said.count("\ncft: ") + said.startswith("cft: ") == 1 and "Traceback" not in said
    assert len(list((tmp_path / "tmp").iterdir())) == ("the traceback is in" in said)
    assert ("interrupted" in said) == (code == 130)


class Vanished(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Path("gone.jpg").read_bytes()


class Odd(Vanished):
    def __getitem__(self, index):
        return choose_device("banana")


@pytest.mark.parametrize("pictures, words", [(Vanished(), "No such file or directory: 'gone.jpg'"),
                                             (Odd(), "no device 'banana' here; expected auto, or one of cpu")])
def test_a_process_that_reads_pictures_fails_in_one_sentence_too(capsys, pictures, words):
    code, _, said = outcome(lambda: list(DataLoader(pictures, num_workers=1)), capsys)
    assert code == 2 and words in said and said.count("\n") == 1 and "Traceback" not in said


def test_a_thread_fails_in_a_sentence(capsys):
    def work():
        thread = threading.Thread(target=failing(ValueError(EVIL)))
        thread.start()
        thread.join()

    code, _, said = outcome(work, capsys)
    assert code == 0 and said.startswith("cft: an unforeseen ValueError") and said.count("\n") == 1


def test_names_have_no_power_over_the_terminal(capsys):
    def work():
        say(f"data {EVIL} end", "next")
        warnings.warn(f"odd {EVIL}", stacklevel=1)
        print(f"bar {EVIL}", file=sys.stderr)
        raise ValueError(EVIL)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda text, *_, **__: print(f"warning {text}", file=sys.stderr)
        _, out, said = outcome(work, capsys)
    assert out.splitlines() == [r"data \x1b]0;title\x07\nright \u202eto left\r end", "next"]
    for text in (out, said):
        assert not set(text) & {"\x1b", "\x07", "\u202e"}


def test_a_terminal_of_another_encoding_loses_no_word(monkeypatch, capsys):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert outcome(lambda: say("café \udce9 …"), capsys)[0] == 0
    assert raw.getvalue() == rb"caf\xe9 \udce9 \u2026" + b"\n"


def test_nobody_reads_on(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert outcome(lambda: [say("a" * 100_000) for _ in range(9)], capsys)[::2] == (1, "")
    monkeypatch.setattr(sys, "stdout", None)
    assert outcome(lambda: say("a"), capsys)[0] == 0, "closed from the start"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_standard_output_on_a_full_disk(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert outcome(lambda: say("a"), capsys)[::2] == (2, "cft: the disk is full\n")


def test_no_password_of_an_address_is_shown(capsys, tmp_path):
    code, _, said = outcome(failing(KeyError("http://me:secret@host/v1")), capsys)
    (log,) = (tmp_path / "tmp").iterdir()
    assert code == 1 and "//…@host" in said and "secret" not in said + log.read_text()


def run(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a picture, a file and a folder."""
    (tmp_path / "p/a").mkdir(parents=True)
    (tmp_path / "p/a/0.jpg").touch()
    (tmp_path / "file").write_text("text")
    (tmp_path / "closed").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shell, "choose_device", lambda _: failing(FileNotFoundError(2, "it came to the device"))())
    return tmp_path


AUDIT, FIT = ("audit", "p", "--model", "m", "--weights", "file"), ("fit", "p", "--model", "m", "--weights", "file")
MASKS, EVALUATE = ("masks", "p", "--concepts", "file"), ("evaluate", "p", "--model", "m", "--weights", "file")
RUN = ("--out", "run")
OPTIONS = {
    "--batch 0": (AUDIT, "--batch must lie between 1 and 1e+09; got 0"), "--batch -3": ((*FIT, *RUN), "--batch must"),
    "--epochs 0": ((*FIT, *RUN), "--epochs must lie"), "--save-every 0": ((*FIT, *RUN), "--save-every must lie"),
    "--per-class 0": ((*FIT, *RUN), "--per-class must"), "--per-class -1": ((*MASKS, *RUN), "--per-class must"),
    "--seed -1": ((*FIT, *RUN), "--seed must lie"), f"--seed {2**70}": ((*FIT, *RUN), "--seed must lie"),
    "--rate nan": ((*FIT, *RUN), "--rate must lie between 1e-12 and 10; got nan"),
    "--rate inf": ((*FIT, *RUN), "--rate must lie"),
    "--rate 0": ((*FIT, *RUN), "--rate must"), "--chunk -1": ((*FIT, *RUN), "--chunk must lie"),
    "--threads -1": (AUDIT, f"--threads must lie between 0 and {4 * CORES}; got -1"),
    "--threads 99999999": (AUDIT, "--threads must lie"), "--workers -1": (EVALUATE, "--workers must"),
    "--shards 0": ((*MASKS, *RUN), "--shards must"), "--shard -1": ((*MASKS, *RUN), "--shard must"),
    "--occurrence 1.5": (("validate", "p", "--concepts", "file"), "--occurrence must lie between 0 and 1; got 1.5"),
    "--coverage nan": (("validate", "p", "--concepts", "file"), "--coverage must"),
    "--pictures 0": (("validate", "p", "--concepts", "file"), "--pictures must"),
    "--cores -1": (("demo", *RUN), "--cores must"), "--gpus 0": (("reproduce", *RUN), "--gpus must"),
    "--seeds -1": (("demo", *RUN), "--seeds must"),
    "--objects nowhere": (AUDIT, "no object masks at nowhere"),
    "--classes nowhere": (AUDIT, "no class list at nowhere"),
    "--after nowhere": (AUDIT, "no checkpoint at nowhere"), "--masks nowhere": ((*FIT, *RUN), "no masks at nowhere"),
    "--validation nowhere": ((*FIT, *RUN), "no image folder at nowhere"),
    "--weights nowhere": (EVALUATE, "no checkpoint at nowhere"),
    f"--objects {'n' * 300}": (AUDIT, "File name too long"),
    "--out p/": (EVALUATE, "p cannot be written: it is no file; give another --out"),
    "--out file": (FIT, "file cannot be written: it is no folder; give another --out"),
    "--out file/run": (FIT, "file/run cannot be written: Not a directory"),
    f"--out {'n' * 300}": (FIT, "cannot be written: File name too long"),
    "--out /dev/null": (EVALUATE, "/dev/null cannot be written: it is no file"),
    "--audit p": (("validate", "p", "--concepts", "file"), "p cannot be written: it is no file; give another --audit"),
    "--publish file": (("reproduce", *RUN), "file cannot be written: it is no folder; give another --publish"),
    "--out new/deep/run": (FIT, "it came to the device"), "--out new/t.csv": (EVALUATE, "it came to the device")}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_checked_before_anything_is_read_or_made(option, place, capsys):
    words, expected = OPTIONS[option]
    before = sorted(place.rglob("*"))
    assert run(*words, *option.split(" ")) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.count("\n") == 1 and not said.out
    assert sorted(place.rglob("*")) == before


def test_places_that_cannot_be_written_are_told_before_the_work(place, capsys, monkeypatch):
    for number, words in ((errno.ENOSPC, "the disk is full"), (errno.EROFS, "the file system is read-only")):
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse(number))
        assert run(*FIT, "--out", "run") == 2
        assert f"run cannot be written: {words}; give another --out" in capsys.readouterr().err


def refuse(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_every_number_and_path_of_every_command_is_checked():
    free = {"record", "clip", "mpnet", "source"}  # they are looked at where they are used
    for name in (one.name or one.callback.__name__ for one in app.registered_commands):
        for key, parameter in inspect.signature(getattr(cli, name)).parameters.items():
            if any(kind in str(parameter.annotation) for kind in ("int", "float", "Path")) and key not in free:
                assert {key, f"{name}.{key}"} & set(shell.CHECKS), (name, key)


def test_devices_by_every_name(monkeypatch):
    cuda, mps = torch.cuda, torch.backends.mps
    for found, devices in {(0, False): {"auto": "cpu", "cpu": "cpu", "CPU": "cpu", "cpu:0": "cpu:0"},
                           (2, False): {"auto": "cuda", "gpu": "cuda", "cuda": "cuda", "cuda:1": "cuda:1",
                                        "1": "cuda:1"},
                           (0, True): {"auto": "mps", "gpu": "mps", "mps": "mps"}}.items():
        monkeypatch.setattr(cuda, "is_available", lambda found=found: bool(found[0]))
        monkeypatch.setattr(cuda, "device_count", lambda found=found: found[0])
        monkeypatch.setattr(mps, "is_available", lambda found=found: found[1])
        assert {name: choose_device(name) for name in devices} == devices
    monkeypatch.setattr(mps, "is_available", lambda: False)
    for name in ("mps", "gpu", "cuda", "0", "cpu:3", "banana", "xpu", "cuda:", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ValueError, match=f"no device '{name}' here; expected auto, or one of cpu$"):
            choose_device(name)
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="no device 'cuda:9' here; expected auto, or one of cuda:0, cuda:1, cpu"):
        choose_device("cuda:9")


def test_threads_follow_the_variable(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for told in ("3", "", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        shell.use_cores(0)
        shell.use_cores(2)
    assert asked == [3, 2, CORES, 2, CORES, 2]


def test_a_run_stands_for_its_checkpoint(tmp_path):
    assert shell.weights_file(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").touch()
    assert shell.weights_file(tmp_path) == tmp_path / "model.safetensors"


def test_an_empty_text_is_no_path(capsys):
    with pytest.raises(SystemExit, match="2"):
        run_app(typer.Typer(), ["fit", "photos", "--validation", "", "--out", "run"])
    assert "an empty text stands after cft fit photos --validation" in capsys.readouterr().err


def work():
    """What a command may do: lines, a bar, a print of a library, a warning, numbers."""
    say("model    m", "result   a.json")
    say("the answer", answer=True)
    list(tqdm(range(3), desc="working"))
    print("of a library")
    logging.getLogger("cft.odd").warning("odd thing")
    logging.getLogger("cft.odd").debug("reads    a.json")
    tell(share=np.float32(0.5), nothing=float("nan"), rows=pd.DataFrame({"a": [1, np.nan]}), where=Path("x"),
         result={"a": Path("."), "b": Path("gone")})
    tell(warnings=["doubtful"])


def test_json_is_one_object_and_lines_go_to_the_other_stream(capsys):
    code, out, err = outcome(work, capsys, "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert found == {"command": "", "version": found["version"], "exit": 0, "result": {"a": "."}, "share": 0.5,
                     "warnings": ["odd thing", "doubtful"], "nothing": None, "rows": [{"a": 1}, {"a": None}],
                     "where": "x"}
    for line in ("model    m", "result   a.json", "the answer", "of a library", "odd thing", "working: 100%"):
        assert line in err
    assert "reads" not in err
    code, out, err = outcome(work, capsys)
    assert out.splitlines() == ["model    m", "result   a.json", "the answer", "of a library"], "nothing has stayed"


@pytest.mark.parametrize("error, code", [(OSError(errno.ENOSPC, "full", "a"), 2), (KeyError("//me:secret@host"), 1),
                                         (KeyboardInterrupt(), 130), (typer.Exit(3), 3)])
def test_json_of_a_failure_holds_the_sentence(error, code, capsys):
    def fail():
        tell(done=2)
        raise error

    found, out, err = outcome(fail, capsys, "--json")
    told = json.loads(out)
    assert found == told["exit"] == code and told["done"] == 2 and "secret" not in out
    assert err == (f"cft: {told['error']}\n" if "error" in told else "") and ("error" in told) == (code < 3 or code > 9)


@pytest.mark.parametrize("name", get_command(app).commands)
def test_every_command_answers_mistakes_in_json(name, capsys):
    for words in (("--frob",), ("--config", "nowhere.yaml")):
        assert run(name, *words, "--json") == 2
        said = capsys.readouterr()
        told = json.loads(said.out)
        assert {*told} == {"command", "version", "exit", "result", "warnings", "error"}
        assert told["command"] == name and told["exit"] == 2 and said.err == f"cft: {told['error']}\n"


def test_quiet_keeps_results_answers_and_mistakes(capsys):
    for _ in range(2):
        assert outcome(work, capsys, "-q") == (0, "result   a.json\nthe answer\n", "")
        assert "working: 100%" in outcome(work, capsys)[2], "a later command speaks again"
    code, out, err = outcome(lambda: choose_device("banana"), capsys, "--quiet")
    assert (code, out) == (2, "") and err.startswith("cft: torch finds no device 'banana' here")
    code, out, err = outcome(work, capsys, "-q", "--json")
    assert json.loads(out)["warnings"] == ["odd thing", "doubtful"] and err == "result   a.json\nthe answer\n"


def test_a_question_is_seen_in_any_case(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "3 calls. Go on?" in outcome(lambda: shell.agreed("3 calls"), capsys, "-q")[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, out, err = outcome(lambda: shell.agreed("3 calls"), capsys, "--json")
    assert json.loads(out)["exit"] == code == 0 and "3 calls. Go on?" in err


def test_verbose_says_what_is_read_and_decided(capsys):
    before = logging.getLogger("cft").level, [*logging.getLogger("cft").handlers]
    for _ in range(2):
        assert "reads    a.json\n" in outcome(work, capsys, "-v")[2]
        assert "reads" not in outcome(work, capsys)[2]
    assert outcome(work, capsys, "-v", "-q")[::2] == (2, "cft: --verbose and --quiet exclude each other; give one of "
                                                         "them\n")
    run("concepts", "nowhere", "--base-url", "http://me:secret@host/v1", "-v", "--dry-run")
    assert "source nowhere; " in (said := capsys.readouterr().err) and "secret" not in said
    assert (logging.getLogger("cft").level, [*logging.getLogger("cft").handlers]) == before


def taken(capsys, text, *words, name="options.yaml"):
    """What a command is given by a file and the command line, or the sentence that refuses it."""
    given, one = {}, typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    @command(one, place="Where.", out="Where to.", sets="Which.")
    def act(data: list[Path], rate: float, place: Path | None = None, img_size: int = 8, model: str = "m",
            raw: bool = False, weights: list[Path] | None = None, sets: str = "") -> None:
        given.update(locals())

    Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        run_app(one, [*words, "--config", name])
    said = capsys.readouterr()
    return given if end.value.code == 0 else said.err


def test_a_file_holds_any_option_and_the_command_line_wins(place, capsys, monkeypatch):
    monkeypatch.setitem(shell.HELP, "rate", "Rate.")
    given = taken(capsys, "data: [p, p]\nrate: 1e-3\nimg-size: 16\nmodel: 5\nraw: true\nweights: [file, closed]\n"
                          "place: p\n")
    assert given == {"data": [Path("p")] * 2, "rate": 0.001, "img_size": 16, "model": "5", "raw": True, "sets": "",
                     "weights": [Path("file"), Path("closed")], "place": Path("p"), "given": given["given"]}
    given = taken(capsys, "data: p\nrate: 0.1\nimg_size: 16\nmodel:\n", "--img-size", "32", "--rate", "1", "file")
    assert (given["img_size"], given["rate"], given["model"], given["data"]) == (32, 1.0, "m", [Path("file")])
    assert "Missing option" in taken(capsys, "", "p"), "what nobody says is missing"


REFUSED = {
    "frob: 1": "o.yaml: cft act has no option frob; known are data, rate, place, img_size, model, raw, weights, sets",
    "img_size: [1, 2]": "o.yaml: img_size is [1, 2]; expected one value", "raw: 3": "raw is 3; expected true or false",
    "model: no": "o.yaml: model is false; expected one value, in quotes if it is a word", "img_size: true": "is true;",
    "img_size: many": "o.yaml: img_size: Input should be a valid integer", "model: {a: 1}": 'is {"a": 1}; expected',
    "img_size: 4": "o.yaml: img_size: --img-size must lie between 8 and 8192; got 4", "rate: .nan": "--rate must lie",
    "weights: [gone.pth]": "o.yaml: weights: no checkpoint at gone.pth", "weights: [[file]]": "expected values",
    "[1, 2]": "o.yaml holds a list; expected options of cft act", "rate: 1\nrate: 2": "o.yaml is no sound YAML",
    "a: [": "o.yaml is no sound YAML", "config: o.yaml": "has no option config", "5: 6": "has no option 5"}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_file_cannot_say_is_one_sentence(text, place, capsys, monkeypatch):
    monkeypatch.setitem(shell.HELP, "rate", "Rate.")
    said = taken(capsys, text, "p", "--rate", "1", name="o.yaml")
    assert REFUSED[text] in said and said.startswith("cft: ") and said.count("\n") == 1


def test_help_shows_the_everyday_options_first_and_the_rest_in_panels(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("fit", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("data", "--model", "--weights", "--masks", "--concepts", "--objects", "--out", "--method", "--rate",
                 "--dry-run"):
        assert any(line.strip().startswith(name) for line in lines[:28]), name
    panels = [line for line in lines if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert panels == ["Options:", "Training:", "How pictures and checkpoints are read:", "Speed and memory:",
                      "Safety:", "With every command:"]
    assert lines[-1].startswith("    cft fit PICTURES") and not any("\b" in line for line in lines)
    commands = get_command(app).commands.values()
    known = {key for one in commands for p in one.params for key in (p.name, f"{one.name}.{p.name}")}
    assert {*PANELS} - known <= {"help"}
    for one in commands:
        assert {"--json", "--config", "-v", "-q"} <= {opt for p in one.params for opt in p.opts}, one.name
