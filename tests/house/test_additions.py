"""What CONTRIBUTING.md says of a rule, a method, a grounder and a test set of one's own, followed to the letter."""
import json
import shutil
import zipfile
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cft import RECIPES, MaskStore, build_masks, load_model, relevance, save_model, validate
from cft.apps.cli import main
from cft.apps.shell import CHOICES
from cft.concepts.filters import demo_concepts
from cft.concepts.grounding import Grounding
from cft.data import backdrop
from cft.data.folders import list_folder
from cft.data.models import TINY, base_model
from cft.data.testsets import CARDS, EvalSet, folder_set, open_set, read_cards
from cft.evaluate.passes import checkpoint, evaluate_sets, headline
from cft.explain.rules import GATES, Tape, UnsupportedModule, chain, linear
from cft.files import ASSETS
from cft.reproduce.settings import read_settings
from cft.reproduce.variants import recipe_of, shown_to
from cft.train.objectives import Recipe

CLASSES = list(backdrop.CLASSES)


def run(*words):
    """The command line in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return backdrop.write(tmp_path_factory.mktemp("world") / "w", {"train": 2, "val": 2}, seed=7)


# -- a relevance rule --------------------------------------------------------------------------------------------------


class Squared(nn.Module):
    """An activation that nobody has told relevance of."""

    def forward(self, x):
        return x.relu().square()


class Scaled(nn.Module):
    """A layer y = a ⊙ x + b."""

    def __init__(self, features):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(features)), nn.Parameter(torch.randn(features))

    def forward(self, x):
        return self.a * x + self.b


def scaled(module, x, tape):
    """The rule of `Scaled`: relevance goes through a, and b absorbs the rest."""

    def pullback(g):
        tape.absorb("scaled_bias", g, module.b)
        return g * module.a

    return module(x), pullback


def test_a_gate_for_an_activation_of_ones_own(monkeypatch):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**sizes, act_layer=Squared).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(UnsupportedModule, match=r"blocks\.\d\.mlp\.act is a Squared"):
        relevance(model, images)
    monkeypatch.setitem(GATES, Squared, torch.relu)  # act(h) / h
    for differentiable in (False, True):
        found = relevance(model, images, with_ledger=True, differentiable=differentiable)
        logit = found.logits.gather(1, found.target[:, None])[:, 0]
        torch.testing.assert_close(found.tokens.sum(1) + sum(found.ledger.values()), logit)


def test_a_rule_of_ones_own_conserves_relevance():
    torch.manual_seed(1)
    before, own, after = nn.Linear(4, 6).double(), Scaled(6).double(), nn.Linear(6, 3).double()
    x, tape = torch.randn(5, 4, dtype=torch.float64), Tape(ledger={})
    y, pull = chain(x, tape, (linear, before), (scaled, own), (linear, after))
    torch.testing.assert_close(y, after(own(before(x))))
    g = torch.randn_like(y)
    kept = (x * pull(g)).sum(1)
    assert set(tape.ledger) == {"linear_bias", "scaled_bias"}
    torch.testing.assert_close(kept + sum(tape.ledger.values()), (y * g).sum(1))


# -- a method ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Smoothed:
    """Cross-entropy to labels that are not quite certain."""

    smoothing: float = 0.1

    needs = frozenset()

    def __call__(self, model, original, batch):
        loss = nn.functional.cross_entropy(model(batch.images), batch.labels, label_smoothing=self.smoothing)
        return loss, {"smoothed": loss.detach()}


def test_a_method_of_ones_own_is_trained_by_the_command_and_stands_in_a_table(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "smoothed", Recipe(Smoothed(), rate=1e-4))
    monkeypatch.setitem(CHOICES, "method", (*CHOICES["method"], "smoothed"))
    start = ("--model", TINY, "--weights", ASSETS / "base_0.safetensors", "--threads", 1)
    words = ("--method", "smoothed", "--epochs", 1, "--batch", 24, "--out", tmp_path / "run")
    assert run("fit", world / "images/train", *start, *words) == 0
    assert "smoothed: 1 epochs of 1 steps, batch 24, learning rate 0.0001" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["steps"] == 1 and record["recipe"]["objective"] == {"name": "Smoothed", "smoothing": 0.1}
    tuned, _ = load_model(TINY, tmp_path / "run/model.safetensors")
    tested = [checkpoint(base_model(0), "original"), checkpoint(tuned, "smoothed")]
    rows = evaluate_sets(tested, [folder_set(world / "images/val", CLASSES, "val")], tmp_path / "results").rows()
    assert {*rows["method"]} == {"original", "smoothed"}
    assert headline(rows).xs("smoothed").notna().all().all()

    profile = tmp_path / "mine.yaml"  # a reproduction reads its rate from its profile
    profile.write_text("world: drawn\nrates: {demo: {smoothed: 2.0e-5}}\nepochs: 2\n")
    recipe, _ = recipe_of("smoothed", "demo", read_settings(profile), seed=3)
    assert (recipe.rate, recipe.epochs, recipe.seed) == (2e-5, 2, 7003) and recipe.objective == Smoothed()
    assert shown_to("smoothed").guide == "" == shown_to("smoothed").objects


# -- a grounder --------------------------------------------------------------------------------------------------------


class Corner:
    """A grounder that finds every phrase in the upper left quarter, but for feathers."""

    name = "corner"

    def settings(self):
        return {"share": 0.25}

    def __call__(self, image, phrases):
        if not phrases or not all(phrase.strip() for phrase in phrases):
            raise ValueError(f"expected phrases with words in them, got {list(phrases)}")
        return [self.find(image, phrase) for phrase in phrases]

    def find(self, image, phrase):
        width, height = image.width // 2, image.height // 2
        n = 0 if "feather" in phrase else 1
        mask = torch.zeros(image.height, image.width, dtype=torch.bool)
        mask[:height * n, :width] = True
        boxes = torch.tensor([[0.0, 0.0, width, height]])[:n]
        return Grounding(phrase, boxes, torch.full((n,), 0.9), mask)


def test_a_grounder_of_ones_own_fills_a_store_that_is_validated(world, tmp_path):
    pictures, concepts = list_folder(world / "images/train", CLASSES), demo_concepts()
    build_masks(pictures, concepts, Corner(), tmp_path / "store", progress=False)
    store = MaskStore(tmp_path / "store")
    assert store.provenance["grounder"] == "corner" and store.provenance["settings"] == {"share": 0.25}
    quarter = np.zeros((64, 64), bool)
    quarter[:32, :32] = True
    name = store.pictures[0]
    for phrase, record in store.records(name).items():
        assert (record.mask() == quarter).all() if "feather" not in phrase else record.status == "empty"
    judged = validate(store, concepts).concepts
    assert len(judged) and (judged["accepted"] == ~judged["concept"].str.contains("feather")).all()


# -- a test set --------------------------------------------------------------------------------------------------------


class ZippedSet(EvalSet):
    """Pictures in a zip file, <class>/<picture>: only `raw` is new."""

    def __init__(self, path, classes, key):
        self.archive = zipfile.ZipFile(path)
        ids = sorted(self.archive.namelist())
        names = [name.split("/")[0] for name in ids]
        super().__init__(key, ids, [(classes.index(name),) for name in names], names, upright=True)

    def raw(self, index):
        return self.archive.read(self.ids[index])


def test_a_test_set_of_ones_own_gives_the_numbers_of_the_same_pictures_in_a_folder(world, tmp_path):
    folder = folder_set(world / "images/val", CLASSES, "folder")
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for name in folder.ids:
            archive.write(world / "images/val" / name, name)
    zipped = ZippedSet(tmp_path / "val.zip", CLASSES, "zipped")
    rows = evaluate_sets([checkpoint(base_model(0), "base")], [folder, zipped], tmp_path / "results").rows()
    of = {key: part.reset_index(drop=True) for key, part in rows.groupby("set")}
    columns = ["metric", "labels", "split", "value", "low", "high", "n"]
    pd.testing.assert_frame_equal(of["folder"][columns], of["zipped"][columns])


def test_a_card_makes_a_published_set(tmp_path, monkeypatch, capsys):
    (tmp_path / "cards.yaml").write_text(
        "in-fog: {name: ImageNet in fog, pictures: 4, classes: 2, size: 1 MiB, source: https://fog.invalid, "
        "folders: [fog], layout: <WordNet id>/*.png}")
    monkeypatch.setitem(CARDS, "in-fog", read_cards(tmp_path / "cards.yaml")["in-fog"])
    monkeypatch.setitem(CHOICES, "sets", (*CHOICES["sets"], "in-fog"))
    for wnid in ("n01440764", "n02123045"):
        for k in range(2):
            file = tmp_path / f"fog/{wnid}/{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (90 * k, 60, 200)).save(file)
    found = open_set("in-fog", tmp_path)
    assert found.targets == ((0,), (0,), (281,), (281,))
    save_model(tmp_path / "w.safetensors", timm.create_model("vit_tiny_patch16_224", num_classes=1000))
    model = ("--model", "vit_tiny_patch16_224", "--weights", tmp_path / "w.safetensors", "--threads", 1)
    assert run("evaluate", tmp_path, "--sets", "in-fog", *model, "--out", tmp_path / "out") == 0
    assert "in-fog" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "fog/n02123045")
    with pytest.raises(ValueError, match=r"in-fog: expected 4 pictures .* Get it from https://fog\.invalid"):
        open_set("in-fog", tmp_path)


