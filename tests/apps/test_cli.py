"""The command line as its users meet it: strange folders, kills, mistakes."""
import configparser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
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

from cft.apps import cli
from cft.apps.cli import app, main
from cft.concepts.filters import ConceptSet
from cft.concepts.grounding import WEIGHTS
from cft.concepts.language import ANSWERS, Sampling
from cft.concepts.store import MaskStore
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, scan
from cft.data.models import SEEDS, TINY, save_model
from cft.data.testsets import CARDS, miniature, open_set
from cft.files import ASSETS
from cft.train.objectives import RECIPES

VIT = "vit_tiny_patch16_224"
CFT = Path(sys.executable).with_name("cft")


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
            mask[size[1] // 4: size[1] // 2, size[0] // 4: size[0] // 2] = 255
            Image.fromarray(mask).save(root / "masks" / name / f"{k}.png")
    whole = (root / "photos/zebra/0.JPG").read_bytes()
    (root / "photos/zebra/cut.jpg").write_bytes(whole[: len(whole) // 2])
    torch.manual_seed(0)
    save_model(root / "start.safetensors", timm.create_model(VIT, num_classes=3))
    return root


def run(*words):
    """The command in this process: exit code, and what was written to standard error is read by capsys."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def arguments(album, out, **changes):
    options = {"model": VIT, "weights": album / "start.safetensors", "masks": album / "masks", "out": out, "rate": 1e-4,
               "epochs": 1, "batch": 3, "threads": 1, **changes}
    return [album / "photos", *(w for k, v in options.items() if v is not None for w in (f"--{k.replace('_', '-')}", v))]


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
    assert run("evaluate", album / "photos", "--model", VIT, "--weights", path, "--objects", album / "masks", "--out",
               tmp_path / "t.csv", "--threads", 1) == 0
    table = (tmp_path / "t.csv").read_text()
    assert "top1" in table and "mean_iou" in table and "photos" in capsys.readouterr().out


def test_killed_fit_resumes_and_ends_equal(tmp_path):
    root = backdrop.write(tmp_path / "b", {"train": 4}, seed=1)
    base = ["fit", root / "images/train", "--masks", root / "masks/train", "--objects", root / "objects/train", "--model", TINY,
            "--weights", ASSETS / "base_0.safetensors", "--method", "cft+", "--rate", 1e-4, "--epochs", 6, "--threads", 1]
    command = lambda out: [str(CFT), *map(str, [*base, "--out", tmp_path / out, "--save-every", 2])]
    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "killed/state.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed/state.pt").exists() and not (tmp_path / "killed/model.safetensors").exists()
    for out in ("killed", "whole"):
        subprocess.run(command(out), check=True, capture_output=True)
    killed, whole = (load_file(tmp_path / out / "model.safetensors") for out in ("killed", "whole"))
    assert all(torch.equal(killed[k], whole[k]) for k in whole)
    record = json.loads((tmp_path / "killed/record.json").read_text(encoding="utf-8"))
    assert 0 < record["resumed_at"] < record["steps"] == 36


def _nan_image(album, tmp_path):
    shutil.copytree(album, tmp_path / "a")
    (tmp_path / "a/photos/zebra/2.JPG").unlink()
    Image.fromarray(np.full((224, 224), np.nan, np.float32)).save(tmp_path / "a/photos/zebra/2.tif")
    return arguments(tmp_path / "a", tmp_path / "run")


def _changed(change):
    def build(album, tmp_path):
        import shutil

        shutil.copytree(album, tmp_path / "a")
        change(tmp_path / "a")
        return arguments(tmp_path / "a", tmp_path / "run")

    return build


def _with(**changes):
    return lambda album, tmp_path: arguments(album, tmp_path / "run", **changes)


MISTAKES = {
    "empty class": (_changed(lambda a: (a / "photos/empty").mkdir()), "empty has no picture"),
    "mask of another size": (_changed(lambda a: Image.new("L", (9, 9)).save(a / "masks/zebra/2.png")), "9 × 9 pixels; its picture is 224 × 224"),
    "missing mask": (_changed(lambda a: (a / "masks/zebra/2.png").unlink()), "misses 1 of 9 pictures, first zebra/2.png"),
    "class count": (_changed(lambda a: save_model(a / "start.safetensors", timm.create_model(VIT, num_classes=7))), "the model has 7 classes but"),
    "NaN image": (_nan_image, "NaN or infinite pixels; expected 8- or 16-bit"),
    "corrupt checkpoint": (_changed(lambda a: (a / "start.safetensors").write_bytes(b"junk" * 99)), "cannot read"),
    "truncated checkpoint": (_changed(lambda a: (a / "start.safetensors").write_bytes((a / "start.safetensors").read_bytes()[:9999])), "cannot read"),
    "no masks": (_with(masks=None), "needs mask masks: give --masks"),
    "no object masks": (_with(method="swap"), "needs object masks: give --objects"),
    "no weights": (_with(weights=None), "give either --weights FILE or --pretrained"),
    "unknown method": (_with(method="magic"), "method must be one of plain"),
    "unknown model": (_with(model="vit_giant_patch3"), "timm knows no model named"),
    "other architecture": (_with(model="vit_small_patch16_224"), "does not fit vit_small_patch16_224"),
    "negative rate": (_with(rate=-1), "expected rate > 0"),
    "rate in words": (_with(rate="fast"), "Invalid value for '--rate'"),
    "unknown option": (_with(colours="x"), "No such option: --colours"),
    "no cuda": (_with(device="cuda"), "no CUDA device"),
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
    examples = [re.split(" {3,}", line.strip())[0].split()[1:] for line in said.splitlines() if line.startswith("  ") and line.split()[:1] == ["cft"]]
    assert examples and all(len(line) <= 120 for line in said.splitlines())
    start = ["--model", VIT, "--weights", "start.safetensors"]
    for command, *words in examples:
        given = [w for word in words for w in (start if word == "$MODEL" else [word])]
        assert COMMANDS[command].make_context(command, given, resilient_parsing=False).params
    if not name:  # in the order of use, and each command has its example
        assert list(dict.fromkeys(command for command, *_ in examples)) + ["demo", "reproduce"] == list(COMMANDS)
        assert "`cft demo`" in said and "`cft reproduce`" in said


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["fit", "--help"], ["fit", "--frobnicate"], ["fiit"],
                                   ["fit", "x", "--model", "m", "--out", "o", "--method", "magic"], ["demo", "--seeds", "one"]], ids=" ".join)
def test_what_needs_no_model_loads_none(words, tmp_path):
    code = f"import sys; from cft.apps.cli import main\ntry: main({words})\nexcept SystemExit: print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_completion_offers_commands_and_names_without_a_model(tmp_path):
    def offered(line):
        code = f"import sys; from cft.apps.cli import main\ntry: main()\nexcept SystemExit: assert not {HEAVY} & set(sys.modules)"
        environment = {**os.environ, "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_CFT_COMPLETE": "complete_bash"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True).stdout.split("\n")

    assert offered("cft va")[0] == "validate"
    assert {"cft", "cft+", "cft-paper"} <= set(offered("cft fit --method c")) and "plain" not in offered("cft fit --method c")
    assert set(offered("cft evaluate --suite si-")) >= {"si-size", "si-rotation", "si-location"}


def test_names_listed_without_imports_are_the_real_ones():
    assert cli.RECIPE_NAMES == tuple(RECIPES) and cli.SUITES == tuple(CARDS)
    assert cli.LANGUAGE_MODEL == Sampling().model and cli.DEMO_SEEDS == ",".join(map(str, SEEDS))
    detector, segmenter = cli.GROUNDERS[0].split("+")
    assert {detector, segmenter} <= set(WEIGHTS)


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(Path(__file__).parents[2] / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_every_extra_is_known_by_its_modules():
    packages = {"segment_anything": "segment-anything", "groundingdino": "groundingdino-py", "open_clip": "open-clip-torch",
                "sentence_transformers": "sentence-transformers"}
    for extra, modules in cli.EXTRAS.items():
        listed = {re.split(r"[<>=]", need)[0] for need in settings()[f"{extra}_requirements"].split()}
        assert {packages.get(module, module) for module in modules} <= listed, extra
    assert {key.removesuffix("_requirements") for key in settings() if key.endswith("_requirements")} == {*cli.EXTRAS, "dev"}


MODULES = [module for modules in cli.EXTRAS.values() for module in modules]
BLOCK = f"""
import importlib.metadata as metadata, sys
sys.modules.update(dict.fromkeys({MODULES}))  # neither importable nor found by find_spec
there = metadata.distribution
def distribution(name):  # nor known as installed
    if name.lower().replace("-", "_").removesuffix("_torch").removesuffix("_py") in {MODULES}:
        raise metadata.PackageNotFoundError(name)
    return there(name)
metadata.distribution = distribution
"""


def test_the_core_imports_without_any_extra(tmp_path):
    code = BLOCK + "import importlib, pkgutil, cft\nfor m in pkgutil.iter_modules(cft.__path__): importlib.import_module(f'cft.{m.name}')\nprint('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "fine\n", done.stderr[-2000:]


def test_a_missing_extra_is_named_with_its_install_line(tmp_path, drawn):
    train = drawn / "images/train"
    (tmp_path / "classes.csv").write_text("id,name\nbird,bird\n")
    demo = ("concepts", train, "--record", ANSWERS, "--model", "cft-recorded", "--replay", "--out", tmp_path / "c.json")
    cases = {"grounding": ("masks", train, "--concepts", tmp_path / "c.json", "--out", tmp_path / "s"),
             "llm": ("concepts", tmp_path / "classes.csv", "--yes", "--base-url", "http://127.0.0.1:9", "--out", tmp_path / "d.json")}
    assert run(*demo) == 0
    for extra, words in cases.items():
        code = BLOCK + f"from cft.apps.cli import main\nmain({[str(w) for w in words]})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        said = [line for line in done.stderr.splitlines() if line.startswith("cft:")]
        assert done.returncode == 2 and len(said) == 1 and f"pip install 'cft[{extra}]'" in said[0], done.stderr
    for extra, modules in cli.EXTRAS.items():  # whoever forgets to say it
        for module in modules:
            with pytest.raises(ImportError) as error:
                exec(f"import sys; sys.modules['{module}'] = None; import {module}", {})
            del sys.modules[module]
            assert f"pip install 'cft[{extra}]'" in str(error.value) + cli._advice(error.value)


def test_mistakes_say_what_to_do_next(capsys):
    assert run("fit", "--frobnicate") == 2 and "See: cft fit --help" in capsys.readouterr().err
    assert run("repair") == 2 and "See: cft --help" in capsys.readouterr().err
    assert "--batch" in cli._advice(torch.OutOfMemoryError("full")) and cli._is_told(torch.OutOfMemoryError("full"))


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("cft.demo.experiment.run_demo", lambda *a, **k: {}["table"])
    with pytest.raises(KeyError):
        main(["demo"])


def test_dry_runs_of_measuring_count_passes(drawn, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert run("audit", drawn / "images/adversarial", *START, "--objects", drawn / "objects/adversarial", "--out", out, "--dry-run") == 0
    assert "48 pictures: 240 forward passes and 48 relevance maps" in capsys.readouterr().out and not out.exists()
    assert run("evaluate", drawn / "images/adversarial", *START, "--dry-run") == 0 and "48 on adversarial" in capsys.readouterr().out


def test_evaluate_is_right(tmp_path, capsys):
    root = backdrop.write(tmp_path / "b", {"val": 2, "adversarial": 2}, seed=3)
    sets = [root / "images/val", root / "images/adversarial"]
    assert run("evaluate", *sets, "--model", TINY, "--weights", ASSETS / "base_1.safetensors", "--out", tmp_path / "t.csv", "--threads", 1) == 0
    import pandas as pd

    from cft.data.models import base_model

    table = pd.read_csv(tmp_path / "t.csv")
    model = base_model(1)
    for root in sets:
        data = MaskedImages(scan(root, classes=list(backdrop.CLASSES)), Preprocess.of(model))
        hits = sum(int(model(data[i]["image"][None]).argmax()) == data[i]["label"] for i in range(len(data)))
        value = table[(table["set"] == root.name) & (table["metric"] == "top1")]["value"].item()
        assert value == pytest.approx(100 * hits / len(data))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pictures of three drawn classes, and a base that knows them."""
    root = backdrop.write(tmp_path_factory.mktemp("drawn") / "w", {"train": 6, "adversarial": 4}, seed=2)
    for name in set(backdrop.CLASSES) - {"bird", "fish", "car"}:
        shutil.rmtree(root / "images/train" / name)
    return root


START = ("--model", TINY, "--weights", ASSETS / "base_0.safetensors", "--threads", 1)


def test_from_class_names_to_a_repaired_model(drawn, tmp_path, capsys):
    train, concepts = drawn / "images/train", tmp_path / "concepts.json"
    asking = ("concepts", train, "--record", ANSWERS, "--model", "cft-recorded", "--out", concepts)
    before = ANSWERS.read_bytes()
    assert run(*asking, "--dry-run") == 0 and "18 questions, 18 in the record, 0 calls" in capsys.readouterr().out and not concepts.exists()
    assert run(*asking, "--replay") == 0 and ANSWERS.read_bytes() == before
    found = ConceptSet.load(concepts)
    assert {c.id for c in found.classes} == {"bird", "fish", "car"}
    grounding = ("masks", train, "--concepts", concepts, "--out", tmp_path / "store", "--grounder", "toy", "--per-class", 5, "--threads", 1)
    capsys.readouterr()
    assert run(*grounding, "--dry-run") == 0 and "15 pictures of 3 classes" in capsys.readouterr().out and not (tmp_path / "store").exists()
    assert run(*grounding) == 0 and len(MaskStore(tmp_path / "store").pictures) == 15
    judging = ("validate", tmp_path / "store", "--concepts", concepts, "--out", tmp_path / "kept.json", "--audit", tmp_path / "audit.csv")
    capsys.readouterr()
    assert run(*judging, "--dry-run") == 0 and "15 pictures, " in capsys.readouterr().out and not (tmp_path / "kept.json").exists()
    assert run(*judging) == 0
    kept, audit = ConceptSet.load(tmp_path / "kept.json"), pd.read_csv(tmp_path / "audit.csv")
    assert 0 < len(kept.pairs()) == audit["accepted"].sum() < len(found.pairs())
    capsys.readouterr()
    tuning = ("fit", train, "--masks", tmp_path / "store", *START, "--method", "cft+", "--rate", 1e-4, "--epochs", 1, "--out", tmp_path / "run")
    assert run(*tuning) == 2 and "give --concepts FILE" in capsys.readouterr().err and not (tmp_path / "run").exists()
    tuning += ("--concepts", tmp_path / "kept.json", "--per-class", 2)
    assert run(*tuning, "--dry-run") == 0 and "time     about" in capsys.readouterr().out and not (tmp_path / "run/model.safetensors").exists()
    assert run(*tuning) == 0
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["data"]["pictures"] == 6 and load_file(tmp_path / "run/model.safetensors") and (tmp_path / "run/README.md").is_file()


def test_best_epoch_needs_other_pictures(drawn, tmp_path, capsys):
    words = ("fit", drawn / "images/train", "--masks", drawn / "masks/train", *START, "--method", "cft-official", "--epochs", 1, "--out", tmp_path / "run")
    assert run(*words) == 2 and "--validation" in capsys.readouterr().err
    assert run(*words, "--validation", drawn / "images/train", "--validation-masks", drawn / "masks/train") == 0
    assert json.loads((tmp_path / "run/record.json").read_text())["best_step"] == 3


def test_audit_says_what_it_found(drawn, tmp_path, capsys):
    words = ("audit", drawn / "images/adversarial", *START, "--objects", drawn / "objects/adversarial")
    assert run(*words, "--out", tmp_path / "audit.json") == 0
    said, content = capsys.readouterr().out, json.loads((tmp_path / "audit.json").read_text())
    assert "Audit of 48 pictures" in said and "relevance off object" in said and content["record"]["pictures"] == 48 and "after" not in content
    (tmp_path / "run").mkdir()
    shutil.copy(ASSETS / "base_1.safetensors", tmp_path / "run/model.safetensors")
    (tmp_path / "run/record.json").write_text('{"steps": 7}')
    assert run(*words, "--after", tmp_path / "run", "--out", tmp_path / "report.html") == 0
    said, page = capsys.readouterr().out, (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "before: Audit of 48" in said and "after:  Audit of 48" in said
    assert "After fine-tuning" in page and "<code>7</code>" in page and "--after run" in page and str(tmp_path) not in page and str(drawn) not in page
    assert run(*words, "--after", tmp_path / "run/model.safetensors", "--out", tmp_path / "both.json") == 0
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["run"] == {"steps": 7} and both["after"]["record"]["sha256"] != both["record"]["sha256"]


def test_audit_on_found_objects(drawn, tmp_path, capsys):
    train = drawn / "images/train"
    assert run("concepts", train, "--record", ANSWERS, "--model", "cft-recorded", "--replay", "--out", tmp_path / "c.json") == 0
    assert run("masks", train, "--concepts", tmp_path / "c.json", "--out", tmp_path / "store", "--grounder", "toy", "--per-class", 4, "--threads", 1) == 0
    capsys.readouterr()
    assert run("audit", train, *START, "--objects", tmp_path / "store", "--out", tmp_path / "a.json") == 0
    assert "Audit of 12 pictures" in capsys.readouterr().out
    content = json.loads((tmp_path / "a.json").read_text())
    assert "found by the name of the class, by toy" in content["record"]["objects"] and "gap" in {row["metric"] for row in content["numbers"]}


@pytest.mark.parametrize("words, expected", [(("--out", "report.pdf"), "must end with .html or .json"), (("--after", "nothing.pth"), "no checkpoint at nothing.pth"),
                                             (("--objects", "nowhere"), "object mask folder nowhere misses")])
def test_audit_mistakes(drawn, tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    assert run("audit", drawn / "images/train", *START, *words) == 2
    assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_suite_on_miniatures(tmp_path, capsys, monkeypatch):
    root = miniature("in-a", tmp_path / "sets")
    save_model(tmp_path / "a.safetensors", timm.create_model(VIT, num_classes=1000))
    words = ("evaluate", root, "--suite", "in-a", "--model", VIT, "--weights", tmp_path / "a.safetensors", "--out", tmp_path / "results", "--threads", 1)
    assert run(*words) == 2 and "7,500" in capsys.readouterr().err.replace("7500", "7,500")  # the real set has as many pictures
    monkeypatch.setattr("cft.data.testsets.open_set", partial(open_set, check_counts=False))
    assert run(*words) == 0 and "top1" in capsys.readouterr().out
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").rglob("pictures/**/*.parquet")}
    assert stamps and run(*words) == 0 and stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "results").rglob("pictures/**/*.parquet")}
    assert run("evaluate", root, "--suite", "in-a,in-r", "--model", VIT, "--weights", tmp_path / "a.safetensors", "--out", tmp_path / "r") == 2
