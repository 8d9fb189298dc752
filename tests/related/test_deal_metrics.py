"""DEAL's metrics against slow references, the released bugs against what they do, part masks, a small experiment."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from chapters import from_chapter
from PIL import Image
from torch import nn

from cft.data import backdrop
from cft.data.backdrop import CLASSES
from cft.data.folders import Preprocess
from cft.data.models import write_safetensors
from cft.evaluate.faithfulness import widen
from cft.files import read_json, sha256, write_json
from cft.related import deal
from cft.related import deal_metrics as metrics
from cft.related.deal import DUAL, as_classifier, demo_prompts, dual_encoder
from cft.related.deal_metrics import DualSteps, disentanglability, insertion_scores, part_table, pixels
from cft.reproduce.paper import claims
from cft.reproduce.settings import Work, read_settings
from cft.reproduce.steps import Notes, in_order, make_steps, undone

torch.set_num_threads(1)
TRAINING = ("_PARTS", "_OF_PART", "_OF_CLASS", "_HAS", "Lesson", "_caption", "Lessons", "balanced", "make_dual",
            "save_dual")
*_, Lessons, balanced, make_dual, save_dual = from_chapter("related/03_deal.ipynb", deal, *TRAINING)
miniature_parts, selected_rate = from_chapter("related/04_deal_metrics.ipynb", metrics, "miniature_parts",
                                              "selected_rate")

def generator(seed=0):
    return torch.Generator().manual_seed(seed)

@pytest.fixture(scope="module")
def dual():
    return dual_encoder()

# ---- apart ----

def test_disentanglability_is_the_logistic_of_the_notebook():
    one = torch.zeros(49)
    one[:6] = 1
    found = disentanglability(one.view(7, 7).expand(3, 5, 7, 7))
    assert found.overlap == 6 * 10 and found.value == pytest.approx(1 / (1 + math.exp(-10 * (0.2 - 0.6))))
    assert (found.grid, found.concepts, found.pictures) == ((7, 7), 5, 3)
    nothing = disentanglability(torch.eye(49).view(1, 49, 7, 7)[:, :5])
    assert nothing.overlap == 0 and nothing.value == pytest.approx(1 / (1 + math.exp(-2)))
    assert nothing.minus(found) == pytest.approx(nothing.value - found.value)

@pytest.mark.parametrize("shape", [(1, 5, 8, 8), (1, 4, 7, 7)])
def test_other_grids_are_not_compared(shape):
    with pytest.raises(ValueError, match=r"depends on the grid and the number of concepts: expected \(7, 7\) and 5"):
        disentanglability(torch.rand(1, 5, 7, 7)).minus(disentanglability(torch.rand(*shape)))

# ---- insertion ----

class Watcher(nn.Module):
    """A dual encoder that keeps what it is shown; its embedding depends on every channel and place."""
    def __init__(self, size=16):
        super().__init__()
        self.seen, self.weights = [], torch.randn(4, 3 * size * size, generator=generator(9), dtype=torch.float64)

    def encode_image(self, x):
        self.seen.append(x.clone())
        return x.flatten(1) @ self.weights.T

def slow_insertion(model, images, texts, maps, steps, buggy):
    """Pair by pair and pixel by pixel, as the text of the metric says, or as the released notebook does."""
    n, k, height, width = len(images), maps.shape[1], *images.shape[2:]
    scores = torch.zeros(n, k, steps, dtype=torch.float64)
    cosine = lambda x, t: float(F.cosine_similarity(x.flatten()[None] @ model.weights.T, t[None]))
    for pair in range(n * k):
        i, j = divmod(pair, k)
        picture = images[pair % n] if buggy else images[i]
        small = F.interpolate(picture[None], scale_factor=0.5, mode="bilinear", align_corners=False)
        canvas = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0]
        large = F.interpolate(maps[i, j][None, None], (height, width), mode="bicubic", align_corners=False)[0, 0]
        ranked = sorted(range(height * width), key=lambda p: -large.flatten()[p].item())
        start, end = cosine(canvas, texts[i, j]), cosine(picture, texts[i, j])
        for step in range(1, steps + 1):
            mixed = canvas.clone()
            for p in ranked[:step * height * width // steps]:
                for channel in range(1 if buggy else 3):
                    mixed[channel, p // width, p % width] = picture[channel, p // width, p % width]
            scores[i, j, step - 1] = min(1.0, abs(cosine(mixed, texts[i, j]) - start) / abs(end - start))
    return scores

@pytest.mark.parametrize("buggy", [False, True])
def test_insertion_is_what_the_loops_say(buggy):
    images = torch.randn(3, 3, 16, 16, generator=generator(1), dtype=torch.float64)
    maps = torch.rand(3, 2, 4, 4, generator=generator(2), dtype=torch.float64)
    texts, model = torch.randn(3, 2, 4, generator=generator(3), dtype=torch.float64), Watcher()
    ours = insertion_scores(model, images, texts, maps, bug_compatible=buggy, batch=4)
    slow = slow_insertion(model, images, texts, maps, 5, buggy)
    assert torch.allclose(ours, slow, atol=1e-9)
    assert metrics.localizability(ours) == pytest.approx(slow.mean().item())
    assert insertion_scores(model, images, texts, maps, steps=3).shape == (3, 2, 3)

def test_the_full_picture_scores_one_and_all_channels_come_back():
    images = torch.randn(2, 3, 16, 16, generator=generator(4), dtype=torch.float64)
    maps = torch.rand(2, 3, 4, 4, generator=generator(5), dtype=torch.float64)
    texts, model = torch.randn(2, 3, 4, generator=generator(6), dtype=torch.float64), Watcher()
    scores = insertion_scores(model, images, texts, maps)
    assert (scores[..., -1] == 1).all()
    last = model.seen[-1]
    assert torch.equal(last, images.repeat_interleave(3, 0))  # every channel, and each picture beside its own texts
    changed = (model.seen[2] != metrics.half_blur(images).repeat_interleave(3, 0)).flatten(2).sum(2)
    assert (changed == 16 * 16 // 5).all()  # the first step: a fifth of the pixels, in each of the three channels
    model.seen.clear()
    buggy = insertion_scores(model, images, texts, maps, bug_compatible=True)
    assert (buggy[..., -1] < 1).any()
    last, shown = model.seen[-1], images.repeat(3, 1, 1, 1)
    assert torch.equal(last[:, 0], shown[:, 0]) and torch.equal(last[:, 1:], metrics.half_blur(shown)[:, 1:])

def test_a_picture_without_detail_has_no_score():
    flat, texts, maps = (torch.ones(shape, dtype=torch.float64) for shape in ((1, 3, 8, 8), (1, 2, 4), (1, 2, 2, 2)))
    scores = insertion_scores(Watcher(8), flat, texts, maps)
    assert scores.isnan().all() and math.isnan(metrics.localizability(scores))

def test_insertion_refuses_what_does_not_fit():
    images, texts, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 4), torch.rand(2, 3, 2, 2)
    for bad in ((images[0], texts, maps), (images, texts[:1], maps), (images, texts, maps[:, :2]),
                (images[:1], texts, maps), (images, texts, maps[0])):
        with pytest.raises(ValueError, match="steps >= 1; got"):
            insertion_scores(Watcher(8), *bad)
    with pytest.raises(ValueError, match="and 0"):
        insertion_scores(Watcher(8), images, texts, maps, steps=0)

# ---- accuracy ----

def test_accuracy_is_the_mean_cosine_over_a_class_s_texts(dual):
    prompts = demo_prompts()
    images = pixels(backdrop.render("val", 1, 3))[:4]
    with torch.no_grad():
        rows, z = metrics.concept_rows(dual, prompts), dual.encode_image(images)
        logits = metrics.similarity_logits(dual, images, rows)
        for c in (0, 7):
            cosines = [F.cosine_similarity(z, dual.encode_text([t])) for t in prompts.evaluation()[c]]
            assert torch.allclose(logits[:, c], sum(cosines) / 5, atol=1e-6)
        named = metrics.similarity_logits(dual, images, metrics.concept_rows(dual, prompts, "name"))
        assert torch.allclose(named[:, 2], F.cosine_similarity(z, dual.encode_text(["fish"])), atol=1e-6)
        folded = as_classifier(dual, rows)
        norms = z.norm(dim=1, keepdim=True)
        assert torch.allclose(folded(images), logits * norms, atol=1e-4) and dual.visual.num_classes == 64
    with pytest.raises(ValueError, match="by must be concepts or name"):
        metrics.concept_rows(dual, prompts, "smell")

# ---- parts ----

def slow_part_iou(maps, masks, parts, part):
    both = either = pictures = 0
    for m, mask, name in zip(maps, masks, parts):
        if name == part and mask.any():
            up = F.interpolate(m[None, None].double(), mask.shape, mode="bilinear", align_corners=False)[0, 0].tolist()
            flat = [v for row in up for v in row]
            low, high = min(flat), max(flat)
            flat = [(v - low) / (high - low) for v in flat]
            found, true = [v > sum(flat) / len(flat) for v in flat], mask.flatten().tolist()
            both += sum(a and b for a, b in zip(found, true))
            either += sum(a or b for a, b in zip(found, true))
            pictures += 1
    return pictures, 100 * both / either

def test_part_iou_is_what_the_loops_say():
    maps, masks = torch.rand(6, 3, 4, generator=generator(1)), torch.rand(6, 12, 16, generator=generator(2)) > 0.7
    masks[4] = False
    parts = ["wing", "beak", "wing", "beak", "wing", "tail"]
    table = part_table(maps, masks, parts)
    assert table["part"].tolist() == ["wing", "beak", "tail"]
    for row in table.itertuples():
        pictures, iou = slow_part_iou(maps, masks, parts, row.part)
        assert row.pictures == pictures and row.iou == pytest.approx(iou)
    assert metrics.part_miou(table) == pytest.approx(table["iou"].mean())
    perfect = part_table(masks[:1].float(), masks[:1], ["wing"])
    assert metrics.part_miou(perfect) == 100
    assert math.isnan(metrics.part_miou(part_table(maps[4:5], masks[4:5], ["wing"])))
    wrong = ((maps[:2], masks, parts), (maps, masks.float(), parts), (maps, masks, parts[:3]), (maps[0], masks, parts))
    for bad in wrong:
        with pytest.raises(ValueError, match="bool masks"):
            part_table(*bad)

@pytest.mark.parametrize("kind", ["cub", "partimagenet"])
def test_miniatures_are_read(kind, tmp_path):
    root = miniature_parts(kind, tmp_path, count=3)
    found = metrics.cub_parts(root) if kind == "cub" else metrics.partimagenet(root)
    assert len(found) == 3
    image, numbers, cls = found[0]
    assert image.mode == "RGB" and numbers.shape == (image.height, image.width) and found[1][0].size != image.size
    names = {found.names[n] for n in np.unique(numbers) if n in found.names}
    if kind == "cub":
        assert cls == "black footed albatross" and names == {"head", "tail"} and len(metrics.CUB_PARTS) == 10
    else:
        assert cls == "tench" and names == {"head", "fin"} and 40 in numbers and 40 not in found.names

def test_part_sets_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no pictures in"):
        metrics.cub_parts(tmp_path)
    root = miniature_parts("partimagenet", tmp_path)
    (root / "annotations/test/n01440764_10027.png").unlink()
    with pytest.raises(ValueError, match="1 of 3 pictures have no annotation"):
        metrics.partimagenet(root)
    miniature_parts("partimagenet", tmp_path)
    (root / "annotations/test/test.json").unlink()
    with pytest.raises(ValueError, match="names of the parts"):
        metrics.partimagenet(root)
    miniature_parts("partimagenet", tmp_path)
    Image.new("RGB", (8, 8)).save(root / "images/test/dog_1.JPEG")
    Image.new("L", (9, 8)).save(root / "annotations/test/dog_1.png")
    with pytest.raises(ValueError, match="WordNet id of ImageNet, got 'dog_1.JPEG'"):
        metrics.partimagenet(root)
    root = miniature_parts("cub", tmp_path / "cub")
    Image.new("L", (9, 8)).save(sorted((root / "CUB_Parts/parts_test").iterdir())[0])
    with pytest.raises(ValueError, match="is 9 × 8 pixels; its picture is 40 × 48"):
        metrics.cub_parts(root)[0]
    with pytest.raises(ValueError, match="kind must be cub or partimagenet"):
        miniature_parts("coco", tmp_path)

def test_part_scores_ask_for_the_parts_that_are_there(dual, tmp_path):
    asked = []

    def text(cls, part):
        asked.append((cls, part))
        return f"{cls} {part}"

    small = Preprocess((64, 64), crop=1.0)
    table = metrics.part_scores(dual, metrics.cub_parts(miniature_parts("cub", tmp_path)), small, text=text)
    assert set(table["part"]) == {"head", "tail"} and (table["pictures"] == 3).all()
    assert table["iou"].between(0, 100).all()
    assert asked.count(("black footed albatross", "tail")) == 3
    empty = metrics.cub_parts(miniature_parts("cub", tmp_path))
    for file in empty.annotations:
        Image.fromarray(np.zeros(np.array(Image.open(file)).shape, np.uint8)).save(file)
    with pytest.raises(ValueError, match="expected pictures with parts"):
        metrics.part_scores(dual, empty, small)

# ---- the drawn world ----

def test_every_concept_of_the_demo_names_parts_of_its_class():
    prompts = demo_prompts()
    names = {cls: {k: part.name for k, part in enumerate(parts, 1)} for cls, parts in CLASSES.items()}
    say = lambda label, phrase: {names[prompts.classes[label]][k] for k in metrics.named_parts(label, phrase)}
    assert all(say(label, phrase) for label, concepts in enumerate(prompts.concepts) for phrase in concepts)
    for label, phrase, parts in ((0, "two folded wings", {"wing"}), (8, "dark spiral core", {"spiral core"}),
                                 (8, "spiral pattern", {"spiral", "spiral core"}), (11, "side fins", {"fins"}),
                                 (1, "jet engine under the wing", {"engine"}), (0, "whiskers", set())):
        assert say(label, phrase) == parts
    pictures = backdrop.render("val", 2, 4)
    masks = metrics.true_masks(pictures, prompts)
    beak = 1 + [p.name for p in CLASSES["bird"]].index("beak")
    assert masks.shape == (24, 5, 64, 64) and np.array_equal(masks[0, 0].numpy(), pictures.parts[0] == beak)

def test_scores_of_maps_are_those_of_the_pieces(dual):
    prompts, pictures = demo_prompts(), backdrop.render("val", 1, 8)
    table = metrics.explanation_scores(dual, prompts, pictures, "val").set_index("metric")["value"]
    maps = metrics.class_maps(dual, prompts, pixels(pictures), torch.from_numpy(pictures.labels), batch=5)
    assert maps.shape == (12, 6, 8, 8) and not maps.requires_grad
    assert table["disentanglability"] == pytest.approx(disentanglability(maps[:, 1:]).value)
    masks = metrics.true_masks(pictures, prompts)
    hits = []
    for map_, mask in zip(maps[:, 1:].flatten(0, 1), masks.flatten(0, 1)):
        if mask.any():
            row, column = divmod(int(map_.argmax()), 8)
            near = widen(mask[None], 4)[0]
            hits.append(near[8 * row:8 * row + 8, 8 * column:8 * column + 8].double().mean().item())
    assert table["pointing"] == pytest.approx(100 * sum(hits) / len(hits), rel=1e-3)
    of_parts = {f"{metric}{ending}" for metric in ("part_miou", "pointing") for ending in ("", "_swapped")}
    assert set(table.index) == {"disentanglability", "overlap", "localizability", *of_parts}
    rest = metrics.explanation_scores(dual, prompts, pictures, "val", insertion=False)
    assert set(rest["metric"]) == set(table.index) - {"localizability"}

def test_maps_are_scored_on_the_pictures_of_the_world(tmp_path):
    world = backdrop.write(tmp_path / "world", {"segmentation": 2}, seed=60003)
    drawn = backdrop.render("segmentation", 2, 60003)
    files = sorted((world / "images/segmentation").rglob("*.png"))
    assert {np.asarray(Image.open(f)).tobytes() for f in files} == {image.tobytes() for image in drawn.images}


# ---- the dual encoder ----

def test_lessons_are_true():
    lesson = Lessons(3, objects=8, scenes=4).batch(24, np.random.default_rng(0))
    assert lesson.images.shape == (24, 3, 64, 64) and lesson.true.diagonal().all()
    for j, text in enumerate(lesson.captions):
        named = [c for c in CLASSES if text.split()[0].strip(",") == c]
        if named and "with" in text:  # limited to its class
            assert lesson.labels[j] == list(CLASSES).index(named[0])
            assert not lesson.true[lesson.labels != lesson.labels[j], j].any()
    assert lesson.cover.shape == (24, 64, len(lesson.places)) and lesson.cover.min() >= 0 and lesson.cover.max() <= 1
    own = lesson.cover[lesson.places, :, range(len(lesson.places))]
    assert (own.sum(1) * 64 >= 8).all()  # a caption's part is in its picture
    again = Lessons(3, objects=8, scenes=4).batch(24, np.random.default_rng(0))
    assert torch.equal(again.images, lesson.images) and again.captions == lesson.captions

def test_balanced_is_the_sum_of_two_means():
    logits, match = torch.randn(5, 4, generator=generator(1)), torch.rand(5, 4, generator=generator(2)) > 0.6
    counts = torch.rand(5, 4, generator=generator(3)) > 0.3
    pairs = list(zip(logits.flatten().tolist(), match.flatten().tolist(), counts.flatten().tolist()))
    for among, taken in ((counts, pairs), (True, [(z, m, True) for z, m, _ in pairs])):
        loss = lambda z, m: math.log(1 + math.exp(-z if m else z))
        sides = [[loss(z, m) for z, m, counted in taken if counted and m == want] for want in (True, False)]
        assert balanced(logits, match, among).item() == pytest.approx(sum(sum(s) / len(s) for s in sides), rel=1e-5)

@pytest.mark.slow
def test_the_dual_encoder_learns_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setitem(make_dual.__globals__, "Lessons", lambda seed: Lessons(seed, objects=8, scenes=4))
    first, again = (make_dual(0, steps=2, progress=False)[0].state_dict() for _ in range(2))
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    dual, log = make_dual(0, steps=6, batch=16, progress=False)
    assert len(log) == 6 and set(log[0]) == {"captions", "presence", "places"}
    assert log[-1]["captions"] < log[0]["captions"] and not dual.training
    save_dual(tmp_path, dual, steps=6)
    assert read_json(tmp_path / "deal_dual.json")["steps"] == 6
    back = dual_encoder(tmp_path)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in dual.state_dict().items()) and not back.training
    assert torch.equal(*dual.encode_text(["bird, which has WINGS", "bird wings"]))
    assert dual.encode_text(["xyzzy"]).isfinite().all()
    (tmp_path / "deal_dual.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="with the SHA-256 in deal_dual.json"):
        dual_encoder(tmp_path)
    with pytest.raises(ValueError, match="reinstall the package"):
        dual_encoder(tmp_path / "nowhere")
    write_safetensors(tmp_path / DUAL, {"words.weight": torch.zeros(2, 2)}, {})
    write_json(tmp_path / "deal_dual.json", {"sha256": sha256(tmp_path / DUAL)})
    with pytest.raises(ValueError, match="does not fit the dual encoder"):
        dual_encoder(tmp_path)

# ---- the experiment ----

def test_variants_are_named(tmp_path):
    steps = DualSteps(Work(read_settings("demo"), ("deal",)), tmp_path)
    recipe, _ = steps.recipe("dual", "deal.released", 3)
    assert recipe.objective.detach and recipe.objective.twins == "ignored" and (recipe.seed, recipe.epochs) == (7003, 8)
    assert (recipe.objective.disentangle, recipe.objective.localise, recipe.rate) == (0.1, 0.01, metrics.DUAL_RATE)
    alone = steps.recipe("dual", "contrastive", 0)[0].objective
    assert (alone.disentangle, alone.localise, alone.detach) == (0.0, 0.0, False)
    with pytest.raises(ValueError, match="no method 'magic'"):
        steps.recipe("dual", "magic", 0)

def synthetic(shift):
    rows = []
    for m, method in enumerate(("original", *metrics.DUAL_METHODS, *metrics.RIVALS)):
        for seed in range(5):
            value = lambda base, m=m, seed=seed: base + shift[m] + 0.01 * seed
            for name in ("val", "v2", *backdrop.SHIFTED):
                rows += [(method, seed, name, split, "top1", value(50), 10) for split in ("all", "fine-tuned", "other")]
            rows.append((method, seed, "segmentation", "all", "mean_iou", value(50), 10))
            if method not in metrics.RIVALS:
                for name in ("segmentation", "adversarial"):
                    of_maps = ("disentanglability", "overlap", "part_miou", "pointing")
                    rows += [(method, seed, name, "all", metric, value(0), 10) for metric in of_maps]
                    rows += [(method, seed, name, "all", f"{metric}_swapped", 1.0, 10) for metric in of_maps[2:]]
                rows.append((method, seed, "segmentation", "all", "localizability", value(0), 10))
                rows.append((method, seed, "val", "all", "top1_by_name", value(50), 10))
    return pd.DataFrame(rows, columns=["method", "seed", "set", "split", "metric", "value", "n"])

def test_claims_have_the_sign_of_the_numbers():
    results = synthetic([0.0, -1.0, 2.0, 0.5, 1.0, -1.0, 0.0, 3.0])  # in the order of the methods
    told = metrics.deal_claims(results).set_index("claim")
    assert len(told) == len(claims("deal")) > 7 and (told["seeds"] == 5).all()
    verdict = told["verdict"].to_dict()
    assert verdict["DEAL's maps are further apart than the model's own"] == "holds"
    assert verdict["Contrastive fine-tuning brings the maps closer together"] == "holds"
    assert verdict["Without localisation accuracy at home drops"] == "contradicted"
    assert verdict["CFT from the same weights is more accurate than DEAL on adversarial backgrounds"] == "holds"
    paper = told["in the paper"]
    assert paper["DEAL's maps are further apart than the model's own"] == pytest.approx(0.397 - 0.361)
    assert paper["Without disentanglement accuracy at home drops"] == pytest.approx(60.4 - 70.8)
    parts = (15.69 + 12.73 - 10.49 - 8.79) / 2
    assert paper["DEAL's maps segment parts better than the model's own"] == pytest.approx(parts)
    assert paper[[c for c in paper.index if "CFT" in c]].isna().all()
    columns = metrics.deal_columns(results)
    specific = columns.query("column == 'specificity' and method == 'deal' and seed == 0")["value"]
    assert specific.item() == pytest.approx(0.0)
    table = metrics.deal_table(results)
    assert table.loc["cft", "part_miou"] == "" and table.loc["deal", "val"] == "51.0 ± 0.0"

@pytest.mark.slow
def test_the_released_code_is_contrastive_bit_for_bit_and_nothing_is_made_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "TESTS", ("val", "segmentation"))
    settings = read_settings("smoke", test_per_class=1, segmentation_per_class=1, per_class=1)
    steps = DualSteps(Work(settings, ("deal",)), tmp_path)
    wanted = [steps.scores(method, 0) for method in ("contrastive", "deal", "deal.released", "plain")]
    assert make_steps(in_order(wanted), tmp_path)
    rows = {step.item[0]: pd.read_csv(tmp_path / step.writes[0]) for step in wanted}
    assert all(set(table["method"]) == {method} and set(table["seed"]) == {0} for method, table in rows.items())
    same = rows["deal.released"].query("metric == 'same_weights_as_contrastive'")
    assert same["value"].tolist() == [1.0]
    weights = {m: sha256(tmp_path / f"models/dual/{m}/0/model.safetensors") for m in rows}
    assert weights["deal.released"] == weights["contrastive"] != weights["deal"]
    assert "disentanglability" in set(rows["deal"]["metric"]) - set(rows["plain"]["metric"])
    assert set(rows["plain"]["set"]) == {"val", "segmentation", "train"}
    assert not undone(wanted, Notes(tmp_path))

def test_the_rate_is_the_smallest_that_moves_the_model():
    rows = [("original", float("nan"), 60.0), ("contrastive", 1e-5, 60.9), ("contrastive", 1e-4, 58.5),
            ("contrastive", 3e-4, 70.0), ("deal", 1e-5, 90.0)]
    trials = pd.DataFrame(rows, columns=["method", "rate", "swapped"])
    assert selected_rate(trials) == 1e-4 and selected_rate(trials, 2.0) == 3e-4
    with pytest.raises(ValueError, match="no rate moves the accuracy by 50 points"):
        selected_rate(trials, 50)
