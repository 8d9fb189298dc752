"""Attention-map methods against their matrix definitions, with attention taken from timm itself by hooks."""

import numpy as np
import pytest
import torch
from small_models import directional_error, make, pictures, scalar

import cft.explain.maps as r
from cft.explain import attributions as a

TARGET = torch.tensor([1, 3])
FAMILIES = ["plain", "dinov2", "avg_prefix", "qk_norm"]


def caught(model, images, factor=1.0, retain=True):
    """Logits, attention weights (a list of leaves in the graph) and first-norm outputs of timm's own forward."""
    maps, reads, handles = [], [], []

    def keep(block):
        def hook(module, inputs, output):
            output = output * factor if block is model.blocks[-1] else output
            maps.append(output)
            return output

        return hook

    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(keep(block)))
        handles.append(block.norm1.register_forward_hook(lambda module, inputs, output: reads.append(output)))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, maps, reads


def slow_seed(model, tokens):
    row = np.zeros(tokens)
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    if model.global_pool == "token":
        row[0] = 1
    else:
        row[first:] = 1 / (tokens - first)
    return row


def slow_rollout(layers, row, normalized):
    matrix = np.eye(len(row))
    for layer in layers:
        factor = np.eye(len(row)) + layer
        matrix = (factor / factor.sum(1, keepdims=True) if normalized else factor) @ matrix
    return row @ matrix


def slow(name, model, images, i):
    """The definitions for picture i, heads and blocks in loops."""
    image, target, row = images[i : i + 1], int(TARGET[i]), None
    logits, maps, reads = caught(model, image)
    grads = torch.autograd.grad(logits[0, target], [*maps, reads[-1]])
    A = [m[0].detach().numpy() for m in maps]
    G = [g[0].numpy() for g in grads[:-1]]
    row, prefix, heads = slow_seed(model, A[0].shape[-1]), model.num_prefix_tokens, len(A[0])
    if name in ("eq2", "eq2_grad"):
        phi = row
        for weights, slope in zip(A[::-1], G[::-1]):
            M = sum(weights[h] * (np.maximum(slope[h], 0) if name == "eq2_grad" else 1) for h in range(heads)) / heads
            new = np.zeros_like(phi)
            for t in range(len(phi)):
                for j in range(len(phi)):
                    new[t] += M[t, j] / (M[:, j].sum() + 1e-9) * phi[j]
            phi = new
        return phi
    C = [sum(np.maximum(w[h] * g[h], 0) for h in range(heads)) / heads for w, g in zip(A, G)]
    if name == "gae":
        return slow_rollout(C, row, False)
    if name == "gradient_rollout":
        return slow_rollout(C, row, True)
    if name == "gradcam":
        return np.maximum(sum((row @ G[-1][h])[prefix:].mean() * (row @ A[-1][h]) for h in range(heads)) / heads, 0)
    values, slope = reads[-1][0].detach().numpy(), grads[-1][0].numpy()
    return np.maximum(sum(slope[prefix:, d].mean() * values[:, d] for d in range(values.shape[1])), 0)


@pytest.mark.parametrize("name", ["eq2", "eq2_grad", "gae", "gradient_rollout", "gradcam", "gradcam_tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_definition(family, name):
    model, images = make(family), pictures()
    result = r.relevance(model, images, TARGET, name)
    torch.testing.assert_close(result.logits, model(images))
    for i in range(2):
        np.testing.assert_allclose(result.tokens[i].detach(), slow(name, model, images, i), rtol=1e-8, atol=1e-12)
    assert result.tokens.abs().sum() > 0
    again = r.relevance(model, images, TARGET, r.Method(name, true_gradient=True))
    torch.testing.assert_close(again.tokens, result.tokens)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_iia_matches_definition(family, steps):
    model, images = make(family), pictures()
    result = r.relevance(model, images, TARGET, r.Method("iia", steps=steps))
    torch.testing.assert_close(result.logits, model(images))
    for i in range(2):
        C = [0 for _ in model.blocks]
        for outer in range(steps + 1):
            for inner in range(steps + 1):
                logits, maps, _ = caught(model, images[i : i + 1] * outer / steps, inner / steps)
                grads = torch.autograd.grad(logits[0, TARGET[i]], maps)
                for k, (w, g) in enumerate(zip(maps, grads)):
                    C[k] = C[k] + np.maximum((w * g)[0].detach().numpy(), 0).mean(0) / (steps + 1) ** 2
        expected = slow_rollout(C, slow_seed(model, len(C[0])), True)
        np.testing.assert_allclose(result.tokens[i].detach(), expected, rtol=1e-8, atol=1e-12)


def test_iia_predicts_the_target_of_the_real_picture():
    model, images = make(), pictures()
    own = r.relevance(model, images, method=r.Method("iia", steps=2)).target
    assert own.tolist() == model(images).argmax(1).tolist()


@pytest.mark.parametrize("family", ["plain", "qk_norm"])
def test_input_x_gradient(family):
    model, images = make(family), pictures()
    result = r.relevance(model, images, TARGET, "input_x_gradient")
    leaf = {}

    def grab(module, inputs):
        leaf["x"] = inputs[0]

    handle = model.blocks[0].register_forward_pre_hook(grab)
    logits = model(images)
    handle.remove()
    (slope,) = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), leaf["x"])
    torch.testing.assert_close(result.tokens, (leaf["x"] * slope).sum(-1))


TRUE = [r.Method(name, true_gradient=True)
        for name in ("gae", "gradient_rollout", "gradcam", "gradcam_tokens", "input_x_gradient", "eq2_grad")]
IIA = r.Method("iia", steps=1, true_gradient=True)


@pytest.mark.parametrize("method", [r.Method("eq2"), *TRUE, IIA], ids=lambda m: m.name)
def test_true_gradients(method):
    model, images = make(), pictures()
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(5)
    # of norm about 1: few kinks of ReLU are crossed
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) / 50 for p in parameters]
    f = lambda: scalar(model, images, "saturating", method) + 0 * sum(p.sum() for p in parameters)
    assert directional_error(f, parameters, direction, h=1e-6) < 1e-6


@pytest.mark.parametrize("name", ["gae", "gradient_rollout", "gradcam", "iia"])
def test_constant_gradients_leave_the_top_untrained(name):
    model, images = make(), pictures()
    method = lambda true: r.Method(name, steps=2, true_gradient=true)
    loss = lambda true: r.relevance(model, images, TARGET, method(true)).map().log().mean()
    top = [model.blocks[-1].attn.proj.weight, model.blocks[-1].mlp.fc2.weight, model.head.weight]
    below = model.blocks[-1].attn.qkv.weight
    constant = torch.autograd.grad(loss(False), [*top, below], allow_unused=True)
    true = torch.autograd.grad(loss(True), [*top, below], allow_unused=True)
    assert all(g is None for g in constant[:3]) and constant[3].abs().max() > 0
    assert all(g.abs().max() > 0 for g in true)
    assert (true[3] - constant[3]).abs().max() > 1e-6 * true[3].abs().max()


def test_constant_gradient_of_gae_by_hand():
    model, images = make(), pictures()
    result = r.relevance(model, images, TARGET, "gae")
    slope = torch.arange(result.tokens.shape[1], dtype=torch.float64)
    fast = torch.autograd.grad((result.tokens * slope).sum(), model.blocks[0].attn.qkv.weight)[0]
    logits, maps, _ = caught(model, images)
    grads = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), maps, retain_graph=True)
    R = torch.eye(17, dtype=torch.float64)
    for w, g in zip(maps, grads):
        R = R + (w * g).clamp(min=0).mean(1) @ R
    by_hand = torch.autograd.grad((R[:, 0] * slope).sum(), model.blocks[0].attn.qkv.weight)[0]
    torch.testing.assert_close(fast, by_hand, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", r.ATTRIBUTIONS)
def test_no_graph_without_gradients(name):
    model, images = make(), pictures()
    method = r.Method("iia", steps=1) if name == "iia" else name
    kept = r.relevance(model, images, TARGET, method)
    assert kept.tokens.requires_grad and kept.logits.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            quiet = r.relevance(model, images, TARGET, method)
        assert not quiet.tokens.requires_grad and not quiet.logits.requires_grad
        torch.testing.assert_close(quiet.tokens, kept.tokens.detach())
    frozen = make().requires_grad_(False)
    alone = r.relevance(frozen, images, TARGET, method, differentiable=False).tokens
    torch.testing.assert_close(alone, kept.tokens.detach())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in r.ATTRIBUTIONS if name != "iia"])
def test_autocast(name):
    model, images = make(dtype=torch.float32), pictures(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rough = r.relevance(model, images, TARGET, name)
    assert rough.tokens.dtype == torch.float32
    exact = r.relevance(model, images, TARGET, name)
    assert torch.corrcoef(torch.stack((rough.tokens.flatten(), exact.tokens.flatten())).detach())[0, 1] > 0.97


def test_eq2_conserves_and_seeds():
    weights = [torch.rand(2, 3, 6, 6, dtype=torch.float64).softmax(-1) for _ in range(4)]
    start = a.seed(6, 2, 6, weights[0])
    assert start.tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]
    torch.testing.assert_close(a.eq2(weights, start, epsilon=0).sum(1), torch.ones(2, dtype=torch.float64))
    for first, last in ((2, 2), (-1, 2), (0, 7)):
        with pytest.raises(ValueError, match="expected 0 <= first < last <= 6"):
            a.seed(6, first, last, weights[0])
    with pytest.raises(ValueError, match="points must be at least 1"):
        a.integrated_rollout([weights[0][:, 0]], 0, start)
