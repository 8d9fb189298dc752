"""Test sets: every label by a second derivation, on miniatures in the exact form of the real files; all traps."""
import ast
import csv
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import cft.data.testsets
from cft.data.folders import UnreadableImage, scan
from cft.data.testsets import (
    CARDS,
    MAPPINGS,
    EvalSet,
    class_names,
    class_titles,
    folder_set,
    hub_set,
    miniature,
    noise_picture,
    numbered_files,
    objectnet_labels,
    open_set,
    read_cards,
    same_thing,
    siscore_labels,
    synsets,
    targets_of,
)
from cft.evaluate.metrics import top_k
from cft.files import ASSETS

PICTURES = [key for key in CARDS if key != "in-segmentation"]
WNID = ["in-v", "in-a", "in-r", "in-sketch"]
SI = ["si-location", "si-rotation", "si-size"]


@pytest.fixture(scope="module")
def minis(tmp_path_factory):
    root = tmp_path_factory.mktemp("minis")
    for key in CARDS:
        miniature(key, root, count=3, seed=1)
    return root


@pytest.fixture
def copy(minis, tmp_path):
    """The path of a set's own copy, to be spoilt."""
    return lambda key: shutil.copytree(minis / CARDS[key].folders[0], tmp_path / CARDS[key].folders[0])


def files_below(root):
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))


def plain_label(key, home, path):
    """The accepted classes of a file, from first principles, one at a time."""
    name = path.parent.name
    if key == "in-v2":
        return (int(name),)
    if key in SI:
        lines = [line.split(",") for line in (home / "foreground_classes.csv").read_text().splitlines()]
        return tuple(int(number) for number, theirs in lines if theirs == name)
    if key == "objectnet":
        folders, to_imagenet, lines = (json.loads((home / "mappings" / n).read_text()) for n in MAPPINGS[:3])
        text = (home / "mappings" / MAPPINGS[3]).read_text().splitlines()
        accepted = []
        for wanted in to_imagenet.get(folders[name], "").split("; "):
            for output in range(1000):
                if text[lines[str(output)]] == wanted:
                    accepted.append(output)
        return tuple(accepted)
    every = sorted(ImageNetInfo().label_names())
    return (every.index(name),)


# --- names and numbers

@pytest.mark.parametrize("key,part", [("in-a", "imagenet_a"), ("in-r", "imagenet_r")])
def test_the_200_classes_have_the_indices_that_timm_lists(key, part):
    indices = [int(i) for i in (files("timm.data") / "_info" / f"{part}_indices.txt").read_text().split()]
    assert [synsets().index(wnid) for wnid in synsets(key)] == indices and len(set(indices)) == 200


def test_the_order_is_alphabetical():
    assert list(synsets()) == sorted(set(synsets())) and len(synsets()) == len(class_names()) == 1000
    assert class_names()[10] == ImageNetInfo().index_to_description(10)


def test_a_shifted_table_is_seen():
    names = [name.split(",")[0] for name in class_names()]
    assert all(same_thing(name, number) for number, name in enumerate(names))
    passed = sum(same_thing(name, (number + 1) % 1000) for number, name in enumerate(names))
    assert passed < 150  # 122 neighbours share a word, such as two sharks
    assert not same_thing("zebra", -660) and not same_thing("zebra", 1000) and same_thing("Zebras", 340)


def test_cards():
    counts = {key: (card.pictures, card.classes) for key, card in CARDS.items()}
    assert counts == {
        "in-v": (50000, 1000), "in-v2": (10000, 1000), "in-a": (7500, 200), "in-r": (30000, 200),
        "in-sketch": (50889, 1000), "objectnet": (18574, 113), "si-location": (541548, 61), "si-rotation": (39540, 61),
        "si-size": (92884, 61), "in-segmentation": (4276, 445)}
    for key, card in CARDS.items():
        assert card.key == key and card.source.startswith("http") and card.size and card.layout and card.folders


# --- every set against its miniature

@pytest.mark.parametrize("key", PICTURES)
def test_labels_pictures_and_order(minis, key):
    home = minis / CARDS[key].folders[0]
    found = open_set(key, minis, check_counts=False)
    pictures = home / "images" if key == "objectnet" else home
    expected = {p.relative_to(pictures).as_posix(): plain_label(key, home, p) for p in files_below(pictures)}
    expected = {name: accepted for name, accepted in expected.items() if accepted}
    assert dict(zip(found.ids, found.targets)) == expected
    assert len(found) == len(expected) == (6 if key == "objectnet" else 9)
    assert found.classes_present == tuple(sorted({number for accepted in expected.values() for number in accepted}))
    for index, name in enumerate(found.ids):
        image, accepted = found[index]
        reference = np.asarray(Image.open(pictures / name).convert("RGB"))
        if key == "objectnet":
            reference = np.array([[reference[y, x] for x in range(2, 42)] for y in range(2, 34)])
        assert image.mode == "RGB" and image.size == (40, 32) and np.array_equal(np.asarray(image), reference)
        assert accepted == expected[name] and all(type(number) is int for number in accepted)
        assert found.size(index) == (pictures / name).stat().st_size
    again = open_set(key, home, check_counts=False)  # the set's own folder does as well
    assert again.ids == found.ids and again.digest(full=True) == found.digest(full=True)
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("key", PICTURES)
def test_all_classes_never_beat_the_classes_present(minis, key):
    found = open_set(key, minis, check_counts=False)
    logits = torch.randn(len(found), 1000, generator=torch.Generator().manual_seed(0))
    for row, accepted in enumerate(found.targets):
        logits[row, list(accepted)] += 3
    absent = sorted(set(range(1000)) - set(found.classes_present))
    is_right = lambda row, accepted: any(bool(top_k(row[None], torch.tensor([n]))) for n in accepted)
    right = lambda scores: [is_right(row, accepted) for row, accepted in zip(scores, found.targets)]
    everything, subset = right(logits), right(logits.index_fill(1, torch.tensor(absent), -torch.inf))
    assert all(b or not a for a, b in zip(everything, subset)) and sum(everything) < sum(subset)


def test_ten_is_ten_and_not_the_second_folder(minis):
    home = minis / CARDS["in-v2"].folders[0]
    wrong = {Path(path).relative_to(home).as_posix(): label for path, label in ImageFolder(home).samples}
    found = open_set("in-v2", home, check_counts=False)
    right = {name: accepted[0] for name, accepted in zip(found.ids, found.targets)}
    tens = [name for name in right if name.startswith("10/")]
    assert len(tens) == 3 and all(right[name] == 10 and wrong[name] == 1 for name in tens)
    assert [name.split("/")[0] for name in found.ids] == ["0"] * 3 + ["2"] * 3 + ["10"] * 3


@pytest.mark.parametrize("key", PICTURES)
def test_stray_files_and_folders_do_not_count(copy, key):
    home = copy(key)
    before = open_set(key, home, check_counts=False)
    pictures = before.root
    first = pictures / before.ids[0].split("/")[0]
    for path in (pictures / "README.txt", pictures / "._README.jpg", first / "._0.jpg", first / "notes.txt"):
        path.write_text("no picture")
    (pictures / "__MACOSX").mkdir()
    (pictures / ".ipynb_checkpoints").mkdir()
    after = open_set(key, home, check_counts=False)
    assert after.ids == before.ids and after.digest() == before.digest()


def test_a_picture_is_what_folders_say_and_lies_in_its_class_folder(copy):
    home = copy("in-r")
    before = open_set("in-r", home, check_counts=False)
    folder = home / before.ids[0].split("/")[0]
    (folder / "more").mkdir()
    shutil.copy(home / before.ids[0], folder / "more/deep.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "pipe.png")
    assert open_set("in-r", home, check_counts=False).ids == before.ids
    (folder / "a.jfif").symlink_to(home / before.ids[0])
    assert len(open_set("in-r", home, check_counts=False)) == len(before) + 1


def test_cards_are_data(tmp_path):
    assert {path.name for path in (ASSETS / "testsets").iterdir()} == {"cards.yaml", "groups.yaml"}
    (tmp_path / "c.yaml").write_text("mine: {name: Mine, pictures: 2, classes: 1, size: 1 kB, source: http://x, "
                                     "folders: [a, b], layout: '*.png', splits: {test: 2}}")
    card = read_cards(tmp_path / "c.yaml")["mine"]
    assert (card.key, card.notes, card.splits) == ("mine", "", {"test": 2})
    assert str(card.problem(Path("there"), "odd")) == "mine: odd. Expected at there: *.png. Get it from http://x (1 kB)"
    assert card.home(tmp_path) == tmp_path
    (tmp_path / "b").mkdir()
    assert card.home(tmp_path) == tmp_path / "b"
    (tmp_path / "a").mkdir()
    assert card.home(str(tmp_path)) == tmp_path / "a"
    with pytest.raises(ValueError, match="mine: there is nothing"):
        card.home(tmp_path / "nowhere")


def test_noise_in_numbered_files(tmp_path):
    paths = list(numbered_files(tmp_path / "set", ["a", "b/c"], 2, "x_{:03d}.png"))
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [
        "set/a/x_000.png", "set/a/x_001.png", "set/b/c/x_002.png", "set/b/c/x_003.png"]
    assert all(p.parent.is_dir() and not p.exists() for p in paths)
    one, two = (noise_picture(np.random.default_rng(3), 5, 7) for _ in range(2))
    assert one.size == (7, 5) and one.mode == "RGB" and np.array_equal(one, two)


@pytest.mark.parametrize("labels,classes,numbers,names", [
    ([2, np.int64(0), True], None, (2, 0, 1), ["2", "0", "1"]), (["b", 0, "b"], ["a", "b"], (1, 0, 1), ["b", "a", "b"]),
    (["3"], ["x", "3"], (1,), ["3"])])
def test_labels_and_their_classes(labels, classes, numbers, names):
    targets, found = targets_of(labels, classes, "set")
    assert [tuple(t) for t in targets] == [(n,) for n in numbers] and all(type(n) is int for (n,) in targets)
    assert found == names


@pytest.mark.parametrize("suffix", [".JPEG", ".jpeg", ".JPG", ".png", ".PNG"])
def test_endings_in_either_case(copy, suffix):
    home = copy("in-v")
    for path in files_below(home):
        path.rename(path.with_suffix(suffix))
    assert len(open_set("in-v", home, check_counts=False)) == 9


# --- counts, unknown and misplaced folders

@pytest.mark.parametrize("key", PICTURES + ["in-segmentation"])
def test_counts_are_checked(minis, key, monkeypatch):
    card = CARDS[key]
    with pytest.raises(ValueError) as caught:
        open_set(key, minis)
    for part in (f"{card.pictures:,}", str(card.classes), card.source, card.size, card.layout):
        assert part in str(caught.value)
    pictures, classes = {"objectnet": (6, 2), "in-segmentation": (3, 445)}.get(key, (9, 3))
    monkeypatch.setitem(CARDS, key, replace(card, pictures=pictures, classes=classes))
    assert len(open_set(key, minis)) == pictures
    monkeypatch.setitem(CARDS, key, replace(card, pictures=pictures + 1, classes=classes))
    with pytest.raises(ValueError, match="expected .* found"):
        open_set(key, minis)


def test_missing_classes_are_named(copy):
    home = copy("in-a")
    gone = synsets("in-a")[0]
    shutil.rmtree(home / gone)
    with pytest.raises(ValueError, match=f"missing folders: {gone}, "):
        open_set("in-a", home)
    assert 6 not in open_set("in-a", home, check_counts=False).classes_present


@pytest.mark.parametrize("key", WNID)
@pytest.mark.parametrize("name", ["n99999999", "zebra", "7"])
def test_unknown_class_folder(copy, key, name):
    home = copy(key)
    next(p for p in home.iterdir() if p.is_dir()).rename(home / name)
    with pytest.raises(ValueError, match=f"1 of 3 folders are none of its .* {name}.*Get it from"):
        open_set(key, home, check_counts=False)


def test_a_class_of_the_other_200_is_unknown(copy):
    home = copy("in-r")
    other = next(wnid for wnid in synsets("in-a") if wnid not in synsets("in-r"))
    (home / synsets("in-r")[0]).rename(home / other)
    with pytest.raises(ValueError, match=other):
        open_set("in-r", home, check_counts=False)


@pytest.mark.parametrize("name", ["1000", "-1", "007", "n01440764"])
def test_v2_folders_are_numbers_below_1000(copy, name):
    home = copy("in-v2")
    (home / "2").rename(home / name)
    with pytest.raises(ValueError, match="1 of 3 folders"):
        open_set("in-v2", home, check_counts=False)


def test_flat_validation_archive_is_explained(copy, tmp_path):
    home = copy("in-v")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in files_below(home):
        shutil.copy(path, flat)
    with pytest.raises(ValueError, match="9 pictures lie beside.*the archive is flat.*named by its WordNet id"):
        open_set("in-v", flat, check_counts=False)
    shutil.copy(files_below(home)[0], home)  # sorted in part
    with pytest.raises(ValueError, match="1 pictures lie beside"):
        open_set("in-v", home, check_counts=False)


def test_nothing_there(tmp_path, copy):
    with pytest.raises(ValueError, match="in-r: there is nothing. Expected at .*/x: .*Get it from .*2.0 GiB"):
        open_set("in-r", tmp_path / "x")
    with pytest.raises(ValueError, match="no class folders"):
        open_set("in-r", tmp_path, check_counts=False)
    with pytest.raises(ValueError, match="no set 'imagenet'; expected one of in-v, "):
        open_set("imagenet", tmp_path)
    with pytest.raises(ValueError, match="no set 'imagenet'"):
        miniature("imagenet", tmp_path)
    home = copy("in-sketch")
    for path in (home / synsets()[0]).iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=f"class folder {synsets()[0]} has no picture"):
        open_set("in-sketch", home, check_counts=False)


# --- pictures that are odd

def test_published_pictures_are_read_as_everybody_does_and_own_ones_upright(copy):
    home = copy("in-v")
    paths = files_below(home)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 40, 3), np.uint8))
    noise.save(paths[0], "JPEG", exif=sideways)
    noise.convert("CMYK").save(paths[1], "JPEG")
    noise.convert("L").save(paths[2], "PNG")  # a PNG that is called JPEG, as in the real set
    found = open_set("in-v", home, check_counts=False)
    for index in range(3):
        assert np.array_equal(np.asarray(found[index][0]), np.asarray(Image.open(paths[index]).convert("RGB")))
    assert found[0][0].size == (40, 32) and folder_set(home)[0][0].size == (32, 40)


def test_a_torn_file_is_named(copy):
    home = copy("in-v")
    path = files_below(home)[4]
    path.write_bytes(path.read_bytes()[:200])
    found = open_set("in-v", home, check_counts=False)
    with pytest.raises(UnreadableImage, match=f"in-v: {path.parent.name}/{path.name} does not decode"):
        found[4]


def test_a_list_of_pictures_must_make_sense():
    cases = [([], [], [], "0 pictures"), (["a"], [(1,), (2,)], ["x"], "2 targets"), (["a"], [(1,)], [], "0 groups"),
             (["a", "b"], [(1,), ()], ["x", "y"], "1 targets"), (["a", "a"], [(1,), (1,)], ["x", "x"], "1 repeated")]
    for ids, targets, groups, text in cases:
        with pytest.raises(ValueError, match=text):
            EvalSet("set", ids, targets, groups)
    with pytest.raises(NotImplementedError):
        EvalSet("set", ["a"], [(1,)], ["x"])[0]


def test_digest(copy, tmp_path):
    home = copy("in-r")
    found = open_set("in-r", home, check_counts=False)
    cheap, full = found.digest(), found.digest(full=True)
    moved = open_set("in-r", shutil.copytree(home, tmp_path / "elsewhere"), check_counts=False)
    path = home / found.ids[0]
    os.utime(path, (1, 1))
    assert cheap == found.digest() == moved.digest() != full == moved.digest(full=True)
    total = hashlib.sha256(b"in-r False 0")
    for name, accepted in zip(found.ids, found.targets):
        total.update(f"\0{name}\0{accepted}\0{len((home / name).read_bytes())}".encode())
    assert total.hexdigest() == cheap
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert found.digest() == cheap and found.digest(full=True) != full
    path.write_bytes(content + b"\0")
    assert found.digest() != cheap
    path.rename(path.with_name("other.jpg"))
    assert open_set("in-r", home, check_counts=False).digest() != cheap


# --- SI-Score

@pytest.mark.parametrize("key", SI)
def test_siscore_groups_are_the_factor(minis, key):
    found = open_set(key, minis, check_counts=False)
    columns = {"si-location": ("x_coord", "y_coord"), "si-rotation": ("rotation",), "si-size": ("area",)}[key]
    with (found.root / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for index, name in enumerate(found.ids):
        row = next(row for row in rows if row["image_id"] == Path(name).stem)
        assert found.groups[index] == ",".join(row[column] for column in columns)
    assert len(set(found.groups)) == 2


def test_siscore_without_metadata_and_with_half_of_it(copy):
    home = copy("si-size")
    lines = (home / "metadata.csv").read_text().splitlines()
    (home / "metadata.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="metadata.csv does not list 1 pictures, first zebra/8.jpg"):
        open_set("si-size", home, check_counts=False)
    (home / "metadata.csv").unlink()
    assert set(open_set("si-size", home, check_counts=False).groups) == {"band-aid", "pitcher (container)", "zebra"}


@pytest.mark.parametrize("text,error", [
    (None, "foreground_classes.csv is missing"), ("int,label\n", "columns int and label, got no rows"),
    ("index,label\n340,zebra\n", "columns int and label, got .*index"),
    ("int,label\n420,band-aid\n726,pitcher (container)\n340,zebra\n",
     "2 of 3 names .* contradict WordNet: band-aid is not class 420"),
    ("int,label\n419,band-aid\n340,zebra\n", "1 of 3 folders are none of its 2 classes, first pitcher")])
def test_siscore_table(copy, text, error):
    home = copy("si-rotation")
    table = home / "foreground_classes.csv"
    table.unlink() if text is None else table.write_text(text)
    with pytest.raises(ValueError, match=f"{error}.*Get it from https://github.com/google-research/si-score"):
        open_set("si-rotation", home, check_counts=False)


def test_siscore_names_with_commas_and_quotes(tmp_path):
    (tmp_path / "foreground_classes.csv").write_bytes(b'int,label\r\n340,"zebra, striped"\r\n21,kite\r\n')
    assert siscore_labels(tmp_path) == {"zebra, striped": (340,), "kite": (21,)}


@pytest.mark.parametrize("key,name", [
    ("si-location", "location20_area02_min0pc"), ("si-size", "area"), ("si-rotation", "rotation")])
def test_siscore_archives_have_other_folder_names(copy, key, name):
    home = copy(key)
    home.rename(home.with_name(name))
    assert len(open_set(key, home.parent, check_counts=False)) == 9


# --- ObjectNet

def test_objectnet_four_channels_border_and_official_mode(minis):
    home = minis / "objectnet-1.0"
    ours = open_set("objectnet", minis, check_counts=False)
    official = open_set("objectnet", minis, check_counts=False, crop_border=False, first_mapping_only=True)
    assert Image.open(ours.root / ours.ids[0]).mode == "RGBA" and ours.digest() != official.digest()
    whole = np.asarray(official[0][0])
    assert whole.shape == (36, 44, 3) and (whole[:2] == (255, 0, 0)).all() and (whole[:, -2:] == (255, 0, 0)).all()
    assert np.array_equal(np.asarray(ours[0][0]), whole[2:34, 2:42])
    assert ours.targets[0] == (409, 530) and official.targets[0] == (409,)
    assert ours.classes_present == (409, 499, 530) and official.classes_present == (409, 499)
    assert not any("air_freshener" in name for name in ours.ids) and (home / "images/air_freshener").is_dir()


def test_objectnet_chain_is_not_the_identity(minis):
    lines = json.loads((minis / "objectnet-1.0/mappings" / MAPPINGS[2]).read_text())
    assert sorted(lines.values()) == list(range(1000)) and sum(int(k) == v for k, v in lines.items()) < 10


@pytest.mark.parametrize("name", MAPPINGS)
def test_objectnet_missing_mapping(copy, name):
    home = copy("objectnet")
    (home / "mappings" / name).unlink()
    with pytest.raises(ValueError, match=f"objectnet: mapping files are missing: {name}. .*objectnet.dev"):
        open_set("objectnet", home, check_counts=False)


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("file,change,error", [
    (1, lambda x: x | {"Alarm clock": "analog clock; crane"}, r"'crane' must stand in one line .*classes \[\d+, \d+\]"),
    (1, lambda x: x | {"Alarm clock": "analog clock, digital clock"},
     r"'analog clock, digital clock' must .* classes \[\]"),
    (2, lambda x: {str((int(k) + 1) % 1000): v for k, v in x.items()},
     "must stand in one line .* and be that class, got classes"),
    (0, lambda x: {k: v for k, v in x.items() if k != "alarm_clock"},
     "1 of 3 folders are none of its 2 classes, first alarm_clock")])
def test_objectnet_wrong_mapping(copy, file, change, error):
    home = copy("objectnet")
    rewrite(home / "mappings" / MAPPINGS[file], change)
    with pytest.raises(ValueError, match=error):
        open_set("objectnet", home, check_counts=False)


def test_objectnet_same_class_twice_counts_once(copy):
    mappings = copy("objectnet") / "mappings"
    rewrite(mappings / MAPPINGS[1], lambda x: x | {"Alarm clock": "digital clock; analog clock; digital clock"})
    assert objectnet_labels(mappings)["alarm_clock"] == (530, 409)
    assert objectnet_labels(mappings, first_mapping_only=True)["alarm_clock"] == (530,)


# --- ImageNet-Segmentation

def plain_segmentation(path):
    """Pictures and masks pixel by pixel."""
    import h5py

    with h5py.File(path, "r") as file:
        for row in range(len(file["/value/img"])):
            stored, inner = file[file["/value/img"][row, 0]], file[file["/value/gt"][row, 0]]
            mask = file[inner[0, 0]][()]
            stored = stored[()]
            channels, width, height = stored.shape
            picture = [[[stored[c, x, y] for c in range(channels)] for x in range(width)] for y in range(height)]
            yield np.array(picture, np.uint8), np.array([[mask[x, y] for x in range(width)] for y in range(height)])


def test_segmentation_against_loops(minis):
    found = open_set("in-segmentation", minis, check_counts=False)
    reference = list(plain_segmentation(found.path))
    assert len(found) == len(reference) == 3 and len(set(found.ids)) == 3
    for (image, mask), (pixels, labels) in zip(found, reference):
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels) and np.array_equal(mask, labels)
        assert 0 < mask.sum() < mask.size
    assert found.path.read_bytes()[:19] == b"MATLAB 7.3 MAT-file" and found.path.read_bytes()[512:516] == b"\x89HDF"
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize("start,workers", [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_segmentation_in_workers(tmp_path, start, workers):
    found = open_set("in-segmentation", miniature("in-segmentation", tmp_path, count=16), check_counts=False)
    here = [(np.asarray(image), mask) for image, mask in found]
    loader = DataLoader(found, batch_size=None, num_workers=workers, multiprocessing_context=start, collate_fn=tuple)
    for _ in range(2 if start == "fork" else 1):
        there = [(np.asarray(image), np.asarray(mask)) for image, mask in loader]
        assert all(np.array_equal(a, c) and np.array_equal(b, d) for (a, b), (c, d) in zip(here, there, strict=True))
    assert np.array_equal(np.asarray(found[5][0]), here[5][0])


def test_segmentation_travels(minis):
    found = open_set("in-segmentation", minis, check_counts=False)
    twin = pickle.loads(pickle.dumps(found))
    assert twin.ids == found.ids and np.array_equal(twin[2][1], found[2][1])


def test_segmentation_of_another_form(tmp_path, minis):
    import h5py

    path = tmp_path / "gtsegs_ijcv.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file" * 40)
    with pytest.raises(ValueError, match="not a file of HDF5 with value/img and value/gt.*calvin-vision"):
        open_set("in-segmentation", tmp_path)
    with h5py.File(path, "w") as file:
        file["value/img"] = np.zeros((2, 1))
    with pytest.raises(ValueError, match="value/gt"):
        open_set("in-segmentation", path)
    with h5py.File(path, "a") as file:
        file["value/gt"] = np.zeros((3, 1))
    with pytest.raises(ValueError, match=r"must both be \(pictures, 1\), got \[\(2, 1\), \(3, 1\)\]"):
        open_set("in-segmentation", path)
    shutil.copy(minis / "gtsegs_ijcv.mat", path)
    cheap, full = (open_set("in-segmentation", path, check_counts=False).digest(full=f) for f in (False, True))
    with h5py.File(path, "r+") as file:
        file["#refs#/1m"][0, 0] = 3
    spoilt = open_set("in-segmentation", path, check_counts=False)
    assert spoilt.digest() == cheap and spoilt.digest(full=True) != full
    with pytest.raises(ValueError, match="picture 1 must be uint8 .* 0 … 3"):
        spoilt[1]


# --- pictures of one's own

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An image folder with a folder inside a class, a transparent picture and one on its side."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(5)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for name in ("ant", "bee hive", "cat"):
        (root / name / "more").mkdir(parents=True)
        for k, file in enumerate(("0.jpg", "more/1.PNG", "2.jpeg")):
            picture = Image.fromarray(rng.integers(0, 256, (12, 20, 4 if k == 1 else 3), dtype=np.uint8))
            picture.save(root / name / file, **({"exif": sideways} if k == 2 else {}))
    return root


def test_folder_by_name(own):
    by_alphabet, by_model = folder_set(own), folder_set(own, classes=["cat", "dog", "bee hive", "ant"])
    assert [t for (t,) in by_alphabet.targets] == [0] * 3 + [1] * 3 + [2] * 3
    assert [t for (t,) in by_model.targets] == [3] * 3 + [2] * 3 + [0] * 3 and by_model.classes_present == (0, 2, 3)
    assert list(by_model.groups) == ["ant"] * 3 + ["bee hive"] * 3 + ["cat"] * 3
    assert [name.split("/")[0] for name in by_model.ids] == list(by_model.groups)
    assert "ant/more/1.PNG" in by_model.ids and by_model.key == "folder"
    sizes = [by_model[i][0].size for i in range(3)]
    assert sorted(sizes) == [(12, 20), (20, 12), (20, 12)]
    folder = scan(own)
    same = folder_set(folder, classes=["cat", "dog", "bee hive", "ant"])
    assert same.targets == by_model.targets and same.ids == by_model.ids == by_alphabet.ids
    assert same.digest() == by_model.digest()
    assert folder_set(folder.only([2]), classes=["cat"]).targets == ((0,),) * 3
    with pytest.raises(ValueError, match="folder: a label is 'ant'; expected one of the model's 2 classes"):
        folder_set(folder, classes=["cat", "dog"])
    with pytest.raises(ValueError, match="does not know: ant, bee hive; expected some of cat, dog"):
        folder_set(own, classes=["cat", "dog"])


@pytest.fixture(scope="module")
def table(own):
    import datasets

    paths = [path for path in sorted(own.rglob("*.*")) if path.is_file()]
    names = ["cat", "bee hive", "ant"]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "n": datasets.Value("int64")}
    labels = [names.index(p.relative_to(own).parts[0]) for p in paths]
    columns = {"image": [str(p) for p in paths], "label": labels, "n": list(range(9))}
    return datasets.Dataset.from_dict(columns, datasets.Features(kinds))


def test_hub(table, own, tmp_path):
    classes = ["ant", "dog", "bee hive", "cat"]
    found, plain = hub_set(table, classes=classes), hub_set(table)
    folder = folder_set(own, classes=classes)
    assert sorted(found.targets) == sorted(folder.targets) and plain.targets == tuple((n,) for n in table["label"])
    assert found.groups == plain.groups == tuple(table.features["label"].names[n] for n in table["label"])
    for index in (0, 4, 8):
        theirs = table[index]["image"]
        if theirs.mode == "RGB":
            assert np.array_equal(np.asarray(found[index][0]), np.asarray(theirs))
        else:  # transparent pixels on white, by hand
            pixels = np.asarray(theirs).astype(float)
            share = pixels[..., 3:] / 255
            assert np.abs(np.asarray(found[index][0]) - (pixels[..., :3] * share + 255 * (1 - share))).max() <= 1
    table.save_to_disk(tmp_path / "saved")
    saved = hub_set(tmp_path / "saved", classes=classes)
    assert saved.digest(full=True) == found.digest(full=True) and len(set(saved.ids)) == 9
    loaded = [target for _, target in DataLoader(saved, batch_size=None, num_workers=2, collate_fn=tuple)]
    assert [tuple(t) for t in loaded] == list(saved.targets)


def test_hub_errors(table):
    import datasets

    labelled = lambda label: table.select_columns(["image"]).add_column("label", [label] * 9)
    for source, options, error in [
        (datasets.DatasetDict(train=table, test=table), {}, "the splits train, test"),
        (table.to_iterable_dataset(), {}, "an endless IterableDataset"),
        (table, {"label": "y"}, "expected the columns image .* and y"),
        (table, {"image": "n"}, "expected the columns n"),
        (table, {"classes": ["cat", "ant"]}, "a label is 'bee hive'; expected one of the model's 2 classes"),
        (labelled(-1), {}, "a label is -1; expected a number"), (labelled(None), {}, "a label is None"),
        (labelled(0.5), {}, "a label is 0.5"), (labelled("cat"), {}, "a label is 'cat'.*names need `classes`"),
        (labelled(7), {"classes": ["cat", "ant"]}, "a label is 7")]:
        with pytest.raises(ValueError, match=error):
            hub_set(source, **options)


def test_a_row_without_a_picture_is_named(own):
    import datasets

    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    good = {"bytes": None, "path": str(next(own.rglob("*.jpg")))}
    rows = {"image": [good, {"bytes": None, "path": None}, None, {"bytes": None, "path": "/gone/x.png"}],
            "label": [0, 1, 1, 1]}
    features = datasets.Features({"image": plain, "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features).cast_column("image", datasets.Image())
    found = hub_set(table, ["a", "b"], key="mine")
    assert found[0][0].mode == "RGB"
    for row, words in ((1, "has no picture; expected bytes"), (2, "has no picture"), (3, "/gone/x.png: No such")):
        with pytest.raises(UnreadableImage, match=f"mine: row 0000000{row}:? {words}"):
            found[row]


# --- extras are extras

@pytest.mark.parametrize("module,call", [
    ("h5py", lambda root: open_set("in-segmentation", root)),
    ("h5py", lambda root: miniature("in-segmentation", root / "new")),
    ("datasets", lambda root: hub_set(root)),
])
def test_a_missing_package_is_named(minis, tmp_path, monkeypatch, module, call):
    shutil.copy(minis / "gtsegs_ijcv.mat", tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {module}; install it with: pip install '{module}'"):
        call(tmp_path)


def test_the_module_imports_without_extras():
    tree = ast.parse(Path(cft.data.testsets.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {"h5py", "datasets"} & {name.split(".")[0] for name in names if name}


def test_miniatures_repeat(tmp_path):
    for key in ("in-a", "objectnet", "si-size"):
        roots = (("a", 0), ("b", 0), ("c", 1))
        first, second, other = (open_set(key, miniature(key, tmp_path / name, seed=k), False) for name, k in roots)
        assert first.digest(full=True) == second.digest(full=True) != other.digest(full=True)


@pytest.mark.parametrize("folders, titles", [
    (["n01440764", "n01443537"], ["tench, Tinca tinca", "goldfish, Carassius auratus"]),
    (["001.Black_footed_Albatross", "002.Laysan_Albatross"], ["Black footed Albatross", "Laysan Albatross"]),
    (["n02085620-Chihuahua", "n02085782-Japanese_spaniel"], ["Chihuahua", "Japanese spaniel"]),
    (["3-toed_sloth", "Straße_Hund"], ["3-toed sloth", "Straße Hund"]),
    (["n01440764", "my__dog"], ["tench, Tinca tinca", "my dog"])])
def test_titles_of_classes_from_their_folders(folders, titles):
    assert class_titles(folders) == dict(zip(folders, titles))


def test_titles_of_all_of_imagenet_differ():
    titles = class_titles(synsets())
    assert len(set(titles.values())) == 1000
    assert [titles[name].split(":")[0] for name in ("n02012849", "n03126707")] == ["crane", "crane"]


@pytest.mark.parametrize("folders", [["0", "1"], ["007", "dog"], ["n99999999", "dog"], ["a_b", "a b"], ["12_", "13_"]])
def test_what_is_no_title_is_refused_by_name(folders):
    with pytest.raises(ValueError, match=rf"folders {re.escape(folders[0])}\b.*in their names; give --names FILE"):
        class_titles(folders)


@pytest.mark.parametrize("text", [
    "tench\ngold fish\n", "\ufefftench\r\ngold fish", "1,gold fish\n0,tench\n",
    "0\ttench\n1\tgold fish", "0: tench\n1: gold fish",
    '"0","tench"\n"1","gold fish"', "id,name\n0,tench\n1,gold fish\n", "0 tench\n1 gold fish\n2 more"])
def test_titles_from_a_file(tmp_path, text):
    (tmp_path / "names.txt").write_bytes(text.encode())
    assert class_titles(["0", "1"], tmp_path / "names.txt") == {"0": "tench", "1": "gold fish"}


@pytest.mark.parametrize("text", ["tench\n", "a\nb\nc\n", "", "0\n1\n", "tench\ntench\n"])
def test_a_file_of_titles_that_does_not_fit(tmp_path, text):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match="folders 0, 1.*names.txt; give --names FILE.* 2 folders"):
        class_titles(["0", "1"], tmp_path / "names.txt")
