"""The explorer without a browser: masks, numbers and words against other ways to get them, and widgets that answer."""
import json
import math
import re
import shutil
import sys
from dataclasses import replace

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from cft.apps import explorer
from cft.apps.explorer import (
    DROPPED,
    KEPT,
    OFF,
    Explorer,
    Material,
    Memory,
    View,
    edited,
    explained,
    first_view,
    lines,
    save_version,
    scene,
    see,
    union,
)
from cft.concepts.filters import Concept, ConceptSet, demo_concepts
from cft.concepts.grounding import Grounding
from cft.concepts.language import ClassName
from cft.concepts.masks import build_masks
from cft.concepts.store import write_pngs
from cft.concepts.validation import conclude, gather_evidence
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, list_folder
from cft.data.models import TINY, base_model
from cft.demo.toy_grounder import toy_grounder
from cft.explain.maps import relevance
from cft.files import ASSETS

KNOWN = ("bird", "fish", "turtle")
EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the pipeline writes for three classes: pictures, store, concepts, a base, and a run."""
    root = tmp_path_factory.mktemp("made")
    pictures = backdrop.write(root / "world", {"train": 5}, seed=4) / "images/train"
    for name in set(backdrop.CLASSES) - set(KNOWN):
        shutil.rmtree(pictures / name)
    build_masks(list_folder(pictures), demo_concepts(), toy_grounder(), root / "store", per_class=4, progress=False)
    demo_concepts().save(root / "concepts.json")
    shutil.copy(ASSETS / "base_0.safetensors", root / "base.safetensors")
    (root / "run").mkdir()
    shutil.copy(ASSETS / "base_1.safetensors", root / "run/model.safetensors")
    (root / "run/record.json").write_text('{"steps": 3}')
    return root


def opened(made, **changes):
    given = {"store": made / "store", "concepts": made / "concepts.json", "run": made / "run", **changes}
    return Material.open(made / "world/images/train", TINY, made / "base.safetensors", **given)


@pytest.fixture(scope="module")
def material(made):
    return opened(made)


# -- the plain half ---------------------------------------------------------------------------------------------------


def test_everything_is_read(material):
    assert material.missing == () and material.run == {"steps": 3} and len(material.with_masks) == 12
    assert [len(material.pictures(c)) for c in KNOWN] == [5] * 3
    with_masks = [p in material.with_masks for p in material.pictures("bird")]
    assert with_masks == sorted(with_masks, reverse=True) and sum(with_masks) == 4


@pytest.mark.parametrize("class_id", KNOWN)
def test_the_mask_is_what_training_would_see(made, material, class_id, tmp_path):
    """Written as PNG, read and cut by the data chapter: the same union."""
    view = replace(first_view(material, class_id), occurrence=0.5)
    kept = conclude(gather_evidence(material.store, material.concepts), material.concepts, 0.5).kept
    pngs = write_pngs(material.store, kept, tmp_path / "png", [view.picture])
    folder = material.folder.choose([view.picture]).with_masks(pngs)
    item = MaskedImages(folder, Preprocess.of(base_model(0)))[0]
    seen = see(material, view.picture, class_id)
    assert torch.equal(union(seen, lines(material, view)), item["mask"]) and torch.equal(seen.image, item["image"])
    assert {line.concept for line in lines(material, view) if line.state == KEPT} == set(kept.of(class_id))


def test_lines_are_judged_as_validation_does(material):
    for threshold in (0.0, 0.15, 0.6, 1.0):
        pairs, _ = material.evidence.judge(threshold)
        for class_id in KNOWN:
            view = replace(first_view(material, class_id), occurrence=threshold)
            accepted = dict(zip(zip(pairs["class_id"], pairs["concept"]), pairs["accepted"]))
            for line in lines(material, view):
                assert (line.state == KEPT) == accepted[class_id, line.concept] and (line.state == DROPPED) != (line.state == KEPT)
                assert line.area == pytest.approx(see(material, view.picture, class_id).masks[line.concept].float().mean())


def test_switching_off_takes_out_of_the_mask(material):
    view = first_view(material, "bird")
    seen, whole = see(material, view.picture, "bird"), lines(material, view)
    victim = max((line for line in whole if line.state == KEPT), key=lambda line: line.area).concept
    left = lines(material, replace(view, off=frozenset({("bird", victim), ("fish", "fins")})))
    assert [line.state for line in left if line.concept == victim] == [OFF]
    expected = np.zeros((64, 64), bool)
    for line in left:
        if line.state == KEPT:
            expected |= seen.masks[line.concept].numpy()
    assert np.array_equal(union(seen, left).numpy(), expected) and expected.sum() < union(seen, whole).sum()


def test_scene_numbers_are_plain_loops(material):
    view = replace(first_view(material, "fish"), explain="label")
    now, seen = scene(material, view), see(material, view.picture, "fish")
    mask = union(seen, now.lines).numpy()
    own = seen.own.numpy()
    assert f"{mask.mean():.0%} of the picture" in now.panels[0].caption
    assert f"it covers {(mask & own).sum() / (mask | own).sum():.0%}" in now.panels[0].caption
    for which, panel in zip(("before", "after"), now.panels[1:]):
        model = getattr(material, which)
        patches = relevance(model, seen.image[None], torch.tensor([material.classes.index("fish")]), differentiable=False).patches[0].clamp(min=0)
        fraction = mask.reshape(8, 8, 8, 8).mean((1, 3))
        share = sum(float(patches[i, j]) * fraction[i, j] for i in range(8) for j in range(8)) / float(patches.sum())
        assert f"{share:.0%} of what speaks for it lies on the mask" in panel.caption and "for fish" in panel.caption
        with torch.inference_mode():
            chances = model(seen.image[None]).softmax(-1)[0]
        best = [a for a in now.answers if a.model == which]
        assert [a.name for a in best] == [material.classes[int(k)] for k in chances.argsort(descending=True)[:3]]
        assert [a.probability for a in best] == pytest.approx([float(chances.sort(descending=True).values[r]) for r in range(3)])
        assert [a.right for a in best] == [a.name == "fish" for a in best]


def test_explaining_the_answer_or_the_label(material):
    view = first_view(material, "turtle")
    found = explained(material, "before", view)
    assert int(found.target) == int(found.logits.argmax())
    assert int(explained(material, "before", replace(view, explain="label")).target) == material.classes.index("turtle")


def test_maps_are_computed_once(made, monkeypatch):
    fresh, calls = opened(made), []
    monkeypatch.setattr(explorer, "relevance", lambda *a, **k: calls.append(a[3]) or relevance(*a, **k))
    view = first_view(fresh, "bird")
    for changes in ({}, {"strength": 0.1}, {"occurrence": 0.9}, {"normalize": "minmax"}, {"off": frozenset({("bird", "the sky")})}, {}):
        scene(fresh, replace(view, **changes))
    assert calls == ["attnlrp"] * 2
    scene(fresh, replace(view, method="gae"))
    assert calls[2:] == ["gae"] * 2


@pytest.mark.parametrize("method", ["cp", "gradcam", "input_x_gradient", "eq2"])
def test_other_methods_and_normalisations_draw_other_maps(material, method):
    view = first_view(material, "bird")
    drawn = {(m, n): scene(material, replace(view, method=m, normalize=n)).panels[1].picture.tobytes() for m in ("attnlrp", method) for n in ("signed", "saturating")}
    assert len(set(drawn.values())) == len(drawn)


def test_memory_forgets_the_oldest():
    memory, made = Memory(2), []
    for key in (1, 2, 1, 3, 2, 1):
        assert memory.get(key, lambda key=key: made.append(key) or key * 10) == key * 10
    assert made == [1, 2, 3, 2, 1] and len(memory.results) == 2


# -- what is missing --------------------------------------------------------------------------------------------------


def test_whatever_is_missing_is_said(made, tmp_path):
    nothing = opened(made, store=None, concepts=None, run=None)
    assert ["cft masks", "cft concepts", "cft fit"] == [next(c for c in ("cft masks", "cft concepts", "cft fit") if c in note) for note in nothing.missing]
    now = scene(nothing, first_view(nothing))
    assert now.notes == nothing.missing and len(now.panels) == 2 and not now.lines and "Nothing to judge by" in now.summary
    (tmp_path / "junk.json").write_text("{}")
    broken = opened(made, store=tmp_path, concepts=tmp_path / "junk.json", run=tmp_path / "no run")
    assert "no mask store at" in broken.missing[0] and "validation error" in broken.missing[1] and "no checkpoint at" in broken.missing[2]
    assert scene(broken, first_view(broken)).panels and Explorer(broken).save.disabled


def test_a_picture_without_masks_and_one_set_aside(made, tmp_path):
    shutil.copytree(made / "world", tmp_path / "world")
    train = tmp_path / "world/images/train"
    (train / "bird/torn.png").write_bytes((train / "bird/bird_0000.png").read_bytes()[:200])
    build_masks(list_folder(train), demo_concepts(), toy_grounder(), tmp_path / "store", progress=False)
    shutil.copy(train / "fish/fish_0000.png", train / "fish/new.png")
    material = Material.open(train, TINY, made / "base.safetensors", store=tmp_path / "store", concepts=made / "concepts.json")
    new = scene(material, View("fish", "fish/new.png"))
    assert any("it was not among those that were looked at" in note for note in new.notes) and "without masks" in new.panels[0].alt
    assert len(new.panels) == 2 and not any("lies on the mask" in panel.caption for panel in new.panels)
    with pytest.raises(ValueError, match="torn.png"):
        scene(material, View("bird", "bird/torn.png"))
    live = Explorer(material, first_view(material, "bird"))
    live.picture.value = "bird/torn.png"
    assert "torn.png" in live.notes.value
    live.picture.value = "bird/bird_0001.png"
    assert "torn" not in live.notes.value


def test_classes_that_concepts_or_model_do_not_know(made, tmp_path):
    shutil.copytree(made / "world/images/train", tmp_path / "train")
    (tmp_path / "train/unicorn").mkdir()
    shutil.copy(made / "world/images/train/bird/bird_0000.png", tmp_path / "train/unicorn/u.png")
    material = Material.open(tmp_path / "train", TINY, made / "base.safetensors", store=made / "store", concepts=made / "concepts.json", run=made / "run")
    now = scene(material, first_view(material, "unicorn"))
    assert any("concept set does not know the class unicorn" in n for n in now.notes) and any("model does not know" in n for n in now.notes)
    assert "Coverage of unicorn is unknown" in now.summary and not any(a.right for a in now.answers)
    assert scene(material, replace(first_view(material, "unicorn"), explain="label")).panels
    for call in (lambda: material.pictures("dragon"), lambda: first_view(material, "dragon"), lambda: scene(material, View("dragon", "dragon/1.png"))):
        with pytest.raises(ValueError, match="no class 'dragon' in train; expected one of bird"):
            call()


def test_concepts_that_were_not_looked_for(made, tmp_path):
    more = replace(demo_concepts(), concepts=(*demo_concepts().concepts, Concept("a golden crown", ("bird",), ("important",))))
    more.save(tmp_path / "more.json")
    material = opened(made, concepts=tmp_path / "more.json")
    now = scene(material, first_view(material, "bird"))
    assert any("a golden crown" in note and "ground it first" in note for note in scene(material, first_view(material, "bird")).notes)
    assert next(line for line in now.lines if line.concept == "a golden crown").state == "not looked for here"


def test_a_model_without_relevance_still_shows(made):
    material = opened(made, run=None)
    material.before = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 12))
    material.preprocess = Preprocess.of(base_model(0))
    now = scene(material, first_view(material, "bird"))
    assert "no map" in now.panels[1].caption and not now.answers


# -- editing ----------------------------------------------------------------------------------------------------------


def test_an_edit_says_who_and_what(material):
    view = replace(first_view(material, "bird"), occurrence=0.5, off=frozenset({("bird", "the sky"), ("bird", "clouds")}))
    result = edited(material, view, " Ada ", "not a part")
    expected = conclude(material.evidence, material.concepts, 0.5).kept
    assert set(result.pairs()) == set(expected.pairs()) - view.off
    entry = result.settings["edits"][-1]
    assert (entry["by"], entry["why"], entry["from"], entry["occurrence"], entry["parent"]) == ("Ada", "not a part", "concepts.json", 0.5, material.concepts.digest())
    assert {tuple(pair) for pair in entry["removed"]} == set(material.concepts.pairs()) - set(result.pairs()) and re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", entry["when"])
    reasons = {(d.text, d.owners): d.reason for d in result.dropped}
    assert reasons["the sky", ("bird",)] == "switched off by hand by Ada: not a part"


def test_versions_are_never_overwritten(material, made, tmp_path):
    file = tmp_path / "concepts.json"
    shutil.copy(made / "concepts.json", file)
    original = file.read_bytes()
    result = edited(material, replace(first_view(material, "bird"), occurrence=0.5), "Ada")
    (tmp_path / "concepts.v3.json").write_text("mine")
    assert [save_version(result, file).name for _ in range(2)] == ["concepts.v2.json", "concepts.v4.json"]
    assert save_version(result, tmp_path / "concepts.v4.json").name == "concepts.v5.json" and save_version(result, tmp_path / "a.vb.json").name == "a.vb.v2.json"
    assert file.read_bytes() == original and (tmp_path / "concepts.v3.json").read_text() == "mine"
    again = ConceptSet.load(tmp_path / "concepts.v2.json")
    assert again.digest() == result.digest() and not list(tmp_path.glob("*.tmp"))
    chained = opened(made, concepts=tmp_path / "concepts.v2.json")
    second = edited(chained, replace(first_view(chained, "bird"), occurrence=0.9), "Bob")
    assert [e["by"] for e in second.settings["edits"]] == ["Ada", "Bob"] and second.settings["edits"][1]["parent"] == again.digest()
    json.loads(second.to_json())


@pytest.mark.parametrize("by, view, words", [(" ", {"occurrence": 0.5}, "name of who"), ("Ada", {"occurrence": 0.0}, "expected a change to save")])
def test_edits_that_are_none(material, by, view, words):
    with pytest.raises(ValueError, match=words):
        edited(material, replace(first_view(material, "bird"), **view), by)


# -- the widgets ------------------------------------------------------------------------------------------------------


def controls(widget):
    """What takes the focus, in the order of the page."""
    if isinstance(widget, ipywidgets.Box):
        return [found for child in widget.children for found in controls(child)]
    return [] if isinstance(widget, ipywidgets.HTML) else [widget]


def test_every_control_is_labelled_and_in_order(material):
    live = Explorer(material, first_view(material, "bird"), by="Ada")
    names = [control.description for control in controls(live.box)]
    assert all(names) and names[:6] == ["class", "picture", "◀ previous", "next ▶", "occurrence ≥", "coverage ≥"]
    assert names[6:6 + len(live.boxes)] == list(live.boxes) and names[-7:] == ["relevance", "normalisation", "explains", "overlay", "edited by", "because", "save as a new version"]
    assert all(isinstance(c, (ipywidgets.Dropdown, ipywidgets.FloatSlider, ipywidgets.Checkbox, ipywidgets.Button, ipywidgets.Text)) for c in controls(live.box))


def test_moves_change_what_is_shown_and_back(material):
    rows = material.evidence.occurrences
    some = rows[(rows["occurrence"] > 0.2) & (rows["occurrence"] < 0.9)].iloc[0]["class_id"]
    live = Explorer(material, first_view(material, some), by="Ada")
    start = live.panels.value, live.summary.value, [w.value for _, w in live.boxes.values()]
    live.occurrence.value = 0.9
    assert live.summary.value != start[1] and [w.value for _, w in live.boxes.values()] != start[2]
    live.occurrence.value = 0.15
    largest = max((line for line in lines(material, live.view) if line.state == KEPT), key=lambda line: line.area).concept
    live.boxes[largest][0].value = False
    assert live.panels.value != start[0] and "○ switched off" in live.boxes[largest][1].value
    live.boxes[largest][0].value = True
    assert (live.panels.value, live.summary.value, [w.value for _, w in live.boxes.values()]) == start
    for name, value in (("strength", 0.2), ("normalize", "saturating"), ("method", "gae"), ("explain", "label")):
        before = live.panels.value, getattr(live, name).value
        getattr(live, name).value = value
        assert live.panels.value != before[0] or name == "explain", name  # the answer may be the label
        getattr(live, name).value = before[1]
        assert live.panels.value == before[0], name
    assert {what for what, _ in live.timings} == {"occurrence", "concept", "strength", "normalize", "method", "explain"} and all(0 < s < 60 for _, s in live.timings)


def test_walking_through_classes_and_pictures(material):
    live = Explorer(material, first_view(material, "bird"))
    assert live.picture.options[-1][0].endswith("(no masks)")
    live.boxes["the sky"][0].value = False
    live.class_id.value = "fish"
    assert live.view.class_id == "fish" and live.picture.value.startswith("fish/") and set(live.boxes) == set(material.concepts.of("fish"))
    live.class_id.value = "bird"
    assert not live.boxes["the sky"][0].value and live.view.off == {("bird", "the sky")}
    names = material.pictures("bird")
    live.earlier.click()
    assert live.picture.value == names[-1] and live.view.picture == names[-1]
    live.later.click()
    live.later.click()
    assert live.picture.value == names[1]


def test_saving_from_the_page(made, tmp_path):
    shutil.copy(made / "concepts.json", tmp_path)
    live = Explorer(opened(made, concepts=tmp_path / "concepts.json"), by="Ada")
    live.occurrence.value = 0.0
    live.save.click()
    assert "not saved" in live.saved.value and "expected a change" in live.saved.value
    live.occurrence.value = 0.5
    live.save.click()
    assert "saved as concepts.v2.json" in live.saved.value and (tmp_path / "concepts.v2.json").is_file()
    live.by.value = ""
    live.save.click()
    assert "not saved" in live.saved.value and len(list(tmp_path.glob("*.json"))) == 2


def test_hostile_names_stay_text(tmp_path, made):
    """A concept and a folder full of markup."""
    bird = made / "world/images/train/bird"
    shutil.copytree(bird, tmp_path / "p" / "<b>bird")
    concepts = ConceptSet((ClassName("<b>bird", f"name {EVIL}"),), (Concept(EVIL, ("<b>bird",), ("important",)),))
    concepts.save(tmp_path / "c.json")

    class Everywhere:
        name = "everywhere"

        def settings(self):
            return {}

        def __call__(self, image, phrases):
            mask = torch.zeros(image.height, image.width, dtype=torch.bool)
            mask[8:40, 8:40] = True
            return [Grounding(p, torch.tensor([[8.0, 8, 40, 40]]), torch.ones(1), mask) for p in phrases]

    build_masks(list_folder(tmp_path / "p"), concepts, Everywhere(), tmp_path / "s", progress=False)
    names = ["<b>bird", *backdrop.CLASSES[1:]] if isinstance(backdrop.CLASSES, list) else ["<b>bird", *list(backdrop.CLASSES)[1:]]
    material = Material.open(tmp_path / "p", TINY, made / "base.safetensors", store=tmp_path / "s", concepts=tmp_path / "c.json", classes=names)
    now = scene(material, replace(first_view(material), explain="label"))
    live = Explorer(material)
    pages = [now._repr_html_(), live.notes.value, live.panels.value, live.answers.value, live.summary.value, *(w.value for _, w in live.boxes.values())]
    for page in pages:
        assert "<script" not in page and "<b>bird" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in pages[0] and any(line.concept == EVIL and not math.isnan(line.area) for line in now.lines)


def test_scene_shows_itself_without_widgets(material):
    html = scene(material, first_view(material, "bird"))._repr_html_()
    assert html.count("<img ") == html.count("alt=") == 3 and "in the mask: found in" in html and "answers before" in html and "http" not in html


def test_without_ipywidgets_the_extra_is_named(material, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"the explorer needs ipywidgets; install it with: pip install 'cft\[lab\]'"):
        Explorer(material)


def test_pictures_of_any_shape(made, tmp_path):
    (tmp_path / "p/bird").mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 200), np.uint8)).save(tmp_path / "p/bird/wide.jpg")
    material = Material.open(tmp_path / "p", TINY, made / "base.safetensors")
    assert [panel.picture.shape for panel in scene(material, first_view(material)).panels] == [(explorer.SIDE, explorer.SIDE, 3)] * 2
