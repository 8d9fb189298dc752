"""Data sets with groups: labels, groups, pixels by a second derivation, on miniatures in the exact form; all traps."""
import csv
import io
import pickle
import pickletools
import shutil
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from chapters import from_chapter
from PIL import Image
from torch.utils.data import DataLoader

import cft.related.groups
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, read_mask, scan
from cft.data.testsets import class_names, synsets
from cft.evaluate.passes import accuracy_rows
from cft.files import read_json, write_json
from cft.related.groups import (
    BIRD_COUNTS,
    CORRUPTIONS,
    GROUP_CARDS,
    GROUP_SPLITS,
    IN9_VARIANTS,
    SUPERCLASSES,
    answer_table,
    as_folder,
    backdrop_set,
    backgrounds_gap,
    cifar_names,
    csv_set,
    group_scores,
    group_table,
    imagenet_answers,
    open_groups,
    plain_pickle,
    severity_table,
    spawrious_parts,
)

miniature_groups = from_chapter("related/00_groups.ipynb", cft.related.groups, "_mini_waterbirds", "_mini_cifar",
                                "_mini_in9", "_mini_hard", "miniature_groups")[-1]


class Python2(pickle._Pickler):
    """Writes texts as Python 2 did."""

    def text(self, text):
        raw = text.encode("latin1") if isinstance(text, str) else text
        head, size = (pickle.SHORT_BINSTRING, 1) if len(raw) < 256 else (pickle.BINSTRING, 4)
        self.write(head + len(raw).to_bytes(size, "little") + raw)
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: text, bytes: text}


def write_python2(path, content):
    """A pickle as Python 2 wrote it: texts as bytes, numpy under its former name."""
    stream = io.BytesIO()
    Python2(stream, protocol=2).dump(content)
    path.write_bytes(stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def as_pickles(key, binary, home):
    """The same CIFAR in the form of pickles, as the archive for Python has it."""
    home.mkdir(parents=True)
    names = [line for line in next(binary.glob("*.txt")).read_text().split("\n") if line]
    meta, names_key = {"cifar-10": ("batches.meta", "label_names"), "cifar-100": ("meta", "fine_label_names")}[key]
    write_python2(home / meta, {names_key: names})
    for file in binary.glob("*.bin"):
        records = np.fromfile(file, np.uint8).reshape(-1, 3074 if key == "cifar-100" else 3073)
        labels = [column.tolist() for column in records[:, :-3072].T]
        of_labels = dict(zip(("coarse_labels", "fine_labels") if key == "cifar-100" else ("labels",), labels))
        files = [f"p_s_{k:06d}.png" for k in range(len(records))]
        content = {"filenames": files, "batch_label": "batch 1 of 1", **of_labels, "data": records[:, -3072:].copy()}
        write_python2(home / file.stem, content)


@pytest.fixture(scope="module")
def minis(tmp_path_factory):
    root = tmp_path_factory.mktemp("minis")
    for key in GROUP_CARDS:
        home = miniature_groups(key, root, count=3, seed=1)
        if key in ("cifar-10", "cifar-100"):
            as_pickles(key, home, root / "python" / GROUP_CARDS[key].folders[1])
    return root


@pytest.fixture
def copy(minis, tmp_path):
    """A set's own copy, to be spoilt."""
    def make(key, form="binary"):
        name = GROUP_CARDS[key].folders[form == "python"]
        return shutil.copytree((minis / "python" if form == "python" else minis) / name, tmp_path / name)
    return make


def loose(key, root, split="test"):
    return open_groups(key, root, split, check_counts=False)


def test_cards_and_splits_agree():
    assert set(GROUP_SPLITS) == set(GROUP_CARDS)
    assert all(GROUP_SPLITS[key]["test"] == card.pictures for key, card in GROUP_CARDS.items())
    assert {split: sum(n) for split, n in BIRD_COUNTS.items()} == GROUP_SPLITS["waterbirds"]
    totals = {split: sum(n for *_, n in spawrious_parts(split)) for split in ("train", "test")}
    assert totals == GROUP_SPLITS["spawrious"]
    assert all(card.key == key and card.source for key, card in GROUP_CARDS.items())


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_waterbirds_row_by_row(minis, split):
    home = minis / "waterbird_complete95_forest2water2"
    found, expected = loose("waterbirds", minis, split), []
    for row in csv.DictReader((home / "metadata.csv").open()):
        if row["split"] == {"train": "0", "val": "1", "test": "2"}[split]:
            bird, place = ["landbird", "waterbird"][int(row["y"])], ["land", "water"][int(row["place"])]
            expected.append((row["img_filename"], (int(row["y"]),), f"{bird} on {place}"))
    assert list(zip(found.ids, found.targets, found.groups)) == expected and set(Counter(found.groups).values()) == {3}
    assert np.array_equal(found[1][0], Image.open(home / found.ids[1]).convert("RGB"))
    with pytest.raises(ValueError, match="found {'landbird on land': 3.*waterbird_complete95_forest2water2.*0.5 GB"):
        open_groups("waterbirds", minis, split)


def test_spawrious_ties_and_unties(minis):
    train, test = loose("spawrious", minis, "train"), loose("spawrious", minis)
    breeds = sorted(["labrador", "bulldog", "dachshund", "corgi"])
    for one in (train, test):
        for name, (label,), group in zip(one.ids, one.targets, one.groups):
            _, location, breed, _ = name.split("/")
            assert breeds[label] == breed and group == f"{breed} in {location}"
    places = lambda one: {breed: {g.split(" in ")[1] for g in one.groups if g.startswith(breed)} for breed in breeds}
    assert all("beach" in there and len(there) == 2 for there in places(train).values())
    assert places(test) == {"bulldog": {"mountain"}, "corgi": {"jungle"}, "dachshund": {"snow"}, "labrador": {"desert"}}
    assert places(train)["corgi"] == {"desert", "beach"} and places(train)["labrador"] == {"snow", "beach"}
    assert not set(train.groups) & set(test.groups)
    wanted = Counter()
    for folder, _, n in spawrious_parts("train"):
        wanted[folder.split("/")[0], "tied" if "beach" not in folder else "beach"] += n
    assert wanted == {("0", "tied"): 4 * 3072, ("0", "beach"): 4 * 96, ("1", "tied"): 4 * 2756, ("1", "beach"): 4 * 412}
    with pytest.raises(ValueError, match="expected 3,168 pictures in 0/mountain/bulldog, found 3"):
        open_groups("spawrious", minis)
    with pytest.raises(ValueError, match="expected train or test, got 'val'"):
        spawrious_parts("val")


def test_spawrious_takes_the_first_files_by_name(minis, copy, monkeypatch):
    home = copy("spawrious")
    (home / "0/jungle/bulldog/.hidden").touch()
    (home / "0/jungle/bulldog/._a.png").touch()
    (home / "0/jungle/bulldog/a_folder.png").mkdir()
    (home / "0/jungle/bulldog/a_first.png").write_bytes((home / "0/jungle/bulldog/node_0.png").read_bytes())
    monkeypatch.setattr(cft.related.groups, "TOTAL", 2)
    found = loose("spawrious", home.parent, "train")
    assert [n for n in found.ids if n.startswith("0/jungle/bulldog")] == ["0/jungle/bulldog/a_first.png"]
    shutil.rmtree(home / "1/beach/corgi")
    with pytest.raises(ValueError, match="1/beach/corgi, found 0"):
        loose("spawrious", home.parent, "train")


def records(path, label_bytes):
    """Label and pixels of every record, byte by byte."""
    content, size = path.read_bytes(), label_bytes + 3072
    for start in range(0, len(content), size):
        record = content[start:start + size]
        planes = record[label_bytes:]
        pixel = lambda x, y, planes=planes: tuple(planes[1024 * c + 32 * y + x] for c in range(3))
        yield record[label_bytes - 1], [[pixel(x, y) for x in range(32)] for y in range(32)]


@pytest.mark.parametrize("key, folder, label_bytes", [
    ("cifar-10", "cifar-10-batches-bin", 1), ("cifar-100", "cifar-100-binary", 2)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_in_both_forms(minis, key, folder, label_bytes, split):
    home = minis / folder
    tens = {"train": [f"data_batch_{k}" for k in (1, 2, 3, 4, 5)], "test": ["test_batch"]}
    files = tens[split] if key == "cifar-10" else [split]
    plain = [r for file in files for r in records(home / f"{file}.bin", label_bytes)]
    binary, python = loose(key, minis, split), loose(key, minis / "python", split)
    assert len(binary) == 3 * len(files) and binary.ids == python.ids
    assert binary.targets == python.targets and binary.groups == python.groups
    for index, (label, pixels) in enumerate(plain):
        for one in (binary, python):
            image, accepted = one[index]
            assert accepted == (label,) and one.groups[index] == cifar_names(key, home)[label]
            assert np.array_equal(np.asarray(image), np.array(pixels, np.uint8))
    assert binary.digest(full=True) == python.digest(full=True)


def test_the_pickles_are_those_of_python_2(minis):
    content = (minis / "python/cifar-100-python/train").read_bytes()
    codes = [(op.name, arg) for op, arg, _ in pickletools.genops(content)]
    assert ("PROTO", 2) in codes and ("GLOBAL", "numpy.core.multiarray _reconstruct") in codes
    names = {name for name, _ in codes}
    assert {"SHORT_BINSTRING", "BINSTRING"} <= names and not {"BINUNICODE", "BINBYTES"} & names
    theirs = {b"data", b"fine_labels", b"coarse_labels", b"filenames", b"batch_label"}
    assert set(pickle.loads(content, encoding="bytes")) == theirs


class Run:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("payload, word", [
    (Run(eval, "open('{flag}', 'w')"), "builtins.eval"), (Run(np.load, "{flag}"), "numpy.load"),
    (Run(Run, print), "test_groups.Run")])
def test_a_pickle_runs_nothing(tmp_path, payload, word):
    flag = tmp_path / "flag"
    payload.call = payload.call[0], tuple(a.format(flag=flag) if isinstance(a, str) else a for a in payload.call[1])
    for protocol in (0, 2, 4, 5):
        (tmp_path / "trap").write_bytes(pickle.dumps({"data": payload}, protocol))
        with pytest.raises(ValueError, match=f"trap is refused: it asks for .*{word.rsplit('.', 1)[1]}"):
            plain_pickle(tmp_path / "trap")
        assert not flag.exists()


@pytest.mark.parametrize("content, word", [
    (b"", "EOFError|Ran out"), (b"not a pickle", "refused"), (pickle.dumps([1]), "expected a dict, got list"),
    (pickle.dumps({"data": np.zeros(2)})[:-4], "refused")])
def test_damaged_pickles(tmp_path, content, word):
    (tmp_path / "trap").write_bytes(content)
    with pytest.raises(ValueError, match=word):
        plain_pickle(tmp_path / "trap")


@pytest.mark.parametrize("spoil, word", [
    (lambda h: (h / "test.bin").unlink(), "test.bin is missing"),
    (lambda h: (h / "test.bin").write_bytes(b"\0" * 3073), "must be records of 3074 bytes, got 3,073"),
    (lambda h: (h / "test.bin").write_bytes(b"\0\xf0" + b"\0" * 3072),
     "a label is 240; expected one of the model's 100 classes"),
    (lambda h: (h / "fine_label_names.txt").write_text("apple\n"), "expected 100 class names"),
    (lambda h: (h / "fine_label_names.txt").unlink(), "neither fine_label_names.txt nor meta is there")])
def test_cifar_that_is_spoilt(copy, spoil, word):
    home = copy("cifar-100")
    spoil(home)
    with pytest.raises(ValueError, match=f"^cifar-100: (test.bin )?{word}.*kriz"):
        loose("cifar-100", home.parent)


PIXELS = np.zeros((1, 3072), np.uint8)


@pytest.mark.parametrize("data, labels", [
    (PIXELS.repeat(2, 0), [0]), (None, [0]), (PIXELS.astype(float), [0]), (PIXELS, ["a"]), (PIXELS, 0), (PIXELS, None),
    (PIXELS[0], [0]), ([[0] * 3072], [0]), ([[0], [0, 1]], [0])])
def test_cifar_pickles_of_another_shape(copy, data, labels):
    home = copy("cifar-100", "python")
    (home / "test").write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    with pytest.raises(ValueError, match="cifar-100: (test must have data, uint8|setting an array).*kriz"):
        loose("cifar-100", home.parent)
    assert len(loose("cifar-100", home.parent, "train")) == 3


def test_cifar_c_by_blocks(minis):
    home, found = minis / "CIFAR-10-C", loose("cifar-10-c", minis)
    labels, place = np.load(home / "labels.npy"), 0
    for name in CORRUPTIONS:
        pictures = np.load(home / f"{name}.npy")
        for row in range(15):
            assert found.groups[place] == f"{name}/{row // 3 + 1}" and found.targets[place] == (labels[row],)
            assert np.array_equal(found[place][0], pictures[row]) and found.raw(place) == pictures[row].tobytes()
            place += 1
    assert place == len(found) == len(set(found.ids))
    loader = DataLoader(found, batch_size=None, num_workers=2, collate_fn=lambda item: (np.asarray(item[0]), item[1]))
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(loader, found))
    assert len(pickle.dumps(found)) < 50_000, "pixels stay on the disk"


@pytest.mark.parametrize("spoil, word", [
    (lambda h: (h / "frost.npy").unlink(), "1 of 16 files are missing, first frost.npy"),
    (lambda h: np.save(h / "fog.npy", np.zeros((15, 32, 32, 3))), "fog.npy must hold uint8"),
    (lambda h: np.save(h / "fog.npy", np.zeros((12, 32, 32, 3), "u1")), "fog.npy has 12 pictures; labels.npy has 15"),
    (lambda h: np.save(h / "fog.npy", np.array([Run(print, "x")], dtype=object)), "fog.npy does not read"),
    (lambda h: np.save(h / "labels.npy", np.arange(15)), "labels.npy must repeat the same labels 5 times"),
    (lambda h: np.save(h / "labels.npy", np.int64(3)), "labels.npy must repeat the same labels 5 times"),
    (lambda h: np.save(h / "labels.npy", np.zeros((5, 3))), "labels.npy must repeat the same labels 5 times"),
    (lambda h: np.save(h / "labels.npy", np.full(15, 12)), "a label is 12; expected one of the model's 10 classes")])
def test_cifar_c_that_is_spoilt(copy, spoil, word, capsys):
    home = copy("cifar-10-c")
    spoil(home)
    with pytest.raises(ValueError, match=f"^cifar-10-c: {word}"):
        loose("cifar-10-c", home.parent)
    assert capsys.readouterr().out == ""


def test_the_door_says_what_there_is(tmp_path, minis):
    with pytest.raises(ValueError, match="no set 'celeba' with a split 'test'; .* one of waterbirds: train, val, test"):
        open_groups("celeba", tmp_path)
    with pytest.raises(ValueError, match="no set 'cifar-10-c' with a split 'train'"):
        open_groups("cifar-10-c", tmp_path, "train")
    with pytest.raises(ValueError, match="there is nothing. Expected at"):
        open_groups("cifar-10", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected 10,000 pictures in test, found 3"):
        open_groups("cifar-10", minis)
    with pytest.raises(ValueError, match="no set 'celeba'; expected one of waterbirds, "):
        miniature_groups("celeba", tmp_path)
    (tmp_path / "waterbird_complete95_forest2water2").mkdir()
    with pytest.raises(ValueError, match="waterbirds: .*metadata.csv.*Get it from"):
        loose("waterbirds", tmp_path)


def test_imagenet_9_folder_by_folder(minis):
    home, found, place = minis / "bg_challenge", loose("in-9", minis), 0
    nine = sorted(path.name for path in (home / "original/val").iterdir())
    assert len(nine) == 9 and (nine[0], nine[2], nine[8]) == ("00_dog", "02_wheeled vehicle", "08_fish")
    for variant in ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "only_bg_b", "only_bg_t", "no_fg"):
        for label, folder in enumerate(nine):
            for file in sorted((home / variant / "val" / folder).iterdir()):
                assert found.ids[place] == file.relative_to(home).as_posix() and found.groups[place] == variant
                assert found[place][1] == (label,) and np.array_equal(found[place][0], Image.open(file))
                place += 1
    assert place == len(found) == 8 * 9 * 3
    with pytest.raises(ValueError, match="^in-9: expected 32,400 pictures in test, found 216.*MadryLab"):
        open_groups("in-9", minis)


def test_superclasses_and_the_gap_by_looking_up_every_answer(minis):
    home, found = minis / "bg_challenge", loose("in-9", minis)
    table = read_json(home / "in_to_in9.json")
    assert list(table) != sorted(table, key=int), "the file has no order to rely on"
    thousand = imagenet_answers(found, home / "in_to_in9.json")
    assert (thousand.ids, thousand.groups) == (found.ids, found.groups)
    logits = torch.randn(len(found), 1000, generator=torch.Generator().manual_seed(2))
    for row, (label,) in zip(logits[::2], found.targets[::2]):
        row[next(int(k) for k, v in table.items() if v == label)] += 9
    right, seen = Counter(), Counter()
    for answer, (label,), group in zip(logits.argmax(1).tolist(), found.targets, found.groups):
        seen[group] += 1
        right[group] += table[str(answer)] == label
    pictures = answer_table(thousand, logits)
    each = {group: 100 * right[group] / seen[group] for group in IN9_VARIANTS}
    assert group_table(pictures)["top1"].to_dict() == pytest.approx(each) and len(set(each.values())) > 2
    gap = backgrounds_gap(pictures)
    assert gap == pytest.approx(each["mixed_same"] - each["mixed_rand"]) and gap != 0
    with pytest.raises(ValueError, match="no group mixed_rand among "):
        backgrounds_gap(pictures[pictures["group"] != "mixed_rand"])


@pytest.mark.parametrize("change", [
    {"0": 9}, {"0": "1"}, {"0": True}, {"1000": 1}, {"0": None}, {str(k): -1 for k in range(4, 1000, 10)}])
def test_a_mapping_of_another_form(minis, tmp_path, change):
    found, file = loose("in-9", minis), tmp_path / "in_to_in9.json"
    with pytest.raises(ValueError, match="in_to_in9.json is missing or wrong; .*as in in_to_in9.json of https://github.com/Madry"):
        imagenet_answers(found, file)
    write_json(file, {str(k): k % 10 - 1 for k in range(1000)})
    assert imagenet_answers(found, file).targets[0] == tuple(range(1, 1000, 10))
    write_json(file, read_json(file) | change)
    with pytest.raises(ValueError, match="in_to_in9.json is missing or wrong; expected keys 0 … 999, values −1 … 8"):
        imagenet_answers(found, file)


def test_imagenet_9_without_a_folder(copy):
    home = copy("in-9")
    shutil.rmtree(home / "mixed_next/val/06_musical instrument")
    with pytest.raises(ValueError, match="^in-9: no picture in mixed_next/val/06_musical instrument. Expected at"):
        loose("in-9", home.parent)


@pytest.mark.parametrize("split, part", [("train", "train"), ("test", "val")])
def test_hard_imagenet_mask_by_mask(minis, split, part):
    found = loose("in-hard", minis, split)
    assert len(found) == 6 and set(found.groups) == {"n03218198", "n04228054"}
    folder = as_folder(found, class_names())
    for index, mask in enumerate(sorted((minis / "hardImageNet" / part).iterdir())):
        wnid, name = mask.name[:9], mask.name[10:]
        assert found.ids[index] == f"{part}/{wnid}/{name}" and found.masks[index] == mask
        assert synsets()[found.targets[index][0]] == wnid == found.groups[index]
        assert np.array_equal(found[index][0], Image.open(minis / "HardImageNet_Images" / part / wnid / name))
        drawn = np.zeros((32, 40), bool)
        drawn[5:21, 6:27] = True
        assert len(np.unique(np.asarray(Image.open(mask)))) > 2 and np.array_equal(read_mask(mask)[0], drawn)
        sample = folder.samples[index]
        assert (sample.object, sample.label) == (mask, found.targets[index][0])
    item = MaskedImages(folder, Preprocess((32, 40), crop=1.0))[0]
    assert torch.equal(item["object"], torch.from_numpy(drawn))
    assert as_folder(loose("in-9", minis), SUPERCLASSES).samples[0].object is None


@pytest.mark.parametrize("spoil, word", [
    (lambda h: (h / "val").rename(h / "test"), "no mask in val"),
    (lambda h: (h / "val/n00000000_x.JPEG").touch(), "1 of 7 pictures are missing or .*, first val/n00000000/x.JPEG"),
    (lambda h: (h / "val/n04228054_x.JPEG").touch(), "1 of 7 pictures are missing or .*, first val/n04228054/x.JPEG"),
    (lambda h: None, "expected 15 classes in val, found 2")])
def test_hard_imagenet_that_is_spoilt(copy, minis, spoil, word):
    home = copy("in-hard")
    shutil.copytree(minis / "HardImageNet_Images", home.parent / "HardImageNet_Images")
    spoil(home)
    with pytest.raises(ValueError, match=f"^in-hard: {word}.*mmoayeri"):
        open_groups("in-hard", home.parent)


@pytest.mark.parametrize("column, value", [("y", "2"), ("place", "-1"), ("split", "test"), ("y", "")])
def test_waterbirds_of_another_kind(copy, column, value):
    home = copy("waterbirds")
    table = pd.read_csv(home / "metadata.csv", dtype=str)
    table.loc[0, column] = value
    table.to_csv(home / "metadata.csv", index=False)
    with pytest.raises(ValueError, match=f"waterbirds: {column} must be 0 … [12], got {value}"):
        loose("waterbirds", home)


def test_waterbirds_as_wilds_unpacks_it(copy):
    home = copy("waterbirds")
    found = loose("waterbirds", home).ids
    assert loose("waterbirds", home.rename(home.with_name("waterbirds_v1.0")).parent).ids == found


@pytest.fixture
def table(tmp_path):
    for name in "abcd":
        Image.new("RGB", (6, 4), "navy").save(tmp_path / f"{name}.png")
    return pd.DataFrame({"image": [f"{n}.png" for n in "abcd"], "label": ["1", "0", "1", "0"], "group": list("xxyy"),
                         "split": ["test"] * 3 + ["train"]})


def test_a_table_of_ones_own(table, tmp_path):
    table.to_csv(tmp_path / "t.csv", index=False)
    found = csv_set(tmp_path / "t.csv", tmp_path)
    assert (found.targets, found.groups) == (((1,), (0,), (1,), (0,)), tuple("xxyy"))
    joined = csv_set(table, tmp_path, group=("group", "split"), where={"split": ["train"]}, joint="+")
    assert joined.groups == ("y+train",)
    named = csv_set(table, tmp_path, classes=("1", "0"))
    assert named.targets == ((0,), (1,), (0,), (1,)), "a name that looks like a number is a name"


@pytest.mark.parametrize("change, word", [
    ({"group": ("place",)}, "without place"), ({"image": "file"}, "without file"),
    ({"where": {"fold": ["1"]}}, "without fold"),
    ({"where": {"split": ["dev"]}}, "csv: no row has split dev; expected some of test, train"),
    ({"where": {"split": ["test", "dev"]}}, "csv: no row has split dev"),
    ({"where": {"split": ["train"], "group": ["x"]}}, "csv: no row has group x; expected some of y"),
    ({"where": {"split": []}}, "0 pictures"),
    ({"classes": ["only"]}, "a label is 1; expected one of the model's 1 classes")])
def test_a_table_that_does_not_fit(table, tmp_path, change, word):
    with pytest.raises(ValueError, match=word):
        csv_set(**({"table": table, "root": tmp_path} | change))


LOST = "1 of 4 pictures are missing or not in the folder, first"


@pytest.mark.parametrize("cell, word", [
    ("../a.png", f"{LOST} ../a.png"), ("/a.png", f"{LOST} /a.png"), ("z.png", f"{LOST} z.png"),
    ("b.png", "expected ids to differ"), (" ", "1 cells of image are empty")])
def test_pictures_that_are_not_there(table, tmp_path, cell, word):
    table.loc[0, "image"] = cell
    with pytest.raises(ValueError, match=word):
        csv_set(table, tmp_path)
    with pytest.raises(ValueError, match="no table at"):
        csv_set(tmp_path / "none.csv", tmp_path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return backdrop.write(tmp_path_factory.mktemp("world") / "w", {"val": 8, "adversarial": 4, "sketch": 1}, seed=3)


def test_the_drawn_world(world):
    drawn = {name: backdrop.render(name, n, 3) for name, n in (("val", 8), ("adversarial", 4))}
    homes, scenes = backdrop_set(world), backdrop_set(world, by="background")
    assert len(homes) == 12 * 12 and homes.ids == scenes.ids
    seen = defaultdict(int)
    for name, (label,), home, scene in zip(homes.ids, homes.targets, homes.groups, scenes.groups):
        which, cls, file = name.split("/")
        number = int(file[-8:-4])
        picture = np.flatnonzero(drawn[which].labels == label)[number]
        assert list(backdrop.CLASSES)[label] == cls
        assert scene == f"{cls} on {backdrop.BACKGROUNDS[drawn[which].backgrounds[picture]]}"
        assert home == f"{cls} {'at home' if drawn[which].at_home[picture] else 'away'}"
        seen[which] += 1
    assert seen == {"val": 96, "adversarial": 48}
    assert all(group.endswith(" away") for group in backdrop_set(world, ["adversarial"]).groups)


@pytest.mark.parametrize("call, word", [
    ({"by": "weather"}, "by must be home or background"), ({"sets": ["sketch"]}, "12 cells of group are empty"),
    ({"sets": ["test"]}, "no row has set test; expected some of adversarial, sketch, val"),
    ({"sets": ["sketch"], "by": "background"}, "12 cells of group are empty")])
def test_the_drawn_world_refuses(world, call, word):
    with pytest.raises(ValueError, match=word):
        backdrop_set(world, **call)
    with pytest.raises(ValueError, match="no metadata.csv of a written benchmark"):
        backdrop_set(world / "images")


def test_folders_keep_order_and_pixels(minis, tmp_path, world):
    arrays = loose("cifar-10", minis, "train")
    names = cifar_names("cifar-10", minis / "cifar-10-batches-bin")
    with pytest.raises(ValueError, match="are no files; expected `out`, a folder to write them to"):
        as_folder(arrays, names)
    folder = as_folder(arrays, names, tmp_path / "png")
    with pytest.raises(ValueError, match="expected names for all classes, got 1"):
        as_folder(arrays, names[:1], tmp_path)
    assert len(folder) == len(arrays) and folder.classes == names
    for index, sample in enumerate(folder.samples):
        assert (sample.label,) == arrays.targets[index] and sample.path.parent.name == names[sample.label]
        assert np.array_equal(Image.open(sample.path), arrays.pixels(index))
    folder.samples[0].path.write_bytes(b"kept")
    assert as_folder(arrays, names, tmp_path / "png") == folder
    assert folder.samples[0].path.read_bytes() == b"kept", "what is there is not written again"
    homes = backdrop_set(world)
    kept, copied = (as_folder(homes, list(backdrop.CLASSES), out) for out in (None, tmp_path / "copy"))
    assert kept.names == list(homes.ids) and [s.label for s in kept.samples] == [s.label for s in copied.samples]
    assert all(np.array_equal(Image.open(a.path), Image.open(b.path)) for a, b in zip(kept.samples, copied.samples))
    assert scan(tmp_path / "copy").classes == tuple(sorted(backdrop.CLASSES))


def test_scores_by_counting(minis):
    source = loose("waterbirds", minis)
    logits = torch.randn(len(source), 2, generator=torch.Generator().manual_seed(4))
    pictures = answer_table(source, logits)
    right, seen = Counter(), Counter()
    for row, (label,), group in zip(logits.tolist(), source.targets, source.groups):
        seen[group] += 1
        right[group] += row[label] > row[1 - label]
    each = {group: 100 * right[group] / seen[group] for group in seen}
    scores = group_scores(pictures, ["landbird on land"] * 3 + ["waterbird on water"])
    assert scores["average"] == pytest.approx(100 * sum(right.values()) / 12) and scores["worst"] == min(each.values())
    assert scores["worst_group"] == min(each, key=each.get) and (scores["n"], scores["groups"]) == (3, 4)
    assert scores["adjusted"] == pytest.approx(0.75 * each["landbird on land"] + 0.25 * each["waterbird on water"])
    of_groups = group_table(pictures)["top1"]
    assert of_groups.to_dict() == each and of_groups.is_monotonic_increasing
    rows = accuracy_rows(pictures, 2).query("metric == 'top1' and labels == 'full2'").set_index("split")["value"]
    assert rows["worst group"] == scores["worst"] and rows["all"] == pytest.approx(scores["average"])
    with pytest.raises(ValueError, match="no test pictures of ostrich"):
        group_scores(pictures, ["ostrich"])
    with pytest.raises(ValueError, match="expected logits of 12 pictures"):
        answer_table(source, logits[:5])


def test_groups_that_are_the_classes_have_a_worst_one_too(minis):
    source = loose("spawrious", minis)
    logits = torch.nn.functional.one_hot(torch.tensor([t[0] for t in source.targets]), 4).float()
    logits[:2] = logits[:2].roll(1, 1)
    scores = group_scores(answer_table(source, logits))
    assert (scores["worst_group"], scores["worst"]) == ("bulldog in mountain", pytest.approx(100 * 4 / 6))


def test_severities_by_hand(minis):
    source = loose("cifar-10-c", minis)
    logits = torch.randn(len(source), 10, generator=torch.Generator().manual_seed(0))
    logits[range(len(source)), [t[0] for t in source.targets]] += 1.5
    table = severity_table(answer_table(source, logits))
    hits = (logits.argmax(1).numpy() == [t[0] for t in source.targets]).reshape(15, 5, 3).mean(2) * 100
    assert list(table.index) == [*CORRUPTIONS, "mean"] and np.allclose(table.iloc[:15, :5], hits)
    assert np.allclose(table.loc["mean"], [*hits.mean(0), hits.mean()])
    assert np.allclose(table["mean"].iloc[:15], hits.mean(1))
    with pytest.raises(ValueError, match="expected groups like fog/3, got '[lw]a"):
        severity_table(answer_table(loose("waterbirds", minis), torch.zeros(12, 2)))
