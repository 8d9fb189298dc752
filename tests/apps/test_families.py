"""Audit, fine-tuning, repair and explorer on networks that run their own forward pass."""

from dataclasses import replace

import pytest
import torch
from small_families import make_network
from torch import nn

import cft.evaluate.audit as judge
from cft.apps import repair as room
from cft.apps.explorer import Material, first_view, scene
from cft.apps.shell import why_unexplained
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, list_folder
from cft.evaluate.audit import audit
from cft.train.loop import fine_tune
from cft.train.objectives import RECIPES

CLASSES = list(backdrop.CLASSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    world = backdrop.write(tmp_path_factory.mktemp("families") / "world", {"val": 3}, seed=5)
    masks = world / "objects/val"
    return list_folder(world / "images/val", CLASSES).with_masks(object=masks, mask=masks)


def network(name):
    model, images = make_network(name, torch.float32, len(CLASSES))
    side = images.shape[-1]
    vars(model)["pretrained_cfg"] = dict(model.pretrained_cfg) | {"input_size": (3, side, side), "crop_pct": 1.0}
    return model


@pytest.mark.parametrize("name", ["resnet", "swin", "eva02", "siglip"])
def test_the_tools_work(name, folder, tmp_path, monkeypatch):
    model = network(name)
    assert why_unexplained(model) == ""
    report = audit(model, folder, progress=False)
    assert report.method == "attnlrp" and not [w for w in report.unmeasured if "relevance" in w]
    assert report.pictures["off"].between(0, 100).all()
    images = MaskedImages(folder.only([0, 3]), Preprocess.of(model, margin=1.0), train=True, cached=True)
    recipe = replace(RECIPES["cft"], epochs=1, batch=3, rate=1e-3)
    tuned = fine_tune(model, images, recipe, progress=False)
    moved = [n for n, p in tuned.model.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(moved) > 0.8 * len([*model.parameters()])
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in tuned.model.named_buffers())
    shown = scene(material := Material(folder, tuple(CLASSES), model, tuned.model), first_view(material))
    assert shown is not None
    monkeypatch.setattr(judge, "doubt_about", lambda *_, **__: "")  # it is at chance
    monkeypatch.setattr(room, "CLEARED", "never")
    monkeypatch.setattr(room, "DECADES", (1e-3, ))
    monkeypatch.setattr(room, "RUNS", 1)
    monkeypatch.setattr(room, "SHARES", (1.0, ))
    found = room.repair(model, folder, methods=("cft", ), epochs=1, progress=False)
    assert len(found.trials) >= 1 and found.sentences()


def test_what_is_not_supported_is_told_before_any_work():
    class Own(nn.Module):
        def forward(self, x):
            return x.sin()

    model = network("swin")
    model.layers[0].blocks[0].mlp.act = Own()
    assert why_unexplained(model).startswith("layers.0.blocks.0.mlp.act is a Own: supported here: modules of torch")
