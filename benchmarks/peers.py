"""Relevance alone against other libraries: lxt, of the AttnLRP authors, and captum's input × gradient.

lxt lets autograd find relevance, after exchanging the forward functions of layers for ones with modified gradients.
Here they are given to the layers of a copy of the model, so that nothing outside the copy changes. captum's input ×
gradient on pixels is a lower bound of what any method by gradients must pay. Without a library there is no row.
"""

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from cost import Case, Step
from table import Row, device, place, row
from timm.layers import Attention  # pyright: ignore[reportPrivateImportUsage]
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cft.evaluate.passes import times_slower
from cft.explain.maps import relevance, relevances


def lxt_copy(model: VisionTransformer) -> VisionTransformer:
    """A copy of `model` whose layers run lxt's AttnLRP forward functions; classes and modules stay as they are.

    lxt knows nothing of timm's attention: that forward function is ours, around lxt's wrapper, which scales the
    gradients of q, k and v by ¼, ¼ and ½.
    """
    from lxt.efficient.patches import layer_norm_forward, non_linear_forward, wrap_attention_forward

    mix = wrap_attention_forward(lambda module, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=module.scale))
    twin = copy.deepcopy(model).requires_grad_(False)
    for module in twin.modules():
        layer: Any = module
        if isinstance(module, nn.LayerNorm):
            layer.forward = partial(layer_norm_forward, module)
        elif isinstance(module, nn.GELU):
            layer.original_forward = module.forward
            layer.forward = partial(non_linear_forward, module)
        elif isinstance(module, Attention):
            layer.forward = partial(_attend, module, mix)
    return twin


def _attend(module: Any, mix: Callable, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return module.proj(mix(module, module.q_norm(q), module.k_norm(k), v).transpose(1, 2).flatten(2))


def tokens_x_gradient(model: VisionTransformer, images: Tensor, target: Tensor) -> Tensor:
    """Σ_d x ⊙ ∂z/∂x at the input of the first block, by autograd: (batch, tokens)."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images))).detach().requires_grad_()
    chosen = model.forward_head(model.norm(model.blocks(tokens))).gather(1, target[:, None]).sum()
    return (tokens * torch.autograd.grad(chosen, tokens)[0]).sum(-1).detach()


def peer_rows(case: Case, rounds: int = 5) -> list[Row]:
    """Time that lxt and captum need for the relevance of a batch over the time that ours needs, where installed."""
    images, labels, peers = case.batch.images, case.batch.labels, dict[str, Step]()
    model = copy.deepcopy(case.model).requires_grad_(False)
    if importlib.util.find_spec("lxt"):
        peers["lxt"] = partial(tokens_x_gradient, lxt_copy(model), images, labels)
    if importlib.util.find_spec("captum"):
        from captum.attr import InputXGradient

        peers["captum"] = lambda: InputXGradient(model).attribute(images.clone().requires_grad_(), labels)
    ours = partial(relevance, model, images, labels, differentiable=False)
    rows, note = [], f"inference, median of {rounds} alternating pairs; {case.note}"
    for name, theirs in peers.items():
        ratio = times_slower(theirs, ours, rounds)
        rows.append(row(f"relevance_vs_{name}_speed", ratio, "their time / ours", ">= 1.3", name, note))
    return rows


def zennit_relevance(model: nn.Module, layer: str, images: Tensor, target: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Relevance at the output of a layer of torchvision's ResNet, by zennit: the ε-rule, sums and means by shares.

    zennit folds batch norm into the convolution before.
    """
    from zennit.composites import LayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.torchvision import ResNetCanonizer

    rule, share, inner = Epsilon(epsilon), Norm(stabilizer=epsilon), list[Tensor]()
    rules = [(nn.Linear, rule), (nn.Conv2d, rule), (nn.ReLU, Pass()), (nn.BatchNorm2d, Pass()), (Sum, share),
             (nn.AdaptiveAvgPool2d, share)]

    def see(module: nn.Module, inputs: Any, y: Tensor) -> None:
        inner.append(y)

    composite = LayerMapComposite(rules, [ResNetCanonizer()])
    with composite.context(model) as changed, changed.get_submodule(layer).register_forward_hook(see):
        logits = changed(images.clone().requires_grad_())
        chosen = F.one_hot(target, logits.shape[1]) * logits.detach()
        return torch.autograd.grad(logits, inner[0], chosen)[0].sum(1)


def family_rows(batch: int = 2, rounds: int = 5) -> list[Row]:
    """The same for a ResNet-50, by zennit, and for three families by captum, input × gradient at the same layer."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    target, rows = torch.arange(batch), []
    resnet: Any = torchvision.models.resnet50().eval()
    swin: Any = timm.create_model("swin_tiny_patch4_window7_224").eval()
    eva: Any = timm.create_model("eva02_tiny_patch14_224", num_classes=1000).eval()
    peers: list[tuple[str, str, nn.Module, Step]] = []
    if importlib.util.find_spec("zennit"):
        peers.append(("zennit", "resnet50", resnet, lambda: zennit_relevance(resnet, "layer3", images, target)))
    if importlib.util.find_spec("captum"):
        from captum.attr import LayerGradientXActivation

        for name, model, layer in (("resnet50", resnet, resnet.layer3), ("swin_t", swin, swin.layers[2]),
                                   ("eva02_t", eva, eva.blocks[0])):
            theirs = partial(LayerGradientXActivation(model, layer).attribute, images, target)
            peers.append(("captum", name, model, theirs))
    for peer, name, model, theirs in peers:
        ratio = times_slower(theirs, partial(relevance, model, images, target, differentiable=False), rounds)
        note = f"inference, median of {rounds} alternating pairs; {name}, batch {batch}, float32, {place(device())}"
        rows.append(row(f"relevance_vs_{peer}_speed_{name}", ratio, "their time / ours", ">= 1", peer, note))
    return rows


def classes_rows(case: Case, classes: int = 5, rounds: int = 3) -> list[Row]:
    """Time of one call of `relevance` for each of some classes over that of one call of `relevances` for all."""
    images, model = case.batch.images, copy.deepcopy(case.model).requires_grad_(False)
    targets = (case.batch.labels[:, None] + torch.arange(classes, device=images.device)) % model.num_classes
    alone = lambda: [relevance(model, images, target, differentiable=False) for target in targets.T]
    ratio = times_slower(alone, lambda: relevances(model, images, targets), rounds)
    note = f"inference, {classes} classes, median of {rounds} alternating pairs; {case.note}"
    return [row("relevance_classes_speed", ratio, "their time / ours", ">= 1.3", "one call per class", note)]
