"""Concepts or objects, cue by cue: all steps in small, and what is read off made-up rows."""
import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cft.data import backdrop
from cft.data.backdrop import CUES
from cft.data.models import TINY, load_model
from cft.demo.cue import (
    STEMS,
    CueBench,
    choose_cue,
    cue_figure,
    cue_power,
    cue_recipe,
    cue_relevance,
    cue_scores,
    cue_sentence,
    cue_steps,
    cue_table,
    draw_guides,
    set_name,
    spurious_base,
)
from cft.evaluate.importance import WEIGHTINGS
from cft.evaluate.intervals import power_of
from cft.explain.maps import relevance
from cft.files import ASSETS
from cft.reproduce.paper import claims, verdicts
from cft.reproduce.settings import Cues, Work, read_settings
from cft.reproduce.steps import Notes, PaperSteps, in_order, make_steps
from cft.reproduce.tables import LABELS
from cft.reproduce.variants import varied
from cft.reproduce.worlds import tuned_classes
from cft.train.closed import Head
from cft.train.objectives import ThreeRegions

SMALL = Cues(cues=("paint",), half=True, per_class=2, tested=2, broad=1, spurious=1, objects=25, epochs=1,
             rates=(3e-5,), strengths=(0.1,), tuning=(100,), allowed_loss=100,
             methods=("three-regions.random", "region-head.kept", "repaint+"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The steps of one seed, made."""
    settings = read_settings("cue").model_copy(update={"cue": SMALL, "seeds": 1})
    steps = PaperSteps(Work(settings, ("cue",)), tmp_path_factory.mktemp("cue"))
    last = cue_steps(steps, [0])
    assert make_steps(in_order(last), steps.root), list((steps.root / "failed").glob("*"))
    return steps, last


def test_every_method_is_tested_on_every_set_at_its_choice(made):
    steps, last = made
    rows, notes = pd.read_csv(steps.root / "related/cue/0.csv"), Notes(steps.root)
    assert all(notes.is_done(step) for step in in_order(last))
    assert {*rows["method"]} == {"original", *SMALL.methods} and {*rows["seed"]} == {0}
    top = rows[rows["metric"] == "top1"]
    tests = {f"paint/{name}" for name in CUES["paint"]} - {"paint/train"}
    for method, of in top.groupby("method"):
        assert {*zip(of["set"], of["split"])} == {*itertools.product(tests, ("all", "fine-tuned", "other"))}, method
    choice = pd.read_csv(steps.root / "cue/8/paint.csv").set_index("method")
    assert {*choice.index} == {*SMALL.methods} and {*choice["rate"]} <= {0.0, 3e-5, 0.1}
    for method in SMALL.methods:
        told = rows[(rows["method"] == method) & (rows["set"] == "paint/choice")].set_index("metric")["value"]
        assert told["rate, 1e-6"] == pytest.approx(1e6 * choice.loc[method, "rate"])
        assert told["share"] == choice.loc[method, "share"]
        tried = pd.read_csv(steps.root / f"cue/8/paint/100/{method}.csv")
        assert {*zip(tried["rate"], tried["share"])} == {(tried["rate"][0], 1.0), (tried["rate"][0], 0.5)}


def test_the_original_by_hand_and_where_its_relevance_lies(made):
    steps, _ = made
    model, names = load_model(TINY, steps.root / "cue/8/bases/paint-0.safetensors")
    assert names == list(backdrop.CLASSES)
    rows = pd.read_csv(steps.root / "related/cue/0.csv").query("method == 'original'")
    rows = rows.set_index(["set", "split", "metric"])
    away = backdrop.render("paint/away", 2, 60000)
    x = torch.from_numpy(away.images.transpose(0, 3, 1, 2) / 127.5 - 1).float() * 2
    with torch.inference_mode():
        said = model(x).argmax(1).numpy()
    mine = np.isin(away.labels, tuned_classes(0))
    for split, part in ("all", mine | ~mine), ("fine-tuned", mine), ("other", ~mine):
        right = 100 * (said == away.labels)[part].mean()
        assert rows.loc[("paint/away", split, "top1"), "value"] == pytest.approx(right, abs=1e-3)
    maps = relevance(model, x, torch.from_numpy(away.labels), differentiable=False).patches.detach().clamp(min=0)
    shares = []
    for values, mask in zip(maps, away.concepts):
        inside = sum(float(values[i, j]) * mask[8 * i:8 * i + 8, 8 * j:8 * j + 8].mean()
                     for i in range(8) for j in range(8))
        shares += [inside / float(values.sum())] if values.sum() > 0 else []
    assert rows.loc[("paint/away", "all", "on concepts"), "value"] == pytest.approx(100 * np.mean(shares), abs=0.01)
    three = [("paint/away", "all", f"on {where}") for where in ("concepts", "the rest", "background")]
    assert sum(rows.loc[key, "value"] for key in three) == pytest.approx(100, abs=0.01)
    assert rows.loc[("paint/val", "all", "window"), "value"] == 15
    assert 5 < rows.loc[("paint/val", "all", "body beside concepts"), "value"] < 95


def test_no_picture_of_a_test_is_chosen_by(made):
    steps, last = made
    needed = {step.name for step in in_order(last) if step.kind == "cue-trials"}
    assert needed == {f"cue-trials 8 paint 100 {method}" for method in ("original", *SMALL.methods)}
    choice = next(step for step in in_order(last) if step.kind == "cue-choice")
    assert {step.item[2] for step in choice.needs} == {"100"}
    more = PaperSteps(Work(steps.settings.model_copy(update={"cue": SMALL.model_copy(update={"fine": ("both",)})}),
                           ("cue",)), steps.root)
    names, old = ({step.name for step in in_order(cue_steps(of, [0]))} for of in (more, steps))
    new = {name for name in names - old if name.startswith("cue-rows")}
    assert new == {f"cue-rows 4 both 0 {method}" for method in ("original", *SMALL.fine_methods)}
    assert all(Notes(steps.root).is_done(step) for step in in_order(cue_steps(more, [0])) if step.name in old
               and step.kind != "cue"), "what is done stays done"
    with pytest.raises(ValueError, match=r"seeds \[100\] are both tuned and tested on"):
        cue_steps(steps, [0, 100])


def test_weighed_concepts_are_steps_beside_the_others(made, tmp_path):
    """What is done stays done; the weighed methods have a choice of their own and masks with their weights."""
    steps, old = made
    more = SMALL.model_copy(update={"weighted": ("paint",),
                                    "weighted_methods": ("cft.hierarchy", "region-head.random-weights")})
    root = shutil.copytree(steps.root, tmp_path / "cue")
    steps = PaperSteps(Work(steps.settings.model_copy(update={"cue": more}), ("cue",)), root)
    last, before = in_order(cue_steps(steps, [0])), {step.name for step in in_order(old)}
    notes = Notes(steps.root)
    assert {step.name for step in last if not notes.is_done(step)} == {
        "cue 0", "cue-choice 8 paint weighted", *(f"cue-weights 8 paint {seed}" for seed in (0, 100)),
        *(f"cue-{kind} 8 paint {seed} {method}" for kind, seed in (("trials", 100), ("rows", 0))
          for method in more.weighted_methods)}
    assert before < {step.name for step in last}
    assert make_steps(last, steps.root), list((steps.root / "failed").glob("*"))
    rows = pd.read_csv(steps.root / "related/cue/0.csv")
    assert {*rows["method"]} == {"original", *SMALL.methods, *more.weighted_methods}
    assert {*pd.read_csv(steps.root / "cue/8/paint-weighted.csv")["method"]} == {*more.weighted_methods}
    weights = pd.read_csv(steps.root / "cue/8/paint/0/weighted/weights.csv").set_index(["kind", "class", "concept"])
    assert {kind for kind, _, _ in weights.index} == {*WEIGHTINGS} and weights["weight"].between(0, 1).all()
    place = steps.root / "cue/worlds/paint/0"
    bench = CueBench(more, place, steps.root / "cue/8/bases/paint-0.safetensors", 8, "paint", 0, 60000)
    bench.weighted = steps.root / "cue/8/paint/0/weighted"
    for guide in ("hierarchy", "random-weights"):
        images = bench.images(guide)
        for sample, name in zip(images.folder.samples, images.folder.names):
            owner, of = name.split("/")[0], np.asarray(Image.open(place / "parts/paint/train" / name))
            expected = np.zeros((64, 64), np.float32)
            for k, part in enumerate(backdrop.CLASSES[owner], 1):
                if part.concept:
                    expected[of == k] = weights.loc[(guide, owner, part.name), "weight"]
            assert np.abs(np.load(sample.mask) - expected).max() < 1e-4
    assert {*read_settings("cue").cue.weighted_methods} == {
        f"{base}.{kind}" for base in ("cft", "region-head") for kind in WEIGHTINGS}
    assert read_settings("cue").cue.weighted == () and {*read_settings("cue").cue.weighted_methods} <= LABELS.keys()


def test_guides_are_what_their_names_say(made):
    steps, _ = made
    place = steps.root / "cue/worlds/paint/0"
    bench = CueBench(SMALL, place, steps.root / "cue/8/bases/paint-0.safetensors", 8, "paint", 0, 60000)
    assert {bench.images("kept").folder.classes[k] for k in tuned_classes(0)} == {
        name.split("/")[0] for name in bench.images("kept").folder.names}
    read = lambda kind, name: np.asarray(Image.open((place / kind / name).with_suffix(".png"))) > 0
    for guide in ("kept", "random", "body"):
        images = bench.images(guide)
        name = images.folder.names[0]
        mask = read("masks/paint/train" if guide == "kept" else f"controls/{guide}", name)
        sample = images.folder.samples[0]
        assert ((np.asarray(Image.open(sample.mask)) > 0) == mask).all()
        assert ((np.asarray(Image.open(sample.object)) > 0) == read("objects/paint/train", name)).all()


def test_recipes_have_equal_steps_and_trials():
    s = read_settings("cue").cue
    assert len(s.rates) == len(s.strengths) and not s.half and s.epochs * 12 * s.per_class == 240 * 8
    assert {*s.methods} <= LABELS.keys() and {m for c in claims("cue") for m in (c.method, c.against)} <= {
        "original", *s.methods}
    assert {*s.fine_methods} <= {*s.methods} and s.fine == ("paint", "both")
    fine = [c for c in claims("cue") if "(4 px)" in c.columns[0]]
    assert {c.columns[0].split("/")[0] for c in fine} == {*s.fine}
    assert {m for c in fine for m in (c.method, c.against)} <= {*s.fine_methods}
    for method in s.methods:
        recipe, guide = cue_recipe(method, s, 3, 0.01)
        assert (recipe.rate, recipe.epochs, recipe.batch, recipe.average, recipe.seed) == (0.01, 8, 8, 1.0, 7003)
        assert guide in ("kept", "random", "body", "shuffled", "ellipse")
    kept = cue_recipe("three-regions.kept", s, 0, 1.0)[0].objective
    assert isinstance(kept, ThreeRegions) and kept.rest == "kept"
    assert isinstance(varied("region-head.down")[0].objective, Head)
    columns = {set_name(cue, name, patch) for cue in CUES for name in CUES[cue] for patch in (8, 4)}
    assert {column for c in claims("cue") for column in c.columns} <= columns
    assert {c.sign for c in claims("cue") if c.against != "original"} == {1}


def test_the_second_stage_knows_its_habit(monkeypatch):
    seen = {}
    monkeypatch.setattr("cft.demo.cue.train_stage", lambda model, layers, stage, seed, progress: seen.update(
        correlation=stage.correlation, steps=stage.steps, view=layers))
    monkeypatch.setattr("cft.demo.cue.Layers", lambda seed, objects, scenes, view: view)
    for cue, correlation in {"background": 0.97, "paint": None, "both": 0.97, "part": None, "badge": None}.items():
        model = load_model(TINY, ASSETS / "base_0.safetensors")[0]
        before = model.head.weight.clone()
        spurious_base(SMALL, model, cue, 1)
        assert (seen["correlation"], seen["steps"], seen["view"]) == (correlation, 1, CUES[cue]["train"])
        assert not torch.equal(before, model.head.weight), "the head is new"


def test_a_choice_loses_little_and_gains_most():
    def rows(method, seed, rate, home, away, other):
        held = [("held home", "all", home), ("held away", "all", away), ("held away", "other", other)]
        return [(method, seed, rate, 1.0, *of) for of in held]

    trials = pd.DataFrame(
        [*rows("original", 0, 0.0, 80, 40, 50), *rows("original", 1, 0.0, 80, 40, 50),
         *rows("a", 0, 1.0, 78, 70, 50), *rows("a", 1, 1.0, 75, 70, 50),  # loses 3.5 points on average
         *rows("a", 0, 2.0, 79, 50, 49), *rows("a", 1, 2.0, 76, 60, 48),
         *rows("b", 0, 1.0, 70, 90, 50), *rows("b", 1, 1.0, 70, 90, 50)],
        columns=["method", "seed", "rate", "share", "set", "split", "value"])
    found = choose_cue(trials, 3.0).set_index("method")
    assert found.loc["a"].tolist() == [2.0, 1.0] and found.loc["b"].tolist() == [0.0, 0.0]
    shown = choose_cue(trials[trials["split"] == "all"], 3.0).set_index("method")
    assert shown.loc["a"].tolist() == [2.0, 1.0], "where all classes are shown, no others can lose"
    assert choose_cue(trials[trials["split"] == "all"], 4.0).set_index("method").loc["a"].tolist() == [1.0, 1.0]


def test_all_classes_are_shown_unless_half_of_them(tmp_path):
    for half, shown in ((False, [*range(12)]), (True, tuned_classes(3))):
        settings, place = SMALL.model_copy(update={"half": half}), tmp_path / str(half)
        draw_guides(settings, place, "paint", 3, 0)
        bench = CueBench(settings, place, ASSETS / "base_0.safetensors", 8, "paint", 3, 0)
        for guide in ("kept", "random"):
            folder = bench.folder(guide)
            assert {sample.label for sample in folder.samples} == {*shown} and len(folder.samples) == 2 * len(shown)
            assert all(Path(sample.mask).is_file() for sample in folder.samples)


def made_up(differences):
    """Rows of concepts, objects and a random part on two worlds, four seeds."""
    rng, rows = np.random.default_rng(0), []
    for seed, cue in itertools.product(range(4), ("paint", "part")):
        base = rng.normal(50, 8)
        for method, gain in (("cft.object", 0.0), ("cft", differences[cue] + rng.normal(0, 0.5)), ("cft.random", 0.5)):
            for name in ("away", "val"):
                rows.append((method, seed, f"{cue}/{name}", "all", "top1", base + gain * (name == "away")))
    return pd.DataFrame(rows, columns=["method", "seed", "set", "split", "metric", "value"])


def test_verdicts_tables_and_power_on_made_up_rows():
    rows = made_up({"paint": 4.0, "part": -4.0})
    told = verdicts(cue_scores(rows), claims("cue"))
    by = told.set_index("claim")["verdict"]
    first = "Concepts guide better than objects where {} tells"
    assert by[first.format("the body's paint")] == "holds" and by[first.format("a concept's paint")] == "contradicted"
    assert by[first.format("a badge")] == "not run"
    lines = {line["claim"]: cue_sentence(line) for line in told.to_dict("records")}
    assert "holds (+" in lines[first.format("the body's paint")] and "n = 4" in lines[first.format("the body's paint")]
    assert lines[first.format("a badge")].endswith("nothing was run yet.")
    level = verdicts(cue_scores(made_up({"paint": 0.0, "part": 0.0})), claims("cue")).to_dict("records")
    sentence = next(cue_sentence(line) for line in level if line["claim"] == first.format("the body's paint"))
    assert "is undecided, and if there is a difference it is smaller than" in sentence
    table = cue_table(rows)
    assert list(table.columns) == ["paint", "part"] and set(table.index) == {
        LABELS[m] for m in ("cft", "cft.object", "cft.random")}
    power = cue_power(rows, claims("cue")).set_index(["claim", "test"])
    line = power.loc[(first.format("the body's paint"), "paint/away")]
    wide = rows[rows["set"] == "paint/away"].pivot(index="seed", columns="method", values="value")
    deviation = (wide["cft"] - wide["cft.object"]).std()
    assert line["seeds"] == 4 and line["deviation"] == pytest.approx(deviation, abs=0.005)
    assert line["power for 2 points"] == pytest.approx(power_of(2, deviation, 4), abs=0.006)
    figure = cue_figure(rows)
    assert [ax.get_title() for ax in figure.axes] == ["paint", "part"]


def test_nothing_was_run_yet():
    told = verdicts(cue_scores(pd.DataFrame({"metric": []})), claims("cue"))
    assert set(told["verdict"]) == {"not run"} and len(told) == len(claims("cue")) >= 40
    assert cue_power(pd.DataFrame({"metric": []}), claims("cue")).empty


def test_shares_of_relevance_as_a_table(made):
    rows = pd.read_csv(made[0].root / "related/cue/0.csv")
    table = cue_relevance(rows)
    assert set(table.columns) == {"on concepts", "on the rest", "on background"}
    assert len(table) == 1 + len(SMALL.methods) and table.sum(axis=1).sub(100).abs().max() < 0.2


def test_settings():
    with pytest.raises(ValueError, match="expected some of background, paint, both, part, badge; got smell"):
        Cues(cues=("smell",))
    later, some = (read_settings("cue", **{"cue.fine": text}).cue.fine for text in ("", "both part"))
    assert tuple(later) == () and tuple(some) == ("both", "part")
    assert {patch: name for patch, name in STEMS.items()} == {8: TINY, 4: f"{TINY}_patch4"}
    assert read_settings("cue").seeds == 20 and read_settings("cue").drawn


def test_cues_are_named_with_spaces_and_none_by_nothing():
    read = lambda **given: Cues.model_validate(given)
    assert read(cues="paint both", fine="").fine == read(fine=None).fine == () == SMALL.fine
    assert read(cues="paint both").cues == ("paint", "both")
    with pytest.raises(ValueError, match="expected some of .*; got glue"):
        read(cues="glue")
