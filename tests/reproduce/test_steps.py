"""Steps: what is made again and what is not, on steps that only pretend; and the paper's own steps on a small world."""
import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cft.concepts.filters import ConceptSet
from cft.concepts.masks import CONTROLS
from cft.concepts.store import MaskStore
from cft.data.backdrop import CLASSES
from cft.data.testsets import synsets
from cft.files import read_json
from cft.reproduce.paper import PAPER
from cft.reproduce.settings import Work, read_settings, rows_file
from cft.reproduce.steps import Notes, PaperSteps, Step, failure_file, file_name, in_order, listing, make_steps, undone
from cft.reproduce.variants import GUIDES, guide_concepts
from cft.train import loop

# ---- any steps ----


class Kitchen:
    """Steps that write what they read into a file, and say in `made` that they ran; those in `broken` fail."""
    def __init__(self, root):
        self.root, self.made, self.broken, self.salt = root, [], set(), ""

    def step(self, name, *needs, writes=(), **more):
        writes = (f"{name}.txt", *writes)

        def make(item):
            self.made.append(item)
            if item in self.broken:
                raise ValueError(f"no {item} today")
            read = [(self.root / f"{need.item[0]}.txt").read_text() for need in needs]
            for file in (*writes, *more.get("records", ())):
                (self.root / file).write_text(f"{item} of {', '.join(read) or 'nothing'}{self.salt}")

        return Step(more.pop("kind", "cook"), (name,), writes, make, needs=needs, **more)

    def run(self, *steps):
        """The names that are made, and whether all are done."""
        self.made.clear()
        return make_steps(in_order(steps), self.root), list(self.made)

    def undone(self, *steps):
        return [step.item[0] for step in undone(steps, Notes(self.root))]


@pytest.fixture
def kitchen(tmp_path):
    return Kitchen(tmp_path)


def test_of_one_name_there_is_one_step(kitchen):
    one, same, other = kitchen.step("a"), kitchen.step("a", depends={"x": 1}), kitchen.step("b")
    assert one == same != other and len({one, same, other}) == 2 and one != "cook a"
    assert (one.name, file_name("evaluate a/b cft 0")) == ("cook a", "evaluate--a_b--cft--0")


def test_in_order_each_comes_after_what_it_needs(kitchen):
    a, b = kitchen.step("a"), kitchen.step("b", kind="bake")
    c, d = kitchen.step("c", a, kind="bake"), kitchen.step("d", a, b)
    e = kitchen.step("e", d, a)
    order = [step.item[0] for step in in_order([e, c])]
    assert order == ["b", "a", "c", "d", "e"]  # by levels, and within one by kinds
    assert in_order([]) == []


def test_what_has_changed_is_made_again_and_nothing_else(kitchen):
    def menu(**changes):
        made = {}
        for name, needs in {"a": (), "b": (), "ab": ("a", "b"), "abc": ("ab",), "bc": ("b",)}.items():
            depends = {"heat": changes.get(name, 1)}
            made[name] = kitchen.step(name, *(made[need] for need in needs), depends=depends)
        return [made["abc"], made["bc"]]

    root = kitchen.root
    assert kitchen.undone(*menu()) == ["a", "b", "ab", "bc", "abc"]
    assert kitchen.run(*menu()) == (True, ["a", "b", "ab", "bc", "abc"]) and not kitchen.undone(*menu())
    assert kitchen.run(*menu()) == (True, [])
    (root / "a.txt").touch()
    assert not kitchen.undone(*menu()), "dates do not count"
    assert kitchen.undone(*menu(bc=2)) == ["bc"] and kitchen.undone(*menu(a=2)) == ["a", "ab", "abc"]
    assert kitchen.run(*menu(a=2)) == (True, ["a"]), "what came out the same redoes nothing"
    kitchen.salt = "!"
    assert kitchen.run(*menu(a=3)) == (True, ["a", "ab", "abc"]), "what came out otherwise does"
    (root / "b.txt").unlink()
    assert kitchen.run(*menu(a=3))[1] == ["b", "ab", "bc", "abc"]
    (root / "bc.txt").write_text("sand")
    assert kitchen.run(*menu(a=3)) == (True, ["bc"])
    for broken in ("", "{", "[]", '{"depends": 1}'):
        (root / "steps/cook--bc.json").write_text(broken)
        assert kitchen.undone(*menu(a=3)) == ["bc"], broken
    assert kitchen.run(*menu(a=3)) == (True, ["bc"])


def test_steps_that_were_not_asked_for_are_not_made(kitchen):
    first = kitchen.step("a")
    second = kitchen.step("b", first)
    assert make_steps([second], kitchen.root) is False and not kitchen.made and not list(kitchen.root.iterdir())
    assert kitchen.run(second)[0] and make_steps([second], kitchen.root)


def test_what_is_noted(kitchen):
    first = kitchen.step("a", depends={"pair": (1, 2)})
    second = kitchen.step("b", first, folder="b", records=("b.log",))
    kitchen.run(second)
    notes = Notes(kitchen.root)
    note = json.loads((kitchen.root / "steps/cook--b.json").read_text())
    digest = hashlib.sha256((kitchen.root / "a.txt").read_bytes()).hexdigest()
    assert note["step"] == "cook b" and note["reads"] == {"cook a": {"a.txt": digest}} and note["seconds"] >= 0
    assert set(note["writes"]) == {"b.txt", "b"} and notes.read(first)["depends"] == {"pair": [1, 2]}
    lines = [json.loads(line)["step"] for line in (kitchen.root / "done.jsonl").read_text().splitlines()]
    assert lines == ["cook a", "cook b"]
    third = kitchen.step("c", second)
    kitchen.run(third)
    (kitchen.root / "b.log").unlink()
    assert kitchen.undone(third) == ["b", "c"] and kitchen.run(third)[1] == ["b"], "records are not what others read"
    (kitchen.root / "b").mkdir()
    (kitchen.root / "b/new.png").write_bytes(b"1")
    assert kitchen.run(third) == (True, ["b"]) and not (kitchen.root / "b/new.png").exists()


def test_a_folder_by_names_and_sizes(tmp_path):
    seen = [listing(tmp_path)]
    for name, content in (("deep/a", b"1"), ("deep/a", b"12"), ("deep/b", b""), ("c", b"")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        seen.append(listing(tmp_path))
    assert len(set(seen)) == 5 and seen[-1].startswith("3 files, ") and listing(tmp_path / "none") == seen[0]


def test_outdated_files_are_removed_and_unfinished_ones_are_kept(kitchen):
    step = kitchen.step("a", folder="more", records=("a.log",))
    Notes(kitchen.root).clear(step)
    (kitchen.root / "more").mkdir()
    (kitchen.root / "more/state.pt").write_bytes(b"half")
    kitchen.run(step)
    assert (kitchen.root / "more/state.pt").exists(), "it goes on from there"
    Notes(kitchen.root).clear(step)
    assert [p.name for p in kitchen.root.rglob("*") if p.is_file()] == ["done.jsonl"]


def test_failures_are_noted_and_forgotten_and_stop_only_what_needs_them(kitchen, capsys):
    a, b = kitchen.step("a"), kitchen.step("b")
    c, d = kitchen.step("c", a), kitchen.step("d", b)
    kitchen.broken = {"a"}
    assert kitchen.run(c, d) == (False, ["a", "b", "d"])
    note = read_json(failure_file(kitchen.root, "cook a"))
    assert (note["step"], note["error"], note["cell"]) == ("cook a", "ValueError: no a today", None)
    assert note["traceback"][-1] == note["error"] and len(note["traceback"]) <= 12
    assert "Traceback" in capsys.readouterr().err and len(list((kitchen.root / "failed").iterdir())) == 1
    kitchen.broken = set()
    assert kitchen.run(c, d) == (True, ["a", "c"]) and not list((kitchen.root / "failed").iterdir())


def test_a_page_says_which_cell_failed_and_how(kitchen):
    class CellError(Exception):
        exec_count, ename, evalue = 4, "ValueError", "no rows"

    def make(key):
        raise CellError("\x1b[31mIn [4]\x1b[0m")

    assert not make_steps([Step("page", ("table1",), ("p.ipynb",), make)], kitchen.root)
    note = read_json(failure_file(kitchen.root, "page table1"))
    assert (note["error"], note["cell"]) == ("ValueError: no rows", 4) and "In [4]" in note["traceback"][-1]
    assert "\x1b" not in "".join(note["traceback"])


def test_a_step_that_leaves_nothing_has_failed(kitchen):
    step = Step("idle", (), ("x.txt",), lambda: None, records=("y.txt",))
    assert not make_steps([step], kitchen.root)
    assert read_json(failure_file(kitchen.root, "idle"))["error"] == "RuntimeError: idle ended and left no x.txt"


def test_steps_of_one_kind_are_made_at_once_and_one_by_one_where_that_fails(kitchen):
    asked = []

    def at_once(steps):
        asked.append([step.item[0] for step in steps])
        for step in steps:
            step.make(*step.item)

    steps = [kitchen.step(name, at_once=at_once) for name in "abc"]
    assert kitchen.run(*steps[:2]) == (True, ["a", "b"]) and asked == [["a", "b"]]
    assert kitchen.run(*steps) == (True, ["c"]) and asked == [["a", "b"]], "one alone is made alone"
    for name in "abc":
        (kitchen.root / f"{name}.txt").unlink()
    kitchen.broken = {"b"}
    fine, made = kitchen.run(*steps)
    assert not fine and asked[1:] == [["a", "b", "c"]] and set(made) == {"a", "b", "c"}
    assert kitchen.undone(*steps) == ["b"], "one of them stops no other"
    assert len((kitchen.root / "done.jsonl").read_text().splitlines()) == 5


# ---- the steps of the paper, which only pretend ----


class Pretended:
    """The steps of some work, that write down what they were made from in place of making anything."""
    def __init__(self, root, **changes):
        self.root, self.changes, self._known = root, changes, {}

    def steps(self, work, keys):
        paper = PaperSteps(work, self.root)
        self._known = {}
        return paper, [self.faked(step) for key in keys for step in paper.of_page(key)]

    def faked(self, step):
        if step not in self._known:
            needs = tuple(map(self.faked, step.needs))

            def make(*_):
                made = json.dumps([step.name, Notes(self.root).made_from(replace(step, needs=needs))])
                for name in (*step.writes, *step.records):
                    (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.root / name).write_text(made)

            self._known[step] = replace(step, make=make, needs=needs, at_once=None)
        return self._known[step]

    def redone(self, work, keys):
        """The names of the steps that are made for some pages now."""
        _, steps = self.steps(work, keys)
        todo = undone(steps, Notes(self.root))
        lines = self.root / "done.jsonl"
        before = len(lines.read_text().splitlines()) if lines.is_file() else 0
        assert make_steps(todo, self.root)
        made = [json.loads(line)["step"] for line in lines.read_text().splitlines()[before:]]
        assert len(set(made)) == len(made) and set(made) == {step.name for step in todo}
        return set(made)


def starting(names, *starts):
    return {name for name in names if name.startswith(starts)}


KEYS = ("fig1", "table2", "table3", "thresholds")


def test_a_changed_setting_redoes_what_depends_on_it(tmp_path):
    fake, base = Pretended(tmp_path), read_settings("smoke")
    rates = base.rates["demo"]
    redo = lambda **changes: fake.redone(Work(base.model_copy(update=changes)), KEYS)
    everything = redo()
    assert len(starting(everything, "fine-tune")) == len(Work(base, KEYS).tuned())
    assert len(starting(everything, "evaluate")) == len(Work(base, KEYS).tested())
    assert redo() == set()
    idle = {"stamp": "X", "device": "cuda", "workers": 3, "together": 1, "seeds": 1, "names": {"demo": "x"}}
    assert redo(**idle) == set(), "what decides about no number redoes nothing"
    rrr = starting(everything, "fine-tune demo rrr ", "evaluate demo rrr ")
    assert redo(rates={"demo": rates | {"rrr": 1.0}}) == rrr and len(rrr) == 4
    assert redo() == rrr, "and back again"
    tuned = {name for name in starting(everything, "fine-tune", "evaluate", "maps") if " original " not in name}
    for change in ({"epochs": 2}, {"batch": 4}, {"precision": "bf16"}):
        assert redo(**change) == tuned and redo() == tuned, change
    sets = starting(everything, "concept-set", "guide")
    assert redo(kinds=("important", "around")) == sets | tuned and redo() == sets | tuned
    guides = starting(everything, "guide")
    assert redo(per_class=2) == guides | tuned and redo() == guides | tuned
    assert redo(pool=9) == everything - {"concepts"} == redo()  # the pictures are others
    rows = starting(everything, "evaluate")
    classes = redo(classes=5)
    assert classes == guides | tuned | rows == redo()  # the rows of the original are split by the classes


def test_other_networks_redo_their_rows_and_no_masks(tmp_path, monkeypatch):
    """A base that changes, or is trained, redoes all that was measured on it, the original's rows included."""
    fake, base = Pretended(tmp_path), read_settings("smoke")
    everything = fake.redone(Work(base), KEYS)
    below = starting(everything, "fine-tune", "evaluate", "maps")
    with monkeypatch.context() as patch:
        patch.setattr(PaperSteps, "start_digest", lambda self, model, seed: "another")
        assert fake.redone(Work(base), KEYS) == below and starting(below, "evaluate demo original")
    assert fake.redone(Work(base), KEYS) == below
    trained = Work(base.model_copy(update={"bases": "trained"}))
    assert fake.redone(trained, KEYS) == below | {"base 0"}


@pytest.fixture
def imagenet(tmp_path):
    """Settings whose places exist: training pictures of the classes that are drawn, sets, weights and answers."""
    place = lambda name: tmp_path / "data" / name
    models = ("vit_base_patch16_224", "deit3_base_patch16_224")
    files = {f"{model}.pth": model for model in models}
    for name in synsets():
        place(f"train/{name}").mkdir(parents=True)
    for key in PAPER.sets.values():
        (place(key) / "a").mkdir(parents=True)
        (place(key) / "a/1.JPEG").write_bytes(b"1")
    for name in (*files, "answers.jsonl"):
        place(name).write_bytes(b"1")
    return read_settings("paper", classes=3, seeds=2, shards=2, train=place("train"), answers=place("answers.jsonl"),
                         weights={model: place(name) for name, model in files.items()},
                         sets={key: place(key) for key in PAPER.sets.values()})


def test_a_changed_file_redoes_what_depends_on_it(imagenet, tmp_path):
    fake, keys = Pretended(tmp_path / "run"), ("table1", "table3", "table5", "fig1")
    work = Work(imagenet, models=("ViT-B", "DeiT"), methods=("CFT", "RRDA", "GSAM-class"))
    redo = lambda: fake.redone(work, keys)
    everything = redo()
    assert redo() == set() and len(starting(everything, "fine-tune")) == len(work.tuned(*keys))
    assert starting(everything, "ground") == {"ground all 0", "ground all 1"} and not starting(everything, "world")
    # the weights of a network: all that was measured on it
    imagenet.weights["vit_base_patch16_224"].write_bytes(b"12")
    vit = starting(everything, *(f"{kind} vit_base_patch16_224" for kind in ("fine-tune", "evaluate", "maps")))
    assert redo() == vit and "evaluate vit_base_patch16_224 original 0 in-v" in vit
    # a picture of a test set: the numbers on this set, of every checkpoint, and its maps
    (imagenet.sets["in-a"] / "a/2.JPEG").write_bytes(b"1")
    assert redo() == {name for name in starting(everything, "evaluate", "maps") if name.endswith(" in-a")}
    # a picture to train on: all masks, and what was fine-tuned with them, but not the original
    world = PaperSteps(work, tmp_path / "run").world
    (imagenet.train / world.names[world.tuned(1)[0]] / "new.JPEG").write_bytes(b"1")
    untouched = {name for name in everything if " original " in name} | {"concepts"}
    assert redo() == everything - untouched
    other = next(name for k, name in enumerate(world.names) if k not in {*world.tuned(0), *world.tuned(1)})
    (imagenet.train / other / "new.JPEG").write_bytes(b"1")
    assert redo() == set(), "nobody looks at this class"
    # an answer of the language model
    imagenet.answers.write_bytes(b"12")
    assert redo() == everything - untouched | {"concepts"}
    # more seeds: the original has rows for each
    more = fake.redone(Work(imagenet.model_copy(update={"seeds": 3}), models=work.models, methods=work.methods), keys)
    assert starting(everything, "evaluate vit_base_patch16_224 original") <= more
    assert not starting(more, "fine-tune vit_base_patch16_224 original")


def test_what_the_steps_of_the_paper_need(imagenet, tmp_path):
    drawn, vit = PaperSteps(Work(read_settings("smoke")), tmp_path), "vit_base_patch16_224"
    paper = PaperSteps(Work(imagenet.model_copy(update={"shards": 64})), tmp_path)
    needs = lambda step: {need.name for need in step.needs}
    assert needs(drawn.evaluate("demo", "original", 0, "val")) == {"world 0"}
    assert needs(drawn.evaluate("demo", "cft", 0, "val")) == {"world 0", "fine-tune demo cft 0"}
    assert needs(drawn.fine_tune("demo", "plain", 0)) == {"guide 0 kept"}, "the pictures are those of the kept masks"
    assert needs(drawn.fine_tune("demo", "cft-paper.strict", 0)) == {"guide 0 kept", "guide 0 strict"}
    assert needs(drawn.fine_tune("demo", "cft+", 0)) == {"guide 0 kept", "guide 0 class"}
    assert needs(drawn.guide(0, "random")) == {"concept-set 0 kept", "guide 0 kept", "guide 0 class"}
    assert needs(drawn.guide(0, "strict")) == {"concept-set 0 kept", "concept-set 0 strict"}
    assert needs(drawn.guide(0, "class")) == needs(drawn.guide(0, "annotated")) == {"concept-set 0 kept"}
    assert needs(drawn.concept_set("0", "kept")) == {"concepts", "ground 0 0"}
    assert drawn.fine_tune("demo", "cft", 0) is drawn.fine_tune("demo", "cft", 0), "made once"
    assert not paper.evaluate(vit, "original", 0, "in-a").needs
    on_gpu = [paper.evaluate(vit, "cft", 0, "in-a"), paper.fine_tune(vit, "cft", 0), paper.ground("all", 3)]
    assert all(step.gpu for step in on_gpu) and not paper.guide(0, "kept").gpu and not drawn.ground("0", 0).gpu
    assert len(paper.concept_set("all", "kept").needs) == 65
    assert needs(paper.fine_tune(vit, "cft-paper.class", 2)) == {"guide 2 class", "guide 2 kept"}
    assert {"concept-set all strict", "concept-set all loose", "concept-set all kept"} <= {
        step.name for step in paper.of_page("thresholds")}
    agreement = PaperSteps(Work(read_settings("demo"), ("demo",)), tmp_path).of_page("demo")
    assert {f"guide {seed} {guide}" for seed in range(5) for guide in ("kept", "class")} <= {s.name for s in agreement}
    with pytest.raises(ValueError, match="runs on the drawn world only"):
        paper.drawn.draw(0)


# ---- the steps of the paper, on a small world ----


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small drawn world, up to its masks."""
    root = tmp_path_factory.mktemp("drawn")
    settings = read_settings("smoke", pool=6, per_class=2, test_per_class=1, segmentation_per_class=1)
    steps = PaperSteps(Work(settings), root)
    assert make_steps(in_order(steps.guide(0, guide) for guide in (*GUIDES, *CONTROLS, "class", "annotated")), root)
    return steps


def make(steps, *wanted):
    return make_steps(in_order(wanted), steps.root)


@pytest.mark.slow
def test_guides_are_nested_as_their_thresholds_are(drawn):
    pairs = {guide: set(ConceptSet.load(drawn.root / f"kept/0/{guide}.json").pairs()) for guide in GUIDES}
    tuned = {list(CLASSES)[k] for k in drawn.world.tuned(0)}
    assert pairs["strict"] <= pairs["kept"] <= pairs["loose"] <= pairs["unvalidated"]
    assert pairs["strict"] < pairs["unvalidated"]
    assert pairs["kept"] < pairs["superclasses"] and pairs["kept"] < pairs["context"]
    # the rule itself, on every pair: in how many pictures of its class a concept was found
    store = MaskStore(drawn.root / "store/0")
    found = store.table()
    for class_id, text in (pair for pair in pairs["unvalidated"] if pair[0] in tuned):
        of = found[(found["class_id"] == class_id) & (found["phrase"] == text)]
        share = (of["area"] > 0).sum() / of["picture"].nunique()
        have = [(class_id, text) in pairs[guide] for guide in ("kept", "strict")]
        assert have == [share >= 0.15, share >= 0.40], (class_id, text, share)
    with pytest.raises(ValueError, match="guide must be one of"):
        guide_concepts(store, ConceptSet.load(drawn.root / "concepts.json"), "class", ("important",), 6)


def test_all_guides_have_the_same_pictures_and_masks_of_their_own(drawn):
    notes = {guide: read_json(drawn.root / f"guides/0/{guide}.json") for guide in (*GUIDES, "class", "annotated")}
    assert len({tuple(note["pictures"]) for note in notes.values()}) == 1 and len(notes["kept"]["pictures"]) == 12
    first = notes["kept"]["pictures"][0].rsplit(".", 1)[0]
    mask = lambda guide: np.asarray(Image.open(drawn.root / f"guides/0/{guide}/{first}.png"))
    area = {guide: (mask(guide) > 0).sum() for guide in (*GUIDES, "class")}
    assert area["strict"] <= area["kept"] <= area["unvalidated"] and area["kept"] < area["superclasses"]
    assert area["kept"] <= area["context"] and not (drawn.root / "guides/0/annotated").exists()
    assert 0.2 < notes["kept"]["agreement"] < 1 and "agreement" not in notes["annotated"]
    assert notes["class"]["concepts"] == {} and notes["kept"]["concepts"]["pairs"] > 0


@pytest.mark.slow
def test_controls_are_made_of_the_masks_that_others_are_shown(drawn):
    pictures = read_json(drawn.root / "guides/0/kept.json")["pictures"]
    place = lambda guide, picture: (drawn.root / "guides/0" / guide / picture).with_suffix(".png")
    mask = lambda guide, picture: np.asarray(Image.open(place(guide, picture))) > 0
    for picture in pictures:
        concepts, objects = mask("kept", picture), mask("class", picture)
        assert (mask("body", picture) == (objects & ~concepts)).all()
        assert mask("ellipse", picture).sum() == mask("shuffled", picture).sum() == concepts.sum()
        part = mask("random", picture)
        assert part.sum() == min(concepts.sum(), objects.sum()) and not (part & ~objects).any()


def test_a_step_done_twice_gives_equal_bytes(drawn, tmp_path):
    def made(root):
        steps = PaperSteps(drawn.work, root)
        wanted = (steps.evaluate("demo", "cft", 0, "val"), steps.maps("demo", "cft", 0, "adversarial"))
        assert make(steps, *wanted)
        return wanted

    made(drawn.root)
    for step in in_order(made(tmp_path)):
        for name in step.writes:
            one, two = drawn.root / name, tmp_path / name
            if name.endswith(".parquet"):
                pd.testing.assert_frame_equal(pd.read_parquet(one), pd.read_parquet(two))
            elif name.endswith(".npz"):
                a, b = np.load(one), np.load(two)
                assert set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a)
            else:
                assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("method, masks", [
    ("plain", set()), ("cft-paper.best", {"mask"}), ("gradmask", {"object"}), ("cft.class", {"mask"}),
    ("cft.object", {"object"}), ("cft+", {"mask", "object"})])
def test_what_a_method_is_shown(drawn, method, masks):
    images = drawn.training_images(drawn.world.network("demo", 0), "demo", method, 0)
    assert {key for key in ("mask", "object") if key in images[0]} == masks and len(images) == 12


def test_masks_are_those_of_the_guide(drawn):
    folder = lambda method: drawn.training_images(drawn.world.network("demo", 0), "demo", method, 0).folder
    places = {"cft": "guides/0/kept", "cft.strict": "guides/0/strict", "cft.annotated": "worlds/0/masks/train"}
    for method, place in places.items():
        assert all((drawn.root / place) in sample.mask.parents for sample in folder(method).samples)
    objects = {"rrda": "worlds/0/objects/train", "cft+": "guides/0/class", "cft+.annotated": "worlds/0/objects/train"}
    for method, place in objects.items():
        assert all((drawn.root / place) in sample.object.parents for sample in folder(method).samples)


@pytest.mark.slow
def test_the_same_run_is_not_done_twice(drawn, monkeypatch):
    """Other thresholds that keep the same concepts ask for the same run; without augmentation it is another one."""
    tune = lambda method: drawn.fine_tune("demo", method, 0)
    assert make(drawn, tune("cft-paper"), tune("cft-paper.no-augmentation"))
    trained, step = [], loop._step
    monkeypatch.setattr(loop, "_step", lambda *a: trained.append(a) or step(*a))
    pngs = lambda guide: sorted((p.name, p.read_bytes()) for p in (drawn.root / f"guides/0/{guide}").rglob("*.png"))
    for method, guide in (("cft-paper.loose", "loose"), ("cft-paper.class", "class")):
        trained.clear()
        assert make(drawn, tune(method))
        assert bool(trained) == (pngs(guide) != pngs("kept")) == (guide == "class")
    methods = ("cft-paper", "cft-paper.loose", "cft-paper.no-augmentation")
    own, other, plain = (drawn.root / f"models/demo/{method}/0" for method in methods)
    for name in ("model.safetensors", "record.json", "README.md"):
        assert (own / name).read_bytes() == (other / name).read_bytes()
    a, b = (read_json(run / "record.json") for run in (own, plain))
    assert {key for key in a if a[key] != b[key]} - {"seconds", "epochs", "provenance"} == {"augment"}


def test_steps_that_cannot_be_made_say_why_and_leave_nothing(drawn):
    steps = [drawn.evaluate("demo", "cft.sideways", 0, "val"), drawn.maps("demo", "original", 0, "segmentation")]
    assert not make(drawn, *steps)
    told = lambda step: read_json(failure_file(drawn.root, step.name))["error"]
    assert "no method 'cft.sideways'" in told(steps[0].needs[0]) and "segmentation has none" in told(steps[1])
    assert not failure_file(drawn.root, steps[0].name).exists(), "it was not tried"
    assert not (drawn.root / "models/demo/cft.sideways").exists()
    assert not (drawn.root / rows_file("demo", "cft.sideways", 0, "val")).exists()


@pytest.mark.parametrize("note", ["", "[]", "{", '{"step": "x"}', '{"writes": []}', '{"writes": {"soup.txt": 3}}'])
def test_a_damaged_note_is_no_note(kitchen, note):
    soup = kitchen.step("soup")
    kitchen.run(soup)
    Notes(kitchen.root).file(soup).write_text(note)
    assert Notes(kitchen.root).read(soup) == {} and kitchen.undone(soup) == ["soup"]
    assert kitchen.run(soup) == (True, ["soup"]) and not kitchen.undone(soup)
