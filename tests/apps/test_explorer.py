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
from jinja2 import StrictUndefined
from PIL import Image

from cft.apps import explorer
from cft.apps.explorer import (
    DROPPED,
    KEPT,
    OFF,
    UNASKED,
    Choices,
    Explorer,
    Material,
    edited,
    explained,
    first_view,
    lines,
    page_part,
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
from cft.evaluate.audit import html_template
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
                assert line.state == (KEPT if accepted[class_id, line.concept] else DROPPED)
                mask = see(material, view.picture, class_id).masks[line.concept]
                assert line.area == pytest.approx(mask.float().mean())


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
        target = torch.tensor([material.classes.index("fish")])
        patches = relevance(model, seen.image[None], target, differentiable=False).patches[0].clamp(min=0)
        fraction = mask.reshape(8, 8, 8, 8).mean((1, 3))
        share = sum(float(patches[i, j]) * fraction[i, j] for i in range(8) for j in range(8)) / float(patches.sum())
        assert f"{share:.0%} of what speaks for it lies on the mask" in panel.caption and "for fish" in panel.caption
        with torch.inference_mode():
            chances = model(seen.image[None]).softmax(-1)[0]
        best = [a for a in now.answers if a.model == which]
        order = chances.argsort(descending=True)[:3]
        assert [a.name for a in best] == [material.classes[int(k)] for k in order]
        assert [a.probability for a in best] == pytest.approx(chances[order].tolist())
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
    off = frozenset({("bird", "the sky")})
    for changes in ({}, {"strength": 0.1}, {"occurrence": 0.9}, {"normalize": "minmax"}, {"off": off}, {}):
        scene(fresh, replace(view, **changes))
    assert calls == ["attnlrp"] * 2
    scene(fresh, replace(view, method="gae"))
    assert calls[2:] == ["gae"] * 2


@pytest.mark.parametrize("method", ["cp", "gradcam", "input_x_gradient", "eq2"])
def test_other_methods_and_normalisations_draw_other_maps(material, method):
    view = first_view(material, "bird")
    views = [replace(view, method=m, normalize=n) for m in ("attnlrp", method) for n in ("signed", "saturating")]
    assert len({scene(material, each).panels[1].picture.tobytes() for each in views}) == len(views)


def test_a_material_forgets_what_is_oldest(made):
    fresh, asked = opened(made, run=None), []

    def tenfold(material, key):
        assert material is fresh
        asked.append(key)
        return key * 10

    assert [fresh.recall(tenfold, key, keep=2) for key in (1, 2, 1, 3, 2, 1)] == [10, 20, 10, 30, 20, 10]
    assert asked == [1, 2, 3, 2, 1] and fresh.recall(see, "bird/bird_0000.png", "bird").masks


# -- what is missing --------------------------------------------------------------------------------------------------


def test_whatever_is_missing_is_said(made, tmp_path):
    nothing = opened(made, store=None, concepts=None, run=None)
    commands = ("cft masks", "cft concepts", "cft fit")
    assert all(command in note for command, note in zip(commands, nothing.missing, strict=True))
    now = scene(nothing, first_view(nothing))
    assert now.notes == nothing.missing and len(now.panels) == 2 and not now.lines
    assert "Nothing to judge by" in now.summary and "without masks" in now.panels[0].alt
    (tmp_path / "junk.json").write_text("{}")
    broken = opened(made, store=tmp_path, concepts=tmp_path / "junk.json", run=tmp_path / "no run")
    said = ("no mask store at", "validation error", "no checkpoint at")
    assert all(words in note for words, note in zip(said, broken.missing, strict=True))
    assert scene(broken, first_view(broken)).panels and Explorer(broken).save.disabled


def test_a_picture_without_masks_and_one_set_aside(made, tmp_path):
    shutil.copytree(made / "world", tmp_path / "world")
    train = tmp_path / "world/images/train"
    (train / "bird/torn.png").write_bytes((train / "bird/bird_0000.png").read_bytes()[:200])
    build_masks(list_folder(train), demo_concepts(), toy_grounder(), tmp_path / "store", progress=False)
    shutil.copy(train / "fish/fish_0000.png", train / "fish/new.png")
    material = Material.open(train, TINY, made / "base.safetensors", store=tmp_path / "store",
                             concepts=made / "concepts.json")
    new = scene(material, Choices("fish", "fish/new.png"))
    assert any("it was not among those that were looked at" in note for note in new.notes)
    assert "without masks" in new.panels[0].alt
    assert len(new.panels) == 2 and not any("lies on the mask" in panel.caption for panel in new.panels)
    with pytest.raises(ValueError, match="torn.png"):
        scene(material, Choices("bird", "bird/torn.png"))
    live = Explorer(material, first_view(material, "bird"))
    live.picture.value = "bird/torn.png"
    assert "torn.png" in live.notes.value
    live.picture.value = "bird/bird_0001.png"
    assert "torn" not in live.notes.value


def test_a_class_whose_first_picture_is_torn_can_be_looked_at(made, tmp_path):
    """The message comes instead of pictures; the next one is shown, and the way back stays open."""
    shutil.copytree(made / "world/images/train", tmp_path / "train")
    (tmp_path / "train/fish/a.png").write_bytes(b"torn")
    material = Material.open(tmp_path / "train", TINY, made / "base.safetensors", concepts=made / "concepts.json")
    live = Explorer(material, first_view(material, "bird"))
    live.class_id.value = "fish"
    assert "a.png" in live.notes.value and set(live.boxes) == set(material.concepts.of("fish"))
    live.later.click()
    assert "a.png" not in live.notes.value and "picture of fish" in live.panels.value
    live.class_id.value = "bird"
    assert "picture of bird" in live.panels.value
    assert Explorer(material, first_view(material, "fish")).notes.value.startswith('<p role="status">⚠ ')


def test_classes_that_concepts_or_model_do_not_know(made, tmp_path):
    shutil.copytree(made / "world/images/train", tmp_path / "train")
    (tmp_path / "train/unicorn").mkdir()
    shutil.copy(made / "world/images/train/bird/bird_0000.png", tmp_path / "train/unicorn/u.png")
    given = {"store": made / "store", "concepts": made / "concepts.json", "run": made / "run"}
    material = Material.open(tmp_path / "train", TINY, made / "base.safetensors", **given)
    now = scene(material, first_view(material, "unicorn"))
    for words in ("concept set does not know the class unicorn", "model does not know"):
        assert any(words in note for note in now.notes)
    assert "Coverage of unicorn is unknown" in now.summary and not any(a.right for a in now.answers)
    assert scene(material, replace(first_view(material, "unicorn"), explain="label")).panels
    for call in (lambda: material.pictures("dragon"), lambda: first_view(material, "dragon"),
                 lambda: scene(material, Choices("dragon", "dragon/1.png"))):
        with pytest.raises(ValueError, match="no class 'dragon' in train; expected one of bird"):
            call()


def test_concepts_that_were_not_looked_for(made, tmp_path):
    crown = Concept("a golden crown", ("bird",), ("important",))
    replace(demo_concepts(), concepts=(*demo_concepts().concepts, crown)).save(tmp_path / "more.json")
    material = opened(made, concepts=tmp_path / "more.json")
    now = scene(material, first_view(material, "bird"))
    assert any("a golden crown" in note and "ground it first" in note for note in now.notes)
    assert [line.state for line in now.lines if line.concept == "a golden crown"] == [UNASKED]


def test_a_model_without_relevance_still_shows(made):
    material = opened(made, run=None)
    material.before = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 12))
    material.preprocess = Preprocess.of(base_model(0))
    now = scene(material, first_view(material, "bird"))
    assert "no map" in now.panels[1].caption and not now.answers


# -- editing ----------------------------------------------------------------------------------------------------------


def test_an_edit_says_who_and_what(material):
    off = frozenset({("bird", "the sky"), ("bird", "clouds")})
    view = replace(first_view(material, "bird"), occurrence=0.5, off=off)
    result = edited(material, view, " Ada ", "not a part")
    expected = conclude(material.evidence, material.concepts, 0.5).kept
    assert set(result.pairs()) == set(expected.pairs()) - view.off
    entry = result.settings["edits"][-1]
    said = {"by": "Ada", "why": "not a part", "from": "concepts.json", "occurrence": 0.5}
    assert said.items() <= entry.items() and entry["parent"] == material.concepts.digest()
    assert {tuple(pair) for pair in entry["removed"]} == set(material.concepts.pairs()) - set(result.pairs())
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", entry["when"])
    reasons = {(d.text, d.owners): d.reason for d in result.dropped}
    assert reasons["the sky", ("bird",)] == "switched off by hand by Ada: not a part"


def test_versions_are_never_overwritten(material, made, tmp_path):
    file = tmp_path / "concepts.json"
    shutil.copy(made / "concepts.json", file)
    original = file.read_bytes()
    result = edited(material, replace(first_view(material, "bird"), occurrence=0.5), "Ada")
    (tmp_path / "concepts.v3.json").write_text("mine")
    assert [save_version(result, file).name for _ in range(2)] == ["concepts.v2.json", "concepts.v4.json"]
    assert save_version(result, tmp_path / "concepts.v4.json").name == "concepts.v5.json"
    assert save_version(result, tmp_path / "a.vb.json").name == "a.vb.v2.json"
    assert file.read_bytes() == original and (tmp_path / "concepts.v3.json").read_text() == "mine"
    again = ConceptSet.load(tmp_path / "concepts.v2.json")
    assert again.digest() == result.digest() and not list(tmp_path.glob("*.tmp"))
    chained = opened(made, concepts=tmp_path / "concepts.v2.json")
    second = edited(chained, replace(first_view(chained, "bird"), occurrence=0.9), "Bob")
    assert [e["by"] for e in second.settings["edits"]] == ["Ada", "Bob"]
    assert second.settings["edits"][1]["parent"] == again.digest()
    json.loads(second.to_json())


@pytest.mark.parametrize("by, occurrence, words", [(" ", 0.5, "name of who"), ("Ada", 0.0, "expected a change")])
def test_edits_that_are_none(material, by, occurrence, words):
    with pytest.raises(ValueError, match=words):
        edited(material, replace(first_view(material, "bird"), occurrence=occurrence), by)


def test_neither_classes_nor_sets_that_are_not_there(made):
    early = opened(made, concepts=None)
    with pytest.raises(ValueError, match="no class 'cloud'"):
        first_view(early, "cloud")
    with pytest.raises(ValueError, match="no concept set to edit"):
        edited(early, first_view(early), "Ada")


# -- the widgets ------------------------------------------------------------------------------------------------------


def controls(widget):
    """What takes the focus, in the order of the page."""
    if isinstance(widget, ipywidgets.Box):
        return [found for child in widget.children for found in controls(child)]
    return [] if isinstance(widget, (ipywidgets.HTML, ipywidgets.Output)) else [widget]


def test_every_control_is_labelled_and_in_order(material):
    live = Explorer(material, first_view(material, "bird"), by="Ada")
    names = [control.description for control in controls(live.box)]
    assert all(names) and names[:6] == ["class", "picture", "◀ previous", "next ▶", "occurrence ≥", "coverage ≥"]
    assert names[6:6 + len(live.boxes)] == list(live.boxes)
    assert names[6 + len(live.boxes):-3] == ["relevance", "normalisation", "explains", "overlay"]
    assert names[-3:] == ["edited by", "because", "save as a new version"]
    kinds = [getattr(ipywidgets, kind) for kind in ("Dropdown", "FloatSlider", "Checkbox", "Button", "Text")]
    assert all(isinstance(control, tuple(kinds)) for control in controls(live.box))


def test_moves_change_what_is_shown_and_back(material):
    rows = material.evidence.occurrences
    some = rows[(rows["occurrence"] > 0.2) & (rows["occurrence"] < 0.9)].iloc[0]["class_id"]
    live = Explorer(material, first_view(material, some), by="Ada")
    start = live.panels.value, live.summary.value, [w.value for _, w in live.boxes.values()]
    live.occurrence.value = 0.9
    assert live.summary.value != start[1] and [w.value for _, w in live.boxes.values()] != start[2]
    live.occurrence.value = 0.15
    kept = [line for line in lines(material, live.view) if line.state == KEPT]
    largest = max(kept, key=lambda line: line.area).concept
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
    moved, seconds = zip(*live.timings)
    assert set(moved) == {"occurrence", "concept", "strength", "normalize", "method", "explain"}
    assert all(0 < s < 60 for s in seconds)


def test_walking_through_classes_and_pictures(material):
    live = Explorer(material, first_view(material, "bird"))
    assert live.picture.options[-1][0].endswith("(no masks)")
    live.boxes["the sky"][0].value = False
    live.class_id.value = "fish"
    assert live.view.class_id == "fish" and live.picture.value.startswith("fish/")
    assert set(live.boxes) == set(material.concepts.of("fish")) and live.timings[-1][0] == "class"
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
    material = Material.open(tmp_path / "p", TINY, made / "base.safetensors", store=tmp_path / "s",
                             concepts=tmp_path / "c.json", classes=["<b>bird", *list(backdrop.CLASSES)[1:]])
    now = scene(material, replace(first_view(material), explain="label"))
    live = Explorer(material)
    parts = [getattr(live, name).value for name in ("notes", "panels", "answers", "summary")]
    pages = [now._repr_html_(), *parts, *(words.value for _, words in live.boxes.values()), page_part("status", EVIL)]
    for page in pages:
        assert "<script" not in page and "<b>bird" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in pages[0] and "&lt;b&gt;bird" in live.answers.value
    assert [line.concept for line in now.lines if not math.isnan(line.area)] == [EVIL]


def test_scene_shows_itself_without_widgets(material):
    html = scene(material, first_view(material, "bird"))._repr_html_()
    assert html.count("<img ") == html.count("alt=") == 3 and "http" not in html
    assert "in the mask: found in" in html and html.index("answers before") < html.index("answers after")


def test_the_template_escapes_and_knows_no_colour():
    template = html_template("scene.html.j2")
    text = (ASSETS / "explorer/scene.html.j2").read_text(encoding="utf-8")
    assert template.environment.autoescape is True and template.environment.undefined is StrictUndefined
    assert not re.search(r"\|\s*safe\b|autoescape|color", text), "what a dark theme would have to undo"


def test_without_ipywidgets_the_extra_is_named(material, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"the explorer needs ipywidgets; install it with: pip install 'cft\[lab\]'"):
        Explorer(material)


def test_pictures_of_any_shape(made, tmp_path):
    (tmp_path / "p/bird").mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 200), np.uint8)).save(tmp_path / "p/bird/wide.jpg")
    material = Material.open(tmp_path / "p", TINY, made / "base.safetensors")
    panels = scene(material, first_view(material)).panels
    assert [panel.picture.shape for panel in panels] == [(explorer.SIDE, explorer.SIDE, 3)] * 2
