"""Figures: colours for every eye, no setting left behind, and the pictures that were asked for."""
import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from letters import SMALLEST, letters

from cft.data.backdrop import CLASSES
from cft.reproduce.figures import (
    COLOURS,
    draw_positions,
    flips,
    gain_figure,
    names_of,
    relevance_panels,
    results_figure,
    style,
    title_of,
)
from cft.reproduce.results import open_results
from cft.reproduce.settings import read_settings, write_settings

# Machado et al. 2009, full severity, for linear light
BLIND = {"protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
         "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
         "none": np.eye(3).tolist()}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lab(linear):
    """CIELAB of linear sRGB, white point D65."""
    f = [t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116
         for t in np.array(TO_XYZ) @ linear / [0.95047, 1.0, 1.08883]]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_colours_differ_for_every_eye():
    codes = [np.array(list(bytes.fromhex(colour[1:]))) for colour in COLOURS]
    linear = [np.where(v > 10, ((v / 255 + 0.055) / 1.055) ** 2.4, v / 255 / 12.92) for v in codes]
    for kind, matrix in BLIND.items():
        seen = [lab(np.clip(np.array(matrix) @ c, 0, 1)) for c in linear]
        pairs = itertools.combinations(enumerate(seen), 2)
        worst = min((float(np.linalg.norm(a - b)), i, j) for (i, a), (j, b) in pairs)
        assert worst[0] > 12, (kind, worst)
        assert min(np.linalg.norm(c - [100, 0, 0]) for c in seen) > 30  # and from white paper


def test_style_leaves_nothing_behind():
    before = dict(matplotlib.rcParams)
    with style():
        cycle = matplotlib.rcParams["axes.prop_cycle"].by_key()
        assert tuple(cycle["color"]) == COLOURS
        assert len(set(cycle["marker"])) == len(set(map(str, cycle["linestyle"]))) == len(COLOURS)
        assert matplotlib.rcParams["savefig.dpi"] == 300 and matplotlib.rcParams["pdf.fonttype"] == 42
    assert dict(matplotlib.rcParams) == before


def test_gains_have_a_panel_a_view(small):
    figure = gain_figure(open_results(small, "table1"), "table1")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["paper, ViT-B\n(arXiv 2603.08309)", "demo, the paper's form", "demo, our form"]
    assert [tick.get_text() for tick in figure.axes[1].get_yticklabels()][:3] == ["val", "v2", "adversarial"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GradMask", "RRR", "RRDA", "CFT"]
    assert len(gain_figure(open_results(), "table7").axes) == 2  # Table 7 prints no original


def write_maps(root, concepts=True):
    """Maps of 'original' and 'cft' on one set: four pictures, the picture's number in each of its values."""
    (root / "maps").mkdir()
    rng = np.random.default_rng(0)
    for method, predicted in (("original", [0, 1, 2, 3]), ("cft", [0, 9, 2, 5])):
        maps = {"pictures": np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((16, 16, 3), np.uint8),
                "label": [0, 9, 7, 3], "predicted": predicted,
                "relevance": rng.normal(size=(4, 2, 2)).astype(np.float16)}
        if concepts:
            maps["concepts"] = np.arange(4)[:, None, None] > np.indices((16, 16))[1] // 4
        np.savez(root / f"maps/demo.{method}.0.object.npz", **maps)


def test_flips(small):
    write_maps(small)
    assert flips(open_results(small, "fig2"), "original", "cft", "object") == ([1], [3])


@pytest.mark.parametrize("concepts", [True, False])
def test_panels_show_what_was_asked_for(small, concepts):
    write_maps(small, concepts)
    found, names = open_results(small, "fig2"), list(CLASSES)
    figure = relevance_panels(found, {"object": [3, 1]}, {"original": "before", "cft": "after"})
    axes = np.array(figure.axes[:-1]).reshape(3, 2)  # the last is the colour bar
    assert [ax.images[0].get_array().max() for ax in axes[0]] == [3, 1]
    assert [ax.get_title() for ax in axes[0]] == [f"object:\n{names[k]}" for k in (3, 9)]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["picture", "before", "after"]
    below = [[ax.get_xlabel() for ax in row] for row in axes[1:]]
    assert below == [[f"✓ {names[3]}", f"✗ {names[1]}"], [f"✗ {names[5]}", f"✓ {names[9]}"]]
    assert (len(axes[1, 0].collections) > 0) == concepts and not axes[0, 0].collections
    signed = np.load(small / "maps/demo.cft.0.object.npz")["relevance"][1].astype(float)
    shown = axes[2, 1].images[1].get_array()
    assert np.allclose(shown, signed / (abs(signed) + 0.5 * abs(signed).mean())) and abs(shown).max() < 1
    with pytest.raises(ValueError, match="no relevance maps at demo.plain.0.object.npz"):
        relevance_panels(found, {"object": [0]}, {"plain": "plain"})


def test_many_pictures_stand_in_bands_that_fit_a_page(small):
    write_maps(small)
    figure = relevance_panels(open_results(small, "fig2"), {"object": [0, 1, 2, 3, 0, 1, 2]}, {"cft": "after"})
    *axes, bar = figure.axes
    assert len(axes) == 2 * 6 + 2 and bar.get_xlabel() == "relevance" and min(letters(figure).values()) >= SMALLEST
    assert [ax.images[0].get_array().max() for ax in axes if ax.get_title()] == [0, 1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize("key", ["table1", "table5", "controls"])
def test_letters_of_gains_and_results_can_be_read(key):
    found = open_results()
    assert min(letters(gain_figure(found, key)).values()) >= SMALLEST
    assert min(letters(results_figure(found)).values()) >= SMALLEST


def test_positions_are_drawn_once_and_for_all(small):
    write_maps(small)
    found = open_results(small)
    drawn = draw_positions(found, "fig1", "object", 3)
    assert drawn == draw_positions(found, "fig1", "object", 3) and len(set(drawn)) == 3 and set(drawn) <= set(range(4))
    assert sorted(draw_positions(found, "demo", "object", 48)) == [0, 1, 2, 3]


def test_classes_and_titles(small, tmp_path_factory):
    assert names_of(open_results(small)) == list(CLASSES)
    other = tmp_path_factory.mktemp("imagenet")
    write_settings(read_settings("paper"), other / "settings.yaml")
    assert len(names_of(open_results(other))) == 1000
    assert title_of("cft-paper") == "CFT, paper's form" and title_of("rrda") == "rrda"


def test_results_show_every_seed(small):
    rows = open_results().rows
    rows[rows["seed"] < 2].to_csv(small / "rows.csv", index=False)
    figure = results_figure(open_results(small, "demo"), ("val", "OOD-7"))
    assert [ax.get_title() for ax in figure.axes] == ["val", "OOD-7"]
    for ax in figure.axes:
        assert len(ax.lines) == 3 and [len(line.get_xdata()) for line in ax.lines] == [18, 18, 18]
        np.testing.assert_allclose(ax.lines[2].get_xdata(), (ax.lines[0].get_xdata() + ax.lines[1].get_xdata()) / 2)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()][:2] == ["Original", "plain fine-tuning"]
