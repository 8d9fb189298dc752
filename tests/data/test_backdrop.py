"""The procedural benchmark: shapes against slow definitions, exact masks, equal pixels everywhere."""
import hashlib
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cft.data import backdrop
from cft.data.backdrop import CLASSES, SETS, SIZE, capsule, ellipse, polygon, render, write

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


def test_pixels_are_equal_everywhere():
    digest = hashlib.sha256()
    for name in SETS:
        pictures = render(name, 2, seed=7)
        digest.update(np.ascontiguousarray(pictures.images).tobytes() + pictures.parts.tobytes())
    assert digest.hexdigest() == "b9da567f7d2bd09de22fec4d5b55298ed29fdf873df5ed1ed3d9e84dbb4cce60"


def test_a_picture_does_not_depend_on_what_is_drawn_with_it():
    many, few = render("object", 10, 3), render("object", 3, 3, classes=[5, 2])
    assert np.array_equal(few.images[:3], many.images[50:53]) and np.array_equal(few.images[3:], many.images[20:23])
    assert not np.array_equal(render("object", 1, 4).images, many.images[::10])


def test_homes_and_away():
    assert 0.95 < render("val", 80, 1).at_home.mean() < 0.99
    assert not render("adversarial", 40, 1).at_home.any()
    assert abs(render("object", 80, 1).at_home.mean() - 1 / 8) < 0.05
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
    assert "sha256:" in (root / "README.md").read_text(encoding="utf-8")


def test_half_written_folder_is_not_taken_for_whole(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(backdrop, "_write_csv", fail)
        with pytest.raises(OSError):
            write(tmp_path / "b", {"val": 1}, seed=5)
    assert not (tmp_path / "b").exists()
    assert (write(tmp_path / "b", {"val": 1}, seed=5) / "metadata.csv").exists()
    with pytest.raises(FileExistsError, match="not written by this recipe"):
        write(tmp_path / "b", {"val": 1}, seed=6)


@pytest.mark.parametrize("arguments", [("valley", 1, 0), ("val", 0, 0), ("val", 1, 0, [12]), ("val", 1, 0, None, 1.5)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="got"):
        render(*arguments)
