"""Settings and the work that they imply."""
import itertools

import pytest

from cft.reproduce.paper import ARTEFACTS, PAPER, artefact
from cft.reproduce.settings import (
    Cost,
    Work,
    hours,
    maps_file,
    measured_costs,
    model_file,
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
    assert (paper.classes, paper.per_class, paper.epochs, paper.batch, paper.pool, paper.seeds) == (500, 3, 50, 8, 30, 5)
    assert paper.rates["vit_base_patch16_224"]["cft-paper"] == 5e-7 and set(paper.rates) == set(PAPER.models.values())
    assert all(5e-7 <= rate <= 1e-5 for rates in paper.rates.values() for rate in rates.values())
    assert not paper.sets and not paper.weights and paper.train is None  # empty places are no places


@pytest.mark.parametrize("text, message", [
    ("epoch: 3", "epoch: Extra inputs"), ("seeds: 0", "seeds: .*greater than or equal to 1, got 0"), ("precision: fp8", "precision: .*'no' or 'bf16'"),
    ("- 3", "must hold names and values, got list"), ("rates: {demo: {cft: quick}}", "rates.demo.cft: .*got 'quick'")])
def test_bad_settings(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "s.yaml")


def test_no_settings(tmp_path):
    with pytest.raises(ValueError, match="no settings at"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="demo, paper, smoke"):
        read_settings("quick")


def by_hand(key, models, methods, seeds, originals):
    """Checkpoints and evaluations of an artefact of the paper's profile, one by one."""
    tuned, tested = set(), set()
    for model, method, seed in itertools.product(models, methods, range(seeds)):
        slug, seed = PAPER.methods[method], 0 if method == "Original" and not originals else seed
        if slug != "original":
            tuned.add((PAPER.models[model], slug, seed))
        tested |= {(PAPER.models[model], slug, seed, PAPER.sets[s]) for s in artefact(key).sets}
    return tuned, tested


def test_work_is_the_union_of_what_artefacts_need():
    work = Work(read_settings("paper"))
    tuned, tested = set(), set()
    for a in ARTEFACTS:
        one, two = by_hand(a.key, a.models, a.methods, a.seeds if a.seeds >= 5 or a.key.startswith("fig") else 1, False)
        tuned, tested = tuned | one, tested | two
    assert (work.tuned(), work.tested()) == (tuned, tested)
    assert work.counts() == {"fine-tunes": len(tuned), "evaluations": len(tested), "pages": len(ARTEFACTS)}


def test_narrowed_work_keeps_the_original():
    work = Work(read_settings("paper"), ("table1",), ("DeiT",), ("RRDA",))
    tuned, tested = by_hand("table1", ("DeiT",), ("Original", "RRDA"), 5, False)
    assert (work.tuned(), work.tested()) == (tuned, tested)


def test_our_form_is_added_where_it_makes_sense():
    demo = read_settings("demo")
    one = Work(demo, ("table6",)).tuned()
    assert {m for _, m, _ in one} == {f + c for f in ("cft-paper", "cft") for c in ("", ".no-classify", ".no-background", ".no-concept", ".labels")}
    assert not any(m.startswith("cft.") for _, m, _ in Work(demo, ("ledger",)).tuned())
    assert {t[3] for t in Work(demo).mapped()} == {"adversarial", "rendition", "object"} and not Work(demo, ("table1",)).mapped()


@pytest.mark.parametrize("arguments, message", [({"keys": ("table10",)}, "unknown artefacts: table10"), ({"models": ("ViT-L",)}, "unknown models: ViT-L"),
                                                ({"methods": ("SGD",)}, "unknown methods: SGD")])
def test_unknown_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        Work(read_settings("demo"), **arguments)


def test_files_of_different_jobs_differ():
    work = Work(read_settings("demo"))
    names = [*(model_file(*t) for t in work.tuned()), *(rows_file(*t) for t in work.tested()), *(maps_file(*t) for t in work.mapped())]
    assert len(set(names)) == len(names)


def test_hours(tmp_path):
    work = Work(read_settings("paper"), ("table3",), ("ViT-B", "DeiT"))
    costs = {"vit_base_patch16_224": Cost("a GPU", 0.5, 0.01, {"cft-paper": 0.4})}
    found = hours(work, {"in-segmentation": 4276}, costs)
    assert found == {"fine-tuning": pytest.approx(5 * 188 * 50 * 0.4 / 3600), "evaluation": pytest.approx(6 * 4276 * 0.01 / 3600), "unmeasured": 5}
    (tmp_path / "c.csv").write_text("model,device,what,seconds\nm,d,step,2\nm,d,picture,1\nm,d,swap,3\n")
    assert measured_costs(tmp_path / "c.csv") == {"m": Cost("d", 2.0, 1.0, {"swap": 3.0})}
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns model, device, what and seconds"):
        measured_costs(tmp_path / "c.csv")
    assert measured_costs()["vit_base_patch16_224"].step > 0
