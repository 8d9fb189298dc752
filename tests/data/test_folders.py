"""Reading folders: strange files, strict masks, joint transforms, filled objects."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cft.data.folders import (
    MaskedImages,
    Preprocess,
    UnreadableImage,
    open_image,
    open_mask,
    scan,
    swap_background,
    without_object,
)


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


def test_masks_any_mode(tmp_path):
    truth = np.eye(12, 20, dtype=bool)
    Image.fromarray(truth).save(tmp_path / "1.png")
    Image.fromarray(truth * np.uint8(1)).save(tmp_path / "L.png")
    Image.fromarray(np.stack([truth * np.uint8(7), 0 * truth, 0 * truth], -1).astype(np.uint8)).save(tmp_path / "RGB.png")
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
    (lambda f: Image.new("L", (5, 5)).save(f / "m/bee/2.png") or scan(f / "i", f / "m"), "is 5 × 5 pixels; its picture is 20 × 12"),
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
    grown = {(y, x) for y in range(16) for x in range(16) if objects[0, max(y - 1, 0):y + 2, max(x - 1, 0):x + 2].any()}
    steps = sorted(((a, b) for a in range(-7, 8) for b in range(-7, 8) if (a, b) != (0, 0)), key=lambda s: (abs(s[0]) + abs(s[1]), s))
    for y in range(16):
        for x in range(16):
            value = image[0, :, y, x]
            if (y, x) in grown:
                a, b = next((a, b) for a, b in steps if ((y - 2 * a) % 16, (x - 2 * b) % 16) not in grown)
                value = image[0, :, (y - 2 * a) % 16, (x - 2 * b) % 16]
            assert torch.equal(fast[:, y, x], value)


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
    assert Preprocess.of(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224, num_classes=3, depth=1)).size == (224, 224)
