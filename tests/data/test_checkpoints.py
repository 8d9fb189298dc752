"""Weights as others save them: wrappings, names, averages, sizes and pre-processing; and what is no checkpoint."""
import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cft.data.checkpoints import Origin, choose_state, class_list, origin_of, read_checkpoint, sound_config
from cft.data.folders import Preprocess, scan
from cft.data.models import TINY, base_model, fit_probe, inputs_of, load_model, output_names, save_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=3).eval()

@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()

def named(state, prefix):
    return {prefix + key: value for key, value in state.items()}

KINDS = {
    "DataParallel": lambda s: named(s, "module."), "compiled": lambda s: named(s, "_orig_mod."),
    "compiled DataParallel": lambda s: named(s, "_orig_mod.module."),
    "Lightning": lambda s: {"state_dict": named(s, "model."), "pytorch-lightning_version": "2.5", "epoch": 1},
    "net": lambda s: {"state_dict": named(s, "net."), "hyper_parameters": {}},
    "arguments": lambda s: {"model": s, "optimizer": {}, "args": argparse.Namespace(lr=0.1)},
    "the PyTorch tutorial": lambda s: {"model_state_dict": s, "loss": np.float64(0.3), "epoch": np.int64(3)},
    "arrays beside": lambda s: {"state_dict": s, "history": np.arange(4.0)},
    "a counter among them": lambda s: {**s, "epoch": 3},
    "nested": lambda s: {"model": {"state_dict": named(s, "module.")}}, "plain": lambda s: dict(s)}

@pytest.mark.parametrize("kind", KINDS)
def test_wrappings(kind, state, tmp_path):
    torch.save(KINDS[kind](state), tmp_path / "x.pth")
    found = load_model(TINY, tmp_path / "x.pth")[0].state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)

@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")])
def test_the_average_is_taken_and_said(names, state, tmp_path):
    torch.save({names[0]: state, names[1]: {k: v + 1 for k, v in state.items()}, "epoch": 1}, tmp_path / "x.pth")
    for average, word in ((True, "moving average"), (False, "the raw weights")):
        found, _ = load_model(TINY, tmp_path / "x.pth", average=average)
        assert torch.equal(found.head.bias, state["head.bias"] + average) and word in origin_of(found).weights
    assert "--raw" in read_checkpoint(tmp_path / "x.pth").weights
    torch.save({names[1]: state}, tmp_path / "y.pth")
    assert "--raw" not in read_checkpoint(tmp_path / "y.pth").weights

STRANGE = {
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of Git LFS"),
    "page.safetensors": (b"<!DOCTYPE html><html><title>Sign in</title>", "web page"),
    "page.pth": (b"\n  <html><body>", "web page"), "empty.pth": (b"", "is empty"), "x.onnx": (b"\x08\x07", "ONNX"),
    "x.h5": (b"\x89HDF\r\n", "HDF5"), "x.gguf": (b"GGUF\3", "GGUF"), "x.npz": (b"PK\3\4" + b"0" * 60,
                                                                               "archive of NumPy"),
    "torn.safetensors": (b"\x10\0\0\0\0\0\0\0{}", "does not read as tensors"), "junk.pth": (b"junk" * 99,
                                                                                            "does not read")}

@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_checkpoint_is_called_by_its_name(name, tmp_path):
    content, words = STRANGE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_model(TINY, tmp_path / name)
    assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1

class Evil:
    def __reduce__(self):
        return open, ("/tmp/cft-evil", "w")

def test_code_is_never_run_and_its_class_is_named(model, state, tmp_path):
    for content, words in ((model, "holds objects of timm"), ({"state_dict": state,
                                                               "x": Evil()}, "holds objects of _?io.open"),
                           (list(state), "holds a list"), ({"epoch": 3}, "holds no tensors by name, but epoch")):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=words):
            read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="a whole model"):
        choose_state(model)

@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not finite"), (float("inf"), "not finite"),
                                              (1j, "complex")])
def test_numbers_that_cannot_be_weights(value, words, state, tmp_path):
    torch.save(state | {"head.bias": torch.full((3,), value)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"{words}.*head.bias"):
        read_checkpoint(tmp_path / "x.pth")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}

@pytest.fixture
def small(monkeypatch):
    """timm knows a small network, `vit_small_of_tests`."""
    from timm.models import _registry
    from timm.models.vision_transformer import VisionTransformer

    def vit_small_of_tests(pretrained=False, num_classes=3, **more):
        known = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
        return VisionTransformer(**SMALL | {k: v for k, v in more.items() if k not in known}
                                 | {"num_classes": num_classes or 0})

    monkeypatch.setitem(_registry._model_entrypoints, "vit_small_of_tests", vit_small_of_tests)
    return "vit_small_of_tests"

def test_hugging_face_and_torchvision_give_their_own_answers(small, tmp_path):
    transformers, torchvision = pytest.importorskip("transformers"), pytest.importorskip("torchvision")
    pictures = torch.randn(2, 3, 32, 32)
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                                    image_size=32, patch_size=8, layer_norm_eps=1e-6,
                                    id2label={0: "ant", 1: "bee", 2: "cat"}, label2id={"ant": 0, "bee": 1, "cat": 2})
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/preprocessor_config.json").write_text(
        json.dumps({
            "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.4, 0.4], "size": {"height": 32, "width": 32},
            "resample": 2}))
    for place in (tmp_path / "hf", tmp_path / "hf/model.safetensors"):
        ours, classes = load_model(small, place)
        assert torch.allclose(ours(pictures), theirs(pictures).logits, atol=1e-5)
        assert classes == ["ant", "bee", "cat"] and "Hugging Face" in origin_of(ours).weights
        assert Preprocess.of(ours).mean == (0.1, 0.2, 0.3) and Preprocess.of(ours).interpolation == "bilinear"
        assert "from config.json" in origin_of(ours).preprocess
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 256, num_classes=3).eval()
    torch.nn.init.normal_(theirs.heads.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours, classes = load_model(small, tmp_path / "tv.pth")
    assert torch.allclose(ours(pictures), theirs(pictures), atol=1e-5) and classes is None

@pytest.mark.parametrize("made", [{"img_size": 48}, {"global_pool": "avg"}, {"reg_tokens": 4}, {"init_values": 0.1}])
def test_a_network_is_built_like_its_checkpoint(made, small, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(small, **made).eval()
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    ours, _ = load_model(small, tmp_path / "x.pth")
    side = made.get("img_size", 32)
    pictures = torch.randn(2, 3, side, side)
    assert torch.equal(ours(pictures), theirs(pictures)) and Preprocess.of(ours).size == (side, side)

def test_a_network_of_one_channel_is_refused_since_pictures_have_three(small, tmp_path):
    torch.save(timm.create_model(small, in_chans=1).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"does not fit .* \(64, 3, 8, 8\) ≠ \(64, 1, 8, 8\)"):
        load_model(small, tmp_path / "x.pth")

def test_positions_are_resampled_where_another_size_is_asked_for(small, tmp_path):
    save_model(tmp_path / "x.safetensors", timm.create_model(small, img_size=48))
    found, _ = load_model(small, tmp_path / "x.safetensors", img_size=32)
    assert Preprocess.of(found).size == (32, 32) and "resampled to 4 × 4" in origin_of(found).weights

@pytest.mark.parametrize(("change", "words"), [
    (lambda s: {k: v for k, v in s.items() if not k.startswith("head")}, "is a backbone.*fit_probe"),
    (lambda s: {f"odd.{k}": v for k, v in s.items()}, "none of the names of"),
    (lambda s: s | {"head_dist.weight": torch.zeros(3, 96)}, "distilled DeiT"),
    (lambda s: s | {"blocks.0.norm1.weight": torch.zeros(5)},
     r"1 tensors differ .* blocks.0.norm1.weight \(96,\) ≠ \(5,\)")])
def test_what_does_not_fit_is_refused_for_what_it_is(change, words, state, tmp_path):
    torch.save(change(dict(state)), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words):
        load_model(TINY, tmp_path / "x.pth")

def test_pre_processing_comes_from_the_command_the_file_or_its_neighbour(model, tmp_path):
    save_model(tmp_path / "x.safetensors", model, ["a", "b", "c"])
    assert "as timm has it" in origin_of(load_model(TINY, tmp_path / "x.safetensors")[0]).preprocess
    beside = {
        "architecture": TINY, "pretrained_cfg": {"mean": [0.1, 0.1, 0.1], "std": [0.2, 0.2, 0.2], "crop_pct": 0.9}}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    found, _ = load_model(TINY, tmp_path / "x.safetensors")
    assert Preprocess.of(found).mean == (0.1,) * 3 and Preprocess.of(found).crop == 0.9
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run/model.safetensors", found)  # what is trained on carries it along
    again, _ = load_model(TINY, tmp_path / "run")
    assert Preprocess.of(again) == Preprocess.of(found) and "from the checkpoint" in origin_of(again).preprocess
    given, _ = load_model(TINY, tmp_path / "run", config={"mean": (0.3,) * 3})
    assert Preprocess.of(given).mean == (0.3,) * 3 and "mean as given" in origin_of(given).preprocess
    (tmp_path / "config.json").write_text('{"architecture": "x", "pretrained_cfg": {"mean": "none"}}')
    with pytest.raises(ValueError, match="config.json has mean 'none'; expected 3 numbers"):
        load_model(TINY, tmp_path / "x.safetensors")

@pytest.mark.parametrize(
    "bad",
    [{"std": [0, 1, 1]}, {"mean": [1, 2]}, {"crop_pct": 7}, {"interpolation": "magic"}, {"mean": [float("nan")] * 3}])
def test_settings_that_cannot_be(bad):
    with pytest.raises(ValueError, match="a file has"):
        sound_config(bad, "a file")

@pytest.mark.parametrize("bad", [["a", "a"], "abc", [1, 2], ["a", " "], {"a": 1}])
def test_class_names_that_cannot_be(bad, model, tmp_path):
    with pytest.raises(ValueError, match="x has|x names"):
        class_list(bad, "x")
    save_model(tmp_path / "x.safetensors", model, ["a", "b", "c"])
    content = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    header["__metadata__"]["classes"] = json.dumps(bad)
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size:])
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        load_model(TINY, tmp_path / "x.safetensors")

def album(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(root / name / "0.png")
    return root

def test_where_class_names_come_from_is_noted(model, tmp_path):
    root = album(tmp_path / "photos", ("ant", "bee", "cat"))
    assert origin_of(model) == Origin()
    assert output_names(model, root) == ["ant", "bee", "cat"] and origin_of(model).guessed
    assert "the folders of" in origin_of(model).classes
    output_names(model, root, ["cat", "bee", "ant"])
    assert origin_of(model).classes == "the checkpoint" and not origin_of(model).guessed
    (tmp_path / "names.txt").write_text("\ufeffcat\nbee\n\nant\n", encoding="utf-8")
    assert output_names(model, root, None, tmp_path / "names.txt") == ["cat", "bee", "ant"]
    told = inputs_of(model, scan(root))
    assert set(told) == {"model", "data", "masks"} and "names.txt" in told["model"] and "3 pictures" in told["data"]

@pytest.mark.parametrize(("text", "words"), [("ant\nant\nbee", "'ant' twice"), ("ant\n..\nbee", "a class '..'"),
                                             ("a/b\nc\nd", "a class 'a/b'"), ("", "no list of texts")])
def test_class_lists_that_cannot_be(text, words, model, tmp_path):
    root = album(tmp_path / "photos", ("ant", "bee", "cat"))
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=f"names.txt.*{words}"):
        output_names(model, root, None, tmp_path / "names.txt")
    (tmp_path / "latin.txt").write_bytes("Straße\nb\nc".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is no text in UTF-8"):
        output_names(model, root, None, tmp_path / "latin.txt")

def test_folders_of_wordnet_ids_have_imagenets_order(tmp_path):
    root, thousand = album(tmp_path / "photos", ("n01443537", "n01440764")), timm.create_model(TINY, num_classes=1000)
    names = output_names(thousand, root)
    assert names[:2] == ["n01440764", "n01443537"] and len(names) == 1000 and not origin_of(thousand).guessed

def test_a_head_for_a_backbone(tmp_path):
    """The base's own features tell drawn classes apart; its head is thrown away and found again."""
    from cft.data import backdrop

    backdrop.write(tmp_path / "w", {"train": 10}, seed=3)
    folder = scan(tmp_path / "w/images/train")
    base = base_model(0)
    torch.save({k: v for k, v in base.state_dict().items() if not k.startswith("head.")}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="is a backbone"):
        load_model(TINY, tmp_path / "backbone.pth")
    held = fit_probe(TINY, tmp_path / "backbone.pth", folder, tmp_path / "start.safetensors")
    found, classes = load_model(TINY, tmp_path / "start.safetensors")
    assert held > 70 and tuple(classes) == folder.classes and found.num_classes == 12
    same = {k for k, v in found.state_dict().items() if torch.equal(v, base.state_dict()[k])}
    assert same == {k for k in base.state_dict() if not k.startswith("head.")}
