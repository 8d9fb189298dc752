"""Grounding: spans, scores and suppression against slow references, both backends against one contract."""
import gc
import itertools
import math
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from grounding import per_concept_loop
from grounding_models import (
    BACKENDS,
    check_grounder,
    check_grounding,
    publish,
    same,
    small_transformers,
    small_weights,
)
from PIL import Image

from cft.concepts import grounding
from cft.concepts.grounding import (
    WEIGHTS,
    GroundedSAM,
    GroundingConfig,
    answered_words,
    check_weights,
    clean_phrases,
    detector_input,
    keep_boxes,
    load_grounder,
    pack_prompts,
    phrase_scores,
    small_grounded_sam,
    small_tokenizer,
    to_pixels,
)
from cft.data import backdrop

TEN = ["a beak", "wings", "a long tail", "legs", "eye", "a small head", "feather", "sky", "a branch", "nest"]
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(backdrop.render("val", 1, seed=0).images[0])


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


# --- the contract

@backends
def test_contract(backend, picture):
    check_grounder(BACKENDS[backend](GroundingConfig(box_threshold=0.6)), picture, TEN)


@backends
def test_absent(backend, picture):
    grounder = BACKENDS[backend](GroundingConfig(box_threshold=1.0))
    check_grounder(grounder, picture, ["wing"], absent=["tail", "a beak"])
    assert grounder.counts["sam_encodings"] == 0, "a picture without a box is not encoded"


@backends
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (90, 3), (3, 90), (33, 70), (1, 300)])
def test_any_size(backend, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    grounder = BACKENDS[backend](GroundingConfig(box_threshold=0.3, largest_box=1.0))
    for result in grounder(image, ["wing", "a beak"]):
        check_grounding(result, image)
    if min(size) > 2:
        assert grounder.counts["sam_encodings"] == 1


def test_untrusted_phrases(picture):
    grounder = small_grounded_sam(GroundingConfig(box_threshold=0.5))
    odd = ["[SEP]", "[CLS] wing", "wing. beak? tail.", "WING", "naïve café", "翼", "🐦", "<b>&amp;</b>", "-", "a\tb\nc",
           "\u202ewing"]
    for result, phrase in zip(grounder(picture, odd), odd, strict=True):
        assert result.phrase == phrase
        check_grounding(result, picture)
    assert clean_phrases(["St. Bernard?"]) == ["st bernard"]
    with pytest.raises(ValueError, match="tokens"):
        grounder(picture, ["\x00\x01"])
    with pytest.raises(ValueError, match="list of phrases"):
        grounder(picture, ["wing", None])
    with pytest.raises(ValueError, match="RGB"):
        grounder(picture.convert("CMYK"), ["wing"])
    with pytest.raises(ValueError, match="RGB"):
        grounder(np.asarray(picture), ["wing"])


@pytest.mark.parametrize("bad", [dict(box_threshold=-0.1), dict(text_threshold=1.1), dict(overlap=float("nan")),
                                 dict(largest_box=95), dict(per_prompt=0)])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GroundingConfig(**bad)


# --- phrases and tokens

def slow_tokens(phrase, vocabulary):
    """WordPiece by hand: the longest piece of the vocabulary first; punctuation is a word of its own."""
    words = "".join(c if c.isalnum() else " " if c == " " else f" {c} " for c in phrase).split()
    tokens = []
    for word in words:
        pieces, rest = [], word
        while rest:
            mark = "##" if pieces else ""
            end = next((n for n in range(len(rest), 0, -1) if mark + rest[:n] in vocabulary), 0)
            if not end:
                pieces = ["[UNK]"]
                break
            pieces.append(mark + rest[:end])
            rest = rest[end:]
        tokens += pieces
    return tokens


def test_spans_against_a_slow_tokenizer(tokenizer):
    rng = np.random.default_rng(0)
    words = ["wing", "wings", "a", "of", "claw", "small", "red", "x2", "well-worn", "bird's", "ünder", "tail", "winged"]
    phrases = list({" ".join(rng.choice(words, rng.integers(1, 5))) for _ in range(120)})
    plain = str.maketrans("ü", "u")
    for limit in (40, 256):
        prompts = pack_prompts(phrases, tokenizer, limit)
        assert sorted(p for prompt in prompts for p in prompt.phrases) == sorted(phrases)
        for prompt in prompts:
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt.text)["input_ids"])
            assert len(tokens) == len(prompt.offsets) <= limit
            place = 1
            for phrase, span in zip(prompt.phrases, prompt.spans, strict=True):
                own = slow_tokens(phrase.translate(plain), tokenizer.get_vocab())
                assert span == (place, place + len(own)) and tokens[slice(*span)] == own
                place = span[1] + 1
                assert tokens[span[1]] == "."
            assert place == len(tokens) - 1 and tokens[-1] == "[SEP]"


def fewest_prompts(costs, room):
    """The fewest bins by trying every way, for a handful of phrases."""
    best = len(costs)

    def place(rest, bins):
        nonlocal best
        if len(bins) >= best and rest:
            return
        if not rest:
            best = min(best, len(bins))
            return
        for k in range(len(bins)):
            if bins[k] + rest[0] <= room:
                place(rest[1:], [*bins[:k], bins[k] + rest[0], *bins[k + 1:]])
        place(rest[1:], [*bins, rest[0]])

    place(costs, [])
    return best


def test_packing_is_nearly_optimal(tokenizer):
    rng = np.random.default_rng(1)
    optimal = 0
    for _ in range(40):
        phrases = list({" ".join(rng.choice(["wing", "tail", "beak", "eye"], rng.integers(1, 7))) for _ in range(7)})
        limit = int(rng.integers(9, 16))
        prompts = pack_prompts(phrases, tokenizer, limit)
        fewest = fewest_prompts([len(p.split()) + 1 for p in phrases], limit - 2)
        assert fewest <= len(prompts) <= math.ceil(11 / 9 * fewest + 6 / 9)
        optimal += len(prompts) == fewest
    assert optimal >= 36


def test_packing_ignores_order_and_keeps_to_its_limits(tokenizer):
    for order in itertools.islice(itertools.permutations(TEN), 0, 3000, 500):
        assert pack_prompts(order, tokenizer, 14) == pack_prompts(TEN, tokenizer, 14)
    assert [len(p.phrases) for p in pack_prompts(TEN, tokenizer, per_prompt=4)] == [4, 4, 2]
    assert pack_prompts([], tokenizer) == []
    assert len(pack_prompts(["wing wing"], tokenizer, 5)[0].offsets) == 5
    with pytest.raises(ValueError, match="1 to 2 tokens, got 3"):
        pack_prompts(["wing wing wing"], tokenizer, 5)


def test_phrase_scores_against_loops():
    rng = np.random.default_rng(0)
    probabilities, spans = rng.random((30, 20)), [(1, 3), (4, 5), (6, 12)]
    slow = [[max(probabilities[b, t] for t in range(start, stop)) for start, stop in spans] for b in range(30)]
    assert np.array_equal(phrase_scores(torch.tensor(probabilities), spans).numpy(), np.array(slow))


def test_words_above_the_text_threshold(tokenizer):
    (prompt,) = pack_prompts(["a clawed wing", "tail"], tokenizer)
    k = prompt.phrases.index("a clawed wing")
    start, stop = prompt.spans[k]
    assert stop - start == 8  # a, c ##l ##a ##w ##e ##d, wing
    whole = tuple(range(8))
    expected = {(): "", (0,): "a", (7,): "wing", (1, 2, 3): "cla", whole: "a clawed wing", (1, 3): "c a"}
    for chosen, words in expected.items():
        probabilities = torch.zeros(256)
        probabilities[[start + t for t in chosen]] = 0.9
        assert answered_words(prompt, k, probabilities, 0.25) == words


@backends
def test_text_threshold_shapes_words_only(backend, picture):
    low, high = (BACKENDS[backend](GroundingConfig(box_threshold=0.6, text_threshold=t)) for t in (0.25, 0.65))
    pairs = list(zip(low(picture, TEN), high(picture, TEN), strict=True))
    assert all(same(a, b) for a, b in pairs) and any(a.words != b.words for a, b in pairs)


# --- boxes

def slow_keep(boxes, scores, size, config):
    """Thresholds, guards and greedy suppression, one box after the other, in double precision."""
    def iou(a, b):
        wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        return wide * high / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high)

    kept = []
    for k in sorted(range(len(boxes)), key=lambda k: -scores[k]):
        wide, high = boxes[k][2] - boxes[k][0], boxes[k][3] - boxes[k][1]
        small = wide * high <= config.largest_box * size[0] * size[1]
        if scores[k] > config.box_threshold and wide >= 1 and high >= 1 and small:
            if all(iou(boxes[k], boxes[other]) <= config.overlap for other in kept):
                kept.append(k)
    return kept


@pytest.mark.parametrize("config", [GroundingConfig(), GroundingConfig(overlap=0.3),
                                    GroundingConfig(overlap=1, largest_box=1),
                                    GroundingConfig(box_threshold=0.9, largest_box=0.2)])
def test_boxes_against_a_slow_reference(config):
    rng = np.random.default_rng(0)
    shares = np.concatenate([rng.random((150, 2)) * 1.4 - 0.2, rng.random((150, 2)) ** 3], 1)
    shares[::10, 2:] = 1.9  # over the whole picture
    shares[::17, 2] = 0.001  # less than a pixel
    near = shares[:40] + rng.normal(0, 0.01, (40, 4))  # nearly the same again
    shares = np.concatenate([shares, np.abs(near)])
    scores, size = rng.random(190), (80, 60)
    cut = lambda value, end: min(max(value, 0), end)
    slow = [[cut((x + dx * w / 2) * size[0], size[0]) if axis == 0 else cut((y + dx * h / 2) * size[1], size[1])
             for dx in (-1, 1) for axis in (0, 1)] for x, y, w, h in shares]
    boxes = to_pixels(torch.tensor(shares), size, size)
    assert np.allclose(boxes.numpy(), slow)
    kept = keep_boxes(boxes, torch.tensor(scores), size, config).tolist()
    assert kept == slow_keep(slow, scores.tolist(), size, config) and 0 < len(kept) < 150
    assert len(keep_boxes(boxes, torch.full((190,), torch.nan).double(), size, config)) == 0


class PaintedDetector:
    """Returns the boxes it was given; a box's score for a phrase is the table's, on the phrase's last token."""

    name, limit = "painted", 256

    def __init__(self, table):
        self.tokenizer, self.table, self.texts = small_tokenizer(), table, []

    def prepare(self, image):
        return torch.zeros(1, 3, 1, 1)

    def detect(self, pixels, text):
        self.texts.append(text)
        phrases = text.rstrip(".").split(". ")
        (prompt,) = pack_prompts(phrases, self.tokenizer)
        probabilities = torch.zeros(len(self.table), 256)
        for b, (_, scores) in enumerate(self.table):
            for phrase, span in zip(prompt.phrases, prompt.spans):
                probabilities[b, span[1] - 1] = scores.get(phrase, 0)
        return probabilities, torch.tensor([box for box, _ in self.table])


class RectangleSegmenter:
    """A box's mask is the box."""

    name = "rectangles"

    def encode(self, image):
        return image.size

    def masks(self, encoded, boxes):
        width, height = encoded
        masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist()):
            mask[top:bottom, left:right] = True
        return masks


TABLE = [((0.25, 0.25, 0.5, 0.5), {"wing": 0.9, "a tail": 0.2}),
         ((0.75, 0.75, 0.5, 0.5), {"wing": 0.6, "a tail": 0.36}),
         ((0.5, 0.5, 1.0, 1.0), {"wing": 0.99, "sky": 0.99}), ((0.75, 0.25, 0.5, 0.5), {"a tail": 0.35})]


@pytest.mark.parametrize("at_once", [64, 1])
def test_union_and_guards_on_painted_boxes(at_once, monkeypatch):
    monkeypatch.setattr(grounding, "BOXES_AT_ONCE", at_once)
    grounder = GroundedSAM(PaintedDetector(TABLE), RectangleSegmenter())
    wing, tail, sky, none = grounder(Image.new("RGB", (8, 6)), ["wing", "a tail", "sky", "nest"])
    quarters = torch.zeros(6, 8, dtype=torch.bool)
    quarters[3:, 4:] = True
    assert torch.equal(tail.mask, quarters) and tail.scores.tolist() == pytest.approx([0.36])
    quarters[:3, :4] = True
    assert torch.equal(wing.mask, quarters) and wing.scores.tolist() == pytest.approx([0.9, 0.6])
    assert wing.boxes.tolist() == [[0, 0, 4, 3], [4, 3, 8, 6]] and wing.words == ("wing", "wing")
    assert len(sky.boxes) == len(none.boxes) == 0 and not sky.mask.any() and not none.mask.any()
    decodings = 1 if at_once == 64 else 3
    assert grounder.counts == {"pictures": 1, "detector_passes": 1, "sam_encodings": 1, "sam_decodings": decodings}
    loose = GroundedSAM(PaintedDetector(TABLE), RectangleSegmenter(), GroundingConfig(largest_box=1))
    assert loose(Image.new("RGB", (8, 6)), ["sky"])[0].mask.all()
    assert repr(tail) == "Grounding('a tail': 1 box, best 0.36, 25% of the picture)"
    assert repr(none) == "Grounding('nest': absent)"


def test_a_long_picture_is_cut_back():
    grounder = GroundedSAM(PaintedDetector(TABLE), RectangleSegmenter())
    # laid on 320 × 20, where the box is the lower right quarter
    (tail,) = grounder(Image.new("RGB", (320, 15)), ["a tail"])
    assert tail.boxes.tolist() == [[160, 10, 320, 15]] and tail.mask.shape == (15, 320)
    assert tail.mask[10:, 160:].all() and tail.mask.sum() == 5 * 160


# --- against the libraries' own ways

@pytest.mark.parametrize("size", [(64, 64), (640, 480), (480, 641), (1500, 300), (37, 500), (5, 9)])
def test_the_picture_is_prepared_as_the_libraries_do(size):
    from groundingdino.datasets import transforms as T
    from transformers import GroundingDinoImageProcessor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = detector_input(image)[0]
    theirs, _ = T.Compose([T.RandomResize([800], max_size=1333), T.ToTensor(),
                           T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])(image, None)
    assert torch.allclose(ours, theirs, atol=1e-6)
    processor = GroundingDinoImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    if max(size) < 1.6 * min(size):
        assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 0.03  # it resizes to whole grey values
    else:  # it rounds the short side first, and may exceed 1333 by a few pixels
        assert all(abs(a - b) < 6 for a, b in zip(theirs.shape, ours.shape, strict=True))


def test_one_concept_is_scored_as_groundingdino_does(picture):
    from groundingdino.util.inference import predict

    grounder = small_grounded_sam(GroundingConfig(box_threshold=0.5, overlap=1, largest_box=1))
    for phrase in TEN:
        (prompt,) = grounder.prompts([phrase])
        pixels = grounder.detector.prepare(picture)
        boxes, scores, _ = grounder.find(pixels, prompt, picture.size, picture.size)[phrase]
        with grounding._quiet():
            theirs, best, _ = predict(grounder.detector.model, pixels[0], phrase, 0.5, 0.25, device="cpu")
        theirs = to_pixels(theirs, picture.size, picture.size)
        assert len(boxes) and len(theirs) >= len(boxes)
        for box, score in zip(boxes, scores, strict=True):
            k = (theirs - box).abs().sum(1).argmin()  # the same box, whose best token may be the period there
            assert torch.allclose(theirs[k], box, atol=1e-4) and best[k] >= score - 1e-6


def test_masks_are_the_predictors(picture):
    from segment_anything import SamPredictor

    grounder = small_grounded_sam(GroundingConfig(box_threshold=0.8))
    results = [result for result in grounder(picture, TEN) if len(result.boxes)]
    predictor = SamPredictor(grounder.segmenter.model)
    predictor.set_image(np.asarray(picture))
    assert len(results) > 5 and len({result.mask.numpy().tobytes() for result in results}) > 3
    for result in results:
        slow = np.zeros((64, 64), bool)
        for box in result.boxes.numpy():
            slow = np.maximum(slow, predictor.predict(box=box, multimask_output=False)[0][0])
        assert np.array_equal(result.mask.numpy(), slow)


def test_masks_are_those_of_sam2(picture):
    grounder = small_transformers(GroundingConfig(box_threshold=0.8))
    model, processor = grounder.segmenter.model, grounder.segmenter.processor
    for result in grounder(picture, TEN):
        slow = torch.zeros(64, 64, dtype=torch.bool)
        for box in result.boxes.tolist():
            inputs = processor(images=picture, input_boxes=[[box]], return_tensors="pt")
            with torch.no_grad():
                out = model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"],
                            multimask_output=False)
            slow |= processor.post_process_masks(out.pred_masks, inputs["original_sizes"])[0][0, 0]
        assert int((slow ^ result.mask).sum()) <= 2


# --- what it costs, and what company does

@backends
@pytest.mark.parametrize("count", [1, 5, 10])
def test_real_calls_of_the_networks(backend, count, picture):
    """Counted by hooks on the networks, not by the grounder's own counter."""
    for way, expected in {"packed": (1, 1), "loop": (count, count), "one by one": (count, 1)}.items():
        grounder = BACKENDS[backend](GroundingConfig(box_threshold=0.6, per_prompt=1 if way == "one by one" else None))
        sam, calls = grounder.segmenter.model, {"detector": 0, "encoder": 0}

        def add(name, calls=calls):
            return lambda *_: calls.__setitem__(name, calls[name] + 1)

        grounder.detector.model.register_forward_hook(add("detector"))
        (sam.image_encoder if backend == "groundingdino" else sam.vision_encoder).register_forward_hook(add("encoder"))
        results = (per_concept_loop if way == "loop" else GroundedSAM.__call__)(grounder, picture, TEN[:count])
        assert all(len(result.boxes) for result in results)
        assert (calls["detector"], calls["encoder"]) == expected
        assert (grounder.counts["detector_passes"], grounder.counts["sam_encodings"]) == expected


@backends
def test_one_by_one_is_the_loop(backend, picture):
    grounder = BACKENDS[backend](GroundingConfig(box_threshold=0.85, per_prompt=1))
    pairs = list(zip(grounder(picture, TEN), per_concept_loop(grounder, picture, TEN), strict=True))
    assert sum(len(a.boxes) for a, _ in pairs) > 10
    assert all(same(a, b, pixels=2) and a.words == b.words and a.phrase == b.phrase for a, b in pairs)


@backends
def test_text_features_do_not_depend_on_company_but_scores_do(backend, picture):
    grounder = BACKENDS[backend]()
    network = grounder.detector.model
    layer, seen = network.feat_map if backend == "groundingdino" else network.model.text_projection, []
    layer.register_forward_hook(lambda module, x, y: seen.append(y[0]))
    pixels = grounder.detector.prepare(picture)

    def read(prompt):
        probabilities, _ = grounder.detector.detect(pixels, prompt.text)
        best = phrase_scores(probabilities, prompt.spans).amax(0)
        places = enumerate(zip(prompt.phrases, prompt.spans))
        return {phrase: (seen[-1][start:stop], best[k]) for k, (phrase, (start, stop)) in places}

    (packed,) = grounder.prompts(TEN)
    company, moved = read(packed), 0.0
    for phrase in TEN:
        text, best = read(pack_prompts([phrase], grounder.detector.tokenizer)[0])[phrase]
        assert torch.allclose(text, company[phrase][0], atol=1e-5)
        moved = max(moved, abs(best - company[phrase][1]).item())
    assert moved > 1e-3, "else the chapter's warning is out of date"
    shifted = seen[-1].roll(1, 0)
    assert not torch.allclose(shifted, seen[-1], atol=1e-2), "features that all look alike would prove nothing"


def test_nothing_stays_in_memory(picture):
    grounder = small_grounded_sam()

    def tensors():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    grounder(picture, TEN)
    before = tensors()
    for _ in range(3):
        grounder(picture, TEN)
    assert 0 < tensors() <= before


def test_random_networks_leave_the_callers_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b = small_grounded_sam(seed=1), small_grounded_sam(seed=1)
    assert torch.equal(torch.rand(3), expected)
    for x, y in zip(a.detector.model.state_dict().values(), b.detector.model.state_dict().values(), strict=True):
        assert torch.equal(x, y)


# --- weights

@pytest.fixture
def cable(monkeypatch):
    """Pulls the network cable."""
    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return small_weights(tmp_path, monkeypatch)


def test_loading_from_a_folder(folder, cable, picture, monkeypatch, capfd):
    root, recipes, (dino, sam, dino2, sam2) = folder
    capfd.readouterr()
    pairs = {"groundingdino-swint+sam-vit-b": (dino, sam), "grounding-dino-base+sam2.1-hiera-large": (dino2, sam2)}
    for name, models in pairs.items():
        monkeypatch.setenv("CFT_WEIGHTS", str(root))
        grounder = load_grounder(name)
        assert grounder.name == name and not any(p.requires_grad for p in grounder.detector.model.parameters())
        for model, loaded in zip(models, (grounder.detector.model, grounder.segmenter.model), strict=True):
            for key, value in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value), key
        files = [w.files[0] for part in name.split("+") for w in WEIGHTS[part]]
        assert all(len(grounder.settings()["weights"][file]) == 64 for file in files)
        grounder.detector.short, grounder.detector.long = 64, 128
        assert len(grounder(picture, TEN)) == 10
    assert str(root) not in "".join(capfd.readouterr()), "groundingdino prints a path, and we do not"
    (recipe,) = recipes
    assert recipe.backbone == "swin_T_224_1k" and not recipe.use_checkpoint
    assert recipe.text_encoder_type == str(root / "bert-base-uncased")


def test_the_second_recipe_is_there():
    from groundingdino.util.slconfig import SLConfig

    file = Path(sys.modules["groundingdino"].__file__).parent / "config" / "GroundingDINO_SwinB_cfg.py"
    assert SLConfig.fromfile(str(file)).backbone == "swin_B_384_22k"


def test_wrong_weights(folder, monkeypatch):
    root, _, _ = folder
    name, file = "groundingdino-swint+sam-vit-b", root / "sam_vit_b_01ec64.pth"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=f"must have {len(good)} bytes, got {len(good) - 1}.*dl.fbaipublicfiles"):
        load_grounder(name, root)
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256"):
        load_grounder(name, root)
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, file)
    publish(monkeypatch, root, "sam-vit-b")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_grounder(name, root)
    torch.save({"model": {"module.label_enc.weight": torch.zeros(2)}}, root / "groundingdino_swint_ogc.pth")
    publish(monkeypatch, root, "groundingdino-swint")
    with pytest.raises(ValueError, match="must have all parameters"):
        load_grounder(name, root)
    from safetensors.torch import load_file, save_file

    weights = root / "grounding-dino-base/model.safetensors"
    some = load_file(weights)
    some.pop(next(key for key in some if "level_embed" in key))
    save_file(some, weights, metadata={"format": "pt"})
    publish(monkeypatch, root, "grounding-dino-base")
    with pytest.raises(ValueError, match="must have all parameters.*level_embed"):
        load_grounder("grounding-dino-base+sam2.1-hiera-large", root)


class Trap:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_a_checkpoint_runs_no_code(folder, monkeypatch, capsys):
    root, _, _ = folder
    torch.save({"model": Trap()}, root / "groundingdino_swint_ogc.pth")
    publish(monkeypatch, root, "groundingdino-swint")
    with pytest.raises(pickle.UnpicklingError):
        load_grounder("groundingdino-swint+sam-vit-b", root)
    assert "ran" not in capsys.readouterr().out


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("CFT_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match="CFT_WEIGHTS") as error:
        load_grounder()
    for fact in ("groundingdino_swint_ogc.pth", "694 MB", "https://github.com/IDEA-Research",
                 "bert-base-uncased/config.json",
                 "sam_vit_h_4b8939.pth", "2565 MB", "https://dl.fbaipublicfiles.com", "nothing is downloaded"):
        assert fact in str(error.value)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        check_weights(["sam-vit-h"], tmp_path)
    (tmp_path / "sam_vit_h_4b8939.pth").touch()
    with pytest.raises(FileNotFoundError) as error:
        load_grounder(folder=tmp_path)
    assert "sam_vit_h" not in str(error.value), "what is there is not asked for"
    with pytest.raises(NotImplementedError, match="transformers 5.*facebook/sam3"):
        load_grounder("sam3")
    for name in ("sam-vit-h+groundingdino-swint", "groundingdino-swint", "x+y", ""):
        with pytest.raises(ValueError, match="plus sign"):
            load_grounder(name)


def test_the_table_of_weights():
    files = {w for weights in WEIGHTS.values() for w in weights}
    assert all(w.url.startswith("https://") and w.size > 3e8 for w in files)
    assert all(set(w.sha256) <= set("0123456789abcdef") for w in files)
    assert len({w.sha256 for w in files}) == len({w.files[0] for w in files}) == len(files) == 8
    assert all(len(w.sha256) == 64 for w in files)


@pytest.mark.slow
def test_the_module_needs_no_extra(monkeypatch):
    code = ("import sys, cft.concepts.grounding; "
            "assert not {'transformers', 'groundingdino', 'segment_anything', 'cv2'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'cft\[grounding\]'"):
        small_grounded_sam()
    with pytest.raises(ImportError, match=r"needs transformers"):
        load_grounder(folder="anywhere")
