"""Small random networks of every family, pictures for them, and finite differences."""
import torch
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cft.explain.maps as r

FAMILIES = {
    "plain": {},
    "deit3": {"init_values": 0.5, "no_embed_class": True},
    "dinov2": {"init_values": 0.5, "reg_tokens": 3, "no_embed_class": True},
    "qk_norm": {"qk_norm": True, "global_pool": "avg", "class_token": False},
    "avg_prefix": {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False, "act_layer": "quick_gelu"},
    "clip": {"pre_norm": True, "act_layer": "gelu_tanh"},
    "scaled": {"scale_attn_norm": True, "scale_mlp_norm": True, "act_layer": "silu"},
    "bare": {"qkv_bias": False, "proj_bias": False, "act_layer": "relu"},
    "rms": {"norm_layer": RmsNorm, "qk_norm": True},
    "giant": {"mlp_layer": SwiGLUPacked, "act_layer": "silu", "init_values": 0.5},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": "silu", "scale_mlp_norm": True},
}


def make(family: str = "plain", dtype=torch.float64, seed: int = 0, **changes) -> VisionTransformer:
    torch.manual_seed(seed)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**(settings | {"mlp_ratio": 2} | FAMILIES[family] | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.to(dtype).eval()


def pictures(batch: int = 2, size=(16, 16), dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def scalar(model, images, normalize, method="attnlrp"):
    """A scalar that depends on every entry of the map."""
    target = torch.tensor([1, 3])
    phi = r.relevance(model, images, target, method, differentiable=True).map(normalize)
    slope = torch.linspace(-1, 1, phi[0].numel(), dtype=phi.dtype).view_as(phi[0])
    return (slope * phi.log() + (1 - phi).log() / 3).mean()


def directional_error(f, parameters, direction, h=1e-5):
    """Relative error of ⟨∂f, direction⟩ against a fourth-order central difference."""
    gradients = torch.autograd.grad(f(), parameters)
    expected = sum((g * d).sum() for g, d in zip(gradients, direction))
    values = []
    with torch.no_grad():
        for step in (-2, -1, 1, 2):
            for p, d in zip(parameters, direction):
                p += step * h * d
            values.append(f())
            for p, d in zip(parameters, direction):
                p -= step * h * d
    measured = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    return abs(measured - expected) / expected.abs()


def make_convnext(dtype=torch.float64, conv_mlp=False, **changes):
    torch.manual_seed(0)
    changes = {"use_grn": True, "ls_init_value": None} | changes
    model = ConvNeXt(num_classes=5, depths=(1, 1, 2, 1), dims=(4, 4, 6, 8), **changes, conv_mlp=conv_mlp)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.to(dtype).eval()


class Stem(nn.Module):
    """A custom convolutional patch embedding, as small models need it."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, **_):
        super().__init__()
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] ** 2
        last = nn.Conv2d(4, embed_dim, patch_size // 2, patch_size // 2)
        self.layers = nn.Sequential(nn.Conv2d(in_chans, 4, 3, 2, 1), nn.GELU(), last)

    def forward(self, x):
        return self.layers(x).flatten(2).transpose(1, 2)
