"""A repair is chosen on some pictures and decided on others, and a worse model is never handed out."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from cft.apps import repair as room
from cft.apps.repair import (
    SEARCHES,
    Candidate,
    RateSearch,
    deal_out,
    find_concepts,
    find_objects,
    nearer,
    repair,
    searches_for,
)
from cft.concepts.cuts import SelfCut
from cft.concepts.filters import demo_concepts
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, list_folder, scan, swap_background, without_object
from cft.data.models import base_model, load_model
from cft.demo.toy_grounder import toy_grounder
from cft.evaluate.audit import partners

CLASSES = list(backdrop.CLASSES)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return backdrop.write(tmp_path_factory.mktemp("repair") / "world", {"val": 9}, seed=5)


@pytest.fixture(scope="session")
def folder(world):
    return list_folder(world / "images/val", CLASSES).with_masks(object=world / "objects/val")


@pytest.fixture(scope="session")
def model():
    return base_model(1)


@pytest.fixture
def quick(monkeypatch):
    """A search of two runs that do something."""
    monkeypatch.setattr(room, "DECADES", (1e-3, ))
    monkeypatch.setattr(room, "RUNS", 2)
    monkeypatch.setattr(room, "SHARES", (1.0, 0.5))


def test_heaps_share_nothing_and_all_classes_vote(folder):
    heaps = deal_out(folder, per_class=2, only=["bird", "fish"], seed=3)
    names = [set(heap.names) for heap in heaps]
    assert names[0] | names[1] | names[2] == set(folder.names) and sum(map(len, names)) == len(folder)
    assert heaps.train.labels == sorted(map(CLASSES.index, ("bird", "fish"))) and len(heaps.train) == 4
    assert len(heaps.choose.labels) == len(heaps.decide.labels) == len(CLASSES)
    assert deal_out(folder, seed=3) == deal_out(folder, seed=3) != deal_out(folder, seed=4)
    assert len(deal_out(folder).train) == 3 * len(CLASSES)  # a third
    for bad, words in ((["bird"], "needs two to train on"), (["eagle"], "no class 'eagle'")):
        with pytest.raises(ValueError, match=words):
            deal_out(folder, only=bad)


def test_answers_against_a_loop(folder, model):
    images = MaskedImages(folder.only([0, 3]), Preprocess.of(model))
    held = room.HeldIn(images, seed=2, times=2, batch=5)
    items = next(iter(DataLoader(images, len(images))))
    for k in range(2):
        others = partners(items["label"].numpy(), 2 + k)[1]
        for i, other in enumerate(others):
            scene = without_object(items["image"][other][None], items["object"][other][None])
            assert items["label"][other] != items["label"][i]
            assert torch.equal(held.shown[1 + k][i], swap_background(items["image"][i][None], items["object"][i][None],
                                                                     scene)[0])
    right = held.answers(model)
    assert right.shape == (18, 3) and np.array_equal(right[:, 0], (model(items["image"]).argmax(1) == items["label"]))
    scores, all_tuned = held.scores(model, [0]), held.scores(model, [0, 3])
    assert scores["home"] == pytest.approx(100 * right[:, 0].mean()) and np.isnan(all_tuned["other"])
    assert scores["other"] == pytest.approx(100 * right[9:, 1:].mean())


def test_shares_lie_on_the_way(model):
    other = base_model(0)
    half = nearer(model, other, 0.25)
    for name, value in half.state_dict().items():
        assert torch.allclose(value, torch.lerp(model.state_dict()[name], other.state_dict()[name], 0.25), atol=1e-6)


def test_what_the_masks_allow(folder, world):
    found = searches_for(folder, ["cft+", "rrda"])
    assert found["cft+"].recipe.objective.guide == "object"
    both = folder.with_masks(world / "masks/val")
    assert searches_for(both, ["cft+"])["cft+"].recipe.objective.guide == "mask"
    assert all(search.recipe.average == 1 for search in SEARCHES.values() if isinstance(search, RateSearch))
    bare = list_folder(world / "images/val", CLASSES)
    with pytest.raises(ValueError, match="allow none of rrda; give object masks"):
        searches_for(bare, ["rrda"])
    with pytest.raises(ValueError, match="no method 'magic'"):
        searches_for(folder, ["magic"])
    with pytest.raises(ValueError, match="108 pictures have no object mask, first bird/"):
        repair(base_model(0), bare, progress=False)


def test_rates_are_decades_and_then_beside_the_best(folder, model, monkeypatch):
    tried = []

    def tuned(model, images, recipe, run, **_):
        tried.append(recipe.rate)
        return type("Tuned", (), {"model": model})

    class Held:
        def scores(self, model, tuned):
            return {"home": 90.0, "away": 60.0 if tried[-1] == pytest.approx(1e-4 * 30) else 50.0, "other": np.nan}

    monkeypatch.setattr(room, "fine_tune", tuned)
    start = {"home": 90.0, "away": 40.0, "other": np.nan}
    ground = room.Ground(model, None, Held(), start, (0, 1), None, 2, 8, 0)
    found = list(SEARCHES["dfr-like"](ground, "dfr-like", lambda: None))
    assert tried == pytest.approx([30 * rate for rate in (1e-6, 1e-5, 1e-4, 1e-3, 1e-4 / 10**0.5, 1e-4 * 10**0.5)])
    assert len(found) == 6 * 4 and {c.share for c in found} == {1.0, 0.7, 0.5, 0.3}
    assert not ground.eligible({"home": 86.9, "away": 99.0, "other": np.nan})
    assert not replace_start(ground, 50.0).eligible({"home": 90.0, "away": 99.0, "other": 46.0})


def replace_start(ground, other):
    return replace(ground, start={**ground.start, "other": other})


@pytest.mark.slow
def test_a_repair_holds_where_nothing_was_trained(folder, model, quick, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = repair(model, folder, tmp_path, methods=("dfr-like", ), epochs=4, progress=False)
    assert found.better and found.changes["away"][1] > 0 and found.changes["gap"][0] < -5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.trials.chosen.sum() == 1 and found.sentences()[0].startswith("Repaired: on ")
    again = repair(model, folder, tmp_path, methods=("dfr-like", ), epochs=4, progress=False)  # from the runs there
    pd.testing.assert_frame_equal(again.trials, found.trials)
    place = found.save(tmp_path / "result")
    assert {p.name for p in place.iterdir()} == {"model.safetensors", "trials.csv", "repair.json", "report.html",
                                                 "timm"}
    read, classes = load_model("cft_vit_tiny64", place / "model.safetensors")
    assert classes == CLASSES and torch.equal(read.head.weight, found.model.head.weight)


def test_a_head_in_closed_form_is_scored_as_its_model(folder, model, tmp_path):
    heaps = deal_out(folder, seed=1)
    preprocess = Preprocess.of(model)
    held = room.HeldIn(MaskedImages(heaps.choose, preprocess), 1)
    images = MaskedImages(heaps.train, preprocess, train=True)
    ground = room.Ground(model, images, held, held.scores(model, ()), (0, 1), None, 1, 8, 1)
    for name in ("swap-consistent", "swap-head", "relevance-head"):
        found = list(SEARCHES[name](ground, name, lambda: None))
        assert len(found) == 6 * 4 and len({c.how for c in found}) == 24
        for candidate in (found[0], found[-1]):
            assert candidate.scores == pytest.approx(held.scores(candidate.model, (0, 1)))
        assert max(c.scores["away"] for c in found) > ground.start["away"] + 5
    assert SEARCHES["swap-consistent"].given({"mask"}) is None


@pytest.mark.slow
def test_what_is_worse_is_not_handed_out(folder, model, quick, monkeypatch):
    """A candidate that is perfect to the pictures it is chosen by, and ruined."""
    ruined = nearer(model, model, 1.0)
    torch.nn.init.zeros_(ruined.head.weight)

    class Liar(RateSearch):
        def __call__(self, ground, name, tick):
            yield Candidate(name, "by lying", 1.0, 1.0, {"home": 100.0, "away": 100.0, "other": np.nan}, ruined)

    monkeypatch.setitem(room.SEARCHES, "plain", Liar(SEARCHES["plain"].recipe))
    found = repair(model, folder, methods=("plain", ), progress=False)
    assert not found.better and found.model is model
    assert "not surely better" in found.why and "more than 3 points at home" in found.why
    assert found.sentences()[0].startswith("Not repaired: ") and found.sentences()[2].endswith("as it was.")


@pytest.mark.slow
def test_where_everything_forgets_the_original_stays(folder, model, quick):
    found = repair(model, folder, methods=("dfr-like", ), epochs=1, allowed_loss=-100.0, progress=False)
    assert not found.better and found.model is model and found.after is None
    assert "every candidate loses more" in found.why and not found.trials.chosen.any()


def test_a_model_that_does_not_lean_is_left_alone(folder, model, monkeypatch):
    monkeypatch.setattr(room, "CLEARED", repair_verdict := "leans on the background")
    found = repair(model, folder, progress=False)
    assert found.before.verdict == repair_verdict and not found.better and found.model is model and found.trials.empty
    assert "does not lean" in found.sentences()[0]


def test_who_does_not_agree_pays_nothing(folder, model, quick, monkeypatch):
    monkeypatch.setattr(room, "fine_tune", None)
    plans = []
    with pytest.raises(PermissionError, match="nothing was trained"):
        repair(model, folder, methods=("rrda", ), progress=False, agree=plans.append)
    assert "train on 36 pictures of 12 classes, choose by 36, decide by 36; 2 trials a method: rrda" in plans[0]


def test_a_model_at_chance_is_not_repaired(folder, model):
    guessing = nearer(model, model, 1.0)
    torch.nn.init.normal_(guessing.head.weight, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="no repair: .*at chance"):
        repair(guessing, folder, progress=False)


def test_masks_that_would_teach_the_background(folder, world, model, tmp_path):
    for file in (world / "objects/val").rglob("*.png"):
        target = tmp_path / file.relative_to(world / "objects/val")
        target.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(file).convert("L")).save(target)
    with pytest.raises(ValueError, match="would teach the background"):
        repair(model, folder.with_masks(tmp_path), methods=("cft+", ), progress=False)


def test_objects_from_the_network_itself_and_by_name(folder, world, model, tmp_path):
    bare = scan(world / "images/val", classes=CLASSES).only([0, 4])
    cut = find_objects(bare, tmp_path / "cut", SelfCut(model), progress=False)
    assert len(cut) > 9 and all(s.object for s in cut.samples) and "found by self-cut, unchecked" in cut.masks_read[-1]
    named = find_objects(bare, tmp_path / "toy", toy_grounder(), progress=False)
    assert "found by toy" in named.masks_read[-1]

    class Blind(SelfCut):
        def mask(self, image, keys):
            return np.zeros((image.height, image.width), bool)

    with pytest.raises(ValueError, match="in none of 18 pictures; give object masks"):
        find_objects(bare, tmp_path / "blind", Blind(model), progress=False)


def test_concepts_without_their_context(world, tmp_path):
    bare = scan(world / "images/val", classes=CLASSES).only([0, 4])
    masked, found = find_concepts(bare, demo_concepts(), toy_grounder(), tmp_path, progress=False)
    assert all(s.mask and s.object for s in masked.samples) and len(masked) > 9
    assert not {"the sky", "clouds"} & set(found.kept.of("bird")) and found.kept.of("bird")


def test_no_picture_is_counted_whose_object_is_unknown(folder, tmp_path, world):
    first = folder.samples[0]
    Image.new("L", (64, 64)).save(tmp_path / "empty.png")
    odd = replace(folder, samples=(replace(first, object=tmp_path / "empty.png"), *folder.samples[1:]))
    assert folder.name(first) not in room.usable(odd).names and len(room.usable(odd)) == len(room.usable(folder)) - 1
