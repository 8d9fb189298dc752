"""Bags of segments: suppression, crops, retrieval against slow references; grounding is shared; real open_clip code."""
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from cft.concepts.filters import demo_concepts
from cft.concepts.masks import build_masks
from cft.data import backdrop
from cft.data.folders import list_folder
from cft.data.testsets import folder_set
from cft.related.segments import (
    Bags,
    Clip,
    SegmentRules,
    collate,
    cut_out,
    ground,
    retrieve,
    segments_of,
    similarities,
    suppress,
)

torch.set_num_threads(1)
NAMES = list(backdrop.CLASSES)

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

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
    return [[[
        float(picture[c, y, x]) if mask[y, x] else float(fill[c])
        for x in range(max(0, xs[0] - dx), min(mask.shape[1], xs[-1] + dx + 1))]
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
    for rules in (SegmentRules(), SegmentRules(least=0.1), SegmentRules(largest=0.3,
                                                                        overlap=0.1), SegmentRules(most=2)):
        found = [
            r for r in (records[p] for p in phrases)
            if r.score is not None and r.mask().mean() >= rules.least and r.mask().mean() <= rules.largest]
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
    found = similarities(encoder, (Image.fromarray(p) for p in pictures.images),
                         ["sails", "long ears", "a cheerful song"])
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

@pytest.mark.parametrize("encoder, vocabulary, word", [(Odd(), [], "got 0"),
                                                       (Odd(), ["a", "a"], "got 2 with 1 different"),
                                                       (Odd(texts=0), ["a"], "the texts of odd"),
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

SMALL_CLIP = {
    "embed_dim": 16, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}

def test_clip_runs_open_clips_own_code(tmp_path, monkeypatch):
    (tmp_path / "small-clip.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    model = open_clip.create_model("small-clip", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    encoder = Clip(tmp_path / "clip.pt", "small-clip")
    texts, pictures = ["a sail", "long ears",
                       "grass"], [Image.fromarray(p) for p in backdrop.render("val", 1, 0).images[:3]]
    _, _, transform = open_clip.create_model_and_transforms("small-clip", pretrained=None)
    with torch.no_grad():
        a = model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
        b = model.encode_text(open_clip.get_tokenizer("small-clip")(texts), normalize=True)
    assert np.allclose(similarities(encoder, pictures, texts), a @ b.T, atol=1e-5)
    with pytest.raises(ValueError, match="no file at .*ViT-B-32-quickgelu.*ViT-B/32.*open_clip_model.safetensors"):
        Clip(tmp_path / "none.pt")

# ---- bags

def test_bags_and_batches(bags):
    item = bags[4]
    picture = torch.from_numpy(np.array(bags.source[4][0])).permute(2, 0, 1) / 255
    for crop, segment in zip(item["bag"], bags.segments(4), strict=True):
        assert torch.allclose(crop, (cut_out(picture, segment.mask, (64, 64), bags.fill) - 0.5) / 0.25, atol=1e-6)
    batch = collate([bags[k] for k in range(8)])
    lengths = [len(bags[k]["bag"]) for k in range(8)]
    assert batch["valid"].sum(1).tolist() == lengths and len(
        set(lengths)) > 1 and batch["bag"].shape[:2] == (8, max(lengths))
    assert (batch["bag"][~batch["valid"]] == 0).all() and batch["target"].shape == (8, bags.extra["target"].shape[1])
    assert batch["label"].tolist() == [t[0] for t in bags.source.targets[:8]]
    whole = Bags(bags.source, bags.preprocess)
    assert torch.allclose(whole[4]["bag"], (picture[None] - 0.5) / 0.25, atol=1e-6) and whole.segments(4)[0].mask.all()
    with pytest.raises(ValueError,
                       match=r"expected one entry for each of 36 pictures, got {'target': 2, 'phrases': 1}"):
        Bags(bags.source, bags.preprocess, bags.store, [()], extra={"target": torch.zeros(2, 3)})

def test_segment_targets_are_padded():
    items = [{"bag": torch.ones(n, 4), "segment_target": torch.full((n, 2), float(n)), "label": n} for n in (1, 3)]
    assert collate(items)["segment_target"].tolist() == [[[1, 1], [0, 0], [0, 0]], [[3, 3]] * 3]
