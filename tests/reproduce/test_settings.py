"""Settings and the work that they imply."""
import itertools

import pytest

from cft.data.backdrop import SHIFTED
from cft.reproduce.paper import ARTEFACTS, PAPER, artefact
from cft.reproduce.settings import (
    OURS,
    Cost,
    Settings,
    Work,
    hours,
    maps_file,
    measured_costs,
    model_file,
    page_file,
    read_settings,
    rows_file,
    write_settings,
)


@pytest.mark.parametrize("name", ["demo", "smoke", "paper"])
def test_a_profile_survives_the_way_to_a_file_and_back(name, tmp_path):
    settings = read_settings(name)
    path = write_settings(settings, tmp_path / "s.yaml")
    stamp = path.stat().st_mtime_ns
    assert read_settings(path) == settings
    write_settings(settings, path)
    assert path.stat().st_mtime_ns == stamp  # nothing is written when nothing has changed
    write_settings(settings.model_copy(update={"epochs": 3}), path)
    assert read_settings(path).epochs == 3


def test_the_defaults_are_the_papers_values():
    paper = read_settings("paper")
    known = {"classes": 500, "per_class": 3, "epochs": 50, "batch": 8, "pool": 30, "seeds": 5, "ablation_seeds": 1}
    assert paper.values(*known) == known == Settings().values(*known)
    assert paper.rates["vit_base_patch16_224"]["cft-paper"] == 5e-7 and set(paper.rates) == set(PAPER.models.values())
    assert all(5e-7 <= rate <= 1e-5 for rates in paper.rates.values() for rate in rates.values())
    assert not paper.sets and not paper.weights and paper.train is None  # empty places are no places


@pytest.mark.parametrize("text, message", [
    ("epoch: 3", "epoch: Extra inputs"), ("seeds: 0", "seeds: .*greater than or equal to 1, got 0"),
    ("precision: fp8", "precision: .*'no' or 'bf16'"), ("- 3", "s.yaml must hold names and values, got list"),
    ("a: [", "s.yaml is no sound YAML: while parsing"), ("a: !!python/object:os.system x", "could not determine"),
    ("rates: &a {b: *a}", "s.yaml is no sound YAML"), ("\x00", "s.yaml is no sound YAML"),
    ("rates: {demo: {cft: quick}}", "rates.demo.cft: .*got 'quick'"), ("kinds: !!set {a, b}", "no sound YAML.*set"),
    ("rates: {nowhere: {cft: 1e-5}}", "rates: .*nothing is called 'nowhere'; expected .*demo"),
    ("rates: {demo: {ctf: 1e-5}}", "rates: .*nothing is called 'ctf'; expected .*cft"),
    ("sets: {in-x: a}", "sets: .*nothing is called 'in-x'; expected .*in-a")])
def test_bad_settings(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "s.yaml")


def test_no_settings(tmp_path):
    with pytest.raises(ValueError, match="no settings at"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="closed, cue, demo, paper, photographs, smoke"):
        read_settings("quick")


def by_hand(key, models, methods, seeds):
    """Checkpoints and evaluations of an artefact of the paper's profile, one by one; the original has one seed."""
    tuned, tested = set(), set()
    for model, method, seed in itertools.product(models, methods, range(seeds)):
        slug, seed = PAPER.methods[method], 0 if method == "Original" else seed
        if slug != "original":
            tuned.add((PAPER.models[model], slug, seed))
        tested |= {(PAPER.models[model], slug, seed, PAPER.sets[s]) for s in artefact(key).sets}
    return tuned, tested


def test_work_is_the_union_of_what_artefacts_need():
    work = Work(read_settings("paper"))
    tuned, tested = set(), set()
    for a in map(artefact, work.keys):
        seeds = a.seeds if a.key.startswith("fig") else 5 if a.seeds >= 5 else 1  # the ablations have one in the paper
        one, two = by_hand(a.key, a.models, a.methods, seeds)
        tuned, tested = tuned | one, tested | two
    assert (work.tuned(), work.tested(), work.seeds) == (tuned, tested, [0, 1, 2, 3, 4])
    assert work.counts() == {"fine-tunes": len(tuned), "evaluations": len(tested), "pages": len(work.keys)}
    assert {a.key for a in ARTEFACTS} - set(work.keys) == {*OURS}, "which are made where they are asked for"
    more = Work(read_settings("paper", ablation_seeds=3))
    assert {t for t in more.tuned("table6") if t[2] == 0} == work.tuned("table6")
    assert len(more.tuned("table6")) == 3 * len(work.tuned("table6")) and more.tuned("table1") == work.tuned("table1")


def test_related_systems_own_their_work():
    work = Work(read_settings("demo"), ("table3", "deal"))
    assert work.related == ("deal",) and work.counts("deal") == {"fine-tunes": 0, "evaluations": 0, "pages": 1}
    assert work.counts()["pages"] == 2 and work.tuned() == work.tuned("table3")
    assert Work(read_settings("smoke"), ("deal",)).seeds == [0, 1], "two at least: their claims need an interval"


def test_narrowed_work_keeps_the_original():
    work = Work(read_settings("paper"), ("table1",), ("DeiT",), ("RRDA",))
    tuned, tested = by_hand("table1", ("DeiT",), ("Original", "RRDA"), 5)
    assert (work.tuned(), work.tested()) == (tuned, tested)


def test_our_form_is_added_where_it_makes_sense():
    demo = read_settings("demo")
    one = Work(demo, ("table6",)).tuned()
    changes = ("", ".no-classify", ".no-background", ".no-concept", ".labels")
    assert {m for _, m, _ in one} == {form + change for form in ("cft-paper", "cft") for change in changes}
    assert not any(m.startswith("cft.") for _, m, _ in Work(demo, ("ledger",)).tuned())


def test_maps_are_made_for_figures_and_for_the_demos_first_seed():
    work = Work(read_settings("demo"), ("table1", "fig1", "demo"))
    assert not work.mapped("table1")
    both = {("demo", method, 0) for method in ("original", "cft-paper", "cft")}
    assert work.mapped("fig1") == {(*one, name) for one in both for name in ("adversarial", "rendition")}
    shown = {("demo", method, 0) for method in ("original", "cft", "cft+")}
    assert work.mapped("demo") == {(*one, name) for one in shown for name in SHIFTED}


@pytest.mark.parametrize("arguments, message", [
    ({"keys": ("table10",)}, "unknown artefacts: table10; expected some of fig1, .*, comparison"),
    ({"models": ("ViT-L",)}, "unknown models: ViT-L"), ({"methods": ("SGD",)}, "unknown methods: SGD")])
def test_unknown_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        Work(read_settings("demo"), **arguments)


def test_files_of_different_steps_differ():
    work = Work(read_settings("demo"), tuple(a.key for a in ARTEFACTS if a.key != "closed"))
    mapped = {t for key in work.keys for t in work.mapped(key)}
    names = [model_file(*t) for t in work.tuned()] + [rows_file(*t) for t in work.tested()]
    names += [*(maps_file(*t) for t in mapped), *map(page_file, work.keys)]
    assert len(set(names)) == len(names) and len(mapped) == 7 * 3 + 3


def test_hours(tmp_path):
    work = Work(read_settings("paper"), ("table3",), ("ViT-B", "DeiT"))
    costs = {"vit_base_patch16_224": Cost("a GPU", 0.5, 0.01, {"cft-paper": 0.4})}
    found = hours(work, {"in-segmentation": 4276}, costs)
    assert found["fine-tuning"] == pytest.approx(5 * 188 * 50 * 0.4 / 3600)
    assert found["evaluation"] == pytest.approx(6 * 4276 * 0.01 / 3600) and found["unmeasured"] == 5
    (tmp_path / "c.csv").write_text("model,device,what,value\nm,d,step,2\nm,d,picture,1\nm,d,rrda,3\n")
    assert measured_costs(tmp_path / "c.csv") == {"m": Cost("d", 2.0, 1.0, {"rrda": 3.0})}
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns model, device, what and value"):
        measured_costs(tmp_path / "c.csv")
    assert measured_costs()["vit_base_patch16_224"].step > 0
