"""The toy grounder: the contract of a grounder, slow references, what it finds, what it refuses, and bad weights."""
import json
import re
import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from chapters import from_chapter
from PIL import Image
from safetensors.torch import load_file, save_file

from cft.data import backdrop
from cft.demo import toy_grounder as toy
from cft.demo.toy_grounder import ATOMS, MEANINGS, ToyConfig, regions
from cft.files import ASSETS, sha256

RNG, CHAPTER = np.random.default_rng(0), "06_toy_grounder.ipynb"
OF_JUDGING = ("atom_map", "LEAST", "Judgement", "score_grounder", "calibrate")
_, LEAST, Judgement, score_grounder, calibrate = from_chapter(CHAPTER, toy, *OF_JUDGING)
OF_TRAINING = ("atom_map", "distractor", "train_text", "Scenes", "logits_at", "sample_pixels", "orthogonalise", "Muon",
               "train_image", "train_toy_grounder", "save_toy_grounder")
lessons = SimpleNamespace(**dict(zip(OF_TRAINING, from_chapter(CHAPTER, toy, *OF_TRAINING))))
HELD_OUT, HELD_OUT_ABSENT = yaml.safe_load((ASSETS / "toy/held_out.yaml").read_text(encoding="utf-8")).values()


@pytest.fixture(scope="module")
def find():
    return toy.toy_grounder()


@pytest.fixture(scope="module")
def pictures():
    """A draw that no chapter uses, half at home and half away."""
    halves = [backdrop.render(name, 4, seed=83001) for name in ("val", "adversarial")]
    return backdrop.Pictures(*(np.concatenate([getattr(half, field) for half in halves])
                               for field in ("images", "labels", "backgrounds", "parts")))


@pytest.fixture(scope="module")
def bird(pictures):
    return Image.fromarray(pictures.images[0])


@pytest.fixture(scope="module")
def few():
    return lessons.Scenes(0, objects=5, scenes=2)


def fresh(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


# the contract of a grounder


def test_one_result_per_phrase_in_order_with_duplicates(find, bird):
    phrases = ["A Beak.", "the sky", "freedom", "a beak", "the sky"]
    answers = find(bird, phrases)
    assert [answer.phrase for answer in answers] == phrases
    for first, second in ((0, 3), (1, 4)):
        assert torch.equal(answers[first].mask, answers[second].mask)
        assert torch.equal(answers[first].boxes, answers[second].boxes)
    absent = answers[2]
    assert absent.boxes.shape == (0, 4) and absent.scores.shape == (0,) and not absent.mask.any()
    assert absent.mask.dtype == torch.bool and absent.mask.shape == (64, 64)


def test_a_picture_is_encoded_once(find, bird):
    find.counts.clear()
    find(bird, [f"{word} wing" for word in toy.MODIFIERS])
    assert find.counts == {"pictures": 1, "encodings": 1}
    assert find(bird, []) == [] and find.counts == {"pictures": 2, "encodings": 1}


@pytest.mark.parametrize("size", [(64, 64), (100, 80), (17, 29), (300, 64), (1, 1)])
def test_any_size(find, pictures, size):
    for k in (0, 20, 60):
        image = Image.fromarray(pictures.images[k]).resize(size)
        for answer in find(image, ["an animal", "an eye", "a vehicle", "the sky", "a wheel", "freedom"]):
            assert answer.mask.shape == (size[1], size[0])
            assert bool(len(answer.boxes)) == bool(answer.mask.any()) and len(answer.boxes) == len(answer.scores)
            left, top, right, bottom = answer.boxes.unbind(1)
            assert (0 <= left).all() and (left < right).all() and (right <= size[0]).all()
            assert (0 <= top).all() and (top < bottom).all() and (bottom <= size[1]).all()
            assert ((answer.scores > find.config.threshold) & (answer.scores <= 1)).all()
            assert (answer.scores.diff() <= 0).all(), "the best box first"


def test_an_enlarged_picture_has_an_enlarged_mask(find, pictures):
    image = Image.fromarray(pictures.images[0])
    small, = find(image, ["a bird"])
    large, = find(image.resize((256, 256), Image.Resampling.NEAREST), ["a bird"])
    a, b = small.mask.repeat_interleave(4, 0).repeat_interleave(4, 1), large.mask
    assert small.mask.any() and (a & b).sum() / (a | b).sum() > 0.8


@pytest.mark.parametrize("phrases, words", [([""], "must have a word"), (["a beak", " . "], "must have a word"),
                                            (["x" * 201], "at most 200"), ("a beak", "list of phrases"),
                                            ([3], "list of phrases")])
def test_bad_phrases(find, bird, phrases, words):
    with pytest.raises(ValueError, match=words):
        find(bird, phrases)


def test_odd_phrases_are_answered(find, bird):
    for answer in find(bird, ["7", "?!a", "of", "the of a", "Ωμέγα", "a pair of", "x" * 200, "'s", "\x07 beep"]):
        assert not answer.mask.any(), answer.phrase


def test_bad_pictures(find, bird):
    for image in (bird.convert("L"), bird.convert("RGBA"), np.zeros((64, 64, 3), np.uint8), None):
        with pytest.raises(ValueError, match="expected an RGB picture, got"):
            find(image, ["a beak"])


def test_settings_are_plain_json(find):
    settings = json.loads(json.dumps(find.settings()))
    assert settings["name"] == find.name == "toy" and settings["threshold"] == find.config.threshold
    assert re.fullmatch("[0-9a-f]{64}", settings["weights"]["toy_grounder.safetensors"])


def test_answers_are_deterministic_and_independent_of_company(find, bird):
    names = [meaning.nouns[0] for meaning in MEANINGS.values()]
    together, again = find(bird, names), toy.toy_grounder()(bird, names)
    for k, (a, b) in enumerate(zip(together, again)):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores)
        if k % 12 == 0:
            alone, = find(bird, [names[k]])
            assert torch.equal(alone.mask, a.mask)
            torch.testing.assert_close(alone.scores, a.scores)


def test_it_is_fast(find, pictures):
    images, phrases = [Image.fromarray(x) for x in pictures.images[:60]], [m.nouns[0] for m in MEANINGS.values()][:15]
    find(images[0], phrases)
    start = time.thread_time()
    for image in images:
        find(image, phrases)
    assert time.thread_time() - start < 60 * 5 / 180  # 180 pictures in five seconds


# slow references


def slow_regions(chance, config):
    """Flood fill from every pixel, in plain Python."""
    height, width = chance.shape
    seen, found, rest = set(), [], [[float(v) for v in row] for row in chance]
    for start in ((r, c) for r in range(height) for c in range(width)):
        if start in seen or chance[start] <= config.pixel:
            continue
        queue, region = deque([start]), []
        seen.add(start)
        while queue:
            r, c = queue.popleft()
            region.append((r, c))
            for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if 0 <= near[0] < height and 0 <= near[1] < width and near not in seen and chance[near] > config.pixel:
                    seen.add(near)
                    queue.append(near)
        score = sum(sorted((float(chance[p]) for p in region), reverse=True)[:config.surest]) / config.surest
        if score > config.threshold:
            rows, columns = [r for r, _ in region], [c for _, c in region]
            found.append((score, min(columns), min(rows), max(columns) + 1, max(rows) + 1))
        else:
            for r, c in region:
                rest[r][c] = 0.0
    return sorted(found, key=lambda f: (-f[0], f[1:])), np.array(rest)


@pytest.mark.parametrize("thresholds", [(), (0.3, 0.6, 1), (0.9, 0.2, 9), (0.0, 0.4, 2)])
def test_regions_are_those_of_a_flood_fill(thresholds):
    config = ToyConfig(*thresholds)
    for shape in ((1, 1), (9, 13), (20, 20)):
        for _ in range(5):
            chance = RNG.random(shape)**RNG.choice([0.5, 1, 3])
            boxes, scores, rest = regions(chance, config)
            slow, slow_rest = slow_regions(chance, config)
            assert len(boxes) == len(slow)
            np.testing.assert_allclose(scores, [f[0] for f in slow], atol=1e-6)
            np.testing.assert_array_equal(boxes, np.array([f[1:] for f in slow]).reshape(-1, 4))
            np.testing.assert_array_equal(rest, slow_rest)


def test_nothing_above_the_pixel_threshold_is_nothing():
    boxes, scores, rest = regions(np.full((4, 4), 0.5), ToyConfig())
    assert boxes.shape == (0, 4) and scores.shape == (0,) and (rest == 0.5).all()


def test_a_phrase_is_the_sum_of_its_atoms(find, bird):
    phrases = ["a beak", "an animal", "the sky", "a quokka"]
    chances = find.encode(bird).double().numpy()
    np.testing.assert_allclose(chances.sum(0), 1, atol=1e-5)
    logits = find.net.text(phrases).double().numpy()
    for k, answer in enumerate(find(bird, phrases)):
        slow = np.zeros((64, 64))
        for atom in range(len(ATOMS)):
            slow += chances[atom].reshape(64, 64) / (1 + np.exp(-logits[k, atom]))
        found, rest = slow_regions(slow, find.config)
        clear = abs(slow - find.config.pixel) > 1e-5
        assert ((rest > find.config.pixel) == answer.mask.numpy())[clear].all()
        np.testing.assert_allclose(answer.scores, [f[0] for f in found], atol=1e-5)


def test_reading_by_hand(find):
    text, known = find.net.text, toy.known_words()
    state = {key: value.double().numpy() for key, value in text.state_dict().items()}
    phrases = ["a long zorpy beak of the bird", "wings", "zorp"]
    for phrase, fast in zip(phrases, text(phrases)):
        head, modifiers, rest = toy.read_phrase(phrase)
        letters = np.mean([state["letters.weight"][row] for row in toy.letter_groups(head)], 0)
        parts = [letters, state["words.weight"][known.get(head, 0)]]
        for words in (modifiers, rest):
            rows = [state["words.weight"][known[word]] for word in words if word in known]
            parts.append(np.mean(rows, 0) if rows else np.zeros_like(letters))
        x = np.concatenate(parts)
        for layer in (0, 2, 4):
            x = state[f"mix.{layer}.weight"] @ x + state[f"mix.{layer}.bias"]
            x = np.maximum(x, 0) if layer < 4 else x
        np.testing.assert_allclose(fast, x, atol=1e-4)


@pytest.mark.parametrize("phrase, expected", [("a long, pointed beak", ("beak", ("long", "pointed"), ())),
                                              ("A PAIR OF small wings", ("wings", ("small",), ())),
                                              ("the bird’s tail", ("tail", ("bird",), ())),
                                              ("wing of the plane", ("wing", (), ("plane",))),
                                              ("the ability to fly", ("ability", (), ("fly",))),
                                              ("a pair", ("pair", (), ())), ("", ("", (), ())),
                                              ("in water", ("water", ("in",), ()))])
def test_read_phrase(phrase, expected):
    assert toy.read_phrase(phrase) == expected


def test_single_pixels_are_those_of_the_dense_network(few):
    image = fresh(toy.ImageEncoder).eval()
    x, atoms, _ = few.batch(3, torch.Generator().manual_seed(0))
    drawn = lessons.sample_pixels(atoms, 60, torch.Generator().manual_seed(1))
    pixels = torch.cat([torch.tensor([[0, 63, 4032, 4095, 65]] * 3), drawn], 1)
    with torch.no_grad():
        some, dense = lessons.logits_at(image, x, image.trunk(x)[0], pixels), image(x)
    for n in range(3):
        for k, pixel in enumerate(pixels[n].tolist()):
            torch.testing.assert_close(some[n, k], dense[n, :, pixel // 64, pixel % 64], atol=1e-5, rtol=1e-5)


def test_pixels_are_drawn_by_the_root_of_their_atoms_area():
    atoms = torch.zeros(1, 64, 64, dtype=torch.long)
    atoms[0, :8, :8] = 5  # 64 of 4,096 pixels
    drawn = lessons.sample_pixels(atoms, 40_000, torch.Generator().manual_seed(0))
    expected = 64**0.5 / (64**0.5 + 4032**0.5)
    assert (atoms.flatten()[drawn] == 5).float().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (16, 16)])
def test_orthogonalise_acts_on_singular_values_alone(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, values, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(4):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    np.testing.assert_allclose(lessons.orthogonalise(matrix), u @ np.diag(values) @ v, atol=1e-5)


def test_muon_is_nesterov_momentum_made_orthogonal():
    p = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer, mean, slow = lessons.Muon([p], 0.1, momentum=0.8, decay=0.5), 0.0, p.detach().clone()
    for k in range(3):
        p.grad = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        mean = 0.8 * mean + 0.2 * p.grad
        slow = slow * (1 - 0.1 * 0.5) - 0.1 * lessons.orthogonalise(0.2 * p.grad + 0.8 * mean)
        optimizer.step()
    torch.testing.assert_close(p.detach(), slow)


def test_atom_map_pixel_by_pixel(pictures):
    fast, classes = lessons.atom_map(pictures), list(backdrop.CLASSES)
    for n in range(0, len(pictures), 9):
        cls = classes[pictures.labels[n]]
        for r, c in RNG.integers(64, size=(60, 2)):
            part = pictures.parts[n, r, c]
            scene = "", backdrop.BACKGROUNDS[pictures.backgrounds[n]]
            assert ATOMS[fast[n, r, c]] == ((cls, backdrop.CLASSES[cls][part - 1].name) if part else scene)


def test_judgement_by_counting(find, pictures):
    some = backdrop.Pictures(*(getattr(pictures, f)[::7] for f in ("images", "labels", "backgrounds", "parts")))
    asked = {"a beak": MEANINGS["beak"].atoms, "an animal": MEANINGS["animal"].atoms, "freedom": frozenset()}
    judged, atoms = score_grounder(find, some, asked), lessons.atom_map(some)
    table = judged.table(list(asked))
    for phrase, means in asked.items():
        there = found = right = 0
        overlap = []
        for n, picture in enumerate(some.images):
            answer, = find(Image.fromarray(picture), [phrase])
            truth = {(r, c) for r in range(64) for c in range(64) if int(atoms[n, r, c]) in means}
            mask = {(int(r), int(c)) for r, c in answer.mask.nonzero()}
            is_there, is_found = len(truth) >= LEAST, len(answer.boxes) > 0
            there, found, right = there + is_there, found + is_found, right + (is_there and is_found)
            overlap += [len(truth & mask) / len(truth | mask)] if is_there else []
        row = table.loc[phrase]
        assert (row["there"], row["found"]) == (there, found)
        np.testing.assert_allclose(row["precision"], right / found if found else np.nan)
        np.testing.assert_allclose(row["recall"], right / there if there else np.nan)
        np.testing.assert_allclose(row["iou"], np.mean(overlap) if overlap else np.nan)
        np.testing.assert_allclose(row["f1"], 2 * right / max(there + found, 1))


def test_f1_at_a_threshold():
    judged = Judgement(np.array([[0.9], [0.6], [0.0], [0.7]]), np.array([[50], [50], [50], [2]]), np.zeros((4, 1)))
    assert judged.present[:, 0].tolist() == [True, True, True, False]
    assert judged.f1(0.0)[0] == pytest.approx(2 * 2 / 6) and judged.f1(0.65)[0] == pytest.approx(2 * 1 / 5)


# words and lessons


def test_the_words_are_words():
    """YAML takes some words for something else, such as "no" and "on"."""
    words = yaml.safe_load((ASSETS / "toy/words.yaml").read_text(encoding="utf-8"))
    for name in ("modifiers", "endings", "not_visible", "not_drawn"):
        assert len(set(words[name])) == len(words[name]) and all(isinstance(word, str) for word in words[name])
    assert all(isinstance(word, str) for word in (*words["plurals"].values(), *HELD_OUT, *HELD_OUT_ABSENT))
    assert toy.vocabulary_digest() == "7677b9348a48a12a2529e4265f7c4ce74f841f403412dce89dfef0524d25cd32"


def test_the_vocabulary_names_every_atom():
    assert set().union(*(meaning.atoms for meaning in MEANINGS.values())) == set(range(len(ATOMS)))
    assert {ATOMS[k] for k in MEANINGS["hull"].atoms} == {("boat", "body"), ("boat", "portholes")}
    for text in ("antler | antler | rabbit:antlers", "x | x | @desert", "x | x | unicorn:*"):
        with pytest.raises(ValueError, match="is no place"):
            toy.read_vocabulary(text)


def test_lessons_say_what_they_mean():
    rng, owned, every = np.random.default_rng(1), 0, list(MEANINGS.values())
    for k in range(4000):
        meaning = every[k % len(every)]
        phrase, atoms = toy.paraphrase(meaning, rng)
        assert atoms <= meaning.atoms and phrase not in HELD_OUT
        if atoms != meaning.atoms:
            owned += 1
            _, modifiers, rest = toy.read_phrase(phrase)
            assert {ATOMS[a][0] for a in atoms} <= {*modifiers, *rest}, phrase
        phrase, atoms = lessons.distractor(rng)
        assert not atoms and phrase not in HELD_OUT_ABSENT and toy.read_phrase(phrase)[0]
    assert owned > 50


def test_held_out_phrases_were_held_out():
    known = toy.known_words()
    for phrase, name in HELD_OUT.items():
        head, modifiers, _ = toy.read_phrase(phrase)
        assert name in MEANINGS and head in known and any(word not in known for word in modifiers)
    assert not any(toy.read_phrase(phrase)[0] in known for phrase in HELD_OUT_ABSENT)


def test_scenes_agree_with_their_atoms(few):
    x, atoms, labels = few.batch(24, torch.Generator().manual_seed(0))
    again = few.batch(24, torch.Generator().manual_seed(0))
    assert x.shape == (24, 3, 64, 64) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, again[0]) and torch.equal(atoms, again[1])
    for n, label in enumerate(labels.tolist()):
        present = [ATOMS[k] for k in atoms[n].unique().tolist()]
        assert {owner for owner, _ in present} == {"", list(backdrop.CLASSES)[label]}
        assert sum(owner == "" for owner, _ in present) == 1, "one background"


# what it finds and refuses, on pictures that no chapter uses; floors well below what was measured


def test_it_finds_what_is_there(find, pictures):
    asked = {meaning.nouns[0]: meaning.atoms for meaning in MEANINGS.values()}
    table = score_grounder(find, pictures, asked).table(list(asked))
    kinds = np.array([meaning.kind for meaning in MEANINGS.values()])
    large = (kinds == "part") & (table["area"] >= 40).to_numpy()
    assert table["f1"].mean() > 0.88 and table["f1"][kinds == "background"].mean() > 0.9
    assert table["iou"][large].mean() > 0.55 and table["iou"][kinds == "object"].mean() > 0.75
    assert table["iou"].max() < 1, "it is no oracle"


def test_held_out_phrases_are_found_and_others_refused(find, pictures):
    asked = {phrase: MEANINGS[name].atoms for phrase, name in HELD_OUT.items()}
    absent = (*HELD_OUT_ABSENT, *toy.NOT_VISIBLE, "the ability to breathe underwater", "a shy nature")
    judged = score_grounder(find, pictures, asked | dict.fromkeys(absent, frozenset()))
    assert judged.f1()[:len(asked)].mean() > 0.85
    assert (judged.scores[:, len(asked):] > 0).mean() < 0.02


def test_an_owner_narrows_the_meaning(find):
    """With an owner a shared part is read well but not surely: "the wings of a bird" is among those refused."""
    right = strange = several = 0
    for meaning in MEANINGS.values():
        owners = sorted({ATOMS[k][0] for k in meaning.atoms}) if meaning.kind == "part" else []
        for owner in owners if len(owners) > 1 else []:
            named = set((find.net.text([f"the {meaning.nouns[0]} of a {owner}"])[0] > 0).nonzero()[:, 0].tolist())
            several += 1
            right += bool(named & {k for k in meaning.atoms if ATOMS[k][0] == owner})
            strange += any(ATOMS[k][0] != owner for k in named)
    assert several > 40 and right / several > 0.8 and strange / several < 0.35


def test_the_threshold_trades_recall_for_precision(find, pictures):
    asked = {meaning.nouns[0]: meaning.atoms for meaning in MEANINGS.values()}
    some = backdrop.Pictures(*(getattr(pictures, f)[::3] for f in ("images", "labels", "backgrounds", "parts")))
    found, right = [], []
    for threshold in (0.1, 0.5, 0.95):
        judged = score_grounder(toy.ToyGrounder(find.net, replace(find.config, threshold=threshold)), some, asked)
        found.append((judged.scores > 0).sum())
        right.append((judged.present & (judged.scores > 0)).sum())
    assert found[0] > found[1] > found[2] and right[0] / found[0] < right[2] / found[2]
    curve = calibrate(find, backdrop.render("val", 1, seed=83002), (0.5, 0.95))
    assert list(curve.index) == [0.5, 0.95] and curve[0.5] > curve[0.95]


# training and weights


@pytest.mark.slow
def test_short_lessons_lower_the_loss_and_repeat(few):
    texts, images = [fresh(toy.TextEncoder) for _ in range(2)], [fresh(toy.ImageEncoder) for _ in range(2)]
    read = [lessons.train_text(text, 1, 60, progress=False) for text in texts]
    seen = [lessons.train_image(image, few, 1, 24, progress=False) for image in images]
    assert read[0] == read[1] and seen[0] == seen[1]
    for pair in (texts, images):
        assert all(torch.equal(a, b) for a, b in zip(pair[0].state_dict().values(), pair[1].state_dict().values()))
    assert np.mean(read[0][-5:]) < 0.4 * np.mean(read[0][:5]) and np.mean(seen[0][-5:]) < 0.85 * np.mean(seen[0][:5])
    assert lessons.train_text(fresh(toy.TextEncoder), 2, 60, progress=False) != read[0], "the seed matters"


def test_training_saving_and_loading(few, tmp_path, monkeypatch, bird):
    monkeypatch.setitem(lessons.train_toy_grounder.__globals__, "Scenes", lambda seed: few)
    state = torch.random.get_rng_state()
    net = lessons.train_toy_grounder(seed=1, steps=2, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    path = lessons.save_toy_grounder(tmp_path / "new", net, threshold=0.25, seed=1)
    loaded = toy.toy_grounder(tmp_path / "new")
    assert loaded.config.threshold == 0.25 and path.stat().st_size < 1_000_000
    for key, value in loaded.net.state_dict().items():
        assert torch.equal(value, net.state_dict()[key]), "what ships is the rounded network"
    assert toy.toy_grounder(tmp_path / "new", ToyConfig(0.8)).config.threshold == 0.8
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["toy_grounder.json", "toy_grounder.safetensors"]
    assert len(loaded(bird, ["a beak"])) == 1


def test_the_shipped_weights(find, tmp_path):
    path = ASSETS / "toy" / toy.TOY_WEIGHTS
    record = json.loads((ASSETS / "toy/toy_grounder.json").read_text())
    state = load_file(path)
    assert path.stat().st_size < 1_000_000 and find.settings()["weights"][path.name] == record["sha256"]
    assert all(value.dtype == torch.float16 for value in state.values() if value.is_floating_point())
    assert sum(p.numel() for p in find.net.image.parameters()) <= 400_000
    assert sha256(lessons.save_toy_grounder(tmp_path, find.net)) == record["sha256"], "written again, the same bytes"


def spoil(folder, find, **changes):
    """A folder with the trained weights, some tensors changed, and a fitting record."""
    lessons.save_toy_grounder(folder, find.net)
    path = folder / toy.TOY_WEIGHTS
    save_file({**load_file(path), **changes}, path)
    record = json.loads((folder / "toy_grounder.json").read_text())
    record["sha256"] = sha256(path)
    (folder / "toy_grounder.json").write_text(json.dumps(record))
    return folder


def test_bad_weights(find, tmp_path):
    with pytest.raises(ValueError, match="expected toy_grounder.safetensors and toy_grounder.json in"):
        toy.toy_grounder(tmp_path / "nowhere")
    lessons.save_toy_grounder(tmp_path, find.net)
    path, data = tmp_path / toy.TOY_WEIGHTS, (tmp_path / toy.TOY_WEIGHTS).read_bytes()
    for bad in (data[:-1], data[:-2] + b"!!", b"", b"weights"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="does not have the SHA-256"):
            toy.toy_grounder(tmp_path)


def test_weights_that_do_not_fit(find, tmp_path):
    with pytest.raises(ValueError, match="does not fit:"):
        toy.toy_grounder(spoil(tmp_path / "shape", find, **{"image.label.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match="does not fit:"):
        toy.toy_grounder(spoil(tmp_path / "extra", find, **{"image.other": torch.zeros(5)}))
    with pytest.raises(ValueError, match="not finite"):
        toy.toy_grounder(spoil(tmp_path / "nan", find, **{"image.label.bias": torch.full((12,), float("nan"))}))
    folder = spoil(tmp_path / "words", find)
    record = json.loads((folder / "toy_grounder.json").read_text())
    (folder / "toy_grounder.json").write_text(json.dumps(record | {"vocabulary": "0" * 64}))
    with pytest.raises(ValueError, match="another vocabulary"):
        toy.toy_grounder(folder)


@pytest.mark.parametrize("bad", [(1.1,), (-0.1,), (float("nan"),), (0.5, 2), (0.5, 0.5, 0)])
def test_bad_config(bad):
    with pytest.raises(ValueError, match="expected thresholds in 0 … 1"):
        ToyConfig(*bad)
