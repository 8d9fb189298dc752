"""Masks are kept exactly, whatever happens to the process that makes them."""
import errno
import fcntl
import json
import os
import random
import resource
import signal
import time
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from bright_grounder import TEXTS, Bright, built, concept_set, pictures, where
from filelock import FileLock
from PIL import Image

from cft.concepts import masks
from cft.concepts.grounding import PAPER_GROUNDING, small_grounded_sam
from cft.concepts.masks import Search, build_masks, ground_pictures, plan_masks, training_pictures, work_list
from cft.concepts.store import MaskStore
from cft.data import backdrop
from cft.data import folders as data
from cft.data.folders import list_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools


def test_controls_have_the_area_of_the_concepts_and_lie_where_they_say(tmp_path):
    root = backdrop.write(tmp_path / "w", {"train": 2}, seed=3)
    names = list_folder(root / "images/train").names
    read = lambda place, name: np.asarray(Image.open((place / name).with_suffix(".png"))) > 0
    found = {}
    for kind in masks.CONTROLS:
        masks.write_controls(kind, root / "masks/train", root / "objects/train", tmp_path / kind, names, seed=1)
        masks.write_controls(kind, root / "masks/train", root / "objects/train", tmp_path / "again", names, seed=1)
        found[kind] = [read(tmp_path / kind, name) for name in names]
        assert all((a == read(tmp_path / "again", name)).all() for a, name in zip(found[kind], names))
    y, x = np.mgrid[:64, :64] - 31.5
    far = x**2 + y**2
    for i, name in enumerate(names):
        concepts, objects = read(root / "masks/train", name), read(root / "objects/train", name)
        sizes = {kind: found[kind][i].sum() for kind in masks.CONTROLS}
        assert {sizes[kind] for kind in ("random", "shuffled", "ellipse")} == {concepts.sum()}
        assert (found["body"][i] == (objects & ~concepts)).all() and not (found["random"][i] & ~objects).any()
        disc = found["ellipse"][i]
        assert far[disc].max() <= far[~disc].min()
    overlap = lambda kind: np.mean([masks_iou(m, read(root / "masks/train", n)) for m, n in zip(found[kind], names)])
    assert max(map(overlap, ("random", "shuffled", "ellipse"))) < 0.6 and overlap("body") == 0
    with pytest.raises(ValueError, match="expected one of random, body, shuffled, ellipse and two masks of one size"):
        masks.control_mask("halo", concepts, objects, concepts, np.random.default_rng(0))


def masks_iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_wide_picture_has_a_wide_ellipse():
    concepts = np.zeros((20, 60), bool)
    concepts[:10, :20] = True
    shape = masks.control_mask("ellipse", concepts, concepts, concepts, np.random.default_rng(0))
    height, width = shape.any(1).sum(), shape.any(0).sum()
    assert shape.sum() == 200 and 2.4 < width / height < 3.6


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
    return built(*world, Bright(), tmp_path / "store", shards=3)


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
    assert len(work) == 12 and work[0].phrases == ("a c0", *TEXTS)
    assert [w.picture for w in work] == sorted(w.picture for w in work)
    twice = concept_set("c0", "c1", texts=("a c0", "tail"))
    assert work_list(folder, twice)[0].phrases == ("a c0", "tail")  # the class's name as a concept is looked for once
    with pytest.raises(ValueError, match="not in the concept set, first 'c1'"):
        work_list(folder, concept_set("c0"))


# building


def test_a_store_holds_what_the_grounder_found(world, store, tmp_path):
    folder, concepts = world
    table, ranks = store.table(), {p: r for p, _, r in masks.ranked_pictures(folder)}
    assert store.pictures == tuple(sorted(folder.name(s) for s in folder.samples)) and len(table) == 12 * 5
    for picture in store.pictures:
        image = data.open_image(folder.root / picture)
        for phrase in ("a " + picture[:2], *TEXTS):
            mask = store.mask(picture, phrase)
            assert mask.dtype == bool and np.array_equal(mask, where(image, phrase))
            row = table[(table.picture == picture) & (table.phrase == phrase)].iloc[0]
            assert row.area == mask.mean() and row.status == ("ok" if mask.any() else "empty")
            assert row["rank"] == ranks[picture]
            assert row.kind == ("class" if phrase.startswith("a ") else "concept") and row.boxes == int(mask.any())
            assert row.score == 0.625 if mask.any() else np.isnan(row.score)
        assert np.array_equal(store.class_mask(picture), where(image, "a " + picture[:2]))
        assert np.array_equal(store.union(picture, ["leg", "wing"]), where(image, "leg") | where(image, "wing"))
    assert store.counts().loc["concept"].to_dict() == {"empty": 12, "ok": 36} and store.set_aside == ()
    recipe = json.loads((tmp_path / "store/store.json").read_text())
    assert recipe["grounder"] == "bright" and recipe["settings"] == {"threshold": 128}
    assert recipe["concepts"] == concepts.digest()
    meta = pq.read_schema(tmp_path / "store/shard-00001.parquet").metadata
    recipe.pop("shards")
    assert json.loads(meta[b"cft.recipe"]) == recipe


def test_shards_in_any_order_make_the_same_bytes(world, store, tmp_path):
    folder, concepts = world
    for i in (2, 0, 1, 0):
        partial = built(*world, Bright(tmp_path / "log"), tmp_path / "other", shards=3, shard=i)
    assert partial.partial and MaskStore(tmp_path / "other").digest() == store.digest()
    assert len(calls(tmp_path / "log")) == 12
    same = {p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()}
    assert same == {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} and len(same) == 4
    again = built(*world, Bright(tmp_path / "log"), tmp_path / "store", shards=3)
    assert again.digest() == store.digest() and len(calls(tmp_path / "log")) == 12


@pytest.mark.parametrize(("change", "words"), [
    (dict(grounder=Bright(threshold=99)), "settings"), (dict(shards=4), "shards"), (dict(seed=1), "seed"),
    (dict(per_class=2), "pictures"), (dict(max_pixels=9999), "max_pixels"),
    (dict(concepts=concept_set("c0", "c1", texts=("x",))), "concepts"),
])
def test_a_store_is_not_continued_differently(world, store, tmp_path, change, words):
    before = store.digest()
    settings = dict(folder=world[0], concepts=world[1], grounder=Bright(), shards=3) | change
    with pytest.raises(ValueError, match=f"begun differently.*{words}"):
        built(**settings, root=tmp_path / "store")
    assert MaskStore(tmp_path / "store").digest() == before


def test_shards_that_do_not_fit(world, tmp_path):
    for shards in (0, 13):
        with pytest.raises(ValueError, match="between 1 and the number of pictures, 12"):
            built(*world, Bright(), tmp_path / "s", shards=shards)
    with pytest.raises(ValueError, match="between 0 and 2; got 3"):
        built(*world, Bright(), tmp_path / "s", shards=3, shard=3)


def recorded(root, shards):
    """The pictures that are on disk, found by plain reading."""
    done = []
    for i in range(shards):
        if (root / f"shard-{i:05d}.parquet").exists():
            done += sorted(set(pd.read_parquet(root / f"shard-{i:05d}.parquet")["picture"]))
            continue
        journal = root / f"shard-{i:05d}.jsonl"
        for line in journal.read_text().split("\n")[:-1] if journal.exists() else ():
            done.append(json.loads(line)[0]["picture"])
    return done


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    folder, concepts = pictures(tmp_path / "i", each=60), concept_set("c0", "c1")
    rng, root, log = random.Random(0), tmp_path / "s", tmp_path / "log"
    names = {str(zlib.crc32(data.open_image(s.path).tobytes())): folder.name(s) for s in folder.samples}
    build = lambda: built(folder, concepts, Bright(log, pause=0.005), root, shards=24)
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
        done = set(recorded(root, 24) if root.exists() else ())
        assert len(set(asked) - done) <= 1, "more than the picture in hand was lost"
    assert kills >= 20, "too few kills to mean anything"
    reference = built(folder, concepts, Bright(), tmp_path / "r", shards=24)
    assert built(folder, concepts, Bright(log), root, shards=24).digest() == reference.digest()
    there = sorted(p.name for p in root.iterdir())
    assert there == sorted(p.name for p in (tmp_path / "r").iterdir()), "nothing is left lying about"
    assert set(calls(log)) == set(names) and len(calls(log)) <= 120 + kills


class Stricken:
    """The steps of a build that touch the disk below `root`; one is struck by `fate`, before or after it is done."""

    names = ("open", "fsync", "replace", "unlink", "mkdir", "truncate")

    def __init__(self, monkeypatch, root, step, fate, after=False):
        self.root, self.step, self.fate, self.after, self.count = str(root), step, fate, after, 0
        for name in self.names:
            monkeypatch.setattr(os, name, partial(self.call, getattr(os, name)))

    def call(self, real, *args, **kwargs):
        if not isinstance(args[0], int) and not os.fspath(args[0]).startswith(self.root):
            return real(*args, **kwargs)
        self.count += 1
        mine = self.count - 1 == self.step
        if mine and not self.after:
            self.fate()
        try:
            return real(*args, **kwargs)
        finally:
            if mine:
                self.fate()


def steps_until_the_end(tmp_path, run):
    """`run(step, root, build)` in a process of its own for each step, until one comes to its end: how each ended."""
    folder, concepts = pictures(tmp_path / "i"), concept_set("c0", "c1", texts=("leg",))
    reference = built(folder, concepts, Bright(), tmp_path / "r", shards=2).digest()
    step, status = 0, None
    while status != 0:
        root, log = tmp_path / f"s{step}", tmp_path / f"log{step}"
        build = partial(built, folder, concepts, Bright(log), root, shards=2)
        status = status_of(in_child(partial(run, step, root, build)))
        done, asked = len(set(recorded(root, 2))) if root.exists() else 0, len(calls(log))
        assert asked - done <= 1, "more than the picture in hand was lost"
        assert built(folder, concepts, Bright(log), root, shards=2).digest() == reference
        assert len(calls(log)) == asked + 6 - done
        assert sorted(p.name for p in root.iterdir()) == ["shard-00000.parquet", "shard-00001.parquet", "store.json"]
        yield status
        step += 1
    assert step > 20


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_step_that_touches_the_disk(tmp_path, monkeypatch, after):
    def build_and_die(step, root, build):
        Stricken(monkeypatch, root, step, lambda: os.kill(os.getpid(), signal.SIGKILL), after)
        build()

    assert set(steps_until_the_end(tmp_path, build_and_die)) == {-signal.SIGKILL, 0}


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_at_any_step_breaks_nothing(tmp_path, monkeypatch, number):
    """The published fault: an error of the disk left a store that no later run could read or finish."""
    def refuse():
        raise OSError(number, os.strerror(number))

    def build_and_fail(step, root, build):
        struck = Stricken(monkeypatch, root, step, refuse)
        try:
            build()
        except OSError as error:
            clear = "the same call goes on" in str(error) and str(root) in str(error)
            os._exit(5 if error.errno == number and clear else 6)
        os._exit(4 if struck.count > step else 0)  # 4: only the tidying up failed

    met = list(steps_until_the_end(tmp_path, build_and_fail))
    assert set(met) == {5, 4, 0} and met.count(5) > 15


@pytest.mark.parametrize("limit", [0, 40, 400, 900, 3000, 6000])
def test_files_that_cannot_grow(world, tmp_path, limit):
    """An error in the middle of store.json, of a line, of a parquet file: the kernel writes what fits, and no more."""
    def build_within():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            built(*world, Bright(tmp_path / "s.log", pause=0), tmp_path / "s", shards=2)
        except OSError as error:
            os._exit(5 if error.errno == errno.EFBIG else 6)

    reference = built(*world, Bright(), tmp_path / "r", shards=2)
    assert status_of(in_child(build_within)) == 5
    done, log = len(recorded(tmp_path / "s", 2)), tmp_path / "log"
    store = built(*world, Bright(log), tmp_path / "s", shards=2)
    assert store.digest() == reference.digest() and len(calls(log)) == 12 - done
    assert len(list((tmp_path / "s").iterdir())) == 3


def test_a_finished_store_needs_no_right_to_write(world, store, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("unlink", "replace", "truncate", "rename"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(masks, "locked", refuse)
    assert built(*world, Bright(spoil=refuse), tmp_path / "store", shards=3).digest() == store.digest()


def test_a_silent_build_has_no_bar(world, tmp_path, monkeypatch):
    """Not even a disabled one: its lock is shared by forked processes, and one killed with it would stop the others."""
    monkeypatch.setattr(masks, "tqdm", None)
    assert len(built(*world, Bright(), tmp_path / "s").pictures) == 12


def test_two_processes_share_a_store(tmp_path):
    folder, concepts, log = pictures(tmp_path / "i", each=40), concept_set("c0", "c1"), tmp_path / "log"
    build = lambda own: built(folder, concepts, Bright(own, pause=0.004), tmp_path / "s", shards=10).digest()
    children = [in_child(lambda own=tmp_path / f"log{i}": build(own)) for i in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    shares = [calls(tmp_path / f"log{i}") for i in range(2)]
    assert len(shares[0]) + len(shares[1]) == 80 and not set(shares[0]) & set(shares[1]) and min(map(len, shares)) > 8
    reference = built(folder, concepts, Bright(log), tmp_path / "r", shards=10)
    assert MaskStore(tmp_path / "s").digest() == reference.digest()


def test_a_killed_helper_is_replaced_by_the_other(tmp_path):
    folder, concepts = pictures(tmp_path / "i", each=20), concept_set("c0", "c1")
    build = lambda: built(folder, concepts, Bright(pause=0.01), tmp_path / "s", shards=4)
    first = in_child(build)
    time.sleep(0.1)
    second = in_child(build)
    time.sleep(0.1)
    os.kill(first, signal.SIGKILL)  # it stays a zombie until it is waited for
    assert status_of(second) == 0 and status_of(first) == -signal.SIGKILL
    assert MaskStore(tmp_path / "s").digest() == built(folder, concepts, Bright(), tmp_path / "r", shards=4).digest()


def test_what_others_hold_is_left_to_them_and_free_when_they_die(world, tmp_path):
    root = tmp_path / "s"
    built(*world, Bright(), root, shards=3, shard=0)

    def hold():
        with FileLock(root / "shard-00001.lock"):
            (tmp_path / "held").touch()
            time.sleep(60)

    def until(seen):
        end = time.time() + 30
        while not seen() and time.time() < end:
            time.sleep(0.01)
        return seen()

    holder = in_child(hold)
    assert until((tmp_path / "held").exists)
    builder = in_child(lambda: built(*world, Bright(), root, shards=3))
    assert until((root / "shard-00002.parquet").exists), "a shard that is held stops nobody"
    time.sleep(0.5)
    assert not (root / "shard-00001.parquet").exists()
    assert os.waitpid(builder, os.WNOHANG) == (0, 0), "and is waited for"
    os.kill(holder, signal.SIGKILL)  # it stays a zombie until it is waited for
    assert status_of(builder) == 0 and status_of(holder) == -signal.SIGKILL
    assert sorted(p.suffix for p in root.iterdir()) == [".json"] + [".parquet"] * 3
    assert MaskStore(root).digest() == built(*world, Bright(), tmp_path / "r", shards=3).digest()


def test_many_reach_for_the_same_shards(world, tmp_path):
    """Twelve processes begin at the same moment in an empty folder: each picture is grounded once, all see the end."""
    start = time.time() + 1

    def reach():
        time.sleep(max(0, start - time.time()))
        store = built(*world, Bright(tmp_path / "log", pause=0.01), tmp_path / "s", shards=2)
        assert len(store.pictures) == 12

    assert [status_of(child) for child in [in_child(reach) for _ in range(12)]] == [0] * 12
    assert len(calls(tmp_path / "log")) == len(set(calls(tmp_path / "log"))) == 12
    assert sorted(p.suffix for p in (tmp_path / "s").iterdir()) == [".json", ".parquet", ".parquet"]


def test_of_two_different_builds_one_founds_the_store(world, tmp_path):
    """They begin at the same moment; the other one is told, and no row of it is in the store."""
    for attempt in range(4):
        root, start = tmp_path / str(attempt), time.time() + 0.2

        def reach(threshold, root=root, start=start):
            time.sleep(max(0, start - time.time()))
            try:
                built(*world, Bright(threshold=threshold), root, shards=2)
            except ValueError as error:
                os._exit(5 if "settings" in str(error) else 6)

        assert sorted(status_of(child) for child in [in_child(partial(reach, t)) for t in (128, 90)]) == [0, 5]
        threshold = MaskStore(root).provenance["settings"]["threshold"]
        reference = built(*world, Bright(threshold=threshold), tmp_path / f"r{attempt}", shards=2)
        assert MaskStore(root).digest() == reference.digest()


def test_anybody_may_bring_a_list_of_work(world, tmp_path):
    folder, _ = world
    work = [Search(name, name[:2], 0, "", ("tail", "leg")[: 1 + k % 2]) for k, name in enumerate(folder.names)][::-1]
    made_by = {"grounder": "bright", "settings": {}}

    def build(work, log=None):
        segment = lambda item, image: Bright(log)(image, item.phrases)
        return ground_pictures(work, folder.root, segment, tmp_path / "s", made_by, shards=5, progress=False)

    store = build(work)
    assert list(store.pictures) == sorted(folder.names)
    assert all(store.phrases(item.picture) == tuple(sorted(item.phrases)) for item in work)
    assert np.array_equal(store.mask("c1/0001.png", "leg"), where(data.open_image(folder.root / "c1/0001.png"), "leg"))
    assert store.table().kind.eq("concept").all() and store.provenance["concepts"] == [None]
    assert build(work[::-1], tmp_path / "log").digest() == store.digest(), "the order of the list is of no account"
    assert not calls(tmp_path / "log")
    with pytest.raises(ValueError, match="got more for c0/0003.png"):
        build([*work, replace(work[8], phrases=("ghost",))])
    with pytest.raises(ValueError, match="begun differently.*pictures.*work"):
        build(work[1:])


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
    folder = list_folder(tmp_path / "i")
    store = built(folder, concept_set("c0"), Bright(spoil=crash), tmp_path / "s", max_pixels=30_000)
    assert store.pictures == ("c0/cmyk.jpg", "c0/good.png", "c0/turned.jpg")
    aside = dict(line.split(": ", 1) for line in store.set_aside)
    unreadable = ("bomb.png", "float.tif", "large.png", "nothing.jpg", "page.png", "torn.png")
    expected = dict.fromkeys(unreadable, "unreadable") | {"deep.png": "failed", "grey.png": "failed"}
    assert {k: v.split(",")[0] for k, v in aside.items()} == {f"c0/{name}": why for name, why in expected.items()}
    assert "200 × 200 pixels are more than 30000" in aside["c0/large.png"]
    assert "ZeroDivisionError" in aside["c0/grey.png"]
    assert not any(str(tmp_path) in line or not line.isprintable() for line in store.set_aside)
    assert store.class_mask("c0/turned.jpg").shape == (30, 20) and store.counts().loc["picture"].sum() == 8
    assert "8 pictures set aside" in repr(store) and "8 pictures set aside" in store._repr_html_()
    with pytest.raises(ValueError, match="was set aside .unreadable: .*truncated"):
        store.mask("c0/torn.png", "leg")


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda image, found: found[:-1], "expected 5 groundings; the grounder gave 4"),
    (lambda image, found: found[::-1], "expected 'a c0'"),
    (lambda image, found: [replace(g, mask=g.mask.T) for g in found], r"with \(12, 10\)"),
    (lambda image, found: None, "TypeError")])
def test_wrong_answers_are_no_masks(world, tmp_path, spoil, words):
    once = lambda image, found: spoil(image, found) if zlib.crc32(image.tobytes()) == first else found
    first = zlib.crc32(data.open_image(world[0].root / "c0/0000.png").tobytes())
    store = built(*world, Bright(spoil=once), tmp_path / "s")
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
        built(*world, Bright(spoil=breaks), tmp_path / "s", shards=2, patience=4)
    assert sorted(recorded(tmp_path / "s", 2)) == ["c0/0000.png", "c0/0001.png"]
    store = built(*world, Bright(tmp_path / "log"), tmp_path / "s", shards=2, patience=4)
    assert not store.set_aside and len(calls(tmp_path / "log")) == 10
    assert store.digest() == built(*world, Bright(), tmp_path / "r", shards=2).digest()


def test_later_concepts_go_into_a_second_store(world, store, tmp_path):
    folder, concepts = world
    richer = concept_set("c0", "c1", texts=(*TEXTS, "antenna"))
    asked = []
    grounder = Bright(spoil=lambda image, found: asked.append([g.phrase for g in found]) or found)
    built(folder, richer, grounder, tmp_path / "second", known=store)
    assert asked == [["antenna"]] * 12
    both = MaskStore(tmp_path / "store", tmp_path / "second")
    assert len(both.table()) == 72 and both.pictures == store.pictures
    assert both.phrases("c0/0000.png") == ("a c0", "antenna", *TEXTS)
    image = data.open_image(folder.root / "c0/0000.png")
    assert np.array_equal(both.union("c0/0000.png", ["antenna", "leg"]), where(image, "antenna") | where(image, "leg"))
    assert both.provenance["concepts"] == [concepts.digest(), richer.digest()]
    assert plan_masks(folder, richer, known=both).records == 0
    with pytest.raises(ValueError, match="nothing to ground"):
        built(folder, richer, grounder, tmp_path / "third", known=both)
    built(folder, concepts, Bright(threshold=5), tmp_path / "different")
    with pytest.raises(ValueError, match="differ in settings"):
        MaskStore(tmp_path / "store", tmp_path / "different")


def test_a_picture_that_failed_is_tried_again_later(world, tmp_path):
    fails = lambda image, found: found if zlib.crc32(image.tobytes()) % 3 else 1 / 0
    first = built(*world, Bright(spoil=fails), tmp_path / "s")
    assert first.set_aside
    built(*world, Bright(), tmp_path / "t", known=first)
    both = MaskStore(tmp_path / "s", tmp_path / "t")
    assert both.set_aside == () and len(both.table()) == 60


def test_the_plan_counts(world, tmp_path):
    class Prompts(Bright):
        def prompts(self, phrases):
            return [phrases[:2], phrases[2:4], phrases[4:]]

    want = plan_masks(*world, Prompts(), per_class=4, shards=2)
    assert (want.pictures, want.classes, want.phrases, want.records, want.shards) == (8, 2, 6, 40, 2)
    assert (want.encodings, want.passes, want.done) == (8, 24, 0) and plan_masks(*world).passes == 12
    built(*world, Bright(), tmp_path / "s", per_class=4, shards=2, shard=1)
    left = plan_masks(*world, Prompts(), tmp_path / "s", per_class=4, shards=2)
    assert (left.done, left.encodings, left.passes) == (4, 4, 12) and "4 of them done" in str(left)


@pytest.mark.slow
def test_the_real_grounder_keeps_to_its_plan(tmp_path):
    grounder = small_grounded_sam(replace(PAPER_GROUNDING, per_prompt=2))
    folder, concepts = pictures(tmp_path / "i", each=1, size=(48, 40)), concept_set("c0", "c1")
    expected = plan_masks(folder, concepts, grounder)
    store = built(folder, concepts, grounder, tmp_path / "s")
    assert store.set_aside == () and expected.passes == grounder.counts["detector_passes"] == 6
    assert expected.encodings == 2 >= grounder.counts["sam_encodings"] > 0
    for picture in store.pictures:
        for found in grounder(data.open_image(folder.root / picture), store.phrases(picture)):
            record = store.records(picture)[found.phrase]
            assert np.array_equal(record.mask(), found.mask.numpy())
            assert record.score == (found.scores.max().item() if len(found.scores) else None)
    assert store.provenance["settings"] == json.loads(json.dumps(grounder.settings()))


def test_the_end_says_what_was_set_aside(world, tmp_path, capsys):
    (world[0].root / "c0/0003.png").write_bytes(b"no picture")
    build_masks(*world, Bright(), tmp_path / "s")
    printed = capsys.readouterr()
    assert "55 masks by bright, 1 pictures set aside" in printed.out and "12/12" in printed.err


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

    store = built(folder, concepts, Bright(spoil=spoil), tmp_path / "s")
    choice = training_pictures(store, concepts, per_class=3, limits=(0.01, 0.98))
    assert {p for p in choice.pictures if p.startswith("c0")} == {order[1], order[4], order[5]}
    assert len(choice.pictures) == 6
    assert choice.skipped == (f"{order[0]}: empty", f"{order[2]}: too_large", f"{order[3]}: too_small")
    assert not choice.lacking
    short = training_pictures(store, concepts, per_class=7, limits=(0.01, 0.98))
    assert short.lacking == {"c0": 2} and "c0 lacks 2" in short._repr_html_()
    with pytest.raises(ValueError, match="at least 1"):
        training_pictures(store, concepts, per_class=0)


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
        name = folder.name(sample)
        ids = np.random.default_rng(i).choice([0, 3, 256, 1000], (10, 12))
        truth[name] = (ids == 3) | (ids == 256)
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)).save(tmp_path / "m" / name)
    Image.new("L", (12, 10), 9).save(tmp_path / "m/c0/0001.png")
    Image.new("RGB", (10, 12)).save(tmp_path / "m/c0/0002.png")
    (tmp_path / "m/c0/0003.png").unlink()
    store = masks.import_imagenet_s(folder, tmp_path / "m", concepts, tmp_path / "s", progress=False)
    assert len(store.pictures) == 9 and store.table().kind.eq("class").all()
    for name in store.pictures:
        assert np.array_equal(store.class_mask(name), truth[name]) and store.phrases(name) == (f"a {name[:2]}",)
    reasons = " ".join(store.set_aside)
    assert "is L of (10, 12); expected RGB" in reasons and "is RGB of (12, 10)" in reasons
    assert "cannot be read" in reasons


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = pictures(tmp_path / "i", classes=1)
    (tmp_path / "i/c0/<b>&.png").write_bytes(b"x")
    store = built(list_folder(folder.root), concept_set("c0", texts=(evil,)), Bright(), tmp_path / "s")
    assert "<b>&" not in store._repr_html_() and "&lt;b&gt;" in store._repr_html_()
    assert store.mask("c0/0000.png", evil).shape == (10, 12)
    assert "<b>" not in training_pictures(store, concept_set("c0", texts=(evil,)))._repr_html_()


@pytest.mark.parametrize("left", [b"", b"[]\n", b"{}\n", b"[{}]\n", b"null\n", b"\0\0\n", b"\xff"])
def test_what_a_dead_writer_left_is_taken_over(world, store, tmp_path, left):
    """An empty or damaged journal of a full disk, and the file of its lock, which nobody holds."""
    built(*world, Bright(), tmp_path / "s", shards=3)
    (tmp_path / "s/shard-00001.parquet").unlink()
    (tmp_path / "s/shard-00001.jsonl").write_bytes(left)
    (tmp_path / "s/shard-00001.lock").touch()
    assert built(*world, Bright(), tmp_path / "s", shards=3).digest() == store.digest()
    assert len(list((tmp_path / "s").iterdir())) == 4


def test_a_build_says_what_it_waits_for(world, tmp_path, monkeypatch, caplog):
    now, root = [0.0], tmp_path / "s"
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    built(*world, Bright(), root, shards=2)
    (root / "shard-00000.parquet").unlink()
    with (root / "shard-00000.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def sleep(_):
            now[0] += 4
            if now[0] > 30:
                held.close()

        monkeypatch.setattr(time, "sleep", sleep)
        built(*world, Bright(), root, shards=2)
    assert caplog.messages == ["waiting for other processes that work on shard-00000.parquet"]


@pytest.mark.parametrize("text, words",
                         [("", "no sound JSON"), ("[]", "holds a list"), ('{"format": 2}', "of format 2")])
def test_a_damaged_store_is_named(world, tmp_path, text, words):
    built(*world, Bright(), tmp_path / "s")
    (tmp_path / "s/store.json").write_text(text)
    with pytest.raises(ValueError, match=f"s.* {words}"):
        MaskStore(tmp_path / "s")
