"""Jobs: variants, guides, both worlds, and what a failure leaves."""
import json
import multiprocessing
import os
import time
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cft.concepts.filters import ConceptSet, merge
from cft.concepts.grounding import small_grounded_sam
from cft.concepts.language import ClassName
from cft.concepts.masks import MaskStore
from cft.data.models import read_weights, save_model
from cft.data.testsets import CARDS, miniature, synsets
from cft.evaluate.passes import Results
from cft.reproduce import jobs
from cft.reproduce.jobs import (
    CHANGES,
    device_slot,
    given_by,
    guide_concepts,
    open_world,
    read_json,
    recipe_of,
    run_job,
    write_json,
)
from cft.reproduce.paper import ARTEFACTS, DEMO, PAPER, in_our_form, needed
from cft.reproduce.settings import read_settings, rows_file, write_settings
from cft.train import loop as finetuning
from cft.train.objectives import RECIPES

DEMO_SETTINGS = read_settings("demo")


def difference(a, b, at=""):
    """Names of the fields in which two plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        return [d for k in a for d in difference(a[k], b[k], f"{at}.{k}")]
    return [] if a == b else [at.strip(".")]


@pytest.mark.parametrize("change, fields", [
    ("no-classify", ["objective.weights.classify"]), ("no-background", ["objective.weights.background"]), ("no-concept", ["objective.weights.concept"]),
    ("labels", ["objective.anchor"]), ("original", ["objective.anchor"]), ("object", ["objective.guide"]), ("gradcam", ["objective.method"]),
    ("gradient-rollout", ["objective.method"]), ("iia", ["objective.method"]), ("cp", ["objective.method"]), ("eq2", ["objective.method"]),
    ("gae", ["objective.method"]), ("frozen", ["objective.method"]), ("predicted", ["objective.explain"]), ("saturating", ["objective.normalize"]),
    ("image-means", ["objective.norm"]), ("patches", ["objective.grid"]), ("constant-rate", ["decay"]), ("no-decay", ["weight_decay"]),
    ("rate-x6", ["rate"]), ("best", ["best"]), ("no-augmentation", []), ("strict", []), ("class", [])])
def test_a_variant_differs_in_one_thing(change, fields):
    base, _ = recipe_of("cft-paper", "demo", DEMO_SETTINGS, 1)
    recipe, made = recipe_of(f"cft-paper.{change}", "demo", DEMO_SETTINGS, 1)
    assert difference(base.as_dict(), recipe.as_dict()) == fields
    data = [made.guide != "kept", not made.augment]
    assert sum(data) == (not fields)  # what is no field of the recipe is one of the data


def test_variants_of_the_rivals():
    paper = read_settings("paper")
    vit = "vit_base_patch16_224"
    assert recipe_of("gradmask.table8", vit, paper, 0)[0].rate == 1e-3 and recipe_of("gradmask", vit, paper, 0)[0].rate == 2e-6
    assert not recipe_of("gradmask.constant", vit, paper, 0)[0].objective.second_order
    rrr = recipe_of("rrr.table8", vit, paper, 0)[0].objective
    assert (rrr.weight, rrr.classify) == (8e-10, 2e-6)
    assert recipe_of("cft-paper.rate-x6", vit, paper, 0)[0].rate == pytest.approx(3e-6)
    recipe = recipe_of("cft-paper", vit, paper, 3)[0]
    assert (recipe.rate, recipe.epochs, recipe.batch, recipe.weight_decay, recipe.decay, recipe.decays) == (5e-7, 50, 8, 1e-4, 0.85, 25)


def test_every_method_of_every_artefact_has_a_recipe():
    for profile, settings in ((DEMO, DEMO_SETTINGS), (in_our_form(DEMO), DEMO_SETTINGS), (PAPER, read_settings("paper"))):
        found = {recipe_of(method, model, settings, seed)[0].rate > 0 for a in ARTEFACTS for model, method, seed in needed(a, profile)[0]}
        assert found == {True}
    assert {m.partition(".")[2] for m in PAPER.methods.values()} - {""} <= set(CHANGES)


@pytest.mark.parametrize("method, message", [("cft.sideways", "no method 'cft.sideways'"), ("sgd", "no method 'sgd'"), ("cft+", "no learning rate for cft\\+ on demo")])
def test_bad_methods(method, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(method, "demo", DEMO_SETTINGS, 0)


# ---- guides ----


def some_concepts():
    classes = (ClassName("a", "a cat"), ClassName("b", "a bus"))
    shares = [("a", "tail", ["important"]), ("b", "road", ["around"]), ("a", "road", ["important", "around"]),
              ("a", "animal", ["superclass"])]
    return ConceptSet(classes, merge(shares))


def test_concepts_by_question():
    found = lambda *kinds: {(c, t) for c, t in given_by(some_concepts(), kinds).pairs()}
    assert found("important") == {("a", "tail"), ("a", "road")}
    assert found("important", "around") == {("a", "tail"), ("a", "road"), ("b", "road")}
    assert found("superclass") == {("a", "animal")} and found("important", "superclass") == {("a", "tail"), ("a", "road"), ("a", "animal")}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small drawn world, up to its masks."""
    root = tmp_path_factory.mktemp("drawn")
    settings = read_settings("smoke", pool=6, per_class=2, epochs=1, test_per_class=1, segmentation_per_class=1)
    write_settings(settings, root / "settings.yaml")
    for job in (["world", "seed=0"], ["concepts"], ["ground", "pool=0", "shard=0"], *(["keep", "pool=0", f"guide={g}"] for g in jobs.GUIDES[:-1]),
                *(["paint", "seed=0", f"guide={g}"] for g in jobs.GUIDES)):
        assert run_job(job, root) == 0
    return settings, root


def test_guides_are_nested_as_their_thresholds_are(drawn):
    settings, root = drawn
    pairs = {g: set(ConceptSet.load(root / f"kept/0/{g}.json").pairs()) for g in jobs.GUIDES[:-1]}
    tuned = {list(jobs.backdrop.CLASSES)[k] for k in open_world(settings, root).tuned(0)}
    assert pairs["strict"] <= pairs["kept"] <= pairs["loose"] <= pairs["unvalidated"]
    assert pairs["strict"] < pairs["unvalidated"] and pairs["kept"] < pairs["superclasses"] and pairs["kept"] < pairs["context"]
    # the rule itself, on every pair: in how many pictures of its class a concept was found
    store = MaskStore(root / "store/0")
    found = store.table()
    for (class_id, text) in pairs["unvalidated"]:
        if class_id in tuned:
            of = found[(found["class_id"] == class_id) & (found["phrase"] == text)]
            share = (of["area"] > 0).sum() / of["picture"].nunique()
            assert ((class_id, text) in pairs["kept"], (class_id, text) in pairs["strict"]) == (share >= 0.15, share >= 0.40), (class_id, text, share)
    with pytest.raises(ValueError, match="guide must be one of"):
        guide_concepts(store, ConceptSet.load(root / "concepts.json"), "class", ("important",), 6)


def test_all_guides_have_the_same_pictures_and_masks_of_their_own(drawn):
    _, root = drawn
    notes = {g: read_json(root / f"guides/0/{g}.json") for g in jobs.GUIDES}
    assert len({tuple(n["pictures"]) for n in notes.values()}) == 1 and len(notes["kept"]["pictures"]) == 12
    first = notes["kept"]["pictures"][0].rsplit(".", 1)[0]
    area = {g: (np.asarray(Image.open(root / f"guides/0/{g}/{first}.png")) > 0).sum() for g in jobs.GUIDES}
    assert area["strict"] <= area["kept"] <= area["unvalidated"] and area["kept"] < area["superclasses"] and area["kept"] <= area["context"]


def test_a_job_done_twice_gives_equal_bytes(drawn):
    _, root = drawn
    assert run_job(["tune", "model=demo", "method=cft", "seed=0"], root) == 0
    folder = root / "models/demo/cft/0"
    first = (folder / "model.safetensors").read_bytes()
    for file in folder.iterdir():
        file.unlink()
    assert run_job(["tune", "model=demo", "method=cft", "seed=0"], root) == 0
    assert (folder / "model.safetensors").read_bytes() == first
    times = [json.loads(line) for line in (root / "jobs.jsonl").read_text().splitlines()]
    assert sum(t["job"] == "tune model=demo method=cft seed=0" for t in times) == 2 and all(t["seconds"] >= 0 for t in times)


@pytest.mark.parametrize("method, masks", [("cft-paper.best", {"mask"}), ("gradmask", {"object"}), ("cft.class", {"mask"}), ("cft.object", {"object"})])
def test_what_a_method_is_shown(drawn, method, masks):
    settings, root = drawn
    recipe, change = recipe_of(method, "demo", settings, 0)
    images = jobs.training_images(settings, root, open_world(settings, root).network("demo", 0), 0, change, recipe.objective.needs)
    assert {k for k in ("mask", "object") if k in images[0]} == masks and len(images) == 12


def test_failures_are_noted_and_forgotten(drawn, capsys):
    _, root = drawn
    assert run_job(["test", "model=demo", "method=swap", "seed=0", "name=val"], root) == 1
    note = jobs.note_of(root, "test model=demo method=swap seed=0 name=val")
    told = read_json(note)
    assert told["job"] == "test model=demo method=swap seed=0 name=val" and "no checkpoint at" in told["error"] and told["cell"] is None
    assert not (root / rows_file("demo", "swap", 0, "val")).exists() and "Traceback" in capsys.readouterr().err
    assert run_job(["tune", "model=demo", "method=swap", "seed=0"], root) == 0
    assert run_job(["test", "model=demo", "method=swap", "seed=0", "name=val"], root) == 0
    assert not note.exists() and (root / rows_file("demo", "swap", 0, "val")).exists()
    assert run_job(["dance", "a=b"], root) == 1 and "no job 'dance'" in read_json(jobs.note_of(root, "dance a=b"))["error"]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a/b.json", {"x": [1]})
    assert read_json(tmp_path / "a/b.json") == {"x": [1]} and [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


# ---- GPUs ----


def hold(root, number, log):
    """Hold a slot for a moment and say which device was seen."""
    os.environ["CFT_GPUS"] = "2"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    with device_slot(root, "cuda"):
        began = time.time()
        time.sleep(0.4)
        log.put((os.environ["CUDA_VISIBLE_DEVICES"], began, time.time()))


def test_no_two_jobs_see_the_same_gpu(tmp_path):
    context = multiprocessing.get_context("fork")
    log = context.Queue()
    workers = [context.Process(target=hold, args=(tmp_path, k, log)) for k in range(4)]
    for w in workers:
        w.start()
    seen = [log.get(timeout=30) for _ in workers]
    for w in workers:
        w.join()
    assert {device for device, _, _ in seen} == {"0", "1"}
    for device in ("0", "1"):
        spans = sorted((a, b) for d, a, b in seen if d == device)
        assert all(b <= a for (_, b), (a, _) in zip(spans, spans[1:]))
    with device_slot(tmp_path, "cpu"):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_the_same_run_is_not_done_twice(drawn, monkeypatch):
    """Other thresholds that keep the same concepts ask for the same run; without augmentation it is another one."""
    _, root = drawn
    for method in ("cft-paper", "cft-paper.no-augmentation"):
        assert run_job(["tune", "model=demo", f"method={method}", "seed=0"], root) == 0
    steps = []
    step = finetuning._step
    monkeypatch.setattr(finetuning, "_step", lambda *a: steps.append(a) or step(*a))
    masks = {g: sorted((p.name, p.read_bytes()) for p in (root / f"guides/0/{g}").rglob("*.png")) for g in ("kept", "loose", "class")}
    for method, guide in (("cft-paper.loose", "loose"), ("cft-paper.class", "class")):
        del steps[:]
        assert run_job(["tune", "model=demo", f"method={method}", "seed=0"], root) == 0
        assert bool(steps) == (masks[guide] != masks["kept"])
    own, other, plain = (root / f"models/demo/{m}/0" for m in ("cft-paper", "cft-paper.loose", "cft-paper.no-augmentation"))
    assert masks["loose"] == masks["kept"] and masks["class"] != masks["kept"]
    assert all((own / f).read_bytes() == (other / f).read_bytes() for f in ("model.safetensors", "record.json"))
    a, b = (read_json(run / "record.json") for run in (own, plain))
    assert {k for k in a if a[k] != b[k]} - {"seconds", "epochs"} == {"augment"}


# ---- ImageNet, in miniature: the real adapters, file formats and code, on small random networks ----


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    data, rng = root / "data", np.random.default_rng(0)
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=1000, depth=1, embed_dim=24, num_heads=2)
    timm_small = {"vit_base_patch16_224": "vit_tiny_patch16_224"}
    save_model(root / "w.safetensors", timm.create_model("vit_tiny_patch16_224", num_classes=1000))
    del network
    sets = {key: miniature(key, data / key, 2) for key in ("in-a", "in-segmentation")}
    settings = read_settings("paper", classes=3, per_class=2, pool=3, seeds=2, epochs=1, batch=3, device="cpu", workers=0, shards=2, names=timm_small,
                             train=str(data / "train"), answers=str(root / "answers.jsonl"), weights={"vit_base_patch16_224": str(root / "w.safetensors")},
                             sets={k: str(v) for k, v in sets.items()}, grounder_weights=str(root))
    world = open_world(settings, root)
    names = list(synsets())
    for k in {k for seed in range(2) for k in world.tuned(seed)}:
        folder = data / "train" / names[k]
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(256, size=(60, 80, 3), dtype=np.uint8)).save(folder / f"{names[k]}_{i}.JPEG")
    write_settings(settings, root / "settings.yaml")
    return settings, root


def test_the_classes_of_a_seed(imagenet):
    settings, root = imagenet
    world = open_world(settings, root)
    assert world.tuned(0) == world.tuned(0) != world.tuned(1) and len(world.tuned(0)) == 3
    assert world.pool(0) == world.pool(1) == "all" and sorted(world.folder("all").labels) == sorted({*world.tuned(0), *world.tuned(1)})


def test_the_whole_way_on_imagenet(imagenet, monkeypatch):
    settings, root = imagenet
    folder = open_world(settings, root).folder("all")
    classes = tuple(ClassName(folder.classes[k], folder.classes[k]) for k in folder.labels)
    everything = ConceptSet(classes, merge((c.id, text, ["important"]) for c in classes for text in ("ear", "paw")))
    everything.save(root / "concepts.json")
    grounder = small_grounded_sam()
    monkeypatch.setattr(jobs, "load_grounder", lambda name, weights, device: grounder)
    monkeypatch.setattr(jobs, "open_set", lambda key, place: jobs_open(key, place))
    from cft.data.testsets import open_set as real

    jobs_open = lambda key, place: real(key, place, check_counts=False)
    vit = "model=vit_base_patch16_224"
    for job in (["ground", "pool=all", "shard=0"], ["ground", "pool=all", "shard=1"], ["keep", "pool=all", "guide=kept"],
                ["keep", "pool=all", "guide=unvalidated"], ["paint", "seed=0", "guide=kept"], ["paint", "seed=0", "guide=unvalidated"],
                ["tune", vit, "method=cft-paper.unvalidated", "seed=0"], ["tune", vit, "method=swap", "seed=0"],
                ["test", vit, "method=original", "seed=0", "name=in-a"], ["test", vit, "method=swap", "seed=0", "name=in-segmentation"],
                ["maps", vit, "method=original", "seed=0", "name=in-a"]):
        assert run_job(job, root) == 0, job
    rows = Results(root / "results").rows()
    assert set(rows["set"]) == {"in-a", "in-segmentation"} and {"full1000", "subset"} <= set(rows["labels"]) and {"top1", "mean_iou"} <= set(rows["metric"])
    record = read_json(root / "models/vit_base_patch16_224/swap/0/record.json")
    assert record["recipe"]["rate"] == 2e-6 and record["data"]["pictures"] == 6 and record["recipe"]["objective"]["name"] == "SwappedCrossEntropy"
    assert read_weights(root / "models/vit_base_patch16_224/swap/0/model.safetensors")[0].keys() == read_weights(root / "w.safetensors")[0].keys()


def test_places_that_are_empty_are_named(imagenet, tmp_path):
    settings, root = imagenet
    for change, call, message in (({"train": None}, lambda w: w.folder("all"), "train is empty in the settings"),
                                  ({"weights": {}}, lambda w: w.network("vit_base_patch16_224", 0), "weights.vit_base_patch16_224 is empty"),
                                  ({"sets": {"in-r": tmp_path / "none"}}, lambda w: w.test_set("in-r", 0), "sets.in-r is .*none in the settings"),
                                  ({"answers": None}, lambda w: w.concepts(), "answers is empty")):
        with pytest.raises(ValueError, match=message):
            call(open_world(settings.model_copy(update=change), root))
    assert set(PAPER.sets.values()) == set(CARDS) and set(RECIPES) >= {m.partition(".")[0] for m in PAPER.methods.values()} - {"original"} and asdict(CHANGES["iia"])
