"""What leaves the package is the model, or it does not leave."""
import base64
import copy
import json
import logging
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import onnxruntime
import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from cft.apps import export as ways
from cft.apps.cli import main
from cft.data import backdrop
from cft.data.folders import Preprocess
from cft.data.models import TINY, base_model, load_model, save_model, weights_digest

VIT = "vit_tiny_patch16_224"
CLASSES = ("bird", "dog house", "café")


def small(**changes):
    torch.manual_seed(0)
    return timm.create_model(VIT, num_classes=3, depth=2, **changes).eval()


def other_size(tmp_path):
    """As `load_model` gives it: another size than the network's, and statistics of its own."""
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.8, 0.7), "crop_pct": 0.8, "interpolation": "bilinear"}
    torch.manual_seed(0)
    save_model(tmp_path / "w.safetensors", timm.create_model(VIT, num_classes=3), CLASSES)
    return load_model(VIT, tmp_path / "w.safetensors", img_size=64, config=own)[0]


MODELS = {"drawn world": lambda _: base_model(0), "another size": lambda _: small(img_size=64), "loaded": other_size,
          "drawn world, another size": lambda _: timm.create_model(TINY, img_size=96).eval(),
          "averaged tokens": lambda _: small(img_size=32, global_pool="avg", reg_tokens=2, init_values=0.1),
          "no transformer": lambda _: timm.create_model("convnext_atto", num_classes=3).eval()}


def noise(model, n):
    return torch.randn(n, 3, *Preprocess.of(model).size, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def audited():
    """A base, and a report about it as JSON holds it: before by another base, after by this one."""
    row = {"set": "val", "split": "all", "low": 31.25, "high": 40.0, "n": 77}
    numbers = lambda *values: [row | {"metric": m, "value": v} for m, v in zip(("accuracy", "gap"), values)]
    model = base_model(0)
    part = lambda model, *values, verdict: {"verdict": verdict, "numbers": numbers(*values),
                                            "record": {"sha256": weights_digest(model), "pictures": 80}}
    before = part(base_model(1), 61.5, 52.5, verdict="leans on the background")
    lone = [{"set": "val", "split": "all", "metric": "off_object", "value": 12.5, "low": None, "high": None, "n": 1}]
    after = part(model, 62.5, 12.25, verdict="leans a little")
    after["numbers"] += [*lone, row | {"metric": "accuracy", "split": "class bird", "value": 99.9}]
    return model, before | {"after": after, "change": numbers(1.0, -40.25), "run": None}


@pytest.mark.parametrize("kind", MODELS)
def test_timm_builds_the_same_model_from_the_folder_alone(kind, tmp_path):
    model = MODELS[kind](tmp_path)
    names = [f"class {k}" for k in range(model.num_classes)]
    out = ways.save_for_timm(model, tmp_path / "out", names)
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = noise(model, 2)
    assert torch.equal(again(x), model(x)) and list(again.pretrained_cfg["label_names"]) == names
    p, found = Preprocess.of(model), resolve_model_data_config(again)
    assert Preprocess.of(again) == p and tuple(found["input_size"]) == (3, *p.size)
    assert (tuple(found["mean"]), tuple(found["std"]), found["crop_pct"], found["interpolation"]) == (
        p.mean, p.std, p.crop, p.interpolation)
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == model.pretrained_cfg["architecture"] and config["num_classes"] == len(names)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert ("import cft.data.models" in card) == ("drawn" in kind) and "local-dir" in card and "Objective" not in card
    if kind in ("drawn world", "loaded", "no transformer"):  # the others have arguments that `load_model` does not take
        ours, classes = load_model(config["architecture"], out)
        assert torch.equal(ours(x), model(x)) and classes == names and Preprocess.of(ours) == p


@pytest.mark.slow
def test_the_model_itself_stays_as_it_is(tmp_path):
    model = small(img_size=32).double().train()
    model.requires_grad_(False)
    config, state = copy.deepcopy(model.pretrained_cfg), copy.deepcopy(model.state_dict())
    for way in (ways.save_for_timm, ways.to_torch_export):
        way(model, tmp_path / way.__name__)
    assert model.training and model.pretrained_cfg == config and next(model.parameters()).dtype == torch.float64
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again = timm.create_model(f"local-dir:{tmp_path / 'save_for_timm'}", pretrained=True)
    assert next(again.parameters()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("drawn world", "another size"))
def test_onnx_answers_as_the_model_does_for_any_number_of_pictures(kind, tmp_path, capfd):
    model = MODELS[kind](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = ways.to_onnx(model, tmp_path / "made.onnx")
    session = onnxruntime.InferenceSession(path)
    for n in (1, 5):
        x = noise(model, n)
        (logits,) = session.run(["logits"], {"pixels": x.numpy()})
        assert logits.shape == (n, model.num_classes)
        assert torch.allclose(torch.from_numpy(logits), model(x), atol=1e-4, rtol=0)
    assert capfd.readouterr() == ("", "") and logging.root.manager.disable == logging.NOTSET


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("drawn world", "another size"))
def test_a_program_answers_as_the_model_does_for_any_number_of_pictures(kind, tmp_path, capfd):
    model = MODELS[kind](tmp_path)
    program = torch.export.load(ways.to_torch_export(model, tmp_path / "made.pt2")).module()
    for n in (1, 5):
        assert torch.allclose(program(noise(model, n)), model(noise(model, n)), atol=1e-5)
    assert capfd.readouterr() == ("", "")


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Moody(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * (1 if x.sum() > 0 else 2)


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)[:, :3]


class NoNumber(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * float("nan")


@pytest.mark.parametrize("model", (Moody(), Fixed(), NoNumber()), ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("way", (ways.to_torch_export, ways.to_onnx), ids=lambda w: w.__name__)
def test_a_model_that_does_not_export_leaves_nothing(model, way, tmp_path, capfd):
    with pytest.raises(ValueError, match=f"made was not written; .* this {type(model).__name__}: .") as error:
        way(model, tmp_path / "made")
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()] and capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_answers_that_differ_are_refused(tmp_path, monkeypatch):
    model, load = Mean(), torch.export.load

    def off(amount):
        def reader(file):
            module = load(file).module()
            return SimpleNamespace(module=lambda: lambda x: module(x) + amount)

        monkeypatch.setattr(torch.export, "load", reader)

    off(2e-4)
    with pytest.raises(ValueError, match="logits would differ by 0.0002; expected at most 1e-4"):
        ways.to_torch_export(model, tmp_path / "made.pt2")
    assert not [*tmp_path.iterdir()]
    off(5e-5)
    assert ways.to_torch_export(model, tmp_path / "made.pt2").is_file()


def test_a_model_that_timm_would_build_otherwise_is_refused(tmp_path):
    changed = small(img_size=32)
    changed.blocks[0].mlp.act = nn.ReLU()  # which no configuration tells
    with pytest.raises(ValueError, match="out was not written; timm's layout cannot hold .*logits would differ"):
        ways.save_for_timm(changed, tmp_path / "out")
    wider = small(img_size=32)
    wider.head = nn.Linear(192, 4)
    with pytest.raises(ValueError, match="out was not written"):
        ways.save_for_timm(wider, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_an_opset_that_torch_does_not_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torch writes opset \[18\], expected 99"):
        ways.to_onnx(Mean(), tmp_path / "made.onnx", opset=99)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("module", ("onnx", "onnxscript", "onnxruntime"))
def test_a_missing_package_names_the_extra(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"ONNX needs {module}; install it with: pip install 'cft\[export\]'$"):
        ways.to_onnx(base_model(0), tmp_path / "made.onnx")
    assert not [*tmp_path.iterdir()]


def test_the_card_has_the_numbers_of_the_audit_and_no_others(audited, tmp_path):
    model, report = audited
    card = (ways.save_for_timm(model, tmp_path / "out", about=report) / "README.md").read_text(encoding="utf-8")
    assert "80 pictures says: leans on the background before, and after: leans a little." in card
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    assert table[0][1:] == ["before", "after", "change"] and {len(row) for row in table} == {4}
    shown = {row[0]: row[1:] for row in table[2:]}
    assert shown["right, as they are"] == [f"{v} [31.2, 40.0] (77)" for v in ("61.5", "62.5", "1.0")]
    assert shown["the gap between these two, in points"][1:] == ["12.2 [31.2, 40.0] (77)", "-40.2 [31.2, 40.0] (77)"]
    assert shown["relevance off the object"] == ["not measured", "12.5 (1)", "not measured"]
    assert shown["right, background of another class"] == ["not measured"] * 3 and "99.9" not in card
    alone = (ways.save_for_timm(model, tmp_path / "alone", about=report["after"]) / "README.md").read_text()
    assert "80 pictures says: leans a little." in alone and "61.5" not in alone and "| value |" in alone
    assert "audit" not in (ways.save_for_timm(model, tmp_path / "none") / "README.md").read_text()


def test_an_audit_of_other_weights_or_none_is_refused(audited, tmp_path):
    model, report = audited
    with pytest.raises(ValueError, match="the audit is of weights [0-9a-f]{64}, the model's are [0-9a-f]{64}"):
        ways.save_for_timm(base_model(1), tmp_path / "out", about=report)
    good = report["after"]
    for bad in ({"numbers": []}, {"after": 3}, good | {"numbers": 3}, good | {"numbers": [{"split": "all"}]},
                good | {"numbers": [good["numbers"][0] | {"value": "many"}]}, {"run": {"steps": 3}}):
        with pytest.raises(ValueError, match="expected the JSON that cft fit or cft audit writes"):
            ways.save_for_timm(model, tmp_path / "out", about=bad)
    assert not [*tmp_path.iterdir()]


def test_folders_of_somebody_else_are_not_replaced(tmp_path):
    model, out = base_model(0), tmp_path / "out"
    (tmp_path / "here").mkdir()
    assert ways.save_for_timm(model, tmp_path / "here"), "an empty one"
    ways.save_for_timm(model, out)
    (out / "model.onnx").write_bytes(b"of an export before")
    assert not (ways.save_for_timm(model, out, backdrop.CLASSES) / "model.onnx").exists(), "an export"
    for name, text in (("notes.txt", "mine"), ("config.json", "{}")):
        before = (out / name).read_bytes() if (out / name).exists() else None
        (out / name).write_text(text)
        with pytest.raises(ValueError, match="holds files that no export wrote"):
            ways.save_for_timm(model, out)
        assert (out / name).read_text() == text
        (out / name).write_bytes(before) if before else (out / name).unlink()
    with pytest.raises(ValueError, match="12 classes; expected as many names, got 2"):
        ways.save_for_timm(model, tmp_path / "new", ["a", "b"])
    with pytest.raises(ValueError, match="expected a model of timm, .* timm knows no Moody"):
        ways.save_for_timm(Moody(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def hub(monkeypatch):
    """What the hub was asked, in order, instead of the hub."""
    asked = []

    class Hub:
        private, error = True, None

        def __init__(self, **_):
            pass

        def create_repo(self, name, **given):
            asked.append(("create", name, given))
            if Hub.error:
                raise Hub.error
            return SimpleNamespace(repo_id=name)

        def repo_info(self, name):
            return SimpleNamespace(private=Hub.private)

        def upload_folder(self, **given):
            asked.append(("upload", given))
            return "https://hub.invalid/" + given["repo_id"]

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    Hub.asked = asked
    return Hub


def test_pushed_is_what_was_exported_and_private(hub, tmp_path):
    out = ways.save_for_timm(base_model(0), tmp_path / "out")
    assert not hub.asked
    assert ways.push(out, "me/model") == "https://hub.invalid/me/model"
    (_, name, given), (_, upload) = hub.asked
    assert name == "me/model" and given == {"private": True, "exist_ok": True} and upload["folder_path"] == str(out)
    assert {file.name for file in out.iterdir()} <= {*upload["allow_patterns"]}
    hub.private, before = False, len(hub.asked)
    with pytest.raises(ValueError, match="me/model was not uploaded: it is there and public"):
        ways.push(out, "me/model")
    assert [what for what, *_ in hub.asked[before:]] == ["create"]
    ways.push(out, "me/model", private=False)
    assert hub.asked[-1][0] == "upload"


class SmallHub(BaseHTTPRequestHandler):
    """The four questions that huggingface_hub puts to the hub, on this machine; what comes is kept."""

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kept, place = vars(self.server)["kept"], self.path.partition("?")[0]
        kept["tokens"].add(self.headers.get("Authorization"))
        said = {"id": "me/model", "_id": "0", "private": kept.get("private", True), "siblings": [], "sha": "1" * 40}
        if place == "/api/repos/create":
            kept["private"] = json.loads(body)["private"]
            said = {"url": f"http://{self.headers['Host']}/me/model"}
        elif "/preupload/" in place:
            said = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                              for file in json.loads(body)["files"]]}
        elif "/commit/" in place:
            told = [json.loads(line) for line in body.splitlines()]
            kept["files"] = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                             for line in told if line["key"] == "file"}
            said = {"commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40}
        data = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer


def test_the_real_client_uploads_the_files_as_they_are(tmp_path, monkeypatch, no_proxy):
    out = ways.save_for_timm(base_model(0), tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), SmallHub) as server:
        kept = vars(server).setdefault("kept", {"tokens": set()})
        threading.Thread(target=server.serve_forever, args=(0.02, ), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        address = ways.push(out, "me/model")
        server.shutdown()
    assert "me/model" in address and kept["private"] is True and kept["tokens"] == {"Bearer hf_secret"}
    assert kept["files"] == {file.name: file.read_bytes() for file in out.iterdir()}


def test_what_the_hub_refuses_is_one_sentence_without_the_token(hub, tmp_path):
    out = ways.save_for_timm(base_model(0), tmp_path / "out")
    hub.error = RuntimeError("401 for Bearer hf_secret\nand a page of text")
    with pytest.raises(ValueError, match=r"^me/model was not uploaded: 401 for Bearer …$") as error:
        ways.push(out, "me/model")
    assert error.value.__suppress_context__
    before = len(hub.asked)
    (out / "diary.txt").write_text("mine")
    for folder in (out, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="is not what save_for_timm wrote; nothing was sent"):
            ways.push(folder, "me/model")
    assert len(hub.asked) == before


def run(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


@pytest.fixture
def tuned(tmp_path):
    """The folder of a run, but for the training."""
    folder = tmp_path / "run"
    save_model(folder / "model.safetensors", base_model(0), backdrop.CLASSES)
    record = {"recipe": {"objective": {"name": "cft"}, "batch": 8, "seed": 3, "rate": 1e-4, "weight_decay": 0.01},
              "data": {"pictures": 9, "digest": "d" * 64, "set_aside": []}, "steps": 30, "seconds": 1.5,
              "provenance": {"cft": "0.1.0", "torch": "2", "timm": "1"}}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


@pytest.mark.slow
def test_the_command_writes_all_that_was_asked_for(tuned, audited, hub, tmp_path, capsys):
    report, out = tmp_path / "report.json", tmp_path / "out"
    report.write_text(json.dumps(audited[1]))
    words = ("export", tuned, "--model", TINY, "--out", out)
    assert run(*words, "--to", "torch,timm,onnx", "--audit", report) == 0
    said = capsys.readouterr()
    assert [line.split()[-1] for line in said.out.splitlines()] == [
        str(out), str(out / "model.onnx"), str(out / "model.pt2")] and not said.err and not hub.asked
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "leans a little" in card and "9 pictures, SHA-256 dddd" in card and "# cft_vit_tiny64, fine-tuned" in card
    again = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert again.pretrained_cfg["label_names"] == [*backdrop.CLASSES]
    assert run(*words, "--push", "me/model") == 0 and [what for what, *_ in hub.asked] == ["create", "upload"]
    assert "pushed   https://hub.invalid/me/model" in capsys.readouterr().out
    assert run(*words[:-1], tmp_path / "a.pt2", "--to", "torch") == 0 and (tmp_path / "a.pt2").is_file()


MISTAKES = {
    "an unknown way": (("--to", "keras"), "--to is of timm, onnx, torch"),
    "no way": (("--to", ","), "--to is of timm, onnx, torch"),
    "a file for two": (("--to", "timm,onnx", "--out", "x.onnx"), "--out a folder or one's file"),
    "a file for another": (("--to", "torch", "--out", "x.onnx"), "--out a folder or one's file"),
    "push without a folder": (("--to", "onnx", "--push", "me/model"), "--push with timm"),
    "no report": (("--audit", "none.json"), "no report of an audit at none.json; give another path"),
    "a report that is none": (("--audit", "run/record.json"), "expected the JSON that cft fit or cft audit writes"),
    "no checkpoint": (("nowhere",), "no checkpoint at nowhere; give another path"),
    "another network": (("--model", VIT), "does not fit vit_tiny_patch16_224"),
    "somebody's folder": (("--out", "run"), "run holds files that no export wrote"),
    "a file in the way": (("--out", "run/record.json"), "run/record.json cannot be written: it is no folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_the_command_are_one_sentence_and_leave_nothing(mistake, tuned, tmp_path, capsys, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[mistake]
    given = ["export", *([] if words[0] == "nowhere" else ["run"]), *([] if "--model" in words else ["--model", TINY]),
             *([] if "--out" in words else ["--out", "out"]), *words]
    before = sorted(tmp_path.rglob("*"))
    assert run(*given) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.count("\n") == 1 and not said.out
    assert sorted(tmp_path.rglob("*")) == before and not hub.asked


def test_a_damaged_record_is_named(tuned, tmp_path, capsys):
    (tuned / "record.json").write_text('{"steps": 30}')
    words = ("--model", TINY, "--out", tmp_path / "out")
    assert run("export", tuned, *words) == 2 and "expected the JSON that cft fit" in capsys.readouterr().err
    plain = tuned / "copied.safetensors"
    (tuned / "model.safetensors").rename(plain)
    assert run("export", plain, *words) == 0, "the record is that of the run's own file"
    assert "not recorded here" in (tmp_path / "out/README.md").read_text()
