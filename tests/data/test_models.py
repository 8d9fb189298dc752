"""Loading, saving, the shipped bases and the two-stage training."""
import hashlib
import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cft.data import backdrop
from cft.data.models import (
    FINE,
    SEEDS,
    TINY,
    Layers,
    Stage,
    accuracy_on,
    base_model,
    join_dinov2,
    load_model,
    make_base,
    make_bases,
    read_weights,
    receptive_field,
    save_model,
    weights_digest,
    write_safetensors,
)
from cft.files import ASSETS, read_json, sha256


def test_stem_is_three_strided_convolutions():
    model = timm.create_model(TINY)
    tokens = model.patch_embed(torch.randn(2, 3, 64, 64))
    assert tokens.shape == (2, 64, 96)
    x = torch.randn(1, 3, 64, 64)
    far = x.clone()
    far[..., 32:] = 0  # pixels far right do not reach the leftmost tokens
    assert torch.allclose(model.patch_embed.net[0](x)[..., :10], model.patch_embed.net[0](far)[..., :10])


def test_patches_of_four_pixels(tmp_path):
    model = timm.create_model(FINE)
    stem = model.patch_embed
    assert stem(torch.randn(2, 3, 64, 64)).shape == (2, 256, 96) and stem.grid_size == (16, 16)
    loaded, _ = load_model(FINE, save_model(tmp_path / "m.safetensors", model, backdrop.CLASSES))
    assert weights_digest(loaded) == weights_digest(model)
    for bad in (6, 1):
        with pytest.raises(ValueError, match="a power of 2, got"):
            timm.create_model(TINY, patch_size=bad)


@pytest.mark.parametrize(("name", "patch", "window"), [(TINY, 8, 15), (FINE, 4, 7)])
def test_what_a_token_sees_by_its_whole_jacobian(name, patch, window):
    torch.manual_seed(0)
    stem, images = timm.create_model(name).patch_embed, torch.randn(1, 3, 64, 64)
    side = 64 // patch
    middle = side // 2 * side + side // 2
    whole = torch.autograd.functional.jacobian(lambda x: stem(x)[0, middle], images)[:, 0]  # features, 3, 64, 64
    energy, low = whole.square().sum((0, 1)), 64 // 2
    own = energy[low:low + patch, low:low + patch].sum() / energy.sum()
    window_at = slice(low + patch - window, low + patch)  # convolutions of stride 2 lean up and left
    inner = energy[window_at, window_at].sum() / energy.sum()
    model = torch.nn.Module()
    model.patch_embed = stem
    found = receptive_field(model, images, 400)
    assert (found.patch, found.window) == (patch, window)
    assert found.own == pytest.approx(own.item(), rel=0.1)
    assert found.beyond == pytest.approx(1 - inner.item(), rel=0.2) and found.beyond > 1e-5


def test_round_trip_and_timm(tmp_path):
    model = timm.create_model(TINY, num_classes=5).eval()
    path = save_model(tmp_path / "m.safetensors", model, list("abcde"))
    loaded, classes = load_model(TINY, path)
    by_timm = timm.create_model(TINY, num_classes=5, checkpoint_path=str(path)).eval()
    x = torch.randn(3, 3, 64, 64)
    assert classes == list("abcde") and torch.equal(loaded(x), model(x)) and torch.equal(by_timm(x), model(x))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"], "no draft is left"


def test_pickles_without_code_and_wrapped(tmp_path):
    model = timm.create_model(TINY, num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.pth")
    assert torch.equal(load_model(TINY, tmp_path / "m.pth")[0].head.weight, model.head.weight)
    torch.save({"state_dict": model}, tmp_path / "code.pth")  # a whole module: needs code to load
    with pytest.raises(ValueError, match="holds objects of timm.* save the weights alone"):
        read_weights(tmp_path / "code.pth")


@pytest.mark.parametrize(("make", "words"), [
    (lambda p: None, "no checkpoint at"),
    (lambda p: p.write_bytes(b""), "is empty"),
    (lambda p: p.write_bytes(b"\x10\0\0\0\0\0\0\0{}"), "does not read as tensors"),
    (lambda p: save_model(p, timm.create_model("vit_tiny_patch16_224", num_classes=3)), "does not fit"),
    (lambda p: save_model(p, _with_nan()), "not finite, first in head.bias"),
])
def test_bad_checkpoints(tmp_path, make, words):
    path = tmp_path / "m.safetensors"
    make(path)
    with pytest.raises(ValueError, match=words):
        load_model(TINY, path)


def _with_nan():
    model = timm.create_model(TINY)
    model.head.bias.data[2] = float("nan")
    return model


def test_unknown_model_and_class_count(tmp_path):
    with pytest.raises(ValueError, match="timm knows no model named 'vit_huge_patch1'"):
        load_model("vit_huge_patch1")
    path = save_model(tmp_path / "m.safetensors", timm.create_model(TINY, num_classes=3))
    with pytest.raises(ValueError, match="has 3 classes; expected 7"):
        load_model(TINY, path, num_classes=7)


@pytest.mark.parametrize("seed", SEEDS)
def test_shipped_bases_are_spurious(seed):
    record = {r["seed"]: r for r in read_json(ASSETS / "bases.json")}[seed]
    file = ASSETS / f"base_{seed}.safetensors"
    assert sha256(file) == record["sha256"] and file.stat().st_size < 1_000_000
    base = base_model(seed)
    val, adversarial = (accuracy_on(base, backdrop.render(name, 10, 4242 + seed)) for name in ("val", "adversarial"))
    assert val > 88 and adversarial < 60
    assert abs(val - record["spurious_val"]) < 8


def test_base_errors(tmp_path):
    with pytest.raises(ValueError, match="no base with seed 9"):
        base_model(9)
    (tmp_path / "bases.json").write_text('[{"seed": 0, "sha256": "0"}]')
    (tmp_path / "base_0.safetensors").write_bytes((ASSETS / "base_0.safetensors").read_bytes())
    with pytest.raises(ValueError, match="SHA-256"):
        base_model(0, tmp_path)


def test_the_bank_that_bases_are_trained_on_has_not_changed():
    layers, total = Layers(0, objects=25, scenes=3), hashlib.sha256()
    for of in (layers.objects, layers.scenes):
        total.update(of.numpy().tobytes())
    assert total.hexdigest() == "1cbe031a7d869e577e893cce2575cdaf72575e0a9e08f1de8548512570ee7fca"


def test_layers_compose_what_they_say():
    layers = Layers(0, objects=25, scenes=3)
    images, labels, scenes = layers.batch(400, 0.97, torch.Generator().manual_seed(0))
    assert images.shape == (400, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    assert 0.93 < (layers.home[labels] == scenes).double().mean() <= 1
    free = layers.batch(400, None, torch.Generator().manual_seed(0))
    assert abs((layers.home[free[1]] == free[2]).double().mean() - 1 / 8) < 0.07


@pytest.mark.slow
def test_training_is_a_function_of_the_seed(tmp_path):
    stages = Stage(3, 1e-3, None, 0.5, batch=8), Stage(2, 5e-4, 0.97, batch=8)
    before = torch.random.get_rng_state()
    a, record = make_base(3, *stages, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    folder = make_bases(tmp_path / "bases", [3], 1, *stages)
    b = base_model(3, folder)
    assert all(torch.allclose(p, q, atol=2e-3) for p, q in zip(a.parameters(), b.parameters()))  # b has been float16
    assert record["seed"] == 3 and sorted(p.name for p in folder.iterdir()) == ["base_3.safetensors", "bases.json"]
    assert read_json(folder / "bases.json") == [record | {"sha256": sha256(folder / "base_3.safetensors")}]
    assert save_model(tmp_path / "a.safetensors", a, backdrop.CLASSES, half=True).read_bytes() == (
        folder / "base_3.safetensors").read_bytes(), "a base that is made again on this machine has equal bytes"


def test_join_dinov2(tmp_path):
    model = timm.create_model("dinov2_vitb14", depth=1, embed_dim=24, num_heads=2)
    state = model.state_dict()
    backbone = {k: v for k, v in state.items() if not k.startswith("head.")} | {"mask_token": torch.zeros(1, 24)}
    backbone["pos_embed"] = torch.cat([state["pos_embed"][:, :1], torch.ones(1, 37 * 37, 24)], 1)
    torch.save(backbone, tmp_path / "backbone.pth")
    torch.save({"weight": state["head.weight"], "bias": state["head.bias"]}, tmp_path / "head.pth")
    join_dinov2(tmp_path / "backbone.pth", tmp_path / "head.pth", tmp_path / "joined.safetensors")
    loaded = load_file(tmp_path / "joined.safetensors")
    model.load_state_dict(loaded)
    assert set(loaded) == set(state) and loaded["pos_embed"].shape == (1, 257, 24)
    assert torch.allclose(loaded["pos_embed"][:, 1:], torch.ones(1, 256, 24), atol=1e-5)
    assert torch.equal(loaded["pos_embed"][:, 0], state["pos_embed"][:, 0])
    torch.save({"weight": torch.zeros(10, 24), "bias": torch.zeros(10)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="a linear layer of 48 inputs"):
        join_dinov2(tmp_path / "backbone.pth", tmp_path / "other.pth", tmp_path / "x.safetensors")


def test_equal_weights_are_equal_files(tmp_path):
    """Also for readers that know nothing of ours."""
    model = timm.create_model(TINY)
    files = [save_model(tmp_path / f"{k}.safetensors", model, backdrop.CLASSES).read_bytes() for k in range(6)]
    assert len(set(files)) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(backdrop.CLASSES)
        assert file.metadata()["architecture"] == TINY
    loaded, own = load_file(tmp_path / "0.safetensors"), model.state_dict()
    assert loaded.keys() == own.keys() and all(torch.equal(value, loaded[name]) for name, value in own.items())


def test_the_bytes_of_a_file_are_those_of_the_format(tmp_path):
    """Eight bytes of length, a header with sorted keys, the tensors: written out by hand."""
    state = {"b": torch.arange(6, dtype=torch.float16).reshape(2, 3).T, "a": torch.tensor([1.0, -2.0])}
    path = write_safetensors(tmp_path / "deep/m.safetensors", state, {"z": "1", "format": "pt"})
    header = (b'{"__metadata__":{"format":"pt","z":"1"},"a":{"data_offsets":[0,8],"dtype":"F32","shape":[2]},'
              b'"b":{"data_offsets":[8,20],"dtype":"F16","shape":[3,2]}}')
    header += b" " * (-len(header) % 8)
    tensors = state["a"].numpy().tobytes() + state["b"].contiguous().numpy().tobytes()
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + tensors


def test_a_model_from_elsewhere_can_be_saved(tmp_path):
    path = save_model(tmp_path / "m.safetensors", torch.nn.Linear(2, 3))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "architecture": ""}


def parts(content):
    """Header and tensors of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shipped_base_survives_reading_and_writing(tmp_path, seed):
    """Every bit of its numbers; its header was written before headers were sorted."""
    again = save_model(tmp_path / "again.safetensors", base_model(seed), backdrop.CLASSES, half=True)
    assert parts(again.read_bytes()) == parts((ASSETS / f"base_{seed}.safetensors").read_bytes())


def test_weights_that_modules_share_are_written_and_read(tmp_path):
    model = timm.create_model(TINY, num_classes=12)
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1
    save_model(tmp_path / "w.safetensors", model)
    read, _ = load_model(TINY, tmp_path / "w.safetensors")
    assert torch.equal(read.blocks[1].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in read.state_dict().items())
