"""Pictures for a page: sizes, colours, and the line around an object."""
import base64
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cft.apps.drawing import SIDES, data_uri, grown, outline, overlay, resized


@pytest.mark.parametrize("seed", range(3))
def test_grown_is_a_maximum_over_windows(seed):
    mask = torch.rand(17, 23, generator=torch.Generator().manual_seed(seed)) > 0.95
    for by in (0, 1, 3):
        assert torch.equal(grown(mask, by), F.max_pool2d(mask[None, None].float(), 2 * by + 1, 1, by)[0, 0] > 0)


def test_overlay_shows_relevance_and_outline():
    picture, relevance, mask = torch.full((3, 40, 60), 0.5), torch.zeros(2, 3), torch.zeros(40, 60, dtype=torch.bool)
    relevance[0, 0], relevance[1, 2] = 4.0, -4.0
    mask[15:25, 20:40] = True
    plain, shown = overlay(picture), overlay(picture, relevance)
    assert plain.shape == (round(SIDES[0] * 40 / 60), SIDES[0], 3) and plain.dtype == np.uint8
    red, blue = shown[0, 0].astype(int), shown[-1, -1].astype(int)
    assert red[0] > red[2] + 60 and blue[2] > blue[0] + 60
    assert np.ptp(overlay(picture, torch.zeros(2, 3)).astype(int), -1).max() < 3
    strengths = [int(np.ptp(overlay(picture, relevance, strength=s)[0, 0].astype(int))) for s in (0.0, 0.3, 0.6, 1.0)]
    assert strengths == sorted(strengths) and strengths[0] < 3
    lined = overlay(picture, None, mask)
    assert (lined == 255).all(-1).any() and (lined == 0).all(-1).any() and (lined[0] == plain[0]).all()
    white, black = outline(mask)
    assert not (white & mask).any() and not (white & black).any() and white.sum() == 12 * 22 - 200
    assert overlay(torch.rand(3, 1000, 500)).shape == (SIDES[1], SIDES[1] // 2, 3)
    half, full = overlay(picture, relevance / 2, scale=4.0)[0, 0].astype(int), red
    assert full[0] - full[2] > half[0] - half[2] > 20
    with pytest.raises(ValueError, match="strength must lie"):
        overlay(picture, relevance, strength=1.1)


def test_a_uri_is_the_picture():
    image = overlay(torch.linspace(0, 1, 3 * 30 * 20).reshape(3, 30, 20))
    kind, code = data_uri(image, quality=95).split(",")
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
    assert kind == "data:image/jpeg;base64" and again.shape == image.shape
    assert np.abs(again.astype(int) - image).mean() < 3
    assert resized(torch.rand(1, 2, 900), 90).shape == (1, 1, 90)
