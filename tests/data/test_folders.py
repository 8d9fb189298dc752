"""Reading folders: strange files, strict masks, joint transforms, filled objects."""
import io
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from pycocotools import mask as mask_tools

from cft.data.folders import (
    EXTENSIONS,
    UNREAD,
    Folder,
    MaskedImages,
    Preprocess,
    Sample,
    UnreadableImage,
    class_folders,
    coco_masks,
    cutouts,
    find_pictures,
    list_folder,
    open_image,
    open_mask,
    printable_path,
    read_mask,
    scan,
    swap_background,
    without_object,
)
from cft.files import write_json

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools


def picture(seed=0, size=(20, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for c, name in enumerate(("ant", "bee")):
        (tmp_path / "i" / name).mkdir(parents=True)
        (tmp_path / "m" / name).mkdir(parents=True)
        for k in range(3):
            picture(10 * c + k).save(tmp_path / "i" / name / f"{k}.jpg")
            Image.fromarray(np.eye(12, 20, dtype=np.uint8) * (k + 1)).save(tmp_path / "m" / name / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "LA", "RGBA", "1", "I;16"])
def test_modes_become_rgb(tmp_path, mode):
    if mode == "I;16":
        Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 257).save(tmp_path / "x.png")
    else:
        picture().convert("RGB").convert("L" if mode in ("LA", "1") else "RGB").convert(mode).save(
            tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    opened = open_image(next(tmp_path.iterdir()))
    assert opened.mode == "RGB" and opened.size == (20, 12)
    if mode == "I;16":
        assert np.array_equal(np.asarray(opened)[..., 0].ravel(), np.arange(240))


def test_transparent_is_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png")).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((12, 20, 3), np.uint8)
    upright[:6, :10] = 255  # the bright corner is at the top left
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
            8: lambda a: np.rot90(a, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), upright)


def test_unreadable_and_float(tmp_path):
    picture().save(tmp_path / "x.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(UnreadableImage, match=name):
            open_image(tmp_path / name)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="NaN or infinite pixels"):
        open_image(tmp_path / "nan.tif")


def test_a_stream_is_as_good_as_a_file(tmp_path):
    picture().save(tmp_path / "x.png")
    assert np.array_equal(open_image(io.BytesIO((tmp_path / "x.png").read_bytes())), open_image(tmp_path / "x.png"))


def place(root, *names):
    """Empty files, in folders that are made for them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def below(root, deep=True):
    found, left_out = find_pictures(root, deep)
    return [p.relative_to(root).as_posix() for p in found], left_out


def test_every_ending_in_either_case(tmp_path):
    assert not EXTENSIONS & UNREAD and all(e == e.lower() and e[0] == "." for e in EXTENSIONS | UNREAD)
    for k, ending in enumerate(sorted(EXTENSIONS | UNREAD)):
        place(tmp_path, f"{k}a{ending}", f"{k}b{ending.upper()}", f"{k}c{ending[1:]}", f"{k}d{ending}.txt")
    found, left_out = below(tmp_path)
    assert len(found) == 2 * len(EXTENSIONS) and {Path(name).suffix.lower() for name in found} == EXTENSIONS
    assert sorted(line.split(": ")[1] for line in left_out) == sorted(2 * [f"{e} is not read" for e in UNREAD])


def test_pictures_are_sorted_by_path_and_hidden_places_are_passed_over(tmp_path):
    place(tmp_path, "b/z.jpg", "b/y/x.png", "a.png", "b.png", "B/c.png", "a/2.png", "a/10.png", "notes.txt",
          ".git/x.jpg", "@eaDir/x.jpg", "a/__MACOSX/x.jpg", ".a.jpg", "a/._2.png", "a/._2.HEIC", "b/c.gif")
    found, left_out = below(tmp_path)
    assert found == [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path / name for name in found)]
    assert set(found) == {"b/z.jpg", "b/y/x.png", "a.png", "b.png", "B/c.png", "a/2.png", "a/10.png"}
    assert left_out == [".a.jpg: hidden", "a/._2.HEIC: hidden", "a/._2.png: hidden", "b/c.gif: .gif is not read"]
    assert below(tmp_path, deep=False) == (["a.png", "b.png"], [".a.jpg: hidden"])
    assert below(tmp_path / "b") == (["y/x.png", "z.jpg"], ["c.gif: .gif is not read"])


def test_links_and_other_things_that_are_called_pictures(tmp_path):
    place(tmp_path, "far/a.jpg", "i/own.jpg")
    for name, target in (("link.jpg", "../far/a.jpg"), ("gone.jpg", "nowhere"), ("loop.jpg", "loop.jpg"), ("up", ".."),
                         ("folder.jpg", "../far")):
        (tmp_path / "i" / name).symlink_to(target)
    (tmp_path / "i/inside.png").mkdir()
    place(tmp_path, "i/inside.png/b.png")
    os.mkfifo(tmp_path / "i/pipe.png")
    found, left_out = below(tmp_path / "i")
    assert found == ["inside.png/b.png", "link.jpg", "own.jpg"]
    assert left_out == [f"{name}: no regular file" for name in ("folder.jpg", "gone.jpg", "loop.jpg", "pipe.png")]
    (tmp_path / "root").symlink_to("i")
    assert below(tmp_path / "root") == (found, left_out), "a folder that is named itself is followed"


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    place(tmp_path, "file.jpg")
    assert find_pictures(tmp_path / "nowhere") == find_pictures(tmp_path / "file.jpg") == ([], [])
    place(tmp_path, "open/a.jpg", "shut/b.jpg")
    look = os.scandir

    def refuse(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="shut"):
        find_pictures(tmp_path)


@pytest.mark.parametrize(("path", "shown"), [
    ("a/b c.jpg", "a/b c.jpg"), (Path("é/ü.png"), "é/ü.png"), ("a/\x1b[31mred\n.jpg", "a/?[31mred?.jpg"),
    (os.fsdecode(b"caf\xe9.jpg"), "caf?.jpg"), ("\u202egpj.exe", "?gpj.exe"), ("a\tb", "a?b")])
def test_printable_paths(path, shown):
    assert printable_path(path) == shown and shown.encode() and shown.isprintable()


def test_names_that_no_terminal_should_see(tmp_path):
    name = os.fsdecode(b"\x1b[31m\xff.jpg")
    place(tmp_path, f"i/ant/{name}", "i/ant/\n.gif")
    picture().save(tmp_path / "i/ant/good.jpg")
    folder = scan(tmp_path / "i")
    assert folder.names == ["ant/good.jpg"] and len(folder.set_aside) == 2
    assert all(line.isprintable() and line.startswith("ant/") for line in folder.set_aside)
    assert len(list_folder(tmp_path / "i").digest()) == 64, "a name of any bytes has a digest"


@pytest.fixture
def trio(tmp_path):
    names = ("ant/a.jpg", "ant/more/b.tar.png", "bee/c.jpg")
    return Folder(tmp_path, ("ant", "bee"), tuple(Sample(tmp_path / name, int(name[0] == "b")) for name in names))


def test_names(trio):
    assert trio.names == ["ant/a.jpg", "ant/more/b.tar.png", "bee/c.jpg"] == [trio.name(s) for s in trio.samples]
    with pytest.raises(ValueError):
        trio.name(Sample(trio.root.parent / "x.jpg", 0))


def test_choose(trio):
    assert trio.choose(reversed(trio.names)) == trio and trio.choose([]).samples == ()
    chosen = trio.choose(name for name in ("bee/c.jpg", "ant/a.jpg", "bee/c.jpg"))
    assert chosen.names == ["ant/a.jpg", "bee/c.jpg"] and chosen.classes == trio.classes
    assert trio.choose({"bee/c.jpg": 1}).labels == [1]
    with pytest.raises(ValueError, match=r"2 of 3 pictures are not in .*, first bee/d.jpg; expected all of them"):
        trio.choose(["bee/e.jpg", "bee/d.jpg", "ant/a.jpg"])


def test_with_masks(trio, tmp_path):
    masked = trio.with_masks(tmp_path / "m")
    files = ["ant/a.png", "ant/more/b.tar.png", "bee/c.png"]
    assert [s.mask for s in masked.samples] == [tmp_path / "m" / name for name in files]
    assert all(s.object is None for s in masked.samples) and masked.names == trio.names and trio.with_masks() == trio
    both = masked.with_masks(object=str(tmp_path / "o"))
    assert [s.object for s in both.samples] == [tmp_path / "o" / name for name in files]
    assert [s.mask for s in both.samples] == [s.mask for s in masked.samples], "the other kind stays"
    assert both.choose(["bee/c.jpg"]) == both.only([1]) == trio.only([1]).with_masks(tmp_path / "m", tmp_path / "o")


def test_listing_is_reading_without_opening(folder):
    listed = list_folder(folder / "i")
    masked = scan(folder / "i", folder / "m")
    assert listed == scan(folder / "i") and listed.with_masks(folder / "m").samples == masked.samples
    assert masked.masks_read == ("masks: 6 of two values",)
    place(folder, "i/ant/torn.jpg", "i/bee/x.gif", "i/ant/._0.jpg")
    assert len(list_folder(folder / "i")) == 7 and len(scan(folder / "i")) == 6
    aside = scan(folder / "i").set_aside
    assert [line.split(":")[0] for line in aside] == ["ant/torn.jpg", "ant/._0.jpg", "bee/x.gif"]
    assert list_folder(folder / "i").set_aside == aside[1:] == ("ant/._0.jpg: hidden", "bee/x.gif: .gif is not read")
    (folder / "i/.cache").mkdir()
    (folder / "i/readme.txt").touch()
    assert list_folder(folder / "i").classes == ("ant", "bee")
    assert list_folder(folder / "i", ["cow", "bee", "ant"]).labels == [1, 2]
    picture().save(folder / "i/loose.png")
    assert list_folder(folder / "i").set_aside[0] == "loose.png: beside the class folders"
    for file in (folder / "i/bee").iterdir():
        file.rename(file.with_name(f".{file.name}"))
    with pytest.raises(ValueError, match="bee has no picture; expected at least one"):
        list_folder(folder / "i")


def test_masks_any_mode(tmp_path):
    truth = np.eye(12, 20, dtype=bool)
    Image.fromarray(truth).save(tmp_path / "1.png")
    Image.fromarray(truth * np.uint8(1)).save(tmp_path / "L.png")
    red = np.stack([truth * np.uint8(7), 0 * truth, 0 * truth], -1)
    Image.fromarray(red.astype(np.uint8)).save(tmp_path / "RGB.png")
    for name in ("1", "L", "RGB"):
        assert np.array_equal(open_mask(tmp_path / f"{name}.png", (20, 12)).numpy(), truth)
    with pytest.raises(ValueError, match="20 × 12 pixels; its picture is 12 × 20"):
        open_mask(tmp_path / "L.png", (12, 20))


def test_scan(folder):
    found = scan(folder / "i", folder / "m")
    assert found.classes == ("ant", "bee") and len(found) == 6 and found.labels == [0, 1]
    assert [s.label for s in scan(folder / "i", classes=["wasp", "bee", "ant"]).samples] == [1, 1, 1, 2, 2, 2]
    assert len(found.only([1])) == 3 and found.only([1]).samples[0].label == 1
    digest = found.digest()
    assert digest == scan(folder / "i", folder / "m").digest() != scan(folder / "i").digest()
    Image.new("L", (20, 12)).save(folder / "m/ant/0.png")
    assert digest != scan(folder / "i", folder / "m").digest()


def test_set_aside_and_empty(folder):
    (folder / "i/ant/bad.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "i/ant/notes.txt").write_text("not a picture")
    found = scan(folder / "i")
    assert len(found) == 6 and len(found.set_aside) == 1 and found.set_aside[0].startswith("ant/bad.jpg")
    assert "1 set aside" in found._repr_html_()
    (folder / "i/cat").mkdir()
    with pytest.raises(ValueError, match="cat has no picture"):
        scan(folder / "i")


@pytest.mark.parametrize(("case", "words"), [
    (lambda f: scan(f / "none"), "no folder at"),
    (lambda f: scan(f / "i/ant"), "no class folders"),
    (lambda f: scan(f / "i", classes=["ant"]), "does not know: bee"),
    (lambda f: (f / "m/bee/2.png").unlink() or scan(f / "i", f / "m"), "misses 1 of 6 pictures, first bee/2.png"),
    (lambda f: Image.new("L", (5, 5)).save(f / "m/bee/2.png") or scan(f / "i", f / "m"),
     "is 5 × 5 pixels; its picture is 20 × 12"),
    (lambda f: scan(f / "i", objects=f / "none"), "object mask folder .*none misses 6 of 6 pictures, first ant/0.png"),
    (lambda f: ((f / "m/bee/2.png").write_text("x"), scan(f / "i", f / "m")), "does not decode"),
])
def test_bad_folders(folder, case, words):
    with pytest.raises(ValueError, match=words):
        case(folder)


def test_picture_and_mask_move_together(folder):
    for file in (folder / "i/ant").iterdir():  # a picture that is its own mask
        mask = Image.fromarray((np.indices((12, 20)).sum(0) % 7 < 3).astype(np.uint8) * 255)
        mask.convert("RGB").save(file.with_suffix(".png"))
        file.unlink()
        mask.save(folder / "m/ant" / f"{file.stem}.png")
    found = scan(folder / "i", folder / "m").only([0])
    images = MaskedImages(found, Preprocess((12, 20), margin=1.0, interpolation="nearest"), train=True)
    wide = MaskedImages(found, Preprocess((12, 20), margin=2.0, interpolation="nearest"), train=True, cached=True)
    torch.manual_seed(0)
    flipped = 0
    for i in range(12):
        for source in (images, wide):
            item = source[i % 3]
            assert torch.equal((item["image"][0] > 0), item["mask"])
        flipped += not torch.equal(images[0]["mask"], images[0]["mask"])
    assert flipped > 2


def test_evaluation_follows_the_models_configuration(folder):
    found = scan(folder / "i", folder / "m")
    item = MaskedImages(found, Preprocess((8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), crop=0.8))[0]
    assert item["image"].shape == (3, 8, 8) and item["mask"].shape == (8, 8) and item["label"] == 0
    grey = Image.new("RGB", (20, 12), (128, 128, 128))
    grey.save(folder / "i/ant/0.jpg", quality=100)
    values = MaskedImages(found, Preprocess((8, 8), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), crop=0.8))[0]["image"]
    expected = (128 / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.6, 0.7])
    assert torch.allclose(values.mean((1, 2)), expected, atol=1e-2)


def test_without_object_against_a_slow_search():
    rng = torch.Generator().manual_seed(0)
    image, objects = torch.rand(1, 3, 16, 16, generator=rng), torch.zeros(1, 16, 16, dtype=torch.bool)
    objects[0, 5:9, 4:12] = True
    fast = without_object(image, objects)[0]
    near = lambda y, x: objects[0, max(y - 1, 0):y + 2, max(x - 1, 0):x + 2].any()
    grown = {(y, x) for y in range(16) for x in range(16) if near(y, x)}
    steps = sorted(((a, b) for a in range(-7, 8) for b in range(-7, 8) if (a, b) != (0, 0)),
                   key=lambda s: (abs(s[0]) + abs(s[1]), s))
    for y in range(16):
        for x in range(16):
            value = image[0, :, y, x]
            if (y, x) in grown:
                a, b = next((a, b) for a, b in steps if ((y - 2 * a) % 16, (x - 2 * b) % 16) not in grown)
                value = image[0, :, (y - 2 * a) % 16, (x - 2 * b) % 16]
            assert torch.equal(fast[:, y, x], value)


def some_objects(height=24, width=30):
    """Pictures as a model gets them, with an object in the middle, one in a corner and one of two parts."""
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 0.5
    objects = torch.zeros(3, height, width, dtype=torch.bool)
    objects[0, 9:14, 10:20] = objects[1, :7, :9] = objects[2, 3:5, 3:5] = objects[2, 18:, 27:] = True
    return images, objects


def grown_slowly(objects, grow):
    near = lambda o, y, x: o[max(y - grow, 0):y + grow + 1, max(x - grow, 0):x + grow + 1].any()
    return torch.tensor([[[bool(near(o, y, x)) for x in range(o.shape[1])] for y in range(len(o))] for o in objects])


@pytest.mark.parametrize("fill", ["shift", "inpaint"])
@pytest.mark.parametrize("grow", [0, 1, 2, 5])
def test_the_grown_object_is_filled_and_nothing_else(grow, fill):
    images, objects = some_objects()
    hole = grown_slowly(objects, grow)[:, None].expand_as(images)
    filled = without_object(images, objects, grow=grow, fill=fill)
    assert torch.equal(filled[~hole], images[~hole]) and (filled[hole] != images[hole]).float().mean() > 0.99
    other = without_object(torch.where(hole, torch.full_like(images, 40), images), objects, grow=grow, fill=fill)
    assert torch.equal(filled, other), "of the object nothing is seen"
    if grow == 1 and fill == "shift":
        assert torch.equal(filled, without_object(images, objects))
    whole = {"image": images, "object": objects, "label": torch.arange(3)}
    batches = [{key: values[part] for key, values in whole.items()} for part in (slice(2), slice(2, 3))]
    assert torch.equal(cutouts(batches, grow, fill).scenes, filled)
    assert torch.equal(cutouts(batches).scenes, without_object(images, objects))


def test_inpainting_continues_the_surroundings():
    """A flat picture stays, a flat channel moves by a few of 255 steps, a ramp goes on; noise stays in its range."""
    images, objects = some_objects()
    ramp = torch.linspace(-2, 3, images.shape[-1]).expand_as(images).clone()
    ramp[:, 1] = 0.7
    filled = without_object(ramp, objects, fill="inpaint")
    assert (filled[:, 0] - ramp[:, 0]).abs().max() < 1.5 and (filled[:, 1] - 0.7).abs().max() < 4 * 5 / 255
    middle = without_object(ramp, objects[:1].expand(3, -1, -1), fill="inpaint") - ramp
    assert middle[:, 0].abs().max() < 0.6 < without_object(ramp, objects[:1].expand(3, -1, -1)).sub(ramp).abs().max()
    flat = torch.full_like(ramp, -1.25)
    assert torch.equal(without_object(flat, objects, fill="inpaint"), flat)
    noise = without_object(images, objects, fill="inpaint", grow=2)
    for picture, hole, done in zip(images, grown_slowly(objects, 2), noise):
        assert picture[:, ~hole].min() - 1e-4 <= done.min() and done.max() <= picture[:, ~hole].max() + 1e-4


def test_filling_refuses(monkeypatch):
    images, objects = some_objects()
    whole, none = torch.ones_like(objects), torch.zeros_like(objects)
    for fill in ("shift", "inpaint"):
        assert torch.equal(without_object(images, whole, fill=fill), torch.zeros_like(images))  # no background at all
        assert torch.equal(without_object(images, none, fill=fill), images)
        assert without_object(images[:0], objects[:0], fill=fill).shape == (0, 3, 24, 30)
    half = without_object(images.bfloat16(), objects, fill="inpaint")
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    for wrong in ({"grow": -1}, {"fill": "telea"}):
        with pytest.raises(ValueError, match="expected grow from 0 and fill shift or inpaint, got (-1|1) and '"):
            without_object(images, objects, **wrong)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"fill='inpaint' needs opencv-python; .*pip install 'cft\[grounding\]'"):
        without_object(images, objects, fill="inpaint")
    without_object(images, objects)


def test_without_object_falls_back_to_the_mean():
    image, objects = torch.rand(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    assert torch.equal(without_object(image, objects), torch.zeros_like(image))  # no background at all
    swapped = swap_background(image, objects, torch.zeros_like(image))
    assert torch.equal(swapped, image)


def test_a_class_of_unreadable_pictures(folder):
    for file in (folder / "i/ant").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="ant has no readable picture: 3 could not be read"):
        scan(folder / "i")


def test_a_model_built_for_another_size_says_so():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), num_classes=3)
    preprocess = Preprocess.of(model)
    assert preprocess.size == (64, 96)
    other = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224, num_classes=3, depth=1)
    assert Preprocess.of(other).size == (224, 224)


# ---------------------------------------------------------------- masks and pictures as other tools write them


def disk(size=(40, 30)):
    """A disc, bool (height, width)."""
    y, x = np.mgrid[:size[1], :size[0]]
    return (x - 20) ** 2 + (y - 15) ** 2 < 60


def of_imagenet_s(m):
    channels = [np.where(m, 300 % 256, 0), np.where(m, 300 // 256, 0), 0 * m]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def of_voc(m):
    labels = np.where(m, 15, 0).astype(np.uint8)
    labels[:2] = 255
    found = Image.fromarray(labels, "P")
    found.putpalette([0, 0, 0, *[99] * 765])
    return found


def cut_out(m):
    rgb = np.random.default_rng(0).integers(0, 256, (*m.shape, 3))
    return Image.fromarray(np.concatenate([rgb, np.where(m, 255, 0)[..., None]], -1).astype(np.uint8), "RGBA")


CONVENTIONS = {
    "0 and 255": (lambda m: Image.fromarray(m * np.uint8(255)), "two values"),
    "0 and 1": (lambda m: Image.fromarray(m * np.uint8(1)), "two values"),
    "one bit": (lambda m: Image.fromarray(m), "two values"), "ImageNet-S": (of_imagenet_s, "ImageNet-S"),
    "VOC": (of_voc, "palette"), "cut out": (cut_out, "transparency"),
    "labels": (lambda m: Image.fromarray(np.where(m, np.where(np.arange(m.shape[1]) < 20, 3, 7), 0).astype(np.uint8)),
               "labels"),
    "grey as colours": (lambda m: Image.fromarray(m * np.uint8(255)).convert("RGB"), "two values"),
    "soft edges": (lambda m: Image.fromarray(m * np.uint8(255)).filter(ImageFilter.GaussianBlur(0.6)), "shades"),
    "16 bits": (lambda m: Image.fromarray(m * np.uint16(65535)), "two values")}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_masks_are_read_by_their_convention_and_it_is_said(convention, tmp_path):
    make, words = CONVENTIONS[convention]
    make(truth := disk()).save(tmp_path / "m.png")
    found, how = read_mask(tmp_path / "m.png")
    expected = truth & (np.arange(30) > 1)[:, None] if convention == "VOC" else truth
    assert words in how and (found != expected).mean() < (0.05 if convention == "soft edges" else 1e-9)
    assert torch.equal(open_mask(tmp_path / "m.png", (40, 30)), torch.from_numpy(found))


def test_masks_that_are_not_clear_are_refused_by_name(tmp_path):
    Image.fromarray(np.where(disk(), 15, 255).astype(np.uint8) * (np.arange(40) > 3)).save(tmp_path / "grey.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)).save(tmp_path / "noise.jpg")
    of_imagenet_s(disk()).save(tmp_path / "coloured.jpg")
    np.save(tmp_path / "odd.npy", np.zeros((3, 3), float))
    for name, words in (("grey.png", "is 255 the object, or void"), ("noise.jpg", "shades of grey"),
                        ("coloured.jpg", "coloured JPEG"), ("odd.npy", "holds float64"), ("none.png", "No such file")):
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            read_mask(tmp_path / name)
    np.save(tmp_path / "good.npy", disk().astype(np.uint8))
    assert (read_mask(tmp_path / "good.npy")[0] == disk()).all()


@pytest.mark.parametrize(("state", "change"), [("empty", lambda m: 0 * m), ("full", lambda m: 0 * m + 255),
                                               ("inverted", lambda m: 255 - m)])
def test_masks_that_cannot_be_meant_are_counted_and_refused(state, change, tmp_path):
    for k in range(4):
        place = tmp_path / "i/ant", tmp_path / "m/ant"
        for folder in place:
            folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(place[0] / f"{k}.jpg")
        Image.fromarray((change if k == 0 else lambda m: m)(disk() * np.uint8(255))).save(place[1] / f"{k}.png")
    with pytest.raises(ValueError, match=f"1 of 4 masks in .* are {state}, first ant/0.png"):
        scan(tmp_path / "i", tmp_path / "m")
    assert f"1 {state}" in scan(tmp_path / "i", tmp_path / "m", allow_empty=True).masks_read[0]


def test_masks_called_like_the_picture_are_found_and_twins_refused(tmp_path):
    for name in ("i/ant/a.jpg", "m/ant/a.jpg.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(disk() * np.uint8(255)).save(tmp_path / name)
    assert scan(tmp_path / "i", tmp_path / "m").samples[0].mask == tmp_path / "m/ant/a.jpg.png"
    Image.new("RGB", (40, 30)).save(tmp_path / "i/ant/a.png")
    with pytest.raises(ValueError, match="a.jpg and ant/a.png would share one mask"):
        scan(tmp_path / "i", tmp_path / "m")


def test_sizes_that_no_photograph_has_are_set_aside_before_they_are_decoded(tmp_path):
    Image.new("1", (20_000, 1)).save(tmp_path / "long.png")
    for open_it in (open_image, read_mask):
        with pytest.raises(ValueError, match="long.png.*20000 × 1 pixels; expected"):
            open_it(tmp_path / "long.png")


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\0" * 40,
                                  b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0top\0\0\0\0\0",
                                  b"Exif\0\0II*\0\x08\0\0\0\1\0\x25\x88\1\0\1\0\0\0\7\0\0\0\0\0\0\0"])
def test_broken_exif_data_cost_no_picture(exif, tmp_path):
    for ending in ("jpg", "webp"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"x.{ending}", exif=exif)
        assert set(open_image(tmp_path / f"x.{ending}").size) == {40, 30}


def test_any_failure_of_a_reader_is_an_unreadable_picture(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for failure in (TypeError("x"), KeyError(1), RecursionError(), MemoryError(), OverflowError("y")):
        monkeypatch.setattr(Image.Image, "convert", lambda *_, f=failure: (_ for _ in ()).throw(f))
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda *_, f=failure: (_ for _ in ()).throw(f))
        with pytest.raises(UnreadableImage, match="x.png"):
            open_image(tmp_path / "x.png")


@pytest.mark.parametrize(("names", "words"), [(["a", ".."], "a class is called"), (["a", "b/c"], "a class is called"),
                                              (["a", "b", "a"], "'a' is there twice"),
                                              (["é", "e\u0301"], "is there twice")])
def test_class_names_that_lead_elsewhere_or_are_there_twice(names, words, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=words):
        class_folders(tmp_path, names)


# ---------------------------------------------------------------- COCO


def coco_album(root, width=40, height=30):
    """Two classes of pictures, root/i, and the content of a COCO file in which every way to say a region occurs."""
    for name in ("polar_bear", "cat"):
        (root / "i" / name).mkdir(parents=True)
        for k in range(2):
            picture(k, (width, height)).save(root / f"i/{name}/{name}{k}.jpg")
    square = np.zeros((height, width), np.uint8)
    square[5:15, 10:30] = 1
    code = mask_tools.encode(np.asfortranarray(square))
    runs = [len(list(run)) for _, run in itertools.groupby(square.ravel(order="F"))]
    size = [height, width]
    said = [[[10, 5, 30, 5, 30, 15, 10, 15]], {"size": size, "counts": runs},
            {"size": size, "counts": code["counts"].decode()},
            [[10, 5, 20, 5, 20, 15, 10, 15], [20, 5, 30, 5, 30, 15, 20, 15]]]
    files = ["polar_bear/polar_bear0.jpg", "polar_bear1.jpg", "train\\cat0.jpg", "i/cat/cat1.jpg"]
    everything = {"size": size, "counts": [0, width * height]}
    content = {
        "images": [{"id": k, "file_name": name, "width": width, "height": height} for k, name in enumerate(files)],
        "categories": [{"id": 1, "name": "Polar bear"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [{"id": 10 + k, "image_id": k, "category_id": 1 + k // 2, "segmentation": one, "iscrowd": 0}
                        for k, one in enumerate(said)]
        + [{"id": 20, "image_id": 0, "category_id": 3, "segmentation": everything, "iscrowd": 1}]}
    return content, square.astype(bool)


def test_a_coco_file_becomes_masks(tmp_path):
    content, square = coco_album(tmp_path)
    write_json(file := tmp_path / "a.json", content)
    found = scan(tmp_path / "i", objects=file, out=tmp_path / "o")
    assert [s.object for s in found.samples] == [tmp_path / "o" / Path(n).with_suffix(".png") for n in found.names]
    assert all((read_mask(s.object)[0] == square).all() for s in found.samples)
    assert found.masks_read == ("a.json, 4 of 5 annotations of 4 pictures, those of the picture's class",
                                "object masks: 4 of two values")
    for kind in content["categories"]:
        kind["name"] = f"no {kind['name']}"
    write_json(file, content)
    found = coco_masks(list_folder(tmp_path / "i"), file, tmp_path / "p", {})
    assert all((read_mask(s.object)[0] == square).all() for s in found.samples), "but for the crowd"
    assert found.masks_read == ("a.json, 4 of 5 annotations of 4 pictures, all but crowds, as no category is called "
                                "like a class",)
    content["annotations"] = content["annotations"][1:]
    write_json(file, content)
    with pytest.raises(ValueError, match=f"1 of 4 object masks in {tmp_path}/q are empty, first polar_bear/polar_b"):
        scan(tmp_path / "i", objects=file, out=tmp_path / "q")
    with pytest.raises(ValueError, match="a.json is a file; expected a folder `out`"):
        scan(tmp_path / "i", objects=file)


def changed(place, **fields):
    """A change of the entry `place`, such as images/0, of a COCO file."""
    part, number = place.split("/")
    return lambda content: content[part][int(number)].update(fields)


@pytest.mark.parametrize(("change", "words"), [
    (changed("images/1", width=41), "polar_bear1.jpg is 40 × 30 pixels; it says 41 × 30"),
    (changed("images/1", file_name="x.jpg"), "misses 1 of 4 pictures, or has them twice, first polar_bear/polar_bear1"),
    (changed("images/1", file_name="x/cat0.jpg"), "misses 2 of 4 pictures, or has them twice"),
    (changed("images/1", id=0), "two of its images, or of its categories, have the same id"),
    (changed("categories/1", id=1), "two of its images, or of its categories, have the same id"),
    (changed("categories/1", name="lynx"), "no category 'cat', but others"),
    (changed("annotations/1", image_id=99), "annotation 11 is of an image or a category that it does not list"),
    (changed("annotations/1", category_id=99), "annotation 11 is of an image or a category that it does not list"),
    *((changed("annotations/1", segmentation=odd), "polygon of annotation 11 is empty or odd") for odd in (
        [], [[]], [[1, 1, 5, 5]], [[1, 1, 5, 1, 5, 5, 7]], [[1, 1, 5, 1, 5, float("nan")]], [[1, 1, 5, 1, 5, 1e9]])),
    *((changed("annotations/1", segmentation={"size": size, "counts": counts}), "annotation 11 is not one of 30 × 40")
      for size, counts in (([30, 40], [5, 5]), ([30, 40], "55"), ([30, 40], ""), ([40, 30], [1100, 100]))),
    (changed("annotations/1", segmentation={"size": [30, 40], "counts": "hello world!~~"}), "Invalid RLE"),
    (changed("annotations/1", segmentation={"size": [30, 40]}), "KeyError, 'counts'"),
    (changed("annotations/1", segmentation=None), "TypeError"),
    (changed("annotations/1", segmentation=[["a"] * 6]), "TypeError"),
    (lambda content: content.pop("images"), "no COCO file .*: KeyError, 'images'"),
    (lambda content: content.update(images=7), "no COCO file .*: TypeError")])
def test_a_coco_file_that_cannot_be_meant_is_refused_by_name(change, words, tmp_path):
    content, _ = coco_album(tmp_path)
    change(content)
    write_json(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=words) as error:
        scan(tmp_path / "i", objects=tmp_path / "a.json", out=tmp_path / "o")
    assert str(error.value).startswith(f"{tmp_path}/a.json ") and "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("text", "words"), [("{", "is no sound JSON"), ("[" * 10**5, "is no sound JSON"),
                                             ('[{"image_id": 1, "score": 0.9}]', "is no COCO file .*: TypeError"),
                                             ("7", "is no COCO file"), ("\x89PNG", "is no COCO file|no sound JSON")])
def test_files_that_are_no_annotations_are_refused_by_name(folder, text, words):
    (folder / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json {words}"):
        scan(folder / "i", objects=folder / "a.json", out=folder / "o")


def test_a_file_name_that_two_pictures_have_stands_for_neither(folder):
    images = [{"id": k, "file_name": f"{k}.jpg", "width": 20, "height": 12} for k in range(3)]
    content = {"images": images, "categories": [], "annotations": []}
    write_json(folder / "a.json", content)
    with pytest.raises(ValueError, match="misses 6 of 6 pictures, or has them twice, first ant/0.jpg"):
        scan(folder / "i", objects=folder / "a.json", out=folder / "o")


def test_twins_share_no_mask_where_no_mask_is_asked_for(folder):
    picture().save(folder / "i/ant/0.png")
    assert len(scan(folder / "i")) == 7
    with pytest.raises(ValueError, match="would share one mask"):
        scan(folder / "i", folder / "m")
