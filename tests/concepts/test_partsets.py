"""Published parts: masks against loops over the files of miniatures, and files of another form."""
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from cft.concepts.masks import training_pictures
from cft.concepts.partsets import (
    BIRD_PARTS,
    KINDS_OF_PARTS,
    mini_cub,
    mini_partimagenet,
    open_cub,
    open_partimagenet,
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return mini_partimagenet(tmp_path_factory.mktemp("part"), 3)


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    return mini_cub(tmp_path_factory.mktemp("cub"), 3)


def polygon_pixels(points, size):
    """COCO's polygons of boxes on whole numbers: pixels whose middle lies inside."""
    xs, ys = points[::2], points[1::2]
    return np.array([[min(xs) < x + 0.5 < max(xs) and min(ys) < y + 0.5 < max(ys) for x in range(size[1])]
                     for y in range(size[0])])


def test_partimagenet_is_read_as_it_is_written(shapes, tmp_path):
    file, images = shapes
    told = json.loads(file.read_text())
    assert len(told["categories"]) == 40 and {c["supercategory"] for c in told["categories"]} == {*KINDS_OF_PARTS}
    of = open_partimagenet(file, images, {"n01530575": "brambling"})
    store = of.store(tmp_path / "store", progress=False)
    assert of.names == {"n01530575": "brambling", "n01443537": "n01443537"}
    assert of.parts["n01530575"] == ["bird body", "bird foot", "bird head", "bird tail", "bird wing"]
    assert of.parts["n01443537"] == ["fish body", "fish fin", "fish head", "fish tail"]
    names = {c["id"]: c["name"].lower() for c in told["categories"]}
    assert len(store.pictures) == 6 == len(told["images"]) and not store.set_aside
    for image in told["images"]:
        size, whole = (image["height"], image["width"]), np.zeros((64, 64), bool)
        expected = {part: np.zeros(size, bool) for part in of.parts[image["file_name"][:9]]}
        for note in told["annotations"]:
            if note["image_id"] == image["id"]:
                shape = note["segmentation"]
                mask = polygon_pixels(shape[0], size) if isinstance(shape, list) else coco.decode(
                    {"size": shape["size"], "counts": shape["counts"].encode()}).astype(bool)
                expected[names[note["category_id"]]] |= mask
                whole |= mask
        for part, mask in expected.items():
            assert (store.mask(image["file_name"], part) == mask).all(), (image["file_name"], part)
        assert (store.class_mask(image["file_name"]) == whole).all() and whole.any()
    assert of.concepts.of("n01443537") == ("fish body", "fish fin", "fish head", "fish tail")
    assert len(training_pictures(store, of.concepts, 2).pictures) == 4


def test_partimagenet_in_class_folders_and_in_one(shapes, tmp_path):
    file, images = shapes
    for picture in images.iterdir():
        (tmp_path / picture.name[:9]).mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / picture.name[:9])
    flat, deep = open_partimagenet(file, images), open_partimagenet(file, tmp_path)
    assert {f"{owner}/{name}": owner for name, owner in flat.pictures.items()} == deep.pictures
    (tmp_path / "n01443537/n01443537_0.JPEG").unlink()
    with pytest.raises(ValueError, match=r"n01443537_0\.JPEG is not in .*; expected it there, or in a folder n0144"):
        open_partimagenet(file, tmp_path)


def test_uncompressed_codes_and_pictures_of_another_size(shapes, tmp_path):
    file, images = shapes
    told = json.loads(file.read_text())
    note = next(n for n in told["annotations"] if isinstance(n["segmentation"], dict))
    mask = coco.decode({"size": [64, 64], "counts": note["segmentation"]["counts"].encode()}).astype(bool)
    runs, now = [], 0
    for value in mask.T.ravel():  # column by column
        if value != now:
            runs, now = [*runs, 1] if runs else [0, 1], value
        else:
            runs = [*runs[:-1], runs[-1] + 1] if runs else [1]
    note["segmentation"]["counts"] = runs
    other = next(image for image in told["images"] if image["id"] != note["image_id"])
    other["height"] = 63
    (tmp_path / "train.json").write_text(json.dumps(told))
    of = open_partimagenet(tmp_path / "train.json", images)
    store = of.store(tmp_path / "store", progress=False)
    name = {c["id"]: c["name"].lower() for c in told["categories"]}[note["category_id"]]
    first = next(i["file_name"] for i in told["images"] if i["id"] == note["image_id"])
    assert (store.mask(first, name) == mask).all()
    assert store.set_aside == (f"{other['file_name']}: failed, is 64 × 64 pixels; its annotations are for (64, 63)",)


@pytest.mark.parametrize("spoil, why", (
    (lambda told: told.pop("categories"), "KeyError, 'categories'"),
    (lambda told: told["annotations"][0].update(category_id=99), "KeyError, 99"),
    (lambda told: told["images"][0].update(file_name="cat.jpg"), "does not begin with a WordNet id"),
))
def test_files_that_are_no_partimagenet(shapes, tmp_path, spoil, why):
    told = json.loads(shapes[0].read_text())
    spoil(told)
    (tmp_path / "train.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"no annotation file of PartImageNet: .*{re.escape(why)}"):
        open_partimagenet(tmp_path / "train.json", shapes[1])


def lines(home, name):
    return [line.split() for line in (home / name).read_text().splitlines()]


@pytest.mark.parametrize("radius", (0.08, 0.2))
def test_discs_around_points_pixel_by_pixel(birds, tmp_path, radius):
    of = open_cub(birds, radius)
    store = of.store(tmp_path / "store", progress=False)
    assert of.parts["001.Black_footed_Albatross"] == [
        "back", "beak", "belly", "breast", "crown", "eye", "forehead", "leg", "nape", "tail", "throat", "wing"]
    assert of.names["002.Laysan_Albatross"] == "Laysan Albatross" and len(store.pictures) == 6
    parts = {k: name for k, name in ((k, " ".join(rest)) for k, *rest in lines(birds, "parts/parts.txt"))}
    assert tuple(parts.values()) == BIRD_PARTS
    boxes = {k: [float(v) for v in rest] for k, *rest in lines(birds, "bounding_boxes.txt")}
    for number, picture in lines(birds, "images.txt"):
        _, _, width, height = boxes[number]
        shades = np.asarray(Image.open((birds.parent / "segmentations" / picture).with_suffix(".png")))
        assert {*np.unique(shades)} == {0, 51, 255} and (store.class_mask(picture) == (shades == 255)).all()
        expected = {part.replace("left ", "").replace("right ", ""): np.zeros((64, 64), bool) for part in BIRD_PARTS}
        for image, part, px, py, visible in lines(birds, "parts/part_locs.txt"):
            if image == number and visible == "1":
                mask = expected[parts[part].replace("left ", "").replace("right ", "")]
                for y in range(64):
                    for x in range(64):
                        far = np.hypot(x + 0.5 - float(px), y + 0.5 - float(py))
                        mask[y, x] |= far <= radius * np.sqrt(width * height) and shades[y, x] == 255
        for part, mask in expected.items():
            assert (store.mask(picture, part) == mask).all(), (picture, part)


def test_without_segmentations_the_box_is_the_bird(birds, tmp_path):
    shutil.copytree(birds, tmp_path / "CUB_200_2011")
    of = open_cub(tmp_path / "CUB_200_2011")
    assert of.settings == {"radius": 0.08, "segmentations": False} != open_cub(birds).settings
    picture = min(of.pictures)
    x, y, width, height = (int(float(v)) for v in lines(birds, "bounding_boxes.txt")[0][1:])
    expected = np.zeros((64, 64), bool)
    expected[y:y + height, x:x + width] = True
    assert (of.regions(picture, (64, 64))[""] == expected).all()
    assert open_cub(tmp_path / "CUB_200_2011", segmentations=birds.parent / "segmentations").settings["segmentations"]
    with pytest.raises(ValueError, match="radius must be above 0, got 0"):
        open_cub(birds, 0)
    with pytest.raises(ValueError, match="its segmentation is 64 × 64 pixels"):
        open_cub(birds).regions(picture, (32, 64))


def test_folders_that_are_no_cub(birds, tmp_path):
    shutil.copytree(birds, tmp_path / "home")
    with pytest.raises(ValueError, match=r"images\.txt is missing; expected the folder CUB_200_2011"):
        open_cub(birds.parent)
    (tmp_path / "home/bounding_boxes.txt").write_text("1 2.0 3.0\n")
    with pytest.raises(ValueError, match=r"a line of bounding_boxes\.txt is '1 2\.0 3\.0'; expected 5 columns"):
        open_cub(tmp_path / "home")
