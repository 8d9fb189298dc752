"""Agreement with public libraries in float64: lxt's AttnLRP and its CP variant, captum's input × gradient.

`lxt.efficient.monkey_patch` exchanges `forward` of torch's own classes for the whole process, and importing lxt imports
much of transformers. Everything that touches lxt therefore runs in a process of its own (this file, as a script),
which hands its numbers back as JSON; nothing in the process of the tests is patched.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from cft.explain.maps import relevance

SHAPE = {"img_size": 24, "patch_size": 6, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}


def perturbed(model):
    """The model in float64 with every parameter off its initial value."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.double().eval()


def make(**changes):
    torch.manual_seed(0)
    return perturbed(VisionTransformer(**(SHAPE | {"mlp_ratio": 2} | changes)))


def pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 24, 24, generator=generator, dtype=torch.float64), torch.tensor([0, 6, 2])


def distance(ours, theirs):
    """Largest difference, relative to the largest relevance."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --- in a process of its own -------------------------------------------------------------------------------------


def attnlrp_of_timm():
    """AttnLRP by lxt's functions on the layers of a copy, for a plain ViT and one with LayerScale and registers."""
    from peers import lxt_copy, tokens_x_gradient

    images, target = pictures()
    found = {}
    before = torch.nn.LayerNorm.forward, torch.nn.GELU.forward, torch.nn.functional.scaled_dot_product_attention
    for name, changes in {"plain": {}, "dinov2": {"init_values": 0.5, "reg_tokens": 2, "no_embed_class": True}}.items():
        model = make(**changes)
        theirs = tokens_x_gradient(lxt_copy(model), images, target)
        found[name] = distance(relevance(model, images, target).tokens, theirs)
        found[name + " plain gradient"] = distance(tokens_x_gradient(model, images, target), theirs)
    after = torch.nn.LayerNorm.forward, torch.nn.GELU.forward, torch.nn.functional.scaled_dot_product_attention
    return {**found, "classes unchanged": before == after}


def copied(source):
    """A timm VisionTransformer with the weights of torchvision's `source`."""
    target = VisionTransformer(**SHAPE, mlp_ratio=2).double().eval()
    names = {"class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.pos_embedding": "pos_embed",
             "encoder.ln.": "norm.",
             "encoder.layers.encoder_layer_": "blocks.", ".ln_": ".norm", ".self_attention.in_proj_": ".attn.qkv.",
             ".self_attention.out_proj": ".attn.proj", ".mlp.0": ".mlp.fc1", ".mlp.3": ".mlp.fc2", "heads.head": "head"}
    state = {}
    for key, value in source.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    target.load_state_dict(state)
    return target


def cp_of_torchvision():
    """The default map of lxt, which is the CP variant, on torchvision's ViT against `cp` on timm's."""
    from lxt.efficient import monkey_patch
    from torchvision.models import vision_transformer

    torch.manual_seed(0)
    source = perturbed(vision_transformer.VisionTransformer(24, 6, 3, 3, 24, 48, num_classes=7))
    model, (images, target) = copied(source), pictures()
    with torch.no_grad():
        logits = distance(model(images), source(images))
    ours, attnlrp = (relevance(model, images, target, method, differentiable=False).tokens
                     for method in ("cp", "attnlrp"))
    monkey_patch(vision_transformer)  # for good: from here on this process computes other gradients
    inputs = []

    def keep(module, args):
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[0],)

    source.encoder.layers.register_forward_pre_hook(keep)
    chosen = source(images).gather(1, target[:, None]).sum()
    theirs = (inputs[0] * torch.autograd.grad(chosen, inputs[0])[0]).sum(-1).detach()
    return {"logits": logits, "cp": distance(ours, theirs), "attnlrp": distance(attnlrp, theirs)}


@pytest.fixture(scope="module")
def lxt():
    if importlib.util.find_spec("lxt") is None:
        pytest.skip("lxt is not installed")
    places = [str(Path(__file__).parents[2] / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- the tests ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "dinov2"])
def test_attnlrp_is_lxts(lxt, name):
    found = lxt["attnlrp"]
    assert found[name] <= 1e-7
    assert found[name + " plain gradient"] > 1e-2, "the rules must matter for their agreement to say something"
    assert found["classes unchanged"] is True


@pytest.mark.slow
def test_cp_is_lxts_default_on_torchvision(lxt):
    assert lxt["cp"]["logits"] <= 1e-12
    assert lxt["cp"]["cp"] <= 1e-6
    assert lxt["cp"]["attnlrp"] > 1e-2


def test_captum_input_x_gradient_at_the_first_block():
    attr = pytest.importorskip("captum.attr")
    model, (images, target) = make(init_values=0.5, reg_tokens=2), pictures()
    layer = attr.LayerGradientXActivation(model, model.blocks[0])
    theirs = layer.attribute(images, target, attribute_to_layer_input=True)
    ours = relevance(model, images, target, "input_x_gradient", differentiable=False).tokens
    assert distance(ours, theirs.sum(-1).detach()) <= 1e-12


def test_captum_input_x_gradient_of_pixels():
    """A linear stem without bias and positions keeps Σ x ⊙ ∂z/∂x: the pixels of a patch sum to its token."""
    attr = pytest.importorskip("captum.attr")
    model, (images, target) = make(), pictures()
    with torch.no_grad():
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
    pixels = attr.InputXGradient(model).attribute(images.clone().requires_grad_(), target).detach()
    theirs = pixels.sum(1).unflatten(1, (4, 6)).unflatten(3, (4, 6)).sum((2, 4))
    ours = relevance(model, images, target, "input_x_gradient", differentiable=False).patches
    assert distance(ours, theirs) <= 1e-12


if __name__ == "__main__":
    print(json.dumps({"attnlrp": attnlrp_of_timm(), "cp": cp_of_torchvision()}))
