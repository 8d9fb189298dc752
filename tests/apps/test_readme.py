"""The commands of the README, in their order, on a biased model: the gap between own and foreign backgrounds falls."""
import json
import re
import shlex
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from grounding_models import small_weights
from safetensors.torch import load_file

from cft.apps.cli import main
from cft.concepts import grounding
from cft.concepts.language import ANSWERS
from cft.data import backdrop
from cft.data.folders import scan
from cft.data.models import TINY, base_model, load_model
from cft.evaluate.audit import audit
from cft.files import ASSETS, read_json

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", TEXT.partition("## Use it")[2].partition("## Reproduce")[0], re.S)
NEEDED = {  # what stands for a person, a key and a detector, and what shortens
    "audit": ["--threads", "1"],
    "repair": ["--yes", "--methods", "swap-consistent,swap-head", "--threads", "1"],
    "concepts": ["--record", ANSWERS, "--model", "cft-recorded", "--replay", "--spelling"],
    "masks": ["--grounder", "toy", "--threads", "1"], "fit": ["--epochs", "6", "--threads", "1"]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the README has it; pictures that no command sees, to measure on."""
    backdrop.write(tmp_path / "w", {"train": 9}, seed=11)
    backdrop.write(tmp_path / "fresh", {"val": 12}, seed=12)
    shutil.copy(ASSETS / "base_3.safetensors", tmp_path / "YOURS.safetensors")
    (tmp_path / "w/images/train").rename(tmp_path / "PICTURES")
    (tmp_path / "w/objects/train").rename(tmp_path / "OBJECTS")
    (tmp_path / "fresh/images/val").rename(tmp_path / "TEST_PICTURES")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(block):
    """Run the commands of a block; only the network's name is another one."""
    for line in block.replace("vit_base_patch16_224", TINY).splitlines():
        words = shlex.split(line.partition("#")[0])
        if words[:1] == ["cft"]:
            start = shlex.split(re.search(r'MODEL="(.*)"', TEXT)[1].replace("vit_base_patch16_224", TINY))
            words = [w for word in words[1:] for w in (start if word == "$MODEL" else [word])]
            with pytest.raises(SystemExit) as end:
                main([*words, *map(str, NEEDED.get(words[0], []))])
            assert end.value.code == 0, line


def gap(place, model):
    """Own minus foreign backgrounds, in points, on the fresh pictures with their true objects."""
    folder = scan(place / "TEST_PICTURES", None, place / "fresh/objects/val", list(backdrop.CLASSES))
    numbers = audit(model, folder, progress=False).numbers
    return numbers[(numbers["split"] == "all") & (numbers["metric"] == "gap")]["value"].item()


@pytest.mark.slow
def test_the_one_command(place):
    follow(BLOCKS[0])
    told = json.loads((place / "repaired/repair.json").read_text())
    assert told["repaired"] and {p.name for p in (place / "repaired").iterdir()} > {"report.html", "timm", "trials.csv"}
    repaired, _ = load_model(TINY, place / "repaired/model.safetensors")
    assert gap(place, repaired) < gap(place, base_model(3)) - 5


@pytest.mark.slow
def test_step_by_step(place):
    follow(BLOCKS[1])
    repaired, _ = load_model(TINY, place / "run/model.safetensors")
    assert gap(place, repaired) < gap(place, base_model(3)) - 5
    assert "the sky" not in {c["text"] for c in json.loads((place / "kept.json").read_text())["concepts"]}
    assert (place / "exported/config.json").is_file() and (place / "exported/model.onnx").is_file()


@pytest.fixture
def language_model(monkeypatch, no_proxy):
    """A server on this machine that says the same of every class, its places too; what it was asked is in `seen`."""
    class Handler(BaseHTTPRequestHandler):
        seen = []

        def log_message(self, *_):
            pass

        def do_POST(self):
            self.seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            parts = ["wings", "a tail", "round eye", "legs", "fins", "the sky", "water", "wheels", "windows", "petals"]
            said = json.dumps({"items": parts})
            data = json.dumps({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02, ), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler.seen
    server.shutdown()


@pytest.mark.slow
def test_the_whole_road_by_a_language_model_and_a_grounder(place, language_model, capsys, monkeypatch):
    """Concepts are asked for, found, validated and repaired by; the sky is found in every picture, and dropped."""
    monkeypatch.setattr("cft.apps.repair.SHARES", (1.0, ))
    url, seen = language_model
    follow(f"cft repair PICTURES $MODEL --ask m --base-url {url} --grounder toy --out road")
    said = capsys.readouterr().out
    assert seen and "found by toy, unchecked" in said and re.search("^(R|Not r)epaired: ", said, re.M)
    told = json.loads((place / "road/repair.json").read_text())
    assert told["pictures"]["train"] >= 12 and (place / "road/answers.jsonl").is_file()
    asked = len(seen)
    follow(f"cft repair PICTURES $MODEL --ask m --base-url {url} --grounder toy --out road")
    assert len(seen) == asked, "answers and masks are there"
    with pytest.raises(SystemExit, match="2"):
        main(["repair", "PICTURES", "--model", TINY, "--weights", "YOURS.safetensors", "--ask", "m", "--base-url", url,
              "--grounder", "self", "--yes", "--out", "other"])
    assert "knows no words; give --grounder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_road_by_real_networks(place, language_model, capsys, monkeypatch):
    """GroundingDINO and SAM, small and with random weights, loaded from files by name: what they find means nothing,
    so that no model may come of it unless it proves better."""
    monkeypatch.setattr("cft.apps.repair.SHARES", (1.0, ))
    for picture in (place / "PICTURES").rglob("*_[78]*"):
        picture.unlink()
    (place / "weights").mkdir()
    small_weights(place / "weights", monkeypatch)
    monkeypatch.setenv("CFT_WEIGHTS", "weights")
    few = grounding.detector_input
    monkeypatch.setattr(grounding, "detector_input", lambda image, *_: few(image, 64, 128))
    url, seen = language_model
    name = "groundingdino-swint+sam-vit-b"
    follow(f"cft repair PICTURES $MODEL --ask m --base-url {url} --grounder {name} --out road")
    assert seen and f"masks by {name}" in capsys.readouterr().out
    provenance, told = read_json(place / "road/store/store.json"), read_json(place / "road/repair.json")
    assert provenance["grounder"] == name and len(provenance["settings"]["weights"]) >= 3
    assert not told["repaired"] and (place / "road/report.html").is_file()
    kept, given = (load_file(place / file) for file in ("road/model.safetensors", "YOURS.safetensors"))
    assert kept.keys() == given.keys() and all(torch.equal(kept[key], given[key]) for key in given)
