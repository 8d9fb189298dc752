"""Variants: each differs from its base in what its name says, and every method of every artefact has a recipe."""
import pytest

from cft.concepts.filters import ConceptSet, merge
from cft.concepts.language import ClassName
from cft.concepts.masks import CONTROLS
from cft.evaluate.importance import WEIGHTINGS
from cft.reproduce.paper import ARTEFACTS, DEMO, PAPER, artefact, in_our_form, needed
from cft.reproduce.settings import OURS, read_settings
from cft.reproduce.variants import VARIANTS, Shown, given_by, recipe_of, shown_to, varied
from cft.train.objectives import RECIPES

DEMO_SETTINGS = read_settings("demo")
VIT = "vit_base_patch16_224"


def difference(a, b, at=""):
    """Names of the fields in which two plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        return [d for k in a for d in difference(a[k], b[k], f"{at}.{k}")]
    return [] if a == b else [at.strip(".")]


FIELDS = {
    "no-align": "objective.weights.align", "no-classify": "objective.weights.classify",
    "no-background": "objective.weights.background", "no-concept": "objective.weights.concept",
    "labels": "objective.anchor", "original": "objective.anchor", "object": "objective.guide",
    "gradcam": "objective.method", "gradient-rollout": "objective.method", "iia": "objective.method",
    "cp": "objective.method", "eq2": "objective.method", "gae": "objective.method", "frozen": "objective.method",
    "predicted": "objective.explain", "saturating": "objective.normalize", "image-means": "objective.norm",
    "patches": "objective.grid", "constant-rate": "decay", "no-decay": "weight_decay", "rate-x6": "rate",
    "best": "best"}
OF_DATA = ("no-augmentation", "class", "annotated", "superclasses", "unvalidated", "strict", "loose", "context")


@pytest.mark.parametrize("name", [*FIELDS, *OF_DATA])
def test_a_variant_differs_in_one_thing(name):
    base, _ = recipe_of("cft-paper", "demo", DEMO_SETTINGS, 1)
    recipe, variant = recipe_of(f"cft-paper.{name}", "demo", DEMO_SETTINGS, 1)
    assert difference(base.as_dict(), recipe.as_dict()) == ([FIELDS[name]] if name in FIELDS else [])
    data = [variant.guide != "kept", not variant.augment]
    assert sum(data) == (name in OF_DATA)  # what is no field of the recipe is one of the data
    assert set(VARIANTS) == {*FIELDS, *OF_DATA, *OF_HEADS, *OF_REGIONS, *CONTROLS, *WEIGHTINGS, "constant", "table8"}


OF_HEADS, OF_REGIONS = ("concepts", "after-head", "no-align-after-head"), ("down", "kept")


@pytest.mark.parametrize("name", (*CONTROLS, *WEIGHTINGS))
def test_controls_are_other_masks_and_nothing_else(name):
    (base, _), (recipe, variant) = (recipe_of(f"cft-paper{end}", "demo", DEMO_SETTINGS, 1) for end in ("", f".{name}"))
    assert difference(base.as_dict(), recipe.as_dict()) == [] and variant.guide == name
    assert shown_to(f"cft-paper.{name}") == Shown(name, "")


def test_variants_of_three_regions():
    for base in ("three-regions", "region-head"):
        assert shown_to(base) == Shown("kept", "class")
        for rest in OF_REGIONS:
            assert varied(f"{base}.{rest}")[0].objective.rest == rest
    with pytest.raises(ValueError, match="cft has no rest that 'kept' could change"):
        varied("cft.kept")


def test_variants_of_heads():
    settings = read_settings("closed", shares={"demo": {"cft+": 0.5, "cft+.no-align": 0.3}})
    base, found = (recipe_of(f"relevance-head{name}", "demo", settings, 0)[0] for name in ("", ".concepts"))
    assert difference(base.as_dict(), found.as_dict()) == ["objective.look.inside"] and base.rate < 1 == base.average
    assert shown_to("relevance-head.concepts") == Shown("kept", "class") and shown_to("swap-head") == Shown("", "class")
    assert shown_to("relevance-head.annotated").objects == "annotated"
    after, alone = (recipe_of(f"cft+.{name}after-head", "demo", settings, 0)[0] for name in ("", "no-align-"))
    assert after.first.objective.form == alone.first.objective.form == "relevance-head"
    assert (after.objective.weights.align, alone.objective.weights.align) == (0.8, 0)
    shares = [recipe_of(name, "demo", settings, 0)[0].average for name in ("cft+", "cft+.after-head", "cft+.no-align")]
    assert shares == [0.5, 0.5, 0.3], "a variant has the share, and the rate, of its method, unless it has its own"


def test_variants_of_the_rivals():
    paper = read_settings("paper")
    rate = lambda method: recipe_of(method, VIT, paper, 0)[0].rate
    assert rate("gradmask.table8") == 1e-3 and rate("gradmask") == 2e-6
    assert not recipe_of("gradmask.constant", VIT, paper, 0)[0].objective.second_order
    rrr = recipe_of("rrr.table8", VIT, paper, 0)[0].objective
    assert (rrr.weight, rrr.classify) == (8e-10, 2e-6)
    assert rate("cft-paper.rate-x6") == pytest.approx(3e-6)
    recipe = recipe_of("cft-paper", VIT, paper, 3)[0]
    found = (recipe.rate, recipe.epochs, recipe.batch, recipe.weight_decay, recipe.decay, recipe.decays)
    assert found == (5e-7, 50, 8, 1e-4, 0.85, 25) and recipe.seed == 7003


def test_every_method_of_every_artefact_has_a_recipe():
    paper = read_settings("paper")
    of_paper = [a for a in ARTEFACTS if a.key not in OURS]
    for profile, settings, artefacts in ((DEMO, DEMO_SETTINGS, (*of_paper, artefact("demo"))), (PAPER, paper, of_paper),
                                         (in_our_form(DEMO), DEMO_SETTINGS, of_paper),
                                         (DEMO, read_settings("closed"), [artefact("closed")])):
        wanted = {t for a in artefacts for t in needed(a, profile)[0]}
        assert wanted and all(recipe_of(method, model, settings, seed)[0].rate > 0 for model, method, seed in wanted)
    assert {m.partition(".")[2] for m in PAPER.methods.values()} - {""} <= set(VARIANTS)
    assert {m.partition(".")[0] for m in PAPER.methods.values()} - {"original"} <= set(RECIPES)


@pytest.mark.parametrize("method, model, message", [
    ("cft.sideways", "demo", "no method 'cft.sideways'"), ("sgd", "demo", "no method 'sgd'"),
    ("plain.no-concept", "demo", "plain has no weights that 'no-concept' could change"),
    ("cft+", VIT, r"no learning rate for cft\+ on vit_base_patch16_224; set rates")])
def test_bad_methods(method, model, message):
    settings = DEMO_SETTINGS if model == "demo" else read_settings("paper")
    with pytest.raises(ValueError, match=message):
        recipe_of(method, model, settings, 0)


def test_a_name_stands_for_a_recipe_without_settings():
    recipe, variant = varied("cft+.no-align")
    assert recipe.objective.weights.align == 0 and recipe.average == RECIPES["cft+"].average and variant.guide == "kept"
    assert varied("cft.object")[0].objective.needs == {"object"}


@pytest.mark.parametrize("method, shown", [
    ("plain", Shown("", "")), ("rrda", Shown("", "annotated")), ("cft", Shown("kept", "")),
    ("cft.object", Shown("", "annotated")), ("cft.strict", Shown("strict", "")), ("cft+", Shown("kept", "class")),
    ("cft+.annotated", Shown("annotated", "annotated"))])
def test_which_masks_a_method_is_shown(method, shown):
    assert shown_to(method) == shown


def test_concepts_by_question():
    classes = (ClassName("a", "a cat"), ClassName("b", "a bus"))
    shares = [("a", "tail", ["important"]), ("b", "road", ["around"]), ("a", "road", ["important", "around"]),
              ("a", "animal", ["superclass"])]
    found = lambda *kinds: {(c, t) for c, t in given_by(ConceptSet(classes, merge(shares)), kinds).pairs()}
    assert found("important") == {("a", "tail"), ("a", "road")}
    assert found("important", "around") == {("a", "tail"), ("a", "road"), ("b", "road")}
    assert found("superclass") == {("a", "animal")}
    assert found("important", "superclass") == {("a", "tail"), ("a", "road"), ("a", "animal")}
