"""Masks are kept exactly, whatever happens to the process that makes them."""
import gc
import json
import os
import pickle
import random
import shutil
import signal
import time
import tracemalloc
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from cft.concepts import masks
from cft.concepts.filters import Concept, ConceptSet
from cft.concepts.grounding import PAPER_GROUNDING, Grounding, small_grounded_sam
from cft.concepts.language import ClassName
from cft.concepts.masks import MaskStore, build_masks, list_folder, plan, training_pictures, work_list
from cft.data import folders as data

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools

TEXTS = ("ghost", "leg", "tail", "wing")


def concept_set(*ids, texts=TEXTS):
    return ConceptSet(tuple(ClassName(i, f"a {i}") for i in ids), tuple(Concept(t, tuple(sorted(ids)), ("important",)) for t in texts))


def pictures(root, classes=2, each=3, size=(12, 10), seed=0):
    rng = np.random.default_rng(seed)
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(root / f"c{c}/{i:04d}.png")
    return list_folder(root)


def where(image, phrase):
    """What the grounder of these tests finds: bright pixels of a channel that depends on the phrase."""
    values = np.asarray(image)
    return (values[..., zlib.crc32(phrase.encode()) % 3] > 128) & (phrase != "ghost")


class Bright:
    """A quick grounder that notes each call in a file, which outlives its process."""

    name = "bright"

    def __init__(self, log=None, pause=0.0, threshold=128, spoil=None):
        self.log, self.pause, self.threshold, self.spoil = log, pause, threshold, spoil

    def settings(self):
        return {"threshold": self.threshold}

    def __call__(self, image, phrases):
        if self.log:
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{zlib.crc32(image.tobytes())}\n".encode())
            os.close(handle)
        if self.pause:
            time.sleep(self.pause)
        found = []
        for phrase in phrases:
            mask = torch.from_numpy(where(image, phrase))
            n = int(mask.any())
            found.append(Grounding(phrase, torch.tensor([[0.0, 0.0, 4.0, 5.5]])[:n], torch.tensor([0.625])[:n], mask))
        return self.spoil(image, found) if self.spoil else found


def in_child(work):
    """Run `work` in a process of its own; returns its number at once."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls(log):
    return log.read_text().split() if log.exists() else []


@pytest.fixture
def world(tmp_path):
    return pictures(tmp_path / "images", each=6), concept_set("c0", "c1")


@pytest.fixture
def store(world, tmp_path):
    return build_masks(*world, Bright(), tmp_path / "store", shards=3, progress=False)


# masks, unions, grids


def slow_decode(code, height, width):
    """COCO's code by its definition: 5 bits a character, sign-extended, runs from the third on as differences; columns first."""
    runs, i = [], 0
    while i < len(code):
        value, shift, more = 0, 0, True
        while more:
            char = ord(code[i]) - 48
            value |= (char & 31) << shift
            shift, more, i = shift + 5, bool(char & 32), i + 1
            if not more and char & 16:
                value |= -1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    flat = [bit for k, run in enumerate(runs) for bit in [k % 2] * run]
    assert len(flat) == height * width
    return np.array([[flat[x * height + y] for x in range(width)] for y in range(height)], bool)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (13, 9), (40, 31)])
def test_codes_are_cocos(height, width):
    rng = np.random.default_rng(height)
    for share in (0, 0.03, 0.5, 1):
        mask = rng.random((height, width)) < share
        mask[: height // 2] |= share > 0.4
        code = masks.encode_mask(mask)
        assert np.array_equal(slow_decode(code, height, width), mask)
        assert np.array_equal(masks.decode_mask(code, (height, width)), mask)


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((2, 2, 2)), np.zeros((0, 3)), np.full((2, 2), 2), np.full((2, 2), np.nan)])
def test_only_masks_are_encoded(bad):
    with pytest.raises(ValueError, match="expected a mask"):
        masks.encode_mask(bad)


def test_union_and_weights_against_loops():
    rng = np.random.default_rng(0)
    stack, weights = rng.random((4, 5, 6)) < 0.4, [0.5, 2.0, 0.0, 3.6]
    hard, soft = masks.unite(stack), masks.unite(stack, weights)
    assert hard.dtype == bool and soft.dtype == np.float32
    for y in range(5):
        for x in range(6):
            assert hard[y, x] == any(stack[k, y, x] for k in range(4))
            assert soft[y, x] == np.float32(max([weights[k] / 3.6 for k in range(4) if stack[k, y, x]], default=0.0))
    assert not masks.unite(np.zeros((0, 3, 3), bool)).any()
    for bad in ([1, 2, 3], [0, 0, 0, 0], [1, -1, 0, 0], [1, np.inf, 0, 0]):
        with pytest.raises(ValueError, match="expected 4 weights"):
            masks.unite(stack, bad)
    with pytest.raises(ValueError, match="shape"):
        masks.unite(stack[0])


@pytest.mark.parametrize(("old", "new"), [((64, 64), (224, 224)), ((500, 333), (256, 256)), ((7, 13), (5, 29)), ((375, 500), (224, 224))])
def test_pixels_move_as_in_the_transforms_of_training(old, new):
    mask = np.random.default_rng(0).random(old) < 0.5
    theirs = v2.Resize(list(new), InterpolationMode.BILINEAR, antialias=True)(tv_tensors.Mask(torch.from_numpy(mask)))
    assert np.array_equal(masks.pixel_grid(mask, new), theirs.numpy())


@pytest.mark.parametrize(("size", "grid"), [((28, 28), (4, 4)), ((30, 22), (4, 3)), ((9, 9), (9, 9))])
def test_patches_against_loops(size, grid):
    rng = np.random.default_rng(1)
    for share in (0, 0.004, 0.5):
        stack = rng.random((3, *size)) < share
        stack[2, :7, :7] |= share > 0
        edges = [[(i * n // g, -(-(i + 1) * n // g)) for i in range(g)] for n, g in zip(size, grid)]
        counts = np.zeros(grid, bool)
        for k in (0, 1, 2, 3):
            layer = stack[k] if k < 3 else stack.any(0)
            parts = {(r, c): layer[a:b, d:e].mean() for r, (a, b) in enumerate(edges[0]) for c, (d, e) in enumerate(edges[1])}
            if k == 3:
                for place, covered in parts.items():
                    counts[place] |= covered >= 0.5
            elif layer.any():
                counts[max(sorted(parts), key=lambda place: (parts[place], [-i for i in place]))] = True
        assert np.array_equal(masks.patch_grid(stack, grid), counts)
    exactly_half = np.zeros((1, 14, 14), bool)
    exactly_half[0, :7] = True
    assert masks.patch_grid(exactly_half, (1, 1)).all()
    with pytest.raises(ValueError, match="no finer"):
        masks.patch_grid(exactly_half, (15, 2))


# the choice of pictures


def test_the_choice_is_a_seeded_permutation_of_sorted_files(tmp_path):
    folder = pictures(tmp_path / "i", classes=3, each=40)
    names = sorted(f"c1/{i:04d}.png" for i in range(40))
    random.Random(5).shuffle(names)
    chosen = masks.ranked_pictures(folder, 30, seed=5)
    assert {p: r for p, c, r in chosen if c == "c1"} == {p: r for r, p in enumerate(names[:30])}
    assert {x for x in chosen if x[2] < 3} == set(masks.ranked_pictures(folder, 3, seed=5))
    assert [x for x in chosen if x[1] == "c1"] == masks.ranked_pictures(folder.only([1]), 30, seed=5)
    backwards = replace(folder, samples=folder.samples[::-1])
    assert masks.ranked_pictures(backwards, 30, seed=5) == chosen == sorted(chosen)
    assert len(masks.ranked_pictures(folder)) == 120
    with pytest.raises(ValueError, match="at least 1"):
        masks.ranked_pictures(folder, 0)


def test_work_is_the_concepts_and_the_class(world):
    folder, concepts = world
    work = work_list(folder, concepts)
    assert len(work) == 12 and work[0].phrases == ("a c0", *TEXTS) and [w.picture for w in work] == sorted(w.picture for w in work)
    twice = concept_set("c0", "c1", texts=("a c0", "tail"))
    assert work_list(folder, twice)[0].phrases == ("a c0", "tail")  # the class's name as a concept is looked for once
    with pytest.raises(ValueError, match="not in the concept set, first 'c1'"):
        work_list(folder, concept_set("c0"))


# building


def test_a_store_holds_what_the_grounder_found(world, store, tmp_path):
    folder, concepts = world
    table, ranks = store.table(), {p: r for p, _, r in masks.ranked_pictures(folder)}
    assert store.pictures == tuple(sorted(masks.picture_name(folder, s) for s in folder.samples)) and len(table) == 12 * 5
    for picture in store.pictures:
        image = data.open_image(folder.root / picture)
        for phrase in ("a " + picture[:2], *TEXTS):
            mask = store.mask(picture, phrase)
            assert mask.dtype == bool and np.array_equal(mask, where(image, phrase))
            row = table[(table.picture == picture) & (table.phrase == phrase)].iloc[0]
            assert row.area == mask.mean() and row.status == ("ok" if mask.any() else "empty") and row["rank"] == ranks[picture]
            assert row.kind == ("class" if phrase.startswith("a ") else "concept") and row.boxes == int(mask.any())
            assert row.score == 0.625 if mask.any() else np.isnan(row.score)
        assert np.array_equal(store.class_mask(picture), where(image, "a " + picture[:2]))
        assert np.array_equal(store.union(picture, ["leg", "wing"]), where(image, "leg") | where(image, "wing"))
        assert np.array_equal(store.soft_union(picture, {"leg": 1, "ghost": 2}), where(image, "leg") * np.float32(0.5))
    assert store.counts().loc["concept"].to_dict() == {"empty": 12, "ok": 36} and store.set_aside == ()
    recipe = json.loads((tmp_path / "store/store.json").read_text())
    assert recipe["grounder"] == "bright" and recipe["settings"] == {"threshold": 128} and recipe["concepts"] == concepts.digest()
    meta = pq.read_schema(tmp_path / "store/shard-00001.parquet").metadata
    recipe.pop("shards")
    assert json.loads(meta[b"cft.recipe"]) == recipe
    assert masks.changed_pictures(store, folder.root) == []
    shutil.copy(folder.root / "c0/0000.png", folder.root / "c0/0001.png")
    (folder.root / "c1/0003.png").unlink()
    assert masks.changed_pictures(store, folder.root) == ["c0/0001.png", "c1/0003.png"]


def test_shards_in_any_order_make_the_same_bytes(world, store, tmp_path):
    folder, concepts = world
    for i in (2, 0, 1, 0):
        partial = build_masks(*world, Bright(tmp_path / "log"), tmp_path / "other", shards=3, shard=i, progress=False)
    assert partial.partial and MaskStore(tmp_path / "other").digest() == store.digest() and len(calls(tmp_path / "log")) == 12
    same = {p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()}
    assert same == {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} and len(same) == 4
    again = build_masks(*world, Bright(tmp_path / "log"), tmp_path / "store", shards=3, progress=False)
    assert again.digest() == store.digest() and len(calls(tmp_path / "log")) == 12


@pytest.mark.parametrize(("change", "words"), [
    (dict(grounder=Bright(threshold=99)), "settings"), (dict(shards=4), "shards"), (dict(seed=1), "seed"), (dict(per_class=2), "pictures"),
    (dict(max_pixels=9999), "max_pixels"), (dict(concepts=concept_set("c0", "c1", texts=("x",))), "concepts"),
])
def test_a_store_is_not_continued_differently(world, store, tmp_path, change, words):
    before = store.digest()
    settings = dict(folder=world[0], concepts=world[1], grounder=Bright(), shards=3) | change
    with pytest.raises(ValueError, match=f"begun differently.*{words}"):
        build_masks(**settings, root=tmp_path / "store", progress=False)
    assert MaskStore(tmp_path / "store").digest() == before


def test_shards_that_do_not_fit(world, tmp_path):
    for shards in (0, 13):
        with pytest.raises(ValueError, match="between 1 and the number of pictures, 12"):
            build_masks(*world, Bright(), tmp_path / "s", shards=shards, progress=False)
    with pytest.raises(ValueError, match="between 0 and 2; got 3"):
        build_masks(*world, Bright(), tmp_path / "s", shards=3, shard=3, progress=False)


def recorded(root, shards):
    """The pictures that are on disk, found by plain reading."""
    done = []
    for i in range(shards):
        if (root / f"shard-{i:05d}.parquet").exists():
            done += sorted(set(pd.read_parquet(root / f"shard-{i:05d}.parquet")["picture"]))
            continue
        for journal in sorted((root / f"work/{i:05d}").glob("*.jsonl")):
            for line in journal.read_text().split("\n")[1:]:
                try:
                    done.append(json.loads(line)[0]["picture"])
                except (ValueError, TypeError, IndexError):
                    pass
    return done


def test_killed_at_random_moments(tmp_path):
    folder, concepts, rng, root, log = pictures(tmp_path / "i", each=60), concept_set("c0", "c1"), random.Random(0), tmp_path / "s", tmp_path / "log"
    names = {str(zlib.crc32(data.open_image(s.path).tobytes())): masks.picture_name(folder, s) for s in folder.samples}
    build = lambda: build_masks(folder, concepts, Bright(log, pause=0.005), root, shards=24, progress=False)
    kills, running, longest = 0, True, 0.03  # seconds until a kill
    while running:
        finished, asked = set(recorded(root, 24)) if root.exists() else set(), len(calls(log))
        child = in_child(build)
        time.sleep(rng.uniform(0.005, longest))
        os.kill(child, signal.SIGKILL)
        running = status_of(child) == -signal.SIGKILL
        kills += running
        asked = [names[c] for c in calls(log)[asked:]]
        longest *= 1 if set(asked) else 1.3  # on a busy machine a process needs longer to come to work at all
        assert not finished & set(asked), "a finished picture was grounded again"
        assert len(set(asked) - set(recorded(root, 24) if root.exists() else ())) <= 1, "more than the picture in hand was lost"
    assert kills >= 20, "too few kills to mean anything"
    reference = build_masks(folder, concepts, Bright(), tmp_path / "r", shards=24, progress=False)
    assert build_masks(folder, concepts, Bright(log), root, shards=24, progress=False).digest() == reference.digest()
    assert sorted(p.name for p in root.iterdir()) == sorted(p.name for p in (tmp_path / "r").iterdir())  # nothing is left lying about
    assert set(calls(log)) == set(names) and len(calls(log)) <= 120 + kills


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_step_that_touches_the_disk(tmp_path, monkeypatch, after):
    folder, concepts = pictures(tmp_path / "i"), concept_set("c0", "c1", texts=("leg",))
    reference = build_masks(folder, concepts, Bright(), tmp_path / "r", shards=2, progress=False).digest()

    def build_and_die(step, root, log):
        count = iter(range(10**6))

        def deadly(real):
            def call(*args, **kwargs):
                mine = next(count)
                if mine == step and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return real(*args, **kwargs)
                finally:
                    if mine == step:
                        os.kill(os.getpid(), signal.SIGKILL)
            return call

        for name in ("fsync", "link", "replace", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, deadly(getattr(os, name)))
        build_masks(folder, concepts, Bright(log), root, shards=2, progress=False)

    step, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        root, log = tmp_path / f"s{step}", tmp_path / f"log{step}"
        status = status_of(in_child(partial(build_and_die, step, root, log)))
        done, asked = len(set(recorded(root, 2))) if root.exists() else 0, len(calls(log))
        assert asked - done <= 1
        assert build_masks(folder, concepts, Bright(log), root, shards=2, progress=False).digest() == reference
        assert len(calls(log)) == asked + 6 - done and sorted(p.name for p in root.iterdir() if p.suffix != ".tmp") == [
            "shard-00000.parquet", "shard-00001.parquet", "store.json"]
        step += 1
    assert status == 0 and step > 20


def test_two_processes_share_a_store(tmp_path):
    folder, concepts, log = pictures(tmp_path / "i", each=40), concept_set("c0", "c1"), tmp_path / "log"
    build = lambda own: build_masks(folder, concepts, Bright(own, pause=0.004), tmp_path / "s", shards=10, progress=False).digest()
    children = [in_child(lambda own=tmp_path / f"log{i}": build(own)) for i in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    shares = [calls(tmp_path / f"log{i}") for i in range(2)]
    assert len(shares[0]) + len(shares[1]) == 80 and not set(shares[0]) & set(shares[1]) and min(map(len, shares)) > 8
    reference = build_masks(folder, concepts, Bright(log), tmp_path / "r", shards=10, progress=False)
    assert MaskStore(tmp_path / "s").digest() == reference.digest()


def test_a_killed_helper_is_replaced_by_the_other(tmp_path):
    folder, concepts = pictures(tmp_path / "i", each=20), concept_set("c0", "c1")
    build = lambda: build_masks(folder, concepts, Bright(pause=0.01), tmp_path / "s", shards=4, progress=False)
    first = in_child(build)
    time.sleep(0.1)
    second = in_child(build)
    time.sleep(0.1)
    os.kill(first, signal.SIGKILL)  # it stays a zombie until it is waited for
    assert status_of(second) == 0 and status_of(first) == -signal.SIGKILL
    assert MaskStore(tmp_path / "s").digest() == build_masks(folder, concepts, Bright(), tmp_path / "r", shards=4, progress=False).digest()


@pytest.mark.parametrize(("writer", "age", "taken"), [
    ({"place": "elsewhere", "pid": 1, "began": "1"}, 10, False), ({"place": "elsewhere", "pid": 1, "began": "1"}, 700, True),
    ({"place": "here", "pid": os.getppid(), "began": "true"}, 10**6, False), ({"place": "here", "pid": os.getppid(), "began": "7"}, 0, True),
    ({"place": "here", "pid": 2**30, "began": "7"}, 0, True), ({"place": "here", "pid": os.getpid(), "began": "true"}, 0, True),
    (None, 10, False), (None, 700, True)])
def test_who_may_take_a_shard(tmp_path, writer, age, taken):
    desk = tmp_path / "work/00000"
    desk.mkdir(parents=True)
    if writer and writer["place"] == "here":
        writer = writer | {"place": masks._place(), "began": masks._began(writer["pid"]) if writer["began"] == "true" else writer["began"]}
    (desk / "000000.jsonl").write_text(json.dumps(writer) + "\n" + '[{"picture": "a"}]\n[{"pict' if writer else "")
    os.utime(desk / "000000.jsonl", (time.time() - age,) * 2)
    job = masks._Shard(tmp_path, 0, stale_after=600)
    assert job.take() == taken
    if taken:
        assert set(job.done) == ({"a"} if writer else set())
        assert not masks._Shard(tmp_path, 0, 600).file.exists()
        job.release()
        elsewhere = masks._Shard(tmp_path, 0, stale_after=10**6)
        assert elsewhere.take(), "a journal that was left in order is free at once"
        elsewhere.release()


def test_one_of_many_takes_a_shard(tmp_path):
    """Twelve processes reach for the same shard of a dead one at the same time."""
    (tmp_path / "work/00000").mkdir(parents=True)
    (tmp_path / "work/00000/000000.jsonl").write_text(json.dumps({"place": masks._place(), "pid": 2**30, "began": "1"}) + "\n")
    start = time.time() + 0.3

    def reach():
        time.sleep(max(0, start - time.time()))
        taken = masks._Shard(tmp_path, 0, 600).take()
        (tmp_path / f"tried_{os.getpid()}").touch()
        until = time.time() + 60
        while len(list(tmp_path.glob("tried_*"))) < 12 and time.time() < until:  # a writer that is gone would free the shard
            time.sleep(0.05)
        os._exit(10 if taken else 11)

    results = [status_of(child) for child in [in_child(reach) for _ in range(12)]]
    assert sorted(results) == [10] + [11] * 11


# bad pictures


def test_bad_pictures_are_read_or_named(tmp_path):
    root = tmp_path / "i/c0"
    root.mkdir(parents=True)
    good = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    good.save(root / "good.png")
    good.convert("CMYK").save(root / "cmyk.jpg")
    good.convert("L").save(root / "grey.png")
    Image.fromarray(np.asarray(good.convert("L")).astype(np.uint16) * 257).save(root / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(root / "turned.jpg", exif=exif)
    (root / "torn.png").write_bytes((root / "good.png").read_bytes()[:700])
    (root / "nothing.jpg").touch()
    (root / "page.png").write_text("<html>\x1b[31m")
    Image.new("F", (4, 4)).save(root / "float.tif")
    Image.new("1", (200, 200)).save(root / "large.png")
    header = (root / "good.png").read_bytes()  # a PNG that claims 10 gigapixels
    ihdr = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + header[24:29]
    (root / "bomb.png").write_bytes(header[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + header[33:])
    crash = lambda image, found: 1 / 0 if image.size == (30, 20) and np.asarray(image).std(-1).max() == 0 else found
    store = build_masks(list_folder(tmp_path / "i"), concept_set("c0"), Bright(spoil=crash), tmp_path / "s", max_pixels=30_000, progress=False)
    assert store.pictures == ("c0/cmyk.jpg", "c0/good.png", "c0/turned.jpg")
    aside = dict(line.split(": ", 1) for line in store.set_aside)
    assert {k: v.split(",")[0] for k, v in aside.items()} == {f"c0/{n}": "unreadable" for n in (
        "bomb.png", "float.tif", "large.png", "nothing.jpg", "page.png", "torn.png")} | {"c0/deep.png": "failed", "c0/grey.png": "failed"}
    assert "200 × 200 pixels are more than 30000" in aside["c0/large.png"] and "ZeroDivisionError" in aside["c0/grey.png"]
    assert not any(str(tmp_path) in line or not line.isprintable() for line in store.set_aside)
    assert store.class_mask("c0/turned.jpg").shape == (30, 20) and store.counts().loc["picture"].sum() == 8
    assert "8 pictures set aside" in repr(store) and "8 pictures set aside" in store._repr_html_()
    with pytest.raises(ValueError, match="was set aside .unreadable: .*truncated"):
        store.mask("c0/torn.png", "leg")


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda image, found: found[:-1], "expected 5 groundings; the grounder gave 4"), (lambda image, found: found[::-1], "expected 'a c0'"),
    (lambda image, found: [replace(g, mask=g.mask.T) for g in found], r"with \(12, 10\)"), (lambda image, found: None, "TypeError")])
def test_wrong_answers_are_no_masks(world, tmp_path, spoil, words):
    once = lambda image, found: spoil(image, found) if zlib.crc32(image.tobytes()) == first else found
    first = zlib.crc32(data.open_image(world[0].root / "c0/0000.png").tobytes())
    store = build_masks(*world, Bright(spoil=once), tmp_path / "s", progress=False)
    assert len(store.pictures) == 11 and store.set_aside[0].startswith("c0/0000.png: failed")
    with pytest.raises(ValueError, match=words):
        store.records("c0/0000.png")


def test_ten_failures_in_a_row_stop_the_build(world, tmp_path):
    seen = []

    def breaks(image, found):
        seen.append(image)
        if len(seen) > 2:
            raise OSError("the GPU has left")
        return found

    with pytest.raises(RuntimeError, match="4 pictures in a row .* c0/0005.png: OSError: the GPU has left"):
        build_masks(*world, Bright(spoil=breaks), tmp_path / "s", shards=2, patience=4, progress=False)
    assert sorted(recorded(tmp_path / "s", 2)) == ["c0/0000.png", "c0/0001.png"]
    store = build_masks(*world, Bright(tmp_path / "log"), tmp_path / "s", shards=2, patience=4, progress=False)
    assert not store.set_aside and len(calls(tmp_path / "log")) == 10
    assert store.digest() == build_masks(*world, Bright(), tmp_path / "r", shards=2, progress=False).digest()


# reading


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Stores of 200 and 2000 pictures with five masks each, and the peak memory of building them."""
    root, peaks = tmp_path_factory.mktemp("large"), {}
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda handle: None)
    folder, concepts = pictures(root / "i", classes=1, each=2000, size=(24, 24)), concept_set("c0")
    for n in (200, 2000):
        gc.collect()
        tracemalloc.start()
        build_masks(folder, concepts, Bright(), root / str(n), per_class=n, shards=n // 50, progress=False)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    patch.undo()
    return root, peaks


def test_memory_does_not_grow_with_the_number_of_pictures(large):
    root, peaks = large
    codes = sum(len(code) for file in (root / "2000").glob("*.parquet") for code in pd.read_parquet(file)["rle"])
    assert codes > 2_000_000
    assert peaks[2000] - peaks[200] < codes / 3, "building keeps only the list of work"
    reading = {}
    for n in (200, 2000):
        store = MaskStore(root / str(n), keep=4)
        names = store.pictures
        gc.collect()
        tracemalloc.start()
        for name in names:
            store.union(name, TEXTS)
        reading[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    print(f"peaks of building {peaks}, of reading {reading}, bytes")
    assert reading[2000] - reading[200] < 200_000


@pytest.mark.parametrize("seed", [None, 0])
def test_ten_thousand_masks_read_back(large, seed, capsys):
    store, start = MaskStore(large[0] / "2000"), time.perf_counter()
    assert masks.read_back(store, seed) == 10_000
    rate = 10_000 / (time.perf_counter() - start)
    with capsys.disabled():
        print(f" [{rate:,.0f} masks a second {'in order' if seed is None else 'shuffled'}]", end="")
    assert rate > 300


class Unions(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store, self.names = store, store.pictures

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return torch.from_numpy(self.store.union(self.names[i], TEXTS))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_feeds_workers(world, store, workers):
    everything = torch.cat(list(DataLoader(Unions(store), batch_size=5, num_workers=workers)))
    for picture, union in zip(store.pictures, everything, strict=True):
        image = data.open_image(world[0].root / picture)
        assert np.array_equal(union.numpy(), np.any([where(image, t) for t in TEXTS], 0))
    assert pickle.loads(pickle.dumps(store)).digest() == store.digest()


def test_a_damaged_or_foreign_shard_is_noticed(world, store, tmp_path):
    build_masks(*world, Bright(threshold=1), tmp_path / "other", shards=3, progress=False)
    file = tmp_path / "store/shard-00000.parquet"
    whole = file.read_bytes()
    table, wrong, noticed = store.table(), 0, 0
    for place in range(4, len(whole) // 2, 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        damaged = MaskStore(tmp_path / "store")
        try:
            for picture in store.pictures:
                for phrase, record in damaged.records(picture).items():
                    wrong += not np.array_equal(record.mask(), store.mask(picture, phrase))
        except ValueError:
            noticed += 1
    assert wrong == 0 and noticed > 20 and len(table) == 60
    shutil.copy(tmp_path / "other/shard-00000.parquet", file)
    with pytest.raises(ValueError, match="made by another build"):
        MaskStore(tmp_path / "store").pictures  # noqa: B018


def test_what_is_not_there(store, tmp_path, world):
    for case, words in [(lambda: store.mask("c9/x.png", "leg"), "is not in the mask store"), (lambda: store.mask("", "leg"), "is not in"),
                        (lambda: store.mask("c0/0000.png", "hat"), "'hat' was not looked for"), (lambda: MaskStore(tmp_path), "no mask store"),
                        (lambda: store.soft_union("c0/0000.png", {"leg": 0}), "one above 0")]:
        with pytest.raises(ValueError, match=words):
            case()
    assert store.phrases("c9/x.png") == () and store.masks("c0/0000.png", []).shape == (0, 10, 12)
    (tmp_path / "store/shard-00001.parquet").unlink()
    with pytest.raises(ValueError, match="1 of 3 shards .* missing, first shard-00001"):
        MaskStore(tmp_path / "store")
    half = MaskStore(tmp_path / "store", partial=True)
    assert len(half.pictures) == 8 and len(half.table()) == 40
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/notes.txt").touch()
    with pytest.raises(ValueError, match="holds 'notes.txt' but no store.json"):
        build_masks(*world, Bright(), tmp_path / "odd", progress=False)


def test_later_concepts_go_into_a_second_store(world, store, tmp_path):
    folder, concepts = world
    richer = concept_set("c0", "c1", texts=(*TEXTS, "antenna"))
    asked = []
    grounder = Bright(spoil=lambda image, found: asked.append([g.phrase for g in found]) or found)
    build_masks(folder, richer, grounder, tmp_path / "second", known=store, progress=False)
    assert asked == [["antenna"]] * 12
    both = MaskStore(tmp_path / "store", tmp_path / "second")
    assert len(both.table()) == 72 and both.pictures == store.pictures and both.phrases("c0/0000.png") == ("a c0", "antenna", *TEXTS)
    image = data.open_image(folder.root / "c0/0000.png")
    assert np.array_equal(both.union("c0/0000.png", ["antenna", "leg"]), where(image, "antenna") | where(image, "leg"))
    assert both.provenance["concepts"] == [concepts.digest(), richer.digest()]
    assert plan(folder, richer, known=both).records == 0
    with pytest.raises(ValueError, match="nothing to ground"):
        build_masks(folder, richer, grounder, tmp_path / "third", known=both, progress=False)
    build_masks(folder, concepts, Bright(threshold=5), tmp_path / "different", progress=False)
    with pytest.raises(ValueError, match="differ in settings"):
        MaskStore(tmp_path / "store", tmp_path / "different")


def test_a_picture_that_failed_is_tried_again_later(world, tmp_path):
    fails = lambda image, found: found if zlib.crc32(image.tobytes()) % 3 else 1 / 0
    first = build_masks(*world, Bright(spoil=fails), tmp_path / "s", progress=False)
    assert first.set_aside
    build_masks(*world, Bright(), tmp_path / "t", known=first, progress=False)
    both = MaskStore(tmp_path / "s", tmp_path / "t")
    assert both.set_aside == () and len(both.table()) == 60


def test_the_plan_counts(world, tmp_path):
    class Prompts(Bright):
        def prompts(self, phrases):
            return [phrases[:2], phrases[2:4], phrases[4:]]

    want = plan(*world, Prompts(), per_class=4, shards=2)
    assert (want.pictures, want.classes, want.phrases, want.records, want.shards) == (8, 2, 6, 40, 2)
    assert (want.encodings, want.passes, want.done) == (8, 24, 0) and plan(*world).passes == 12
    build_masks(*world, Bright(), tmp_path / "s", per_class=4, shards=2, shard=1, progress=False)
    left = plan(*world, Prompts(), tmp_path / "s", per_class=4, shards=2)
    assert (left.done, left.encodings, left.passes) == (4, 4, 12) and "4 of them done" in str(left)


def test_the_real_grounder_keeps_to_its_plan(tmp_path):
    grounder = small_grounded_sam(replace(PAPER_GROUNDING, per_prompt=2))
    folder, concepts = pictures(tmp_path / "i", each=1, size=(48, 40)), concept_set("c0", "c1")
    expected = plan(folder, concepts, grounder)
    store = build_masks(folder, concepts, grounder, tmp_path / "s", progress=False)
    assert store.set_aside == () and expected.passes == grounder.counts["detector_passes"] == 6
    assert expected.encodings == 2 >= grounder.counts["sam_encodings"] > 0
    for picture in store.pictures:
        for found in grounder(data.open_image(folder.root / picture), store.phrases(picture)):
            record = store.records(picture)[found.phrase]
            assert np.array_equal(record.mask(), found.mask.numpy()) and record.score == (found.scores.max().item() if len(found.scores) else None)
    assert store.provenance["settings"] == json.loads(json.dumps(grounder.settings()))


def test_the_end_says_what_was_set_aside(world, tmp_path, capsys):
    (world[0].root / "c0/0003.png").write_bytes(b"no picture")
    build_masks(*world, Bright(), tmp_path / "s")
    printed = capsys.readouterr()
    assert "55 masks by bright, 1 pictures set aside" in printed.out and "12/12" in printed.err


# masks for training


def test_masks_become_a_folder_for_training(world, store, tmp_path):
    folder, concepts = world
    out = store.write_pngs(concepts, tmp_path / "pngs")
    scanned = data.scan(folder.root, masks=out)
    for sample in scanned.samples:
        union = np.any([where(data.open_image(sample.path), t) for t in TEXTS], 0)
        assert np.array_equal(data.open_mask(sample.mask, (12, 10)).numpy(), union) and set(np.unique(Image.open(sample.mask))) <= {0, 255}
    assert not list(out.rglob("*.tmp"))
    own = data.scan(folder.root, masks=store.write_pngs(None, tmp_path / "own"))
    for sample in own.samples:
        expected = store.class_mask(masks.picture_name(folder, sample))
        assert np.array_equal(data.open_mask(sample.mask, (12, 10)).numpy(), expected)
    few = masks.masked_folder(folder, store, concepts, tmp_path / "few", ["c1/0002.png", "c0/0001.png"])
    assert [s.path.name for s in few.samples] == ["0001.png", "0002.png"] and len(list((tmp_path / "few").rglob("*.png"))) == 2
    with pytest.raises(ValueError, match="1 of 2 pictures are not in"):
        masks.masked_folder(replace(folder, samples=folder.samples[:6]), store, concepts, tmp_path / "few", ["c1/0002.png", "c0/0001.png"])
    for bad in (["../x.png"], ["/x.png"], ["c0/0001.png", "c0/0001.jpg"]):
        with pytest.raises(ValueError, match="inside the folder, one for each"):
            store.write_pngs(concepts, tmp_path / "pngs", bad)


def test_training_takes_the_next_usable_picture(tmp_path):
    folder, concepts = pictures(tmp_path / "i", each=8), concept_set("c0", "c1")
    order = [p for p, _, _ in sorted((x for x in masks.ranked_pictures(folder) if x[1] == "c0"), key=lambda x: x[2])]
    bad = {order[0]: 0, order[2]: 1, order[3]: 2}  # empty, everything, one pixel of 120
    sums = {zlib.crc32(data.open_image(folder.root / p).tobytes()): kind for p, kind in bad.items()}

    def spoil(image, found):
        kind = sums.get(zlib.crc32(image.tobytes()))
        mask = torch.zeros(10, 12, dtype=torch.bool)
        mask.view(-1)[:{0: 0, 1: 120, 2: 1}.get(kind, 0)] = True
        return found if kind is None else [replace(g, mask=mask) for g in found]

    store = build_masks(folder, concepts, Bright(spoil=spoil), tmp_path / "s", progress=False)
    choice = training_pictures(store, concepts, per_class=3, limits=(0.01, 0.98))
    assert {p for p in choice.pictures if p.startswith("c0")} == {order[1], order[4], order[5]} and len(choice.pictures) == 6
    assert choice.skipped == (f"{order[0]}: empty", f"{order[2]}: too_large", f"{order[3]}: too_small") and not choice.lacking
    short = training_pictures(store, concepts, per_class=7, limits=(0.01, 0.98))
    assert short.lacking == {"c0": 2} and "c0 lacks 2" in short._repr_html_()
    with pytest.raises(ValueError, match="at least 1"):
        training_pictures(store, concepts, per_class=0)


@pytest.mark.parametrize(("area", "status"), [(0.0, "empty"), (0.00099, "too_small"), (0.001, "ok"), (0.98, "ok"), (0.9801, "too_large")])
def test_limits_of_usable_masks(area, status):
    assert masks.status_of(area) == status


# ImageNet-S


def test_imagenet_s_ids_do_not_overflow(tmp_path):
    ids = np.array([[0, 1, 255, 256, 257], [512, 768, 919, 1000, 1001]])
    code = np.stack([ids % 256, ids // 256, np.full_like(ids, 7)], -1).astype(np.uint8)
    Image.fromarray(code).save(tmp_path / "m.png")
    expected = [[int(i) not in (0, 1000) for i in row] for row in ids]
    assert masks.read_imagenet_s(tmp_path / "m.png", (2, 5)).tolist() == expected
    overflowing = (code[..., 0] + code[..., 1] * np.uint8(0)) != 0  # what 256 · G is in bytes
    assert overflowing.tolist() != expected  # the trap is real


def test_imagenet_s_becomes_a_store(world, tmp_path):
    folder, concepts = world
    truth = {}
    for i, sample in enumerate(folder.samples):
        name = masks.picture_name(folder, sample)
        ids = np.random.default_rng(i).choice([0, 3, 256, 1000], (10, 12))
        truth[name] = (ids == 3) | (ids == 256)
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)).save(tmp_path / "m" / name)
    Image.new("L", (12, 10), 9).save(tmp_path / "m/c0/0001.png")
    Image.new("RGB", (10, 12)).save(tmp_path / "m/c0/0002.png")
    (tmp_path / "m/c0/0003.png").unlink()
    store = masks.import_imagenet_s(folder, tmp_path / "m", concepts, tmp_path / "s", shards=2, progress=False)
    assert len(store.pictures) == 9 and store.table().kind.eq("class").all()
    for name in store.pictures:
        assert np.array_equal(store.class_mask(name), truth[name]) and store.phrases(name) == (f"a {name[:2]}",)
    reasons = " ".join(store.set_aside)
    assert "is L of (10, 12); expected RGB" in reasons and "is RGB of (12, 10)" in reasons and "cannot be read" in reasons


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = pictures(tmp_path / "i", classes=1)
    (tmp_path / "i/c0/<b>&.png").write_bytes(b"x")
    store = build_masks(list_folder(folder.root), concept_set("c0", texts=(evil,)), Bright(), tmp_path / "s", progress=False)
    assert "<b>&" not in store._repr_html_() and "&lt;b&gt;" in store._repr_html_()
    assert store.mask("c0/0000.png", evil).shape == (10, 12)
    assert "<b>" not in training_pictures(store, concept_set("c0", texts=(evil,)))._repr_html_()
