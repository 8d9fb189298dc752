"""SEG-MIL-CBM: attention, alignment, suppression and crops against slow references; what padding and order cannot change; real open_clip code."""
import copy
import json
import math

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from cft.concepts.filters import demo_concepts
from cft.concepts.masks import build_masks
from cft.data import backdrop
from cft.data.folders import Preprocess, list_folder
from cft.data.models import base_model
from cft.data.testsets import PictureFiles, folder_set
from cft.demo.toy_grounder import toy_grounder
from cft.evaluate.passes import checkpoint, reading_of, run_pass
from cft.related.groups import answer_table, backdrop_set
from cft.related.segmil import (
    DEMO_RULES,
    LABELS,
    SEGMIL_CLAIMS,
    VARIANTS,
    Bags,
    Clip,
    Featured,
    SegmentRules,
    SegMil,
    SegMilRecipe,
    Standard,
    ToyPairs,
    alignment,
    attention_on,
    backbone_of,
    collate,
    cut_out,
    demo_vocabulary,
    explain,
    featured,
    ground,
    group_rows,
    mean_colour,
    predict_bags,
    retrieve,
    run_segmil,
    segment_targets,
    segments_of,
    segmil_loss,
    segmil_table,
    similarities,
    suppress,
    train_segmil,
)
from cft.reproduce.paper import scores_of, verdicts
from cft.train.loop import Diverged

torch.set_num_threads(1)
NAMES = list(backdrop.CLASSES)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return backdrop.write(tmp_path_factory.mktemp("world") / "w", {"train": 3, "val": 2, "adversarial": 2}, seed=9)


@pytest.fixture(scope="module")
def tools():
    find = toy_grounder()
    return find, ToyPairs(find), tuple(sorted({text for _, text in demo_concepts().pairs()}))


@pytest.fixture(scope="module")
def bags(world, tools, tmp_path_factory):
    find, encoder, vocabulary = tools
    source = folder_set(world / "images/train", NAMES)
    similarity = similarities(encoder, (image for image, _ in source), vocabulary)
    phrases = retrieve(similarity, vocabulary)
    store = ground(source, phrases, find, tmp_path_factory.mktemp("store") / "s", progress=False)
    preprocess = Preprocess.of(base_model(0))
    return Bags(source, preprocess, store, phrases, fill=mean_colour(source), extra={"target": Standard.of(similarity).targets(similarity)}, cached=True)


def small(concepts=7, classes=3, features=5, **changes):
    return SegMil(nn.Identity(), concepts, classes, features, **({"width": 6, "attention": 4} | changes)).double().eval()


def random_bag(lengths=(3, 1, 4), features=5):
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*valid.shape, features, dtype=torch.float64), valid


# ---- the model


def slow_answer(model, bag, valid):
    """The equations, one segment at a time."""
    numbers = {name: p.detach().tolist() for name, p in model.named_parameters()}
    U, v, lines = numbers["key.weight"], numbers["score.weight"][0], lambda name: list(zip(numbers[f"{name}.weight"], numbers[f"{name}.bias"]))
    logits, attention = [], []
    for segments, real in zip(bag, valid):
        rows = [s.tolist() for s, r in zip(segments, real) if r]
        concepts = []
        for x in rows:
            h = [max(0.0, sum(a * k for a, k in zip(w, x)) + b) for w, b in lines("embed.0")]
            concepts.append([sum(a * k for a, k in zip(row, h)) + b for row, b in lines("concept")])
        scores = [sum(vk * math.tanh(sum(u * c for u, c in zip(row, cs))) for vk, row in zip(v, U)) / model.temperature for cs in concepts]
        total = sum(math.exp(s) for s in scores)
        alpha = [math.exp(s) / total for s in scores]
        z = [sum(a * c[m] for a, c in zip(alpha, concepts)) for m in range(len(concepts[0]))]
        logits.append([sum(a * zm for a, zm in zip(row, z)) + b for row, b in lines("classifier")])
        attention.append(alpha + [0.0] * int((~real).sum()))
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(attention, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_model_against_the_equations(temperature):
    model, (bag, valid) = small(temperature=temperature), random_bag()
    answer = model(bag, valid)
    logits, attention = slow_answer(model, bag, valid)
    assert torch.allclose(answer.logits, logits, atol=1e-12) and torch.allclose(answer.attention, attention, atol=1e-12)
    assert torch.allclose(answer.pooled, torch.stack([sum(a * c for a, c in zip(x, y)) for x, y in zip(answer.attention, answer.concepts)]))


def test_order_and_padding_do_not_matter():
    model, (bag, valid) = small(), random_bag()
    before = model(bag, valid).logits
    other = bag.clone()
    other[~valid] = torch.randn_like(other[~valid]) * 1e6
    assert torch.equal(model(other, valid).logits, before)
    other[~valid] = torch.nan
    assert torch.equal(model(other, valid).logits, before)
    order = torch.tensor([2, 0, 1, 3])
    shuffled, seen = bag.clone(), valid.clone()
    shuffled[0], seen[0] = bag[0][order], valid[0][order]
    assert torch.allclose(model(shuffled, seen).logits, before, atol=1e-13)
    wider = torch.cat([bag, torch.ones_like(bag)], 1)
    assert torch.allclose(model(wider, torch.cat([valid, ~torch.ones_like(valid)], 1)).logits, before, atol=1e-13)
    swapped = bag.clone()
    swapped[0, 0] = bag[2, 3]
    assert not torch.allclose(model(swapped, valid).logits[0], before[0], atol=1e-3), "valid segments do matter"


def test_order_and_padding_through_a_real_backbone_in_training():
    """Batch norm in training mode sees the real segments only, too."""
    backbone = timm.create_model("resnet18", pretrained=False, num_classes=0)
    model = SegMil(backbone, 6, 3, width=8, dropout=0.0).train()
    bag, valid = torch.randn(2, 3, 3, 64, 64), torch.tensor([[True, True, False], [True, False, False]])
    before = copy.deepcopy(model)(bag, valid).logits
    bag[~valid] = 1e3
    assert torch.equal(copy.deepcopy(model)(bag, valid).logits, before)
    bag[0, :2] = bag[0, :2].flip(0)
    assert torch.allclose(copy.deepcopy(model)(bag, valid).logits, before, atol=1e-5)


def test_contributions_are_the_logit():
    model, (bag, valid) = small(), random_bag()
    answer = model(bag, valid)
    for target in ([0, 1, 2], [2, 2, 0]):
        parts = model.contributions(answer, torch.tensor(target))
        assert parts.shape == (3, 4, 7) and (parts[~valid] == 0).all()
        for b, k in enumerate(target):
            assert torch.allclose(parts[b].sum() + model.classifier.bias[k], answer.logits[b, k], atol=1e-12)
            i, m = 0, 3
            assert torch.allclose(parts[b, i, m], answer.attention[b, i] * answer.concepts[b, i, m] * model.classifier.weight[k, m])


@pytest.mark.parametrize("level", ["bag", "segment"])
def test_gradients_by_finite_differences(level):
    model, (bag, valid) = small(), random_bag()
    batch = {"label": torch.tensor([0, 2, 1]), "valid": valid, "target": torch.randn(3, 7, dtype=torch.float64), "segment_target": torch.randn(3, 4, 7, dtype=torch.float64)}
    loss = lambda: segmil_loss(model(bag, valid), batch, 0.5, level)[0]
    loss().backward()
    for name, parameter in model.named_parameters():
        where = tuple(0 for _ in parameter.shape)
        with torch.no_grad():
            value = parameter[where].item()
            ends = []
            for step in (1e-6, -1e-6):
                parameter[where] = value + step
                ends.append(loss().item())
            parameter[where] = value
        assert parameter.grad[where].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7), name
    model.zero_grad()
    bag.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, valid).logits, (bag,))
    assert (torch.autograd.grad(loss(), bag)[0][~valid] == 0).all()


def test_alignment_is_a_mean_cosine():
    vectors, targets, valid = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[True, True, False], [True, False, False]])
    cos = lambda a, b: sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    v, t = vectors.tolist(), targets.tolist()
    assert alignment(vectors[:, 0], targets[:, 0]).item() == pytest.approx(-(cos(v[0][0], t[0][0]) + cos(v[1][0], t[1][0])) / 2)
    assert alignment(vectors, targets, valid).item() == pytest.approx(-((cos(v[0][0], t[0][0]) + cos(v[0][1], t[0][1])) / 2 + cos(v[1][0], t[1][0])) / 2)
    assert alignment(targets, 3 * targets, valid).item() == pytest.approx(-1)


def test_loss_adds_up_and_weight_zero_needs_no_target():
    model, (bag, valid) = small(), random_bag()
    answer, batch = model(bag, valid), {"label": torch.tensor([0, 2, 1])}
    plain = segmil_loss(answer, batch, 0.0)[0]
    assert plain == nn.functional.cross_entropy(answer.logits, batch["label"])
    total, parts = segmil_loss(answer, batch | {"target": torch.randn(3, 7, dtype=torch.float64)}, 0.25)
    assert total.item() == pytest.approx((plain + 0.25 * parts["align"]).item())


@pytest.mark.parametrize("valid, word", [(torch.ones(3, 4), "torch.float32"), (torch.ones(3, 3, dtype=torch.bool), r"\(3, 3\)"),
                                         (torch.tensor([[True] * 4, [False] * 4, [True] * 4]), "true somewhere in each bag")])
def test_model_refuses(valid, word):
    with pytest.raises(ValueError, match=word):
        small()(random_bag()[0], valid)


def test_backbones_of_timm():
    with pytest.raises(ValueError, match="expected a backbone with num_features"):
        SegMil(nn.Identity(), 3, 2)
    with pytest.raises(ValueError, match="temperature > 0"):
        SegMil(nn.Identity(), 3, 2, 4, temperature=0)
    for name in ("cft_vit_tiny64", "mobilenetv3_small_050", "resnet10t"):
        model = SegMil(backbone_of(timm.create_model(name, pretrained=False)), 5, 2, width=8).eval()
        assert model(torch.randn(2, 1, 3, 64, 64), torch.ones(2, 1, dtype=torch.bool)).logits.shape == (2, 2), name
    base = base_model(0)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(base.head(backbone_of(base)(x)), base(x), atol=1e-6) and base.head.out_features == 12
    assert len(model.heads()) == len([n for n, _ in model.named_parameters() if "backbone" not in n]) == 8


# ---- segments


def slow_suppress(masks, scores, overlap):
    sets = [{(y, x) for y, row in enumerate(m.tolist()) for x, on in enumerate(row) if on} for m in masks]
    kept = []
    for k in sorted(range(len(scores)), key=lambda k: (-scores[k], k)):
        if all(len(sets[k] & sets[j]) / max(len(sets[k] | sets[j]), 1) <= overlap for j in kept):
            kept.append(k)
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_suppression_against_sets(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((12, 6, 7)) < 0.6
    masks[3:6] = masks[0:3]
    masks[7, :3] ^= True
    scores = rng.integers(0, 5, 12) / 4
    for overlap in (0.3, 0.45, 0.5, 0.7, 1.0):
        assert suppress(masks, scores, overlap) == slow_suppress(masks, scores, overlap)


def test_the_better_twin_stays_and_half_is_allowed():
    one, half, other = np.zeros((3, 4, 4), bool)
    one[:2], half[:1], other[2:] = True, True, True
    assert suppress(np.stack([one, one, other]), [0.5, 0.9, 0.1]) == [1, 2]
    assert suppress(np.stack([one, half]), [0.5, 0.9]) == [1, 0], "an IoU of exactly one half does not suppress"


def slow_cut(picture, mask, fill, margin):
    """The crop before resizing, pixel by pixel."""
    ys, xs = [y for y in range(mask.shape[0]) if any(mask[y])], [x for x in range(mask.shape[1]) if any(mask[:, x])]
    dy, dx = math.ceil(margin * (ys[-1] - ys[0] + 1)), math.ceil(margin * (xs[-1] - xs[0] + 1))
    return [[[float(picture[c, y, x]) if mask[y, x] else float(fill[c]) for x in range(max(0, xs[0] - dx), min(mask.shape[1], xs[-1] + dx + 1))]
             for y in range(max(0, ys[0] - dy), min(mask.shape[0], ys[-1] + dy + 1))] for c in range(3)]


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5])
def test_cuts_against_pixels(margin):
    picture, fill = torch.rand(3, 20, 30), torch.tensor([0.1, 0.5, 0.9])
    mask = np.zeros((20, 30), bool)
    mask[4:15, 20:29] = np.random.default_rng(1).random((11, 9)) < 0.5
    mask[4, 20], mask[14, 28] = True, True
    crop = torch.tensor(slow_cut(picture, mask, fill, margin))
    assert torch.equal(cut_out(picture, mask, tuple(crop.shape[1:]), fill, margin), crop)
    resized = nn.functional.interpolate(crop[None], (16, 16), mode="bilinear", antialias=True, align_corners=False)[0]
    assert torch.allclose(cut_out(picture, mask, (16, 16), fill, margin), resized.clamp(0, 1), atol=1e-5)
    for bad in (np.zeros((20, 30), bool), np.ones((5, 5), bool)):
        with pytest.raises(ValueError, match=r"expected a mask \(20, 30\) that is not empty"):
            cut_out(picture, bad, (8, 8), fill)


@pytest.mark.parametrize("change", [{"least": -0.1}, {"overlap": 2}, {"most": 0}, {"top": 0}, {"margin": -1}])
def test_rules_refuse(change):
    with pytest.raises(ValueError, match="expected shares in 0 … 1"):
        SegmentRules(**change)


def test_filters_one_by_one(bags):
    store, name = bags.store, bags.source.ids[0]
    records, phrases = store.records(name), bags.phrases[0]
    for rules in (SegmentRules(), SegmentRules(least=0.1), SegmentRules(largest=0.3, overlap=0.1), SegmentRules(most=2)):
        found = [r for r in (records[p] for p in phrases) if r.score is not None and r.mask().mean() >= rules.least and r.mask().mean() <= rules.largest]
        order = slow_suppress([r.mask() for r in found], [r.score for r in found], rules.overlap)[:rules.most]
        expected = [(found[k].phrase, found[k].score) for k in order]
        assert [(s.phrase, s.score) for s in segments_of(store, name, phrases, rules)] == expected and expected
    (whole,) = segments_of(store, name, phrases, SegmentRules(least=0.9, largest=0.91))
    assert whole.phrase == "" and whole.mask.all() and whole.mask.shape == (64, 64)
    with pytest.raises(ValueError, match="'a unicorn' was not looked for"):
        segments_of(store, name, ["a unicorn"])


# ---- retrieval and grounding


def test_cosines_and_ranks(tools):
    _, encoder, vocabulary = tools
    pictures = [Image.fromarray(p) for p in backdrop.render("val", 1, 4).images[:5]]
    found = similarities(encoder, iter(pictures), vocabulary, chunk=2)
    a, b = encoder.images(pictures), encoder(vocabulary)
    slow = [[float(np.dot(x, y) / math.sqrt(np.dot(x, x) * np.dot(y, y))) for y in b] for x in a]
    assert np.allclose(found, slow, atol=1e-6)
    for row, phrases in zip(found, retrieve(found, vocabulary, 7)):
        assert list(phrases) == [vocabulary[m] for m in sorted(range(len(vocabulary)), key=lambda m: (-row[m], m))[:7]]
    assert retrieve(np.zeros((1, 4)), ["d", "c", "b", "a"], 2) == [("d", "c")]


def test_the_toy_grounder_retrieves_what_is_there(tools):
    """In a picture of a boat the sail ranks far above the ears; a phrase that names nothing ranks low."""
    _, encoder, _ = tools
    pictures = backdrop.render("adversarial", 8, 5)
    found = similarities(encoder, (Image.fromarray(p) for p in pictures.images), ["sails", "long ears", "a cheerful song"])
    boats, rabbits = pictures.labels == NAMES.index("boat"), pictures.labels == NAMES.index("rabbit")
    assert (found[boats, 0] > found[boats, 1]).mean() > 0.8 and (found[rabbits, 1] > found[rabbits, 0]).mean() > 0.8
    assert found[:, 2].mean() < 0.5 * found[boats, 0].mean()


class Odd:
    name = "odd"

    def __init__(self, texts=1.0, pictures=1.0):
        self.values = texts, pictures

    def __call__(self, texts):
        return np.full((len(texts), 2), self.values[0])

    def images(self, pictures):
        return np.full((len(pictures), 2), self.values[1])


@pytest.mark.parametrize("encoder, vocabulary, word", [(Odd(), [], "got 0"), (Odd(), ["a", "a"], "got 2 with 1 different"), (Odd(texts=0), ["a"], "the texts of odd"),
                                                       (Odd(pictures=np.nan), ["a"], "the pictures of odd")])
def test_similarities_refuse(encoder, vocabulary, word):
    with pytest.raises(ValueError, match=word):
        similarities(encoder, [Image.new("RGB", (4, 4))], vocabulary)
    with pytest.raises(ValueError, match="at least one picture"):
        similarities(Odd(), [], ["a"])


def test_grounding_is_shared_with_cft(world, tools, tmp_path):
    """What CFT's store has is not looked for again, is read from there, and is the same."""
    find, encoder, vocabulary = tools
    folder, source = list_folder(world / "images/train", NAMES), folder_set(world / "images/train", NAMES)
    cft_store = build_masks(folder, demo_concepts(), find, tmp_path / "cft", progress=False)
    phrases = retrieve(similarities(encoder, (image for image, _ in source), vocabulary), vocabulary)
    asked = []

    class Counting:
        name, settings = find.name, staticmethod(find.settings)

        def __call__(self, image, some):
            asked.append(len(some))
            return find(image, some)

    shared = ground(source, phrases, Counting(), tmp_path / "more", known=cft_store, progress=False)
    alone = ground(source, phrases, find, tmp_path / "alone", progress=False)
    known = sum(p in cft_store.phrases(name) for name, some in zip(source.ids, phrases) for p in some)
    assert sum(asked) == 10 * len(source) - known and known > len(source)
    for name, some in zip(source.ids, phrases):
        assert np.array_equal(shared.masks(name, some), alone.masks(name, some))
    asked.clear()
    assert ground(source, phrases, Counting(), tmp_path / "none", known=shared, progress=False) is shared and not asked
    ground(source, phrases, Counting(), tmp_path / "more", known=cft_store, progress=False)
    assert not asked, "a finished store is not built again"
    with pytest.raises(ValueError, match="expected phrases for each of 36 pictures, got 1"):
        ground(source, phrases[:1], find, tmp_path / "x")


def test_standardised_targets():
    similarity = np.random.default_rng(0).normal(0.2, 0.05, (9, 4))
    similarity[:, 2] = 0.3
    standard = Standard.of(similarity)
    slow = (similarity - similarity.mean(0)) / [s if s > 0 else 1 for s in similarity.std(0).round(12)]
    slow /= np.sqrt((slow**2).sum(1, keepdims=True))
    assert np.allclose(standard.targets(similarity), slow, atol=1e-6) and (standard.targets(similarity)[:, 2] == 0).all()


SMALL_CLIP = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


def test_clip_runs_open_clips_own_code(tmp_path, monkeypatch):
    (tmp_path / "small-clip.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    model = open_clip.create_model("small-clip", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    encoder = Clip(tmp_path / "clip.pt", "small-clip")
    texts, pictures = ["a sail", "long ears", "grass"], [Image.fromarray(p) for p in backdrop.render("val", 1, 0).images[:3]]
    _, _, transform = open_clip.create_model_and_transforms("small-clip", pretrained=None)
    with torch.no_grad():
        a = model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
        b = model.encode_text(open_clip.get_tokenizer("small-clip")(texts), normalize=True)
    assert np.allclose(similarities(encoder, pictures, texts), a @ b.T, atol=1e-5)
    with pytest.raises(ValueError, match="no file at .*ViT-B-32-quickgelu.*ViT-B/32.*open_clip_model.safetensors"):
        Clip(tmp_path / "none.pt")


# ---- bags and training


def test_bags_and_batches(bags):
    item = bags[4]
    picture = torch.from_numpy(np.array(bags.source[4][0])).permute(2, 0, 1) / 255
    for crop, segment in zip(item["bag"], bags.segments(4), strict=True):
        assert torch.allclose(crop, (cut_out(picture, segment.mask, (64, 64), bags.fill) - 0.5) / 0.25, atol=1e-6)
    batch = collate([bags[k] for k in range(8)])
    lengths = [len(bags[k]["bag"]) for k in range(8)]
    assert batch["valid"].sum(1).tolist() == lengths and len(set(lengths)) > 1 and batch["bag"].shape[:2] == (8, max(lengths))
    assert (batch["bag"][~batch["valid"]] == 0).all() and batch["target"].shape == (8, bags.extra["target"].shape[1])
    assert batch["label"].tolist() == [t[0] for t in bags.source.targets[:8]]
    whole = Bags(bags.source, bags.preprocess)
    assert torch.allclose(whole[4]["bag"], (picture[None] - 0.5) / 0.25, atol=1e-6) and whole.segments(4)[0].mask.all()
    with pytest.raises(ValueError, match=r"expected one entry for each of 36 pictures, got {'phrases': 1, 'target': 2}"):
        Bags(bags.source, bags.preprocess, bags.store, [()], extra={"target": torch.zeros(2, 3)})


def test_segment_targets_are_padded():
    items = [{"bag": torch.ones(n, 4), "segment_target": torch.full((n, 2), float(n)), "label": n} for n in (1, 3)]
    assert collate(items)["segment_target"].tolist() == [[[1, 1], [0, 0], [0, 0]], [[3, 3]] * 3]


def test_targets_of_segments(bags, tools):
    _, encoder, vocabulary = tools
    standard = Standard(np.full(len(vocabulary), 0.1), np.full(len(vocabulary), 2.0))
    few = copy.copy(bags)
    few.source = PictureFiles(bags.source.root, "few", bags.source.ids[:2], bags.source.targets[:2], bags.source.groups[:2])
    for k, found in enumerate(segment_targets(few, encoder, vocabulary, standard)):
        crops = [Image.fromarray((cut * 255).byte().permute(1, 2, 0).numpy()) for cut in bags.cuts(k)]
        slow = (similarities(encoder, crops, vocabulary) - 0.1) / 2
        assert np.allclose(found, slow / np.linalg.norm(slow, axis=1, keepdims=True), atol=1e-5) and len(found) == len(bags.segments(k))


def test_featured_bags_are_the_same_bags(bags):
    backbone = backbone_of(base_model(0))
    ready = featured(bags, backbone, batch=7)
    model = SegMil(backbone, bags.extra["target"].shape[1], 12, width=16).eval()
    fast = copy.deepcopy(model)
    fast.backbone = nn.Identity()
    assert torch.allclose(predict_bags(fast, ready), predict_bags(model, bags, 5), atol=1e-4)
    short = Featured(ready.source, ready.features, ready.extra, most=2)
    assert [len(short[k]["bag"]) for k in range(len(short))] == [min(2, len(bags[k]["bag"])) for k in range(len(bags))]


@pytest.fixture(scope="module")
def ready(bags):
    return featured(bags, backbone_of(base_model(0)))


def fresh(concepts, **changes):
    torch.manual_seed(3)
    return SegMil(nn.Identity(), concepts, 12, 96, **({"width": 32} | changes))


def test_training_learns_and_leaves_the_model_alone(ready):
    model = fresh(ready.extra["target"].shape[1])
    before = copy.deepcopy(model.state_dict())
    trained = train_segmil(model, ready, SegMilRecipe(rate=3e-3, weight=1.0, backbone_rate=0, epochs=40), progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    labels = torch.tensor([t[0] for t in ready.source.targets])
    assert (predict_bags(trained.model, ready).argmax(1) == labels).float().mean() > 0.9
    first, last = trained.record["epochs"][0], trained.record["epochs"][-1]
    assert last["classify"] < 0.3 * first["classify"] and last["align"] < first["align"] - 0.2 and not trained.model.training


@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_run_goes_on_bit_by_bit(ready, tmp_path, monkeypatch, stop):
    import cft.related.segmil as module

    recipe, model = SegMilRecipe(rate=1e-3, backbone_rate=0, epochs=5, seed=4), fresh(ready.extra["target"].shape[1])
    straight = train_segmil(model, ready, recipe, progress=False)
    real = module._epoch

    def dying(*arguments):
        if arguments[4] == stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        train_segmil(model, ready, recipe, tmp_path / "run", progress=False)
    monkeypatch.setattr(module, "_epoch", real)
    with pytest.raises(ValueError, match="unfinished run of another job"):
        train_segmil(model, ready, SegMilRecipe(epochs=5), tmp_path / "run", progress=False)
    resumed = train_segmil(model, ready, recipe, tmp_path / "run", progress=False)
    again = train_segmil(model, ready, recipe, tmp_path / "run", progress=False)
    for one in (resumed, again):
        assert all(torch.equal(a, b) for a, b in zip(straight.model.state_dict().values(), one.model.state_dict().values()))
    assert not (tmp_path / "run/state.pt").exists() and again.record["epochs"] == straight.record["epochs"]


def test_the_backbone_trains_at_its_own_rate(bags):
    backbone = backbone_of(base_model(0))
    model, some = SegMil(backbone, bags.extra["target"].shape[1], 12, width=16), copy.copy(bags)
    still = train_segmil(model, some, SegMilRecipe(backbone_rate=0, epochs=1), progress=False).model
    moved = train_segmil(model, some, SegMilRecipe(backbone_rate=1e-5, rate=1e-3, epochs=1, weight_decay=0.0), progress=False).model
    step = lambda one, part: max((a - b).abs().max().item() for (n, a), b in zip(one.named_parameters(), model.parameters()) if n.startswith(part))
    assert step(still, "backbone") == 0 and step(still, "concept") > 0
    assert 1e-6 < step(moved, "backbone") < 3e-5 and 1e-4 < step(moved, "concept") < 3e-3, "AdamW moves by about the rate"


def test_the_best_worst_group_is_kept(ready, monkeypatch):
    import cft.related.segmil as module

    worst = iter([10.0, 40.0, 40.0, 20.0])
    weights = []
    monkeypatch.setattr(module, "group_scores", lambda pictures: {"worst": next(worst)})
    real = module.predict_bags
    monkeypatch.setattr(module, "predict_bags", lambda model, some: weights.append(copy.deepcopy(model.state_dict())) or real(model, some))
    done = train_segmil(fresh(ready.extra["target"].shape[1]), ready, SegMilRecipe(backbone_rate=0, rate=1e-3, epochs=4), validation=ready, progress=False)
    assert done.record["best_epoch"] == 1 and all(torch.equal(weights[1][k], v) for k, v in done.model.state_dict().items())


def test_training_refuses(ready):
    model = fresh(ready.extra["target"].shape[1])
    bare = Featured(ready.source, ready.features, {})
    with pytest.raises(ValueError, match="alignment needs target for each picture"):
        train_segmil(model, bare, progress=False)
    with pytest.raises(ValueError, match="needs segment_target"):
        train_segmil(model, ready, SegMilRecipe(level="segment"), progress=False)
    train_segmil(model, bare, SegMilRecipe(weight=0, backbone_rate=0, epochs=1), progress=False)
    spoilt = Featured(ready.source, [f * torch.nan if k == 5 else f for k, f in enumerate(ready.features)], ready.extra)
    with pytest.raises(Diverged, match="epoch 0: the loss is nan; batch: .*bird_0"):
        train_segmil(model, spoilt, SegMilRecipe(backbone_rate=0), progress=False)
    for change in ({"rate": 0}, {"weight": -1}, {"epochs": 0}, {"level": "pixel"}):
        with pytest.raises(ValueError, match="expected rate > 0"):
            SegMilRecipe(**change)


# ---- explanations and the experiment


def test_an_explanation_adds_up(bags, tools):
    import matplotlib

    matplotlib.use("Agg")
    vocabulary = tools[2]
    model = SegMil(backbone_of(base_model(0)), len(vocabulary), 12, width=16)
    with torch.no_grad():
        logits = predict_bags(model, bags)
    for target in (None, 5):
        found = explain(model, bags, 3, vocabulary, NAMES, target)
        k = int(logits[3].argmax()) if target is None else target
        assert found.name == NAMES[k] and found.logit == pytest.approx(logits[3, k].item(), abs=1e-4)
        assert found.parts.sum().item() + found.bias == pytest.approx(found.logit, abs=1e-5)
        table = found.table(4)
        assert table["contribution"].abs().is_monotonic_decreasing and len(table) == 4
        row = table.iloc[0]
        i = [s.phrase for s in found.segments].index(row["segment"])
        assert found.parts[i, vocabulary.index(row["concept"])].item() == pytest.approx(row["contribution"])
        assert found.parts.abs().max().item() == pytest.approx(abs(row["contribution"]))
        assert f"{found.logit:+.2f}" in repr(found) and "<table>" in found._repr_html_()
    figure = found.figure()
    assert len(figure.axes) == 3
    matplotlib.pyplot.close(figure)
    with pytest.raises(ValueError, match="expected names of .* concepts and 12 classes, got 1 and 12"):
        explain(model, bags, 3, ["one"], NAMES)


def test_attention_on_the_object_by_hand(world, bags, ready):
    model = fresh(ready.extra["target"].shape[1]).eval()
    slow = []
    for k, name in enumerate(bags.source.ids):
        mask = np.asarray(Image.open(world / "objects/train" / name)) > 0
        with torch.no_grad():
            alpha = model(ready.features[k][None], torch.ones(1, len(ready.features[k]), dtype=torch.bool)).attention[0]
        slow.append(sum(float(a) * np.mean(mask[s.mask]) for a, s in zip(alpha, bags.segments(k))))
    assert attention_on(model, ready, bags, world / "objects/train") == pytest.approx(100 * np.mean(slow), abs=1e-4)


def test_rows_of_a_test_in_groups(world):
    source = backdrop_set(world)
    logits = torch.randn(len(source), 12, generator=torch.Generator().manual_seed(2))
    logits[range(len(source)), [t[0] for t in source.targets]] += 2
    hits = logits.argmax(1).numpy() == [t[0] for t in source.targets]
    rows = group_rows(answer_table(source, logits)).set_index(["set", "split"])["value"]
    val = np.array([name.startswith("val/") for name in source.ids])
    assert rows["groups", "all"] == pytest.approx(100 * hits.mean()) and rows["val", "all"] == pytest.approx(100 * hits[val].mean())
    assert rows["adversarial", "all"] == pytest.approx(100 * hits[~val].mean()) and len(rows) == 4
    assert rows["groups", "worst group"] == min(100 * hits[[g == group for g in source.groups]].mean() for group in set(source.groups))


def test_vocabularies_and_variants():
    small, large = set(demo_vocabulary()), set(demo_vocabulary(context=True))
    assert small < large and "blue sky" in large - small and "a beak" in small
    assert VARIANTS["segmil"].rules == DEMO_RULES and VARIANTS["cbm"].rules is None and not VARIANTS["segmil"].context
    assert {c.method for c in SEGMIL_CLAIMS} | {c.against for c in SEGMIL_CLAIMS} <= set(LABELS)


def test_the_experiment_runs_and_goes_on(tmp_path, monkeypatch):
    import cft.related.segmil as module

    monkeypatch.setattr(module, "POOL_PER_CLASS", 1)
    monkeypatch.setattr(module, "TEST_PER_CLASS", 1)
    monkeypatch.setattr(module, "DEMO_RECIPE", SegMilRecipe(rate=1e-3, backbone_rate=0, epochs=2))
    methods = ("original", "cbm", "segmil", "segmil bag 1", "segmil segments aligned")
    scores = run_segmil(tmp_path, (1,), methods, progress=False)
    assert list(dict.fromkeys(scores["method"])) == list(methods) and (tmp_path / "segmil.csv").is_file()
    source = backdrop_set(tmp_path / "segmil_work/pictures_1")
    hits = run_pass(source, [checkpoint(base_model(1), "base")], reading_of(base_model(1)))[0]["full_top1"]
    original = scores.query("method == 'original' and set == 'groups' and split == 'all'")
    assert original["value"].item() == pytest.approx(100 * hits.mean(), abs=1e-3) and original["n"].item() == 24
    attention = scores[scores["metric"] == "attention"].set_index("method")["value"]
    assert list(attention.index) == list(methods[1:]) and attention.between(0, 100).all()
    objects = [np.mean(np.asarray(Image.open(tmp_path / "segmil_work/pictures_1/objects" / name)) > 0) for name in source.ids]
    assert attention["cbm"] == pytest.approx(100 * np.mean(objects), abs=1e-3)
    monkeypatch.setattr(module, "_Seed", None)
    assert run_segmil(tmp_path, (1,), methods, progress=False).equals(scores), "nothing is run twice"
    with pytest.raises(ValueError, match="expected some of original, plain, cbm.*; got magic"):
        run_segmil(tmp_path, (1,), ("magic",))
    table = segmil_table(scores)
    assert table.loc["SEG-MIL-CBM", "attention on object"] == f"{attention['segmil']:.1f}" and table.loc["Original", "attention on object"] == ""
    assert list(table.columns) == ["val", "adversarial", "groups", "groups, worst group", "attention on object"]


def test_claims_read_the_rows():
    rows = [{"method": m, "seed": s, "set": "groups", "split": "worst group", "metric": "top1", "value": v + s, "n": 5}
            for m, v in (("segmil", 30.0), ("cbm", 10.0), ("original", 32.5), ("segmil lambda 0", 30.0)) for s in range(4)]
    rows += [{"method": "segmil lambda 0", "seed": 9, "set": "groups", "split": "all", "metric": "attention", "value": 1.0, "n": 5}]
    frame = pd.DataFrame(rows)
    frame.loc[(frame["method"] == "segmil lambda 0") & (frame["seed"] == 2), "value"] += 7
    found = verdicts(scores_of(frame), SEGMIL_CLAIMS).set_index(["artefact", "claim"])["verdict"]
    assert [found.iloc[k] for k in range(4)] == ["holds", "contradicted", "not run", "open"]
    assert segmil_table(frame).loc["Original", "groups, worst group"] == "34.0 ± 1.3"
