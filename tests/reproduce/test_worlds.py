"""Both worlds; ImageNet in miniature: the real adapters, file formats and code, on a small random network."""
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cft.concepts.filters import ConceptSet, merge
from cft.concepts.grounding import small_grounded_sam
from cft.concepts.language import ClassName
from cft.data.models import read_weights, save_model
from cft.data.testsets import CARDS, miniature, synsets
from cft.data.testsets import open_set as real_open_set
from cft.evaluate.passes import Results
from cft.files import read_json
from cft.reproduce import worlds
from cft.reproduce.paper import PAPER
from cft.reproduce.settings import Work, read_settings
from cft.reproduce.steps import PaperSteps, in_order, make_steps
from cft.reproduce.worlds import folder_digest, open_world

VIT = "vit_base_patch16_224"


def test_a_drawn_world(tmp_path):
    world = open_world(read_settings("smoke"), tmp_path)
    world.draw(3)
    note = read_json(tmp_path / "worlds/3.json")
    assert note["seed"] == 3 and note["counts"]["train"] == world.settings.pool
    tuned = world.tuned(3)
    assert len(tuned) == 6 and sorted({s.label for s in world.folder("3").samples}) == sorted(tuned)
    held = world.validation(3)
    assert {s.label for s in held.samples} == set(range(12)) - set(tuned)
    assert all(s.mask.is_file() for s in held.samples)
    picture, mask = world.test_set("segmentation", 3)[0]
    assert mask.shape == (picture.height, picture.width) and set(np.unique(mask)) == {0, 1}
    assert world.start("demo", 3) == world.start("demo", 3) != world.start("demo", 4)
    assert not world.start("demo", 9) and world.base(3) is None, "bases are trained where the package has none"
    assert world.base(9) == tmp_path / "bases/9"
    assert open_world(read_settings("smoke", bases="trained"), tmp_path).base(3) == tmp_path / "bases/3"


def test_digests_of_folders_are_kept_until_a_date_changes(tmp_path):
    place, cache = tmp_path / "a", tmp_path / "digests.json"
    place.mkdir()
    (place / "x.jpg").write_bytes(b"1")
    first = folder_digest([place], cache)
    assert folder_digest([place], cache) == first and len(read_json(cache)) == 1
    (place / "y.jpg").write_bytes(b"22")
    os.utime(place, ns=(1, 1))
    assert folder_digest([place], cache) != first and len(read_json(cache)) == 2


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    data, rng = root / "data", np.random.default_rng(0)
    torch.manual_seed(0)
    save_model(root / "w.safetensors", timm.create_model("vit_tiny_patch16_224", num_classes=1000))
    sets = {key: str(miniature(key, data / key, 2)) for key in ("in-a", "in-segmentation")}
    settings = read_settings(
        "paper", classes=3, per_class=2, pool=3, seeds=2, epochs=1, batch=3, device="cpu", workers=0, shards=2,
        names={VIT: "vit_tiny_patch16_224"}, train=str(data / "train"), answers=str(root / "answers.jsonl"), sets=sets,
        weights={VIT: str(root / "w.safetensors")}, grounder_weights=str(root))
    names = list(synsets())
    for k in {k for seed in range(2) for k in open_world(settings, root).tuned(seed)}:
        folder = data / "train" / names[k]
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(256, size=(60, 80, 3), dtype=np.uint8)).save(folder / f"{names[k]}_{i}.JPEG")
    return settings, root


def test_the_classes_of_a_seed(imagenet):
    settings, root = imagenet
    world = open_world(settings, root)
    assert world.tuned(0) == world.tuned(0) != world.tuned(1) and len(world.tuned(0)) == 3
    assert world.store(0) == world.store(1) == "all"
    assert sorted(world.folder("all").labels) == sorted({*world.tuned(0), *world.tuned(1)})


@pytest.mark.slow
def test_the_whole_way_on_imagenet(imagenet, monkeypatch):
    """Ground, validate, fine-tune, test and map, by the engine's own steps."""
    settings, root = imagenet
    folder = open_world(settings, root).folder("all")
    classes = tuple(ClassName(folder.classes[k], folder.classes[k]) for k in folder.labels)
    everything = ConceptSet(classes, merge((c.id, text, ["important"]) for c in classes for text in ("ear", "paw")))
    grounder = small_grounded_sam()
    monkeypatch.setattr(worlds, "load_grounder", lambda name, weights, device: grounder)
    monkeypatch.setattr(worlds, "open_set", lambda key, place: real_open_set(key, place, check_counts=False))
    monkeypatch.setattr(worlds.ImageNet, "concepts", lambda self: everything)
    steps = PaperSteps(Work(settings), root)
    wanted = [steps.evaluate(VIT, "original", 0, "in-a"), steps.evaluate(VIT, "rrda", 0, "in-segmentation"),
              steps.maps(VIT, "original", 0, "in-a"), steps.fine_tune(VIT, "cft-paper.unvalidated", 0)]
    assert make_steps(in_order(wanted), root), [p.read_text() for p in (root / "failed").glob("*")]
    rows = Results(root / "results").rows()
    assert set(rows["set"]) == {"in-a", "in-segmentation"} and {"full1000", "subset"} <= set(rows["labels"])
    assert {"top1", "mean_iou"} <= set(rows["metric"])
    assert set(rows.loc[rows["set"] == "in-a", "seed"]) == {0, 1}, "the original is counted for each seed's classes"
    run = root / "models" / VIT / "rrda/0"
    record = read_json(run / "record.json")
    assert record["recipe"]["rate"] == 2e-6 and record["data"]["pictures"] == 6
    assert record["recipe"]["objective"]["name"] == "SwappedCrossEntropy"
    assert read_weights(run / "model.safetensors")[0].keys() == read_weights(root / "w.safetensors")[0].keys()


def test_other_weights_or_pictures_are_another_start(imagenet, tmp_path):
    settings, root = imagenet
    world = open_world(settings, tmp_path)
    start, pictures, tested = world.start(VIT, 0), world.pictures("all"), world.tested("in-a")
    other = tmp_path / "other.safetensors"
    other.write_bytes((root / "w.safetensors").read_bytes() + b" ")
    assert open_world(settings.model_copy(update={"weights": {VIT: other}}), tmp_path).start(VIT, 0) != start
    new = root / "data/train" / world.names[world.tuned(0)[0]] / "new.JPEG"
    new.write_bytes(b"a picture")
    assert open_world(settings, tmp_path).pictures("all") != pictures
    new.unlink()
    again = open_world(settings, tmp_path)
    assert again.tested("in-a") == tested != again.tested("in-segmentation")


def test_places_that_are_empty_are_named(imagenet, tmp_path):
    settings, root = imagenet
    for change, call, message in (
            ({"train": None}, lambda w: w.folder("all"), "train is empty in the settings"),
            ({"weights": {}}, lambda w: w.network(VIT, 0), f"weights.{VIT} is empty"),
            ({"sets": {"in-r": tmp_path / "none"}}, lambda w: w.test_set("in-r", 0), "sets.in-r is .*none in the"),
            ({"answers": None}, lambda w: w.concepts(), "answers is empty")):
        with pytest.raises(ValueError, match=message):
            call(open_world(settings.model_copy(update=change), root))
    assert set(PAPER.sets.values()) == set(CARDS)
