"""Taking models apart: steps give the model's own logits, and sizes are what they should be."""

import pytest
import torch
from small_models import FAMILIES, Stem, make, make_convnext, pictures

from cft.explain import anatomy
from cft.explain.rules import Tape


def logits_by_steps(parts):
    x = parts.x
    for layer, module in parts.steps:
        x, _ = layer(module, x, Tape())
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_vit_steps(family):
    model, images = make(family), pictures()
    parts = anatomy.split(model, images, 2)
    torch.testing.assert_close(logits_by_steps(parts), model(images))
    assert parts.grid == (4, 4) and parts.x.shape[1] == 16 + parts.prefix == 16 + model.num_prefix_tokens


@pytest.mark.parametrize("stage", range(4))
def test_convnext_steps(stage):
    model, images = make_convnext(head_hidden_size=7), pictures(2, (64, 96))
    parts = anatomy.split(model, images, stage)
    torch.testing.assert_close(logits_by_steps(parts), model(images))
    assert parts.grid == (16 >> stage, 24 >> stage)
    rows = parts.per_token(parts.x)
    assert rows.shape == (2, parts.grid[0] * parts.grid[1], model.stages[stage].blocks[-1].conv_dw.out_channels)
    assert torch.equal(rows[0, parts.grid[1] + 2], parts.x[0, :, 1, 2])


POOLED = {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2}


@pytest.mark.parametrize("settings", [{}, {"global_pool": "avg"}, POOLED])
def test_pool_is_transposed(settings):
    model = make(**settings)
    x = torch.randn(2, 16 + model.num_prefix_tokens, 12, dtype=torch.float64)
    y, pullback = anatomy.pool(model, x, Tape())
    torch.testing.assert_close(y, model.pool(x))
    g = torch.randn_like(y)
    torch.testing.assert_close((pullback(g) * x).sum(), (g * y).sum())


def test_stems_of_the_wrong_size():
    class Sized(Stem):
        def __init__(self, img_size, patch_size, **rest):
            super().__init__(img_size, patch_size, **rest)
            self.patch_size = (patch_size, patch_size)

    with pytest.raises(ValueError, match=r"images must be 16×16 pixels \(height×width\), got 8×32"):
        anatomy.split(make(embed_layer=Sized), pictures(2, (8, 32)), 2)  # as many tokens, another grid
    with pytest.raises(ValueError, match=r"patch_embed must give 4·4 tokens, got 8"):
        anatomy.split(make(embed_layer=Stem), pictures(2, (8, 16)), 2)


def test_overridden_forward():
    model = make()
    model.forward_head = lambda x: x
    with pytest.raises(anatomy.UnsupportedModule, match="^the model is a VisionTransformer"):
        anatomy.check_model(model)

    class Twice(anatomy.VisionTransformer):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(anatomy.UnsupportedModule, match="^the model is a Twice"):
        anatomy.check_model(Twice(img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3))
