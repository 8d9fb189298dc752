"""What a store says is what was written, and every wrong byte is noticed."""
import gc
import json
import os
import pickle
import shutil
import time
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from bright_grounder import TEXTS, Bright, built, concept_set, pictures, where
from PIL import Image
from torch.utils.data import DataLoader

from cft.concepts.store import MaskStore, decode_mask, encode_mask, read_back, status_of, unite, write_pngs
from cft.data import folders as data

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools


@pytest.fixture
def world(tmp_path):
    return pictures(tmp_path / "images", each=6), concept_set("c0", "c1")


@pytest.fixture
def store(world, tmp_path):
    return built(*world, Bright(), tmp_path / "store", shards=3)


def slow_decode(code, height, width):
    """COCO's code by its definition: 5 bits a character, signed; runs from the third on as differences; by columns."""
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
        code = encode_mask(mask)
        assert np.array_equal(slow_decode(code, height, width), mask)
        assert np.array_equal(decode_mask(code, (height, width)), mask)


@pytest.mark.parametrize("bad", [
    np.zeros(3), np.zeros((2, 2, 2)), np.zeros((0, 3)), np.full((2, 2), 2), np.full((2, 2), np.nan)])
def test_only_masks_are_encoded(bad):
    with pytest.raises(ValueError, match="expected a mask"):
        encode_mask(bad)


def test_union_against_loops():
    rng = np.random.default_rng(0)
    stack = rng.random((4, 5, 6)) < 0.4
    hard = unite(stack)
    assert hard.dtype == bool
    for y in range(5):
        for x in range(6):
            assert hard[y, x] == any(stack[k, y, x] for k in range(4))
    assert not unite(np.zeros((0, 3, 3), bool)).any()
    with pytest.raises(ValueError, match="shape"):
        unite(stack[0])


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
        built(folder, concepts, Bright(), root / str(n), per_class=n, shards=n // 50)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    patch.undo()
    return root, peaks


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(large):
    root, peaks = large
    codes = sum(len(code) for file in (root / "2000").glob("*.parquet") for code in pd.read_parquet(file)["rle"])
    assert codes > 2_000_000
    assert peaks[2000] - peaks[200] < codes / 3, "building keeps only the list of work"
    reading = {}
    for n in (200, 2000):
        store = MaskStore(root / str(n), groups=4)
        names = store.pictures
        gc.collect()
        tracemalloc.start()
        for name in names:
            store.union(name, TEXTS)
        reading[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    print(f"peaks of building {peaks}, of reading {reading}, bytes")
    assert reading[2000] - reading[200] < 200_000


@pytest.mark.slow
def test_ten_thousand_masks_read_back(large, capsys):
    store, start = MaskStore(large[0] / "2000"), time.perf_counter()
    assert read_back(store) == 10_000
    rate = 10_000 / (time.perf_counter() - start)
    with capsys.disabled():
        print(f" [{rate:,.0f} masks a second]", end="")
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
    built(*world, Bright(threshold=1), tmp_path / "other", shards=3)
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
    for stranger in ("other/shard-00000.parquet", "store/shard-00001.parquet"):  # another build's; another of this one
        shutil.copy(tmp_path / stranger, file)
        with pytest.raises(ValueError, match="shard-00000.parquet was made by another build .* or as another shard"):
            MaskStore(tmp_path / "store").pictures  # noqa: B018
        with pytest.raises(ValueError, match="shard-00000.parquet was made by another build"):
            MaskStore(tmp_path / "store").records("c0/0000.png")
    file.write_bytes(whole)
    rows = pq.read_table(file)
    pq.write_table(rows.set_column(6, rows.schema.field(6), rows.column(6).take(list(range(len(rows)))[::-1])), file)
    with pytest.raises(ValueError, match="is damaged"):
        MaskStore(tmp_path / "store").pictures  # noqa: B018
    recipe = json.loads((tmp_path / "store/store.json").read_text())
    (tmp_path / "store/store.json").write_text(json.dumps(recipe | {"format": 1}))
    with pytest.raises(ValueError, match="format 1; expected 2"):
        MaskStore(tmp_path / "store")


def test_what_is_not_there(store, tmp_path, world):
    cases = [(lambda: store.mask("c9/x.png", "leg"), "is not in the mask store"),
             (lambda: store.mask("", "leg"), "is not in"),
             (lambda: store.mask("c0/0000.png", "hat"), "'hat' was not looked for"),
             (lambda: MaskStore(tmp_path), "no mask store")]
    for case, words in cases:
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
        built(*world, Bright(), tmp_path / "odd")


def test_masks_become_a_folder_for_training(world, store, tmp_path):
    folder, concepts = world
    out = store.write_pngs(concepts, tmp_path / "pngs")
    scanned = data.scan(folder.root, masks=out)
    for sample in scanned.samples:
        union = np.any([where(data.open_image(sample.path), t) for t in TEXTS], 0)
        assert np.array_equal(data.open_mask(sample.mask, (12, 10)).numpy(), union)
        assert set(np.unique(Image.open(sample.mask))) <= {0, 255}
    assert all(path.suffix == ".png" for path in out.rglob("*") if path.is_file())
    own = data.scan(folder.root, masks=store.write_pngs(None, tmp_path / "own"))
    for sample in own.samples:
        expected = store.class_mask(folder.name(sample))
        assert np.array_equal(data.open_mask(sample.mask, (12, 10)).numpy(), expected)
    chosen = ["c1/0002.png", "c0/0001.png"]
    few = folder.choose(chosen).with_masks(write_pngs(store, concepts, tmp_path / "few", chosen))
    assert few.names == sorted(chosen) and [s.mask for s in few.samples] == sorted((tmp_path / "few").rglob("*.png"))
    for bad in (["../x.png"], ["/x.png"], ["c0/0001.png", "c0/0001.jpg"]):
        with pytest.raises(ValueError, match="inside the folder, one for each"):
            store.write_pngs(concepts, tmp_path / "pngs", bad)


@pytest.mark.parametrize(("area", "status"), [
    (0.0, "empty"), (0.00099, "too_small"), (0.001, "ok"), (0.98, "ok"), (0.9801, "too_large")])
def test_limits_of_usable_masks(area, status):
    assert status_of(area) == status
