"""The procedural benchmark: shapes against slow definitions, exact masks, equal pixels everywhere."""
import hashlib
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from cft.data import backdrop
from cft.data.backdrop import (
    BACKGROUNDS,
    CLASSES,
    CUES,
    SETS,
    SIZE,
    capsule,
    ellipse,
    polygon,
    render,
    render_background,
    write,
)

STILL = (0.0, 0.0, 1.0)
POINTS = np.random.default_rng(0).uniform(-1.5, 1.5, (200, 2))


def test_ellipse_inside_and_distance_on_axes():
    shape = ellipse(0.2, -0.1, 0.8, 0.3, 0.7)
    for x, y in POINTS:
        p, q = x - 0.2, y + 0.1
        a, b = p * math.cos(0.7) + q * math.sin(0.7), q * math.cos(0.7) - p * math.sin(0.7)
        inside = (a / 0.8) ** 2 + (b / 0.3) ** 2 < 1
        assert (shape(np.array(x), np.array(y), STILL) < 0) == inside
    circle = ellipse(0, 0, 0.5, 0.5)
    assert circle(np.array(1.2), np.array(0.0), STILL) == pytest.approx(0.7)


def test_capsule_is_distance_to_sampled_segment():
    shape = capsule(-0.6, 0.5, 0.7, -0.4, 0.2)
    t = np.linspace(0, 1, 20001)
    for x, y in POINTS[:60]:
        slow = np.hypot(x - (-0.6 + 1.3 * t), y - (0.5 - 0.9 * t)).min() - 0.2
        assert shape(np.array(x), np.array(y), STILL) == pytest.approx(slow, abs=1e-6)


@pytest.mark.parametrize("winding", [1, -1])
def test_polygon_inside_by_ray_casting(winding):
    corners = [(-0.8, 0.6), (0.1, -0.8), (0.9, 0.5)][::winding]
    shape = polygon(*corners)
    for x, y in POINTS:
        crossings = 0
        for (xa, ya), (xb, yb) in zip(corners, corners[1:] + corners[:1]):
            if (ya > y) != (yb > y) and x < xa + (y - ya) / (yb - ya) * (xb - xa):
                crossings += 1
        assert (shape(np.array(x), np.array(y), STILL) < 0) == (crossings % 2 == 1)


def test_enlarge_is_bilinear():
    cells = np.random.default_rng(1).random(5)
    fast = backdrop._enlarge(5) @ cells
    for i in range(SIZE):
        position = min(max((i + 0.5) * 5 / SIZE - 0.5, 0), 4)
        low = min(int(position), 4)
        slow = cells[low] * (1 - position + low) + cells[min(low + 1, 4)] * (position - low)
        assert fast[i] == pytest.approx(slow, abs=1e-12)


# SHA-256 of two pictures of each class of each set, seed 7, and of two pictures of each background: all published
# numbers were measured on these pixels, so that none of them may change.
DRAWN = {
    "train": "5915140fba7607b141a305bc6caf58332656a149a8e3882738173daef530e3e6",
    "val": "93ad8853986b582c181647b2f68328116483ff7008011b7a90372f2c30441829",
    "v2": "c4707521d4f81dc023c4a2c9ccc9ba575344a38d47e3e22229fa5dd36e02dd0b",
    "adversarial": "3d2ab322fb5093153b255d291a122547165e9aa047cfdb8c09eef682e95e832a",
    "object": "37dbe7f3542c4e1273bacc0cb85d6ed380be319077f614bc55408bf8f9aff7db",
    "rendition": "5cd845335dfb9067f015dddcd94e17d1a28a56e8aaab6ee330288a68a087ac77",
    "sketch": "88995103c926b6512c166713d8d211b6188ac1ae006371c3816b89af96c24f17",
    "si_location": "4e51babe0a24f713111a119aaaf3ad644ad33556edb660e5b948ae8d3257875a",
    "si_size": "38d6f7cc2fecbf4bde14c4b0863282e82a01b2a75a26d9849c351d5b1ea99795",
    "si_rotation": "fad230afeea88f861ab31e1492b10d2c4236e8a88f25e2c027dfdc5329ba5edc",
    "segmentation": "ebdcef776db3a8c432889c1cf5e032d412ce00d44239c11478ba08f8e8ff2bee"}
SCENES = {
    "sky": "bd4a43ab133db4f8461b3474ebab323bbcca9b75ec82d1a4f9ef458a40aed3e9",
    "water": "dc52785011c76c9f3505b64578023ee6a124a9e25287418219d0dbd2346fc7c8",
    "grass": "898709c9d03b8ebd8c344cf5ee64885d2c065f97a024aacaf487728f844cb5b1",
    "sand": "af333d5978c23364a80cd22bfc54a07f8821cb731d7a7c196a7ca18b5b44aebc",
    "forest": "a8c19668e8fa18607a1ba94943e4911d2ad99c04e21176c7d7ab668aa583c7af",
    "snow": "ea619e20a7b2e3dff37884a6829fec0286db3b5a32440e75eb6a1a5744b88a83",
    "brick": "5242e3544bc4c3e919abfaca64e4f36a985c77ebac7a5b105f1c004fab81d76d",
    "night": "c701830b217aae73434ddb58ec6120154f0b4faea41b199085a8d7247b010da6"}


def digest_of(*arrays):
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("name", SETS)
def test_no_pixel_has_changed(name):
    p = render(name, 2, seed=7)
    assert digest_of(p.images, p.labels.astype("<i8"), p.backgrounds.astype("<i8"), p.parts) == DRAWN[name]


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_no_background_has_changed(kind):
    scenes = render_background(kind, 2, np.random.default_rng(7))
    assert digest_of(np.floor(scenes * 255 + 0.5).astype(np.uint8)) == SCENES[kind]


def test_the_card_of_a_folder_has_not_changed(tmp_path):
    """A folder that was written before is recognised by its recipe."""
    card = (write(tmp_path / "b", {"train": 1, "val": 1}, seed=5) / "README.md").read_text(encoding="utf-8")
    view = ('{"background": "home", "hidden": 0.12, "jitter": 0.03, "rotation": 0.25, "scale": [22, 31], "shear": 0.1, '
            '"shift": 9, "style": "photo", "usual_paint": 0.9}')
    assert ('recipe: `{"correlation": 0.97, "per_class": {"train": 1, "val": 1}, "seed": 5, "views": '
            f'{{"train": {view}, "val": {view}}}}}`') in card
    assert "sha256:2595402df6241aa1ea404c34f1e10d03e8c1cc72945902e6b1da49a43d25afe2" in card


def test_the_order_of_names_is_a_part_of_the_seeds():
    assert list(SETS) == list(DRAWN) and BACKGROUNDS == tuple(SCENES) and len(CLASSES) == 12 and backdrop.CHUNK == 8
    total = hashlib.sha256()
    for name in SETS:
        pictures = render(name, 2, seed=7)
        total.update(np.ascontiguousarray(pictures.images).tobytes() + pictures.parts.tobytes())
    assert total.hexdigest() == "b9da567f7d2bd09de22fec4d5b55298ed29fdf873df5ed1ed3d9e84dbb4cce60"


def test_a_picture_does_not_depend_on_what_is_drawn_with_it():
    many, few = render("object", 10, 3), render("object", 3, 3, classes=[5, 2])
    assert np.array_equal(few.images[:3], many.images[50:53]) and np.array_equal(few.images[3:], many.images[20:23])
    assert not np.array_equal(render("object", 1, 4).images, many.images[::10])


def test_homes_and_away():
    assert 0.95 < render("val", 40, 1).at_home.mean() < 0.99
    assert not render("adversarial", 16, 1).at_home.any()
    assert abs(render("object", 40, 1).at_home.mean() - 1 / 8) < 0.05
    assert render("val", 8, 1, correlation=1.0).at_home.all()


def test_masks_are_exact():
    pictures = render("val", 4, 2)
    for image_parts, label, concepts in zip(pictures.parts, pictures.labels, pictures.concepts):
        parts = list(CLASSES.values())[label]
        for k, part in enumerate(parts, 1):
            owned = image_parts == k
            assert (concepts[owned] == part.concept).all()
        assert not concepts[image_parts == 0].any() and image_parts.max() <= len(parts)
    share = pictures.objects.mean()
    assert 0.15 < share < 0.3


def test_folder_is_what_was_drawn(tmp_path):
    root = write(tmp_path / "b", {"v2": 2, "sketch": 1}, seed=5)
    table = pd.read_csv(root / "metadata.csv", keep_default_na=False)
    drawn = render("v2", 2, 5)
    v2 = table[table["set"] == "v2"]
    for i, row in enumerate(v2.itertuples()):
        assert list(CLASSES)[drawn.labels[i]] == row.file.split("/")[1]
        assert np.array_equal(np.array(Image.open(root / "images" / row.file)), drawn.images[i])
        assert np.array_equal(np.array(Image.open(root / "objects" / row.file)) > 0, drawn.objects[i])
        assert np.array_equal(np.array(Image.open(root / "parts" / row.file)), drawn.parts[i])
    assert set(table.loc[table["set"] == "sketch", "background"]) == {""}
    card, pixels = (root / "README.md").read_text(encoding="utf-8"), hashlib.sha256()
    for pictures in (drawn, render("sketch", 1, 5)):
        pixels.update(np.ascontiguousarray(pictures.images).tobytes() + pictures.parts.tobytes())
    assert f"sha256:{pixels.hexdigest()}" in card and [p.name for p in tmp_path.iterdir()] == ["b"]
    parts = pd.read_csv(root / "parts.csv")
    assert parts["part"].tolist() == [part.name for of_class in CLASSES.values() for part in of_class]
    assert (parts["concept"] == (parts["part"] != "body")).all()


def test_half_written_folder_is_not_taken_for_whole(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(backdrop, "write_csv", fail)
        with pytest.raises(OSError):
            write(tmp_path / "b", {"val": 1}, seed=5)
    assert list(tmp_path.iterdir()) == []
    assert (write(tmp_path / "b", {"val": 1}, seed=5) / "metadata.csv").exists()
    with pytest.raises(FileExistsError, match="not written by this recipe"):
        write(tmp_path / "b", {"val": 1}, seed=6)


@pytest.mark.parametrize("arguments", [("valley", 1, 0), ("val", 0, 0), ("val", 1, 0, [12]), ("val", 1, 0, None, 1.5)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="got"):
        render(*arguments)


@pytest.mark.parametrize("cue", CUES)
def test_sets_of_a_cue_differ_where_the_cue_lies_and_nowhere_else(cue):
    usual = render(f"{cue}/val", 8, 3)
    assert np.array_equal(usual.parts, render("val", 8, 3).parts), "the poses of val"
    body = usual.objects & ~usual.concepts
    edge = maximum_filter(usual.parts, (1, 7, 7)) != minimum_filter(usual.parts, (1, 7, 7))  # colours mix there
    for name in CUES[cue].keys() - {"train", "val", "context"}:
        away = render(f"{cue}/{name}", 8, 3)
        assert np.array_equal(away.parts, usual.parts) and np.array_equal(away.labels, usual.labels)
        changed = (away.images != usual.images).any(-1) & ~edge
        allowed = {"background": ~usual.objects, "paint": body, "both": body | ~usual.objects,
                   "part": usual.concepts, "badge": body}[cue]
        if name == "background_away":
            allowed = ~usual.objects
        elif name == "paint_away":
            allowed = body
        assert (changed & ~allowed).sum() < 1e-3 * (changed & allowed).sum(), name  # shapes have soft outlines
        if CUES[cue][name].background == "away":
            assert not away.at_home.any() and usual.at_home.mean() > 0.9
    context = render(f"{cue}/context", 8, 3)
    assert context.concepts.sum() < 0.6 * usual.concepts.sum() and not (context.objects & ~usual.objects).any()


def test_the_world_of_the_background_is_the_ordinary_one():
    for name in ("train", "val"):
        assert np.array_equal(render(f"background/{name}", 3, 7).images, render(name, 3, 7).images)


def test_a_paint_goes_with_its_class_and_away_it_never_does():
    own = np.array([backdrop._PAINTS[paint] for paint in backdrop._BODY_PAINT])
    for role in ("body", "first", "badge"):
        for never, share in ((False, 0.97), (True, 0.0)):
            view, met = replace(CUES["paint"]["val"], role=role, never=never), []
            for label in range(len(CLASSES)):
                palette = backdrop._palette(label, view, 400, np.random.default_rng(label))
                near = {r: (abs(palette[r].T - own[label]).max(1) <= 0.08 + 1e-9).mean() for r in backdrop.ROLES}
                met.append(near.pop(role))
                assert max(near.values()) < 0.3, "other paints are random"
            assert abs(np.mean(met) - share) < 0.03, (role, never, np.mean(met))


def test_a_badge_lies_on_the_body_and_is_seen():
    plain, badge = (replace(CUES["badge"]["val"], role=role) for role in ("third", "badge"))
    for label in range(len(CLASSES)):
        (a, _, parts), (b, _, same) = (
            backdrop.render_object(label, view, 8, np.random.default_rng(4)) for view in (plain, badge))
        body = 1 + [part.name for part in tuple(CLASSES.values())[label]].index("body")
        assert np.array_equal(parts, same) and b.max() <= 1
        assert ((abs(a - b).max(0) > 0.2) & (parts == body)).sum((1, 2)).min() >= 8
