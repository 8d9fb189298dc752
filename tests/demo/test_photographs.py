"""Photographs, in small: a dozen drawn pictures stand for them."""
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cft.concepts.cuts import SelfCut
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, list_folder
from cft.data.models import TINY, base_model, load_model, write_safetensors
from cft.demo.photographs import (
    NATURAL_COLUMNS,
    PHOTO_COLUMNS,
    accuracy_parts,
    choose_trial,
    curve_figure,
    photograph_curves,
    photograph_recipe,
    photograph_scores,
    photograph_steps,
    photograph_table,
    shown_figure,
)
from cft.demo.scenes import (
    CUT_SIDE,
    SCENE_KINDS,
    deal_pools,
    draw_photographs,
    make_masks,
    otsu,
    salient,
    scene_crop,
    scene_kinds,
)
from cft.explain.maps import relevance
from cft.files import read_json
from cft.reproduce.settings import Photographs, Work, read_settings
from cft.reproduce.steps import Notes, PaperSteps, in_order, make_steps
from cft.train.closed import FORMS

SMALL = dict(network=TINY, side=64, head=4, repair=3, held=3, tested=3, tuned=2, scenes=1, blocks=1, epochs=1,
             rates=(1e-4, 1e-3), methods=("cft+", "cft+.no-align"), natural=("plain",))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Photographs of three classes with masks, scenes and a backbone."""
    root = tmp_path_factory.mktemp("photographs")
    drawn = backdrop.write(root / "drawn", {"train": 11, "val": 4}, seed=2)
    for name in list(backdrop.CLASSES)[:3]:
        for split in ("train", "val"):
            for kind, to in (("images", ""), ("objects", "objects")):
                target = root / "home" / to / split / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (drawn / kind / split / name).rename(target)
    halves = np.zeros((64, 64), bool)
    halves[:, :32] = True
    for file in (root / "home/val" / list(backdrop.CLASSES)[0]).iterdir():  # as if people had drawn them
        people = root / "home/people/val" / file.parent.name / file.name
        people.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(halves).save(people)
    for number, kind in enumerate(("coast", "field", "hall", "hut")):
        place = root / "home/scenes" / kind
        place.mkdir(parents=True)
        pixels = np.full((80, 120, 3), 40 + 50 * number, np.uint8)
        pixels[:, 60:, 0] = 255  # the half of the tests is red
        for k in range(2):
            Image.fromarray(pixels).save(place / f"{k}.png")
    state = {k: v for k, v in base_model(0).state_dict().items() if not k.startswith("head.")}
    write_safetensors(root / "backbone.safetensors", state, {})
    return root


@pytest.fixture(scope="module")
def settings(home):
    shown = home / "drawn/images/train"  # what is left there of other classes
    return Photographs(folder=home / "home", weights=home / "backbone.safetensors", shown=shown, **SMALL)


@pytest.fixture(scope="module")
def made(home, settings):
    """The steps of a seed, made."""
    work = Work(read_settings("photographs").model_copy(update={"photographs": settings, "seeds": 1}), ("photographs",))
    steps = PaperSteps(work, home / "run")
    last = photograph_steps(steps, [0])
    assert make_steps(in_order(last), steps.root), list((steps.root / "failed").glob("*"))
    return steps, last


def test_otsu_is_the_best_of_all_thresholds():
    rng = np.random.default_rng(0)
    for _ in range(20):
        shades = np.concatenate([rng.normal(60, 20, 200), rng.normal(170, 30, rng.integers(5, 300))])
        shades = shades.clip(0, 255).astype(np.uint8)

        def between(t, shades=shades):
            low, high = shades[shades <= t].astype(float), shades[shades > t].astype(float)
            return len(low) * len(high) * (low.mean() - high.mean())**2 if len(low) and len(high) else 0.0

        assert between(otsu(shades)) == pytest.approx(max(map(between, range(256))))


def test_masks_lose_crumbs_and_holes_and_odd_sizes():
    shades = np.full((112, 112), 10, np.uint8)
    shades[20:60, 20:60], shades[35:40, 35:40], shades[90:93, 90:93], shades[100, 100] = 220, 10, 220, 220
    wanted = np.zeros((112, 112), bool)
    wanted[20:60, 20:60] = True
    found = salient(shades)
    assert (found != wanted).mean() < 0.002 and found[37, 37] and not found[91, 91]
    assert salient(np.full((112, 112), 90, np.uint8)) is None, "faint"
    assert salient(np.where(np.arange(112)[:, None] < 100, 200, 0).astype(np.uint8).repeat(112, 1)) is None, "too large"
    assert salient(np.pad(np.full((8, 8), 255, np.uint8), 52)) is None, "too small"


def test_scenes_are_sorted_by_kind_and_cut_by_half(home, tmp_path):
    kinds = scene_kinds(home / "home/scenes")
    assert list(kinds) == ["coast", "field", "hall", "hut"] and all(len(paths) == 2 for paths in kinds.values())
    for name in (f"{SCENE_KINDS['reef'][0]}_anemone.JPEG", f"{SCENE_KINDS['reef'][1]}/a.png", "stray.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="png")
    assert {kind: len(paths) for kind, paths in scene_kinds(tmp_path).items()} == {"reef": 2}
    numbers = [number for of_kind in SCENE_KINDS.values() for number in of_kind]
    assert len(numbers) == len(set(numbers)) == 48
    with pytest.raises(ValueError, match="no scenes in"):
        scene_kinds(home / "home/val/bird")
    rng = random.Random(0)
    for test in (False, True):
        crops = [np.asarray(scene_crop(kinds["coast"][0], 16, rng, test)) for _ in range(8)]
        inner = [crop[2:-2, 2:-2, 0] for crop in crops]  # the filter reaches two pixels over the middle
        assert all((crop == (255 if test else 40)).all() for crop in inner)


def test_pools_have_no_photograph_in_common():
    s, names = Photographs(head=30, repair=15, held=15, tested=4), [f"{k:02}" for k in range(55)]
    pool = deal_pools(names, ["a", "b", "c", "d", "e"], s, random.Random(1))
    assert tuple(map(len, pool)) == (25, 15, 15, 4) and len({*pool.head, *pool.repair, *pool.held}) == 55
    with pytest.raises(ValueError, match="30 photographs .* expected more than 30"):
        deal_pools(names[:30], ["a"], s, random.Random(1))


def test_a_world_is_what_it_says(made, settings, home):
    steps, _ = made
    world, place = read_json(steps.root / "photographs/0.json"), steps.root / "photographs/0"
    assert len(set(world["homes"].values())) == 3 and len(world["tuned"]) == 2
    masks = read_json(steps.root / "photographs/masks.json")
    assert masks == {"masks": "objects", "used": 45, "set_aside": []}
    seen = Counter()
    for kind in ("images", "objects"):
        seen.update((kind, p.parent.parent.name) for p in (place / kind).rglob("*.png"))
    expected = {"head": 12, "repair": 9, "held": 9, "home": 9, "away": 9, "natural": 9, "natural-head": 12,
                "natural-repair": 9, "natural-held": 9, "people": 3}
    assert seen == {(kind, name): n for kind in ("images", "objects") for name, n in expected.items()}
    grey = {kind: 40 + 50 * k for k, kind in enumerate(("coast", "field", "hall", "hut"))}
    for name, test in (("repair", False), ("home", True), ("away", True)):
        for file in (place / "images" / name).rglob("*.png"):
            pixels, own = np.asarray(Image.open(file)), file.parent.name
            mask = np.asarray(Image.open(place / "objects" / name / own / file.name)) > 0
            natural = "natural" if test else f"natural-{name}"
            whole = np.asarray(Image.open(place / "images" / natural / own / file.name))
            assert np.array_equal(pixels[mask], whole[mask])
            scene = Counter(pixels[~mask][:, 1].tolist()).most_common(1)[0][0]
            home_shade = grey[world["homes"][own]]
            if test:
                assert (scene == home_shade) == (name == "home") and (pixels[~mask][:, 0] == 255).mean() > 0.5


def test_correlation_is_kept(settings, home, tmp_path):
    make_masks(settings, tmp_path / "objects")
    for correlation, share in ((0.0, 0), (1.0, 1)):
        place = tmp_path / str(correlation)
        other = settings.model_copy(update={"correlation": correlation})
        told = draw_photographs(other, tmp_path / "objects", place, 1)
        grey = {kind: 40 + 50 * k for k, kind in enumerate(("coast", "field", "hall", "hut"))}
        at_home = [Counter(np.asarray(Image.open(f)).reshape(-1, 3)[:, 1].tolist()).most_common(1)[0][0]
                   == grey[told["homes"][f.parent.name]] for f in (place / "images/held").rglob("*.png")]
        assert np.mean(at_home) == pytest.approx(share, abs=0.15)


def test_every_trial_and_choice_is_there_and_nothing_is_made_twice(made):
    steps, last = made
    rows = pd.read_csv(steps.root / "related/photographs/0.csv")
    names = rows.groupby(["kind", "method"]).size().index
    stepped = [("spurious", f"cft+.no-align@{rate:g}@{way:g}") for rate in (1e-4, 1e-3) for way in (1.0, 0.5)]
    assert {*stepped, ("spurious", "cft+.no-align"), ("natural", "original")} <= {*names}
    assert {m for k, m in names if k == "natural" and "@" not in m} == {"original", "plain", *FORMS}
    trials = rows[rows["method"].str.startswith("leace@") & (rows["kind"] == "spurious")]
    assert trials["method"].nunique() == 8
    notes = Notes(steps.root)
    assert all(notes.is_done(step) for step in in_order(last))
    for kind in ("spurious", "natural"):  # the choice, once more
        of = rows[rows["kind"] == kind]
        part = lambda name, of=of: of[of["method"] == name].drop(columns=["kind", "method", "seed"])
        for name in ("swap-head", "leace"):
            told = part(name)[part(name)["set"] == "choice"].set_index("metric")["value"]
            mine = {tuple(map(float, m.split("@")[1:])): part(m) for m in of["method"].unique()
                    if m.startswith(f"{name}@")}
            best = choose_trial(mine, part("original"), steps.settings.photographs.allowed_loss)
            assert (told["rate"], told["share"]) == pytest.approx(best or (0.0, 0.0))
            if best and best[1] == 1:
                key = ["set", "split", "metric"]
                whole = part(name).set_index(key)["value"]
                for of_trial, value in mine[best].set_index(key)["value"].items():
                    assert whole[of_trial] == pytest.approx(value)


def test_relevance_inside_what_people_drew(made, settings):
    rows = pd.read_csv(made[0].root / "related/photographs/0.csv")
    place, shares = made[0].root / "photographs/0", []
    model = load_model(TINY, place / "spurious.safetensors")[0]
    for item in MaskedImages(list_folder(place / "images/people", list(backdrop.CLASSES)[:3]), Preprocess.of(model)):
        found = relevance(model, item["image"][None], torch.tensor([item["label"]]), differentiable=False).patches[0]
        shares.append(100 * (found[:, :4].clamp(min=0).sum() / found.clamp(min=0).sum()).item())  # 8 columns of patches
    told = rows[(rows["metric"] == "inside people's") & (rows["kind"] == "spurious")].set_index("method")["value"]
    assert told["original"] == pytest.approx(np.mean(shares), abs=1e-3) and "leace" in told.index
    alone = photograph_table(rows[rows["metric"] != "inside people's"])
    assert [c for c in PHOTO_COLUMNS if c not in alone.columns] == ["inside people's masks"]


def test_without_masks_the_backbone_cuts(home, settings, tmp_path):
    for name in ("train", "val"):
        (tmp_path / "bare" / name).mkdir(parents=True)
        for of in sorted((home / "home" / name).iterdir()):
            (tmp_path / "bare" / name / of.name).mkdir()
            file = sorted(of.iterdir())[0]
            (tmp_path / "bare" / name / of.name / file.name).write_bytes(file.read_bytes())
    bare = settings.model_copy(update={"folder": tmp_path / "bare"})
    told = make_masks(bare, tmp_path / "cut")
    cut = SelfCut(load_model(TINY, settings.weights, new_head=1, img_size=CUT_SIDE)[0])
    assert told["masks"] == "self-cut" and told["used"] + len(told["set_aside"]) == 6
    for file in (tmp_path / "cut").rglob("*.png"):
        picture = Image.open(tmp_path / "bare" / file.relative_to(tmp_path / "cut"))
        assert np.array_equal(np.asarray(Image.open(file)), cut.mask(picture, cut.keys(picture)))


def test_photographs_that_may_be_shown(made):
    steps, _ = made
    with np.load(steps.root / "maps/photographs.npz") as file:
        maps = dict(file)
    classes = list(backdrop.CLASSES)
    assert maps["pictures"].shape == (4, 64, 64, 3) and maps["pictures"].dtype == np.uint8
    assert maps["maps_before"].shape == maps["maps_after"].shape == (4, 8, 8)
    assert {*maps["said_before"], *maps["said_after"]} <= {*classes[:3]} and len({*maps["names"]}) <= 4
    assert not np.array_equal(maps["maps_before"], maps["maps_after"])
    figure = shown_figure(maps, {classes[0]: "the first"})
    assert len(figure.axes) == 12 and "before: " in figure.axes[4].get_xlabel()


def test_choices_lose_little_and_gain_most():
    def rows(home, away, other):
        return pd.DataFrame([("held home", "all", home), ("held away", "all", away), ("held away", "other", other)],
                            columns=["set", "split", "value"])

    start = rows(80, 40, 50)
    trials = {(1.0, 1.0): rows(76, 60, 60), (2.0, 1.0): rows(78, 50, 47), (3.0, 1.0): rows(90, 55, 46),
              (4.0, 0.5): rows(77, 50.04, 50)}
    assert choose_trial(trials, start, 3.0) == (2.0, 1.0) and choose_trial(trials, start, 4.0) == (1.0, 1.0)
    assert choose_trial(trials, rows(99, 40, 99), 3.0) is None


def test_recipes_are_guided_by_objects(settings):
    plus, control = (photograph_recipe(name, settings, 7) for name in ("cft+", "cft+.no-align"))
    assert plus.objective.guide == "object" and plus.seed == 7 and plus.epochs == 1
    assert plus.objective.weights.align > 0 == control.objective.weights.align
    assert photograph_recipe("plain", settings, 0).rate == photograph_recipe("rrda", settings, 0).rate
    with pytest.raises(KeyError, match="grad"):
        photograph_recipe("grad", settings, 0)


def test_parts_of_classes():
    found = accuracy_parts("away", np.array([1, 0, 1, 1], bool), np.array([0, 1, 2, 2]), [0, 1]).set_index("split")
    assert found["value"].to_dict() == {"all": 75, "fine-tuned": 50, "other": 100}
    assert found["n"].to_dict() == {"all": 4, "fine-tuned": 2, "other": 2}


def test_tables_and_figure(made):
    rows = pd.read_csv(made[0].root / "related/photographs/0.csv")
    both = pd.concat([rows, rows.assign(seed=1, value=rows["value"] + 2)], ignore_index=True)
    scores = photograph_scores(both)
    assert {*scores["column"]} == {*PHOTO_COLUMNS, *NATURAL_COLUMNS}
    wide = scores[scores["method"] == "leace"].pivot(index="column", columns="seed", values="value")
    assert wide.loc["reliance", 1] == pytest.approx(wide.loc["mixed-same", 1] - wide.loc["mixed-rand", 1])
    table = photograph_table(both)
    assert {"Original", "CFT+ without alignment", "LEACE of the scene"} <= {*table.index}
    assert (table != "").all(axis=None)
    assert "CFT+ without alignment" not in photograph_table(both, NATURAL_COLUMNS).index
    curves = photograph_curves(both)
    assert len(curves.query("method == 'cft+.no-align'")) == 2 and set(curves["kind"]) == {"spurious", "natural"}
    trial = both[(both["method"] == "cft+.no-align@0.001@1") & (both["set"] == "away") & (both["split"] == "all")]
    point = curves.query("method == 'cft+.no-align' and rate == 0.001")
    assert point["away"].item() == pytest.approx(trial["value"].mean())
    assert len(curve_figure(both, ["cft+.no-align", "leace"]).axes) == 2


def test_bad_input(home, settings, tmp_path):
    with pytest.raises(ValueError, match="photographs.folder is empty"):
        draw_photographs(Photographs(), tmp_path, tmp_path, 0)
    with pytest.raises(ValueError, match="no masks beside the photographs of"):
        make_masks(Photographs(folder=tmp_path), tmp_path)
    with pytest.raises(ValueError, match="0 kinds|no scenes"):
        draw_photographs(settings.model_copy(update={"folder": home / "drawn"}), tmp_path, tmp_path, 0)
    with pytest.raises(ValueError, match="photographs with usable masks"):
        draw_photographs(settings, tmp_path / "none", tmp_path, 0)
