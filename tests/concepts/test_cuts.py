"""Cuts: the equation, planted groups, one mask for every phrase, and what cannot cut."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make
from torch import nn

from cft.concepts.cuts import Remover, SelfCut, largest_part, normalised_cut, patch_keys


def test_the_cut_solves_the_symmetric_problem():
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features, dim=-1).double().numpy()
    alike = np.maximum(unit @ unit.T, 1e-5)
    root = np.diag(alike.sum(1)**-0.5)
    values, vectors = np.linalg.eigh(root @ (np.diag(alike.sum(1)) - alike) @ root)
    y = root @ vectors[:, 1]
    ours = normalised_cut(features)
    expected = (y - y.mean()) / np.linalg.norm(y - y.mean())
    assert np.allclose(abs(ours @ expected), np.linalg.norm(ours)) and ours[np.abs(ours).argmax()] > 0


def test_a_planted_group_is_found_and_the_smaller_one_is_the_object():
    rng = torch.Generator().manual_seed(1)
    groups = torch.zeros(64, 8)
    groups[:, 0] = 1
    groups[18:27] = torch.eye(8)[1]
    y = normalised_cut(groups + 0.05 * torch.randn(64, 8, generator=rng))
    assert sorted(np.flatnonzero(y > 0)) == list(range(18, 27))


def test_the_largest_part():
    mask = np.zeros((6, 6), bool)
    assert not largest_part(mask).any()
    mask[0, 0] = mask[3:5, 3:5] = True
    assert largest_part(mask).sum() == 4 and not largest_part(mask)[0, 0]


def test_one_mask_for_every_phrase_at_the_pictures_size():
    cut = SelfCut(make(dtype=torch.float32))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8))
    one, other = cut(image, ["Bird", "a long beak"])
    assert one.mask.shape == (40, 70) and one.mask.any() and torch.equal(one.mask, other.mask)
    assert (one.phrase, other.phrase) == ("bird", "a long beak") and len(one.boxes) == 1
    assert set(cut.settings()) == {"weights", "size", "features"}


def test_keys_have_length_one_in_every_block():
    model = make(dtype=torch.float32)
    keys = patch_keys(model, torch.zeros(2, 3, *model.patch_embed.img_size))
    parts = keys.chunk(len(model.blocks), -1)
    assert all(torch.allclose(part.norm(dim=-1), torch.ones(())) for part in parts)


def test_what_cannot_cut():
    with pytest.raises(ValueError, match="Sequential cannot cut pictures: expected a vision transformer"):
        patch_keys(nn.Sequential(nn.Conv2d(3, 1, 1)), torch.zeros(1, 3, 8, 8))


def test_a_remover_without_weights_or_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no weights at .*u2net.onnx; fetch https.* 176 MB"):
        Remover(weights=tmp_path)
    (tmp_path / "u2net.onnx").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(ImportError, match=r"pip install 'cft\[cut\]'"):
        Remover(weights=tmp_path)


def test_a_remover_speaks_rembgs_language(tmp_path, monkeypatch):
    """rembg 2.0's new_session and remove, without its network."""
    def remove(image, session, only_mask):
        assert session == "session of u2net" and only_mask and image.mode == "RGB"
        shade = np.zeros((image.height, image.width), np.uint8)
        shade[2:5, 3:9], shade[0, 0] = 200, 255
        return Image.fromarray(shade)

    (tmp_path / "u2net.onnx").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "rembg",
                        SimpleNamespace(new_session=lambda name: f"session of {name}", remove=remove))
    found, = Remover(weights=tmp_path)(Image.new("L", (12, 8)), ["fish"])
    assert found.boxes.tolist() == [[3, 2, 8, 4]] and found.mask.sum() == 18
