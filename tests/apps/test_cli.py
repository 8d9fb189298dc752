"""The command line as its users meet it: strange folders, kills, mistakes."""
import configparser
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from typer.main import get_command

from cft.apps import batch, cli, shell
from cft.apps.cli import app, main
from cft.concepts.filters import ConceptSet, Similarity
from cft.concepts.grounding import WEIGHTS
from cft.concepts.language import ANSWERS, Sampling
from cft.concepts.store import MaskStore, encode_mask
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, scan
from cft.data.models import TINY, base_model, save_model
from cft.data.testsets import CARDS, miniature, open_set
from cft.files import ASSETS, write_json
from cft.reproduce.paper import artefact
from cft.reproduce.runner import Reproduction
from cft.reproduce.settings import read_settings
from cft.train.objectives import RECIPES

VIT = "vit_tiny_patch16_224"
START = ("--model", TINY, "--weights", ASSETS / "base_0.safetensors", "--threads", 1)
RECORDED = ("--record", ANSWERS, "--model", "cft-recorded")
TOY = ("--grounder", "toy", "--threads", 1)
CFT = Path(sys.executable).with_name("cft")


@pytest.fixture(autouse=True)
def _spelling(monkeypatch):
    """Concepts are compared by spelling here: a sentence encoder takes ten seconds to load."""
    monkeypatch.setattr(Similarity, "best", lambda many=False: Similarity())


def photograph(size, seed):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size).filter(ImageFilter.GaussianBlur(2))


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Three classes of photograph-like JPEGs of odd sizes: grey, CMYK, turned by EXIF, one truncated; and masks."""
    root = tmp_path_factory.mktemp("album")
    sizes = [(301, 203), (97, 411), (224, 224)]
    for c, name in enumerate(("café", "dog house", "zebra")):
        (root / "photos" / name).mkdir(parents=True)
        (root / "masks" / name).mkdir(parents=True)
        for k, size in enumerate(sizes):
            image, options = photograph(size, 10 * c + k), {}
            if k == 0:
                image = image.convert(("L", "CMYK", "RGB")[c])
            if k == 1 and c == 2:
                options["exif"] = Image.Exif()
                options["exif"][0x0112] = 8
                size = size[::-1]
            image.save(root / "photos" / name / f"{k}.JPG", "JPEG", **options)
            mask = np.zeros(size[::-1], np.uint8)
            mask[size[1] // 4: size[1] * (c + 2) // 5, size[0] // 4: size[0] * (k + 2) // 4] = 255
            Image.fromarray(mask).save(root / "masks" / name / f"{k}.png")
    whole = (root / "photos/zebra/0.JPG").read_bytes()
    (root / "photos/zebra/cut.jpg").write_bytes(whole[: len(whole) // 2])
    torch.manual_seed(0)
    save_model(root / "start.safetensors", timm.create_model(VIT, num_classes=3))
    return root


def run(*words):
    """The command in this process, and its exit code; what it writes is read by capsys."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def arguments(album, out, **changes):
    options = {"model": VIT, "weights": album / "start.safetensors", "masks": album / "masks", "out": out, "rate": 1e-4,
               "epochs": 1, "batch": 3, "threads": 1, **changes}
    given = {key: value for key, value in options.items() if value is not None}
    return [album / "photos", *(word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value))]


@pytest.mark.slow
def test_fit_on_a_folder_written_by_something_else(album, tmp_path, capsys):
    assert run("fit", *arguments(album, tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    assert "9 pictures of 3 classes" in printed and "1 set aside: zebra/cut.jpg" in printed
    record = json.loads((tmp_path / "run/record.json").read_text(encoding="utf-8"))
    assert record["data"]["pictures"] == 9 and record["steps"] == 3
    path = tmp_path / "run/model.safetensors"
    ours = timm.create_model(VIT, num_classes=3).eval()
    ours.load_state_dict(load_file(path))
    theirs = timm.create_model(VIT, num_classes=3, checkpoint_path=str(path)).eval()
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(ours(x), theirs(x))
    start = load_file(album / "start.safetensors")
    assert any(not torch.equal(start[k], v) for k, v in ours.state_dict().items())
    tested = ("--model", VIT, "--weights", path, "--threads", 1)
    out = tmp_path / "t.csv"
    assert run("evaluate", album / "photos", *tested, "--objects", album / "masks", "--out", out) == 0
    table = out.read_text()
    shown = capsys.readouterr().out
    assert "top1" in table and "mean_iou" in table and "photos" in shown
    folder = ("--model", VIT, "--weights", tmp_path / "run", "--objects", album / "masks", "--threads", 1)
    assert run("evaluate", album / "photos", *folder) == 0 and capsys.readouterr().out == shown, "the run itself"


@pytest.mark.slow
def test_killed_fit_resumes_and_ends_equal(tmp_path):
    root = backdrop.write(tmp_path / "b", {"train": 4}, seed=1)
    base = ["fit", root / "images/train", "--masks", root / "masks/train", "--objects", root / "objects/train", *START,
            "--method", "cft+", "--rate", 1e-4, "--epochs", 4]
    words = lambda out: [*map(str, [*base, "--out", tmp_path / out, "--save-every", 2])]
    process = subprocess.Popen([CFT, *words("killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "killed/state.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed/state.pt").exists() and not (tmp_path / "killed/model.safetensors").exists()
    for out in ("killed", "whole"):
        assert run(*words(out)) == 0
    killed, whole = (load_file(tmp_path / out / "model.safetensors") for out in ("killed", "whole"))
    assert all(torch.equal(killed[k], whole[k]) for k in whole)
    record = json.loads((tmp_path / "killed/record.json").read_text(encoding="utf-8"))
    assert 0 < record["resumed_at"] < record["steps"] == 24


def _nan_image(album, tmp_path):
    shutil.copytree(album, tmp_path / "a")
    (tmp_path / "a/photos/zebra/2.JPG").unlink()
    Image.fromarray(np.full((224, 224), np.nan, np.float32)).save(tmp_path / "a/photos/zebra/2.tif")
    return arguments(tmp_path / "a", tmp_path / "run")


def _changed(change):
    def build(album, tmp_path):
        shutil.copytree(album, tmp_path / "a")
        change(tmp_path / "a")
        return arguments(tmp_path / "a", tmp_path / "run")

    return build


def _with(**changes):
    return lambda album, tmp_path: arguments(album, tmp_path / "run", **changes)


def _tear(file):
    file.write_bytes(file.read_bytes()[:9999])


def _seven_classes(album):
    save_model(album / "start.safetensors", timm.create_model(VIT, num_classes=7))


MISTAKES = {
    "empty class": (_changed(lambda a: (a / "photos/empty").mkdir()), "empty has no picture"),
    "mask of another size": (_changed(lambda a: Image.new("L", (9, 9)).save(a / "masks/zebra/2.png")),
                             "9 × 9 pixels; its picture is 224 × 224"),
    "missing mask": (_changed(lambda a: (a / "masks/zebra/2.png").unlink()),
                     "misses 1 of 9 pictures, first zebra/2.png"),
    "class count": (_changed(_seven_classes), "the model has 7 classes but"),
    "NaN image": (_nan_image, "NaN or infinite pixels; expected 8- or 16-bit"),
    "corrupt checkpoint": (_changed(lambda a: (a / "start.safetensors").write_bytes(b"junk" * 99)), "does not read as"),
    "truncated checkpoint": (_changed(lambda a: _tear(a / "start.safetensors")), "does not read as"),
    "no masks": (_with(masks=None), "needs concept masks: give --masks"),
    "no object masks": (_with(method="rrda"), "needs object masks: give --objects"),
    "no weights": (_with(weights=None), "give either --weights FILE or --pretrained"),
    "unknown method": (_with(method="magic"), "method must be one of plain"),
    "unknown variant": (_with(method="cft.magic"), "no method 'cft.magic'; expected one of plain"),
    "variant without effect": (_with(method="plain.no-align"), "plain has no weights that 'no-align' could change"),
    "variant of the masks": (_with(method="cft.class"), "cft.class is cft with other masks; give --method cft"),
    "unknown model": (_with(model="vit_giant_patch3"), "timm knows no model named"),
    "other architecture": (_with(model="vit_small_patch16_224"), "does not fit vit_small_patch16_224"),
    "negative rate": (_with(rate=-1), "--rate must lie between 1e-12 and 10"),
    "rate in words": (_with(rate="fast"), "--rate must be a number, or auto; got 'fast'"),
    "unknown precision": (_with(precision="half"), "Invalid value for '--precision'"),
    "unknown option": (_with(colours="x"), "No such option: --colours"),
    "no cuda": (_with(device="cuda"), "torch finds no device 'cuda' here; expected auto, or one of"),
    "class list": (_with(classes="nowhere.txt"), "no class list at nowhere.txt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(album, tmp_path, capsys, mistake):
    if mistake == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    build, words = MISTAKES[mistake]
    words_in = build(album, tmp_path)
    assert run("fit", *words_in) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cft:")]
    assert len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_shell_sees_exit_code_2_and_no_traceback(tmp_path):
    done = subprocess.run([str(CFT), "fit", "--frobnicate"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


COMMANDS = get_command(app).commands
HEAVY = {"torch", "torchvision", "timm", "numpy", "pandas", "scipy", "PIL", "matplotlib", "pyarrow"}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_teaches_with_examples_that_parse(capsys, name):
    assert run(*[name] * bool(name), "--help") == 0
    said = capsys.readouterr().out
    assert "Usage: cft" in said
    lines = [line.strip() for line in said.splitlines() if line.startswith("  ") and line.split()[:1] == ["cft"]]
    examples = [re.split(" {3,}", line)[0].split()[1:] for line in lines]
    assert examples and all(len(line) <= 120 for line in said.splitlines())
    start = ["--model", VIT, "--weights", "start.safetensors"]
    for command, *words in examples:
        given = [w for word in words for w in (start if word == "$MODEL" else [word])]
        assert COMMANDS[command].make_context(command, given, resilient_parsing=False).params
    if not name:  # in the order of use, and each command has its example
        steps = [command for command in COMMANDS if command not in ("repair", "demo", "reproduce", "status")]
        assert list(dict.fromkeys(command for command, *_ in examples)) == ["repair", *steps]
        assert "`cft demo`" in said and "`cft reproduce`" in said


ASKED = """import sys
from cft.apps.cli import main
try:
    main(%s)
except SystemExit:
    print(sorted(%s & set(sys.modules)))
"""
LIGHT = ("--help", "--version", "", "fit --help", "fit --frobnicate", "fiit", "fit x --model m --out o --method magic",
         "demo --seeds one")


@pytest.mark.parametrize("line", LIGHT)
def test_what_needs_no_model_loads_none(line, tmp_path):
    code = ASKED % (line.split(), HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_completion_offers_commands_and_names_without_a_model(tmp_path):
    def offered(line):
        typed = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_CFT_COMPLETE": "complete_bash"}
        done = subprocess.run([sys.executable, "-c", ASKED % ("", HEAVY)], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | typed, check=True)
        *names, loaded = done.stdout.splitlines()
        assert loaded == "[]"
        return names

    assert offered("cft va") == ["validate"]
    assert {*offered("cft fit --method c")} == {"cft", "cft+", "cft-paper", "cft-official", "context-head"}
    assert {*offered("cft evaluate --sets si-")} == {"si-size", "si-rotation", "si-location"}
    assert {*offered("cft evaluate --sets in-a,in-s")} == {"in-a,in-sketch", "in-a,in-segmentation"}
    assert offered("cft reproduce --profile s") == ["smoke"] and offered("cft masks --grounder t") == ["toy"]


def test_names_listed_without_imports_are_the_real_ones():
    assert shell.CHOICES["method"] == tuple(RECIPES) and shell.CHOICES["sets"] == tuple(CARDS)
    assert cli.LANGUAGE_MODEL == Sampling().model and {*batch.QUICK} < {*artefact("demo").methods}
    assert set(shell.CHOICES["profile"]) == {file.stem for file in (ASSETS / "profiles").glob("*.yaml")}
    detector, segmenter = shell.CHOICES["grounder"][0].split("+")
    assert {detector, segmenter} <= set(WEIGHTS)


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(Path(__file__).parents[2] / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_every_extra_is_known_by_its_modules():
    packages = {"segment_anything": "segment-anything", "groundingdino": "groundingdino-py",
                "open_clip": "open-clip-torch", "sentence_transformers": "sentence-transformers"}
    for extra, modules in shell.EXTRAS.items():
        listed = {re.split(r"[<>=]", need)[0] for need in settings()[f"{extra}_requirements"].split()}
        assert {packages.get(module, module.replace("_", "-")) for module in modules} <= listed, extra
    listed = {key.removesuffix("_requirements") for key in settings() if key.endswith("_requirements")}
    assert listed == {*shell.EXTRAS, "dev"}


MODULES = [module for modules in shell.EXTRAS.values() for module in modules]
BLOCK = f"""
import importlib.metadata as metadata, sys
absent = [name for name in {MODULES} if name != "sphinx"]  # scipy.stats looks for that name in sys.modules
sys.modules.update(dict.fromkeys(absent))  # neither importable nor found by find_spec
there = metadata.distribution
def distribution(name):  # nor known as installed
    if name.lower().replace("-", "_").removesuffix("_torch").removesuffix("_py") in {MODULES}:
        raise metadata.PackageNotFoundError(name)
    return there(name)
metadata.distribution = distribution
"""


@pytest.mark.slow
def test_the_core_does_without_any_extra_and_names_what_is_missing(tmp_path, drawn, monkeypatch):
    train = drawn / "images/train"
    (tmp_path / "classes.csv").write_text("id,name\nbird,bird\n")
    asked = ("concepts", tmp_path / "classes.csv", "--yes", "--base-url", "http://127.0.0.1:9")
    cases = {"grounding": ("masks", train, "--concepts", tmp_path / "c.json", "--out", tmp_path / "s"),
             "llm": (*asked, "--out", tmp_path / "d.json")}
    assert run("concepts", train, *RECORDED, "--replay", "--out", tmp_path / "c.json") == 0
    code = BLOCK + f"""import importlib, pkgutil, cft
from cft.apps.cli import main
for words in {[[str(w) for w in words] for words in cases.values()]}:
    try:
        main(words)
    except SystemExit as end:
        print("exit", end.code)
for module in pkgutil.walk_packages(cft.__path__, "cft."):
    importlib.import_module(module.name)
    print(module.name)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and sum(line.startswith("cft.") for line in lines) > 40, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("cft:")]
    assert lines.count("exit 2") == len(said) == 2, done.stderr
    assert all(f"pip install 'cft[{extra}]'" in line for extra, line in zip(cases, said)), said
    for extra, modules in shell.EXTRAS.items():  # whoever forgets to say it
        for module in modules:
            with monkeypatch.context() as gone, pytest.raises(ImportError) as error:
                gone.setitem(sys.modules, module, None)  # and back again: others of this process have imported it
                importlib.import_module(module)
            assert f"pip install 'cft[{extra}]'" in str(error.value) + shell._advice(error.value)


def test_mistakes_say_what_to_do_next(capsys):
    assert run("fit", "--frobnicate") == 2 and "See: cft fit --help" in capsys.readouterr().err
    assert run("mend") == 2 and "See: cft --help" in capsys.readouterr().err
    full = torch.OutOfMemoryError("full")
    assert "--batch" in shell._advice(full) and "not enough memory" in shell._sentence(full)


def test_a_mistake_of_ours_leaves_its_traceback_in_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("cft.reproduce.runner.reproduce", lambda *a, **k: {}["sk-1234567890"])
    monkeypatch.setenv("SOME_API_KEY", "sk-1234567890")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("demo", "--out", tmp_path / "demo") == 1
    said, (log,) = capsys.readouterr().err, tmp_path.glob("*.log")
    assert said == f"cft: an unforeseen KeyError: '…'; the traceback is in {log}\n"
    text = log.read_text()
    assert "Traceback" in text and "sk-1234567890" not in text and log.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(tempfile, "mkstemp", lambda *a: os.open("/dev/full/x", os.O_RDONLY))
    assert run("demo", "--out", tmp_path / "demo") == 1
    assert "the traceback could not be written: Not a directory" in capsys.readouterr().err


def test_dry_runs_of_measuring_count_passes(drawn, tmp_path, capsys):
    test, out = drawn / "images/adversarial", tmp_path / "a.json"
    words = ("audit", test, *START, "--objects", drawn / "objects/adversarial", "--out", out, "--dry-run")
    assert run(*words) == 0 and not out.exists()
    assert "48 pictures: 240 forward passes and 48 relevance maps" in capsys.readouterr().out
    assert run("evaluate", test, *START, "--dry-run") == 0 and "48 on adversarial" in capsys.readouterr().out


def test_evaluate_is_right(tmp_path):
    root = backdrop.write(tmp_path / "b", {"val": 2, "adversarial": 2}, seed=3)
    sets, out = [root / "images/val", root / "images/adversarial"], tmp_path / "t.csv"
    assert run("evaluate", *sets, *START, "--out", out) == 0
    table, model = pd.read_csv(out), base_model(0)
    for root in sets:
        data = MaskedImages(scan(root, classes=list(backdrop.CLASSES)), Preprocess.of(model))
        hits = sum(int(model(data[i]["image"][None]).argmax()) == data[i]["label"] for i in range(len(data)))
        value = table[(table["set"] == root.name) & (table["metric"] == "top1")]["value"].item()
        assert value == pytest.approx(100 * hits / len(data))


def test_evaluate_wants_one_checkpoint_and_one_folder_with_masks(drawn, tmp_path, capsys):
    test, objects = drawn / "images/adversarial", drawn / "objects/adversarial"
    assert run("evaluate", test, *START, *START[2:4]) == 2
    assert "expected one checkpoint without --sets" in capsys.readouterr().err
    assert run("evaluate", test, test, *START, "--objects", objects) == 2
    assert "one folder with --objects" in capsys.readouterr().err
    assert run("evaluate", test, "--sets", "in-a", *START, "--objects", objects, "--out", tmp_path / "r") == 2
    assert "published sets bring their own" in capsys.readouterr().err and not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pictures of three drawn classes, and a base that knows them."""
    root = backdrop.write(tmp_path_factory.mktemp("drawn") / "w", {"train": 6, "adversarial": 4}, seed=2)
    for name in set(backdrop.CLASSES) - {"bird", "fish", "car"}:
        shutil.rmtree(root / "images/train" / name)
    return root


def test_from_class_names_to_a_repaired_model(drawn, tmp_path, capsys):
    train, concepts, store = drawn / "images/train", tmp_path / "concepts.json", tmp_path / "store"
    kept_file, table, tuned = tmp_path / "kept.json", tmp_path / "audit.csv", tmp_path / "run"
    said = lambda: capsys.readouterr().out
    asking, before = ("concepts", train, *RECORDED, "--out", concepts), ANSWERS.read_bytes()
    assert run(*asking, "--dry-run") == 0 and not concepts.exists()
    assert "18 questions, 18 in the record, 0 calls" in said()
    assert run(*asking, "--replay") == 0 and ANSWERS.read_bytes() == before
    found = ConceptSet.load(concepts)
    assert {c.id for c in found.classes} == {"bird", "fish", "car"}
    assert f"{len(found.pairs())} pairs of class and concept, {len(found.dropped)} dropped" in said()

    grounding = ("masks", train, "--concepts", concepts, "--out", store, *TOY, "--per-class", 5)
    assert run(*grounding, "--dry-run") == 0 and "15 pictures of 3 classes" in said() and not store.exists()
    assert run(*grounding) == 0 and len(MaskStore(store).pictures) == 15

    judging = ("validate", store, "--concepts", concepts, "--out", kept_file, "--audit", table)
    capsys.readouterr()
    assert run(*judging, "--dry-run") == 0 and "15 pictures, " in said() and not kept_file.exists()
    ConceptSet(ConceptSet.load(concepts).classes, ()).save(tmp_path / "none.json")
    assert run(*(tmp_path / "none.json" if word == concepts else word for word in judging)) == 2
    assert "none.json is not the concept set that" in capsys.readouterr().err
    assert not kept_file.exists()
    assert run(*judging) == 0
    kept, audit = ConceptSet.load(kept_file), pd.read_csv(table)
    assert 0 < len(kept.pairs()) == audit["accepted"].sum() < len(found.pairs())

    words = ("--method", "cft+", "--rate", 1e-4, "--epochs", 1, "--out", tuned)
    tuning = ("fit", train, "--masks", store, *START, *words)
    capsys.readouterr()
    assert run(*tuning) == 2 and "give --concepts FILE" in capsys.readouterr().err and not tuned.exists()
    tuning += ("--concepts", kept_file, "--per-class", 2)
    assert run(*tuning, "--dry-run") == 0 and not tuned.exists()
    assert "time     about" in said()
    assert run(*tuning) == 0
    record = json.loads((tuned / "record.json").read_text())
    assert record["data"]["pictures"] == 6 and load_file(tuned / "model.safetensors")
    assert (tuned / "README.md").is_file()


def test_each_command_says_in_json_what_it_found(drawn, tmp_path, capsys, monkeypatch):
    def told(*words):
        capsys.readouterr()
        assert run(*words, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert {*found} > {"command", "version", "exit", "result", "warnings"} and found["command"] == words[0]
        return found

    train, concepts, store = drawn / "images/train", tmp_path / "concepts.json", tmp_path / "store"
    asking, kept = ("concepts", train, *RECORDED, "--out", concepts), tmp_path / "kept.json"
    assert told(*asking, "--dry-run")["estimate"]["calls"] == 0 and not concepts.exists()
    found = told(*asking, "--replay")
    assert found["result"] == {"out": str(concepts), "record": str(ANSWERS)} and found["counts"]["pairs"] > 0
    grounding = ("masks", train, "--concepts", concepts, "--out", store, *TOY, "--per-class", 2)
    assert told(*grounding, "--dry-run")["plan"]["pictures"] == 6
    found = told(*grounding)
    assert found["pictures"] == 6 and found["set_aside"] == [] and found["result"] == {"out": str(store)}
    found = told("validate", store, "--concepts", concepts, "--out", kept)
    assert found["summary"]["classes"] == 3 and found["result"] == {"out": str(kept)}
    settings = tmp_path / "fit.yaml"
    settings.write_text(f"masks: {drawn / 'masks/train'}\nmethod: cft\nepochs: 9\ntrack: tensorboard\n")
    words = ("fit", train, *START, "--config", settings, "--epochs", 1, "--out", tmp_path / "run")
    assert told(*words, "--dry-run")["time"]["steps"] == 3 and not (tmp_path / "run").exists()
    found = told(*words)
    assert found["last"]["loss"] > 0 and found["result"]["model"] == str(tmp_path / "run/model.safetensors")
    assert json.loads((tmp_path / "run/record.json").read_text())["recipe"]["epochs"] == 1
    assert [*(tmp_path / "run/tensorboard").glob("events.*")]
    found = told("evaluate", train, *START, "--out", tmp_path / "t.csv")
    assert found["rows"][0]["metric"] == "top1" and found["result"] == {"out": str(tmp_path / "t.csv")}
    assert told("evaluate", train, *START, "--dry-run")["pictures"] == {"train": 18}
    assert told("audit", train, *START, "--dry-run")["pictures"] == 18
    found = told("audit", train, *START, "--after", tmp_path / "run", "--out", tmp_path / "a.json")
    assert found["verdict"] == found["before"]["verdict"] == "cannot tell" and found["numbers"][0]["n"] == 18
    assert found["warnings"][0].startswith("not measured: ") and found["result"] == {"out": str(tmp_path / "a.json")}
    monkeypatch.setattr("cft.data.models.fit_probe", lambda *given, **_: 87.5)
    assert told("probe", train, *START, "--out", tmp_path / "p.safetensors")["accuracy"] == 87.5


def test_batch_commands_say_in_json_what_was_made_and_what_failed(tmp_path, capsys, monkeypatch):
    pages = pd.DataFrame({"artefact": ["demo", "fig1"], "status": ["done", "failed"], "seconds": [1.0, 0.0],
                          "missing": ["", "x"]})
    failures = pd.DataFrame([["page fig1", "odd", None, [], "l", "c"]],
                            columns=["step", "error", "cell", "tail", "log", "command"])
    monkeypatch.setattr("cft.reproduce.runner.reproduce", lambda *_, **__: Reproduction(tmp_path, pages, failures, 1.0))
    for name in ("demo", "reproduce"):
        assert run(name, "--json") == 1
        said = capsys.readouterr()
        found = json.loads(said.out)
        assert [page["status"] for page in found["pages"]] == ["done", "failed"] and "failed   page fig1" in said.err
        assert found["failed"][0]["step"] == "page fig1" and found["error"] == "1 of 2 pages are not done"


@pytest.mark.parametrize("method, rate, align", [("cft", "5e-07", True), ("cft+.no-align", "5e-07", False),
                                                 ("cft-paper.rate-x6", "3e-06", True), ("cft-official", "3e-06", True)])
def test_fit_has_a_rate_and_does_it_otherwise_after_a_dot(drawn, tmp_path, capsys, method, rate, align):
    masks = ("--masks", drawn / "masks/train", "--objects", drawn / "objects/train")
    train = drawn / "images/train"
    held = ("--validation", train, "--validation-masks", drawn / "masks/train") if method == "cft-official" else ()
    words = ("fit", train, *masks, *START, "--method", method, "--epochs", 1, *held, "--out", tmp_path / "run")
    assert run(*words) == 0
    assert f"method   {method}: 1 epochs of 3 steps, batch 8, learning rate {rate}, seed 0" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert ("align" in record["epochs"][-1]) == align and record["recipe"]["rate"] == float(rate)


def test_fit_trains_the_last_blocks_before_given_scenes(drawn, tmp_path, capsys):
    masks = ("--masks", drawn / "masks/train", "--objects", drawn / "objects/train", "--method", "rrda", "--epochs", 1)
    words = ("fit", drawn / "images/train", *masks, *START, "--out", tmp_path / "run", "--trainable")
    assert run(*words, 2, "--backgrounds", drawn / "images/adversarial") == 0, capsys.readouterr()
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["recipe"]["trainable"] == 2 and len(record["backgrounds"]) == 64
    assert run(*words[:-2], tmp_path / "other", "--trainable", "99") == 2
    assert "trainable must be all, head or a number of the" in capsys.readouterr().err


def test_nothing_is_asked_for_an_empty_class(drawn, tmp_path, capsys):
    shutil.copytree(drawn / "images/train", tmp_path / "train")
    (tmp_path / "train/empty").mkdir()
    assert run("concepts", tmp_path / "train", *RECORDED, "--replay", "--out", tmp_path / "c.json") == 2
    assert "empty has no picture" in capsys.readouterr().err and not (tmp_path / "c.json").exists()


def test_best_epoch_needs_other_pictures(drawn, tmp_path, capsys):
    train, masks, out = drawn / "images/train", drawn / "masks/train", tmp_path / "run"
    words = ("fit", train, "--masks", masks, *START, "--method", "cft-official", "--epochs", 1, "--out", out)
    assert run(*words) == 2 and "--validation" in capsys.readouterr().err
    assert run(*words, "--validation", train, "--validation-masks", masks) == 0
    assert json.loads((out / "record.json").read_text())["best_step"] == 3


@pytest.mark.slow
def test_audit_says_what_it_found(drawn, tmp_path, capsys):
    words = ("audit", drawn / "images/adversarial", *START, "--objects", drawn / "objects/adversarial")
    assert run(*words, "--out", tmp_path / "audit.json") == 0
    said, content = capsys.readouterr().out, json.loads((tmp_path / "audit.json").read_text())
    assert "Audit of 48 pictures" in said and "relevance off object" in said
    assert content["record"]["pictures"] == 48 and "after" not in content
    (tmp_path / "run").mkdir()
    shutil.copy(ASSETS / "base_1.safetensors", tmp_path / "run/model.safetensors")
    (tmp_path / "run/record.json").write_text('{"steps": 7}')
    assert run(*words, "--after", tmp_path / "run", "--out", tmp_path / "report.html") == 0
    said, page = capsys.readouterr().out, (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "before: Audit of 48" in said and "after:  Audit of 48" in said
    assert "After fine-tuning" in page and "<code>7</code>" in page and "--after run" in page
    assert str(tmp_path) not in page and str(drawn) not in page
    assert run(*words, "--after", tmp_path / "run/model.safetensors", "--out", tmp_path / "both.json") == 0
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["run"] == {"steps": 7} and both["after"]["record"]["sha256"] != both["record"]["sha256"]


def test_audit_without_masks_says_what_is_missing(drawn, capsys):
    assert run("audit", drawn / "images/adversarial", *START) == 0
    said = capsys.readouterr().out
    assert "Audit of 48 pictures: cannot tell" in said and said.count("not measured: ") == 1
    assert "gap" not in said and "nan" not in said


def test_fit_refuses_a_network_without_relevance_before_it_reads_pictures(album, tmp_path, capsys):
    save_model(tmp_path / "m.safetensors", timm.create_model("twins_svt_small", num_classes=3))
    words = ("fit", album / "photos", "--model", "twins_svt_small", "--weights", tmp_path / "m.safetensors",
             "--masks", album / "masks", "--out", tmp_path / "run")
    assert run(*words) == 2 and not (tmp_path / "run").exists()
    said = capsys.readouterr()
    assert "through relevance, which twins_svt_small has not: the model is a Twins" in said.err
    assert "pictures" not in said.out


def test_objects_of_a_coco_file_are_those_of_a_folder(drawn, tmp_path, capsys):
    train, objects, file = drawn / "images/train", drawn / "objects/train", tmp_path / "coco.json"
    folder = scan(train, objects=objects)
    code = lambda s: {"size": [64, 64], "counts": encode_mask(np.asarray(Image.open(s.object)) > 0)}
    numbered = list(enumerate(folder.samples))
    write_json(file, {
        "images": [{"id": k, "file_name": s.path.name, "height": 64, "width": 64} for k, s in numbered],
        "categories": [{"id": k, "name": name.title()} for k, name in enumerate(folder.classes)],
        "annotations": [{"id": k, "image_id": k, "category_id": s.label, "segmentation": code(s)}
                        for k, s in numbered]})
    written, said = {}, {}
    for given in (objects, file):
        out = tmp_path / given.stem
        fit = ("--masks", drawn / "masks/train", "--method", "cft+", "--epochs", 1, "--out", out / "run")
        for words in (("audit", train, "--out", out / "a.json"), ("evaluate", train, "--out", out / "t.csv"),
                      ("fit", train, *fit)):
            assert run(*words, *START, "--objects", given) == 0
        written[given] = [(out / "t.csv").read_text(), json.loads((out / "a.json").read_text())["numbers"],
                          (out / "run/model.safetensors").read_bytes()[-10_000:]]
        said[given] = capsys.readouterr().out
    assert written[file] == written[objects] and "mean_iou" in written[file][0]
    assert said[file].count("coco.json, 18 of 18 annotations of 18 pictures, those of the picture's class") == 3
    assert len(list((tmp_path / "coco/run/objects").rglob("*.png"))) == 18 and "coco.json" not in said[objects]
    file.write_text("[]")
    for command in (("audit",), ("evaluate",), ("fit", "--masks", drawn / "masks/train", "--out", tmp_path / "r")):
        assert run(command[0], train, *command[1:], *START, "--objects", file) == 2
        assert "coco.json is no COCO file with the instances in" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_audit_on_found_objects(drawn, tmp_path, capsys):
    train, concepts, store = drawn / "images/train", tmp_path / "c.json", tmp_path / "store"
    assert run("concepts", train, *RECORDED, "--replay", "--out", concepts) == 0
    assert run("masks", train, "--concepts", concepts, "--out", store, *TOY, "--per-class", 4) == 0
    capsys.readouterr()
    assert run("audit", train, *START, "--objects", store, "--out", tmp_path / "a.json") == 0
    said = capsys.readouterr().out
    assert "objects  of 12 of 18 pictures" in said and "Audit of 12 pictures" in said
    content = json.loads((tmp_path / "a.json").read_text())
    assert "found by the name of the class, by toy" in content["record"]["objects"]
    assert "gap" in {row["metric"] for row in content["numbers"]}
    assert run("audit", drawn / "images/adversarial", *START, "--objects", store) == 0, "some have the same names"
    assert "objects  of 9 of 48 pictures" in capsys.readouterr().out
    shutil.copytree(drawn / "images/adversarial/turtle", tmp_path / "others/turtle")
    assert run("audit", tmp_path / "others", *START, "--objects", store) == 2
    assert "none of the pictures in" in capsys.readouterr().err


@pytest.mark.parametrize("words, expected", [
    (("--out", "report.pdf"), "must end with .html or .json"),
    (("--after", "nothing.pth"), "no checkpoint at nothing.pth"),
    (("--objects", "nowhere"), "no object masks at nowhere")])
def test_audit_mistakes(drawn, tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    assert run("audit", drawn / "images/train", *START, *words) == 2
    assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_published_sets_on_miniatures(tmp_path, capsys, monkeypatch):
    root = miniature("in-a", tmp_path / "sets")
    files = [tmp_path / "a.safetensors", tmp_path / "tuned/model.safetensors"]
    for file in files:
        save_model(file, timm.create_model(VIT, num_classes=1000))
    weights = [word for file in files for word in ("--weights", file)]
    words = ("evaluate", root, "--sets", "in-a", "--model", VIT, *weights, "--out", tmp_path / "out", "--threads", 1)
    assert run(*words) == 2 and "expected 7,500 pictures" in capsys.readouterr().err
    monkeypatch.setattr("cft.data.testsets.open_set", partial(open_set, check_counts=False))
    n = len(open_set("in-a", root, check_counts=False))
    assert run(*words, "--dry-run") == 0 and f"{2 * n} on in-a" in capsys.readouterr().out
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "top1" in said and re.search(r"^a ", said, re.M) and re.search(r"^tuned ", said, re.M)
    stamps = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("pictures/**/*.parquet")}
    made = stamps()
    assert len(made) == 2 and run(*words) == 0 and stamps() == made
    assert run("evaluate", root, "--sets", "in-a,in-r", "--model", VIT, *weights, "--out", tmp_path / "r") == 2
    assert "one name for each folder" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_plans_are_told_without_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("reproduce", "--profile", "smoke", "--only", "table1,demo", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line][:4] == ["artefact", "table1", "demo", "together"]
    assert run("reproduce", "--only", "table99", "--dry-run") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_of_one_seed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cft.reproduce.settings.read_settings", lambda name, **more: read_settings(
        "smoke" if name == "demo" else name, **more))  # few pictures
    monkeypatch.setattr("cft.apps.batch.QUICK", ("original", "plain", "cft", "cft+", "cft+.no-align"))  # … and methods
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--seeds", 1, "--out", "demo") == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert read_settings(tmp_path / "demo/settings.yaml").test_per_class == 3
    rows = {line.split("  ")[0] for line in said.splitlines()}
    assert {"Original", "plain fine-tuning", "CFT", "CFT+", "CFT+ without alignment"} <= rows
    assert "GradMask" not in said and "no claim is judged" in said
    assert (tmp_path / "demo/pages/demo.ipynb").is_file() and list((tmp_path / "demo/artefacts/demo").glob("*.csv"))
    assert run("demo", "--seeds", 1, "--out", "demo") == 0
    assert capsys.readouterr().out == said, "what is there is not made again"


def test_the_commands_of_the_readme_parse():
    root = Path(__file__).parents[2]
    text = "".join((root / name).read_text(encoding="utf-8") for name in ("README.md", "figures/README.md"))
    start = re.search(r'MODEL="(.*)"', text)[1].split()
    lines = [line.split("#")[0].split()[1:] for line in text.splitlines() if line.startswith("cft ")]
    told = re.findall("`cft ([^`…]+)`", text)
    assert len(lines) >= 9 and len(told) >= 15
    for name, *words in [*lines, *map(str.split, told)]:
        given = [w for word in words for w in (start if word == "$MODEL" else [word])]
        assert COMMANDS[name].make_context(name, given).params
