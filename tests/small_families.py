"""Small random classifiers of the families that run their own forward pass, and a picture size for each."""
from functools import partial

import timm
import torch
import torchvision
from timm.models.mlp_mixer import MlpMixer
from timm.models.regnet import RegNet, RegNetCfg
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

SWIN = {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "drop_path_rate": 0.0}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16)}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16)}
HF = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24, "image_size": 32,
      "patch_size": 8, "num_labels": 5}

HIERA = {"img_size": 64, "embed_dim": 12, "num_heads": 1, "stages": (1, 1, 2, 1), "mask_unit_size": (4, 4)}
MAXVIT = {"img_size": 64, "embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": 8,
          "head_hidden_size": 16}
REGNET = RegNetCfg(depth=6, w0=8, wa=8.0, wm=2.0, group_size=4, se_ratio=0.25)
MAPPED = {"num_classes": 5, "global_pool": "map", "attn_pool_num_heads": 3}

NETWORKS = {  # name of timm or a class, settings, pixels
    "resnet": ("resnet18", RESNET, 64),
    "resnext": ("resnext50_32x4d", RESNET | {"base_width": 32, "cardinality": 4}, 64),
    "se_resnet": ("resnet50", RESNET | {"block_args": {"attn_layer": "se"}}, 64),
    "wide_resnet": ("wide_resnet50_2", RESNET, 64),
    "regnet": (RegNet, {"cfg": REGNET}, 64),
    "efficientnet": ("test_efficientnet", {}, 64),
    "mobilenet_v2": ("mobilenetv2_035", {}, 32),
    "mobilenet_v3": ("mobilenetv3_small_050", {}, 32),
    "convnext": ("convnext_atto", CONVNEXT, 64),
    "convnext_clip": ("convnext_atto", CONVNEXT | {"norm_eps": 1e-5, "head_norm_first": True}, 64),
    "eva02": ("eva02_tiny_patch14_224", TINY | {"scale_mlp": True}, 32),
    "dinov3": ("vit_small_patch16_dinov3", TINY, 32),
    "perception_encoder": ("vit_pe_core_tiny_patch16_384", TINY | MAPPED, 32),
    "beit": ("beit_base_patch16_224", TINY, 32),
    "swin": ("swin_tiny_patch4_window7_224", SWIN | {"window_size": 2}, 64),
    "swin_v2": ("swinv2_tiny_window8_256", SWIN | {"window_size": 2}, 64),
    "siglip": ("vit_base_patch16_siglip_224", TINY, 32),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", TINY, 32),
    "hiera": ("hiera_tiny_224", HIERA, 64),
    "cait": ("cait_xxs24_224", TINY, 32),
    "xcit": ("xcit_nano_12_p8_224", TINY, 32),
    "maxvit": ("maxvit_pico_rw_256", MAXVIT, 64),
    "mixer": (MlpMixer, {"img_size": 32, "patch_size": 8, "embed_dim": 12, "num_blocks": 2}, 32),
    "naflex": ("naflexvit_base_patch16_gap", {"embed_dim": 12, "depth": 2, "num_heads": 3}, 64),
    "sam": ("samvit_base_patch16_224", TINY | {"window_size": 2, "global_attn_indexes": (1, )}, 32),
}


def make_network(name: str, dtype: torch.dtype = torch.float64, classes: int = 5) -> tuple[nn.Module, torch.Tensor]:
    """A network in evaluation mode, and two pictures for it."""
    torch.manual_seed(0)
    if name == "torchvision_vit":
        model, side = torchvision.models.VisionTransformer(32, 8, 2, 3, 12, 24, num_classes=classes), 32
    elif name == "torchvision_resnet":
        block, side = torchvision.models.resnet.BasicBlock, 64
        model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=classes)
    elif name == "hugging_face_vit":
        model, side = ViTForImageClassification(ViTConfig(**HF)), 32
    else:
        known, settings, side = NETWORKS[name]
        build = known if callable(known) else partial(timm.create_model, known)
        model = build(**{"num_classes": classes} | settings)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return model.to(dtype).eval(), images.to(dtype)
