"""The relevance chapter against a slow rule-by-rule reference in NumPy and against finite differences."""

import math

import numpy as np
import pytest
import torch
from small_models import FAMILIES, Stem, directional_error, make, make_convnext, pictures, scalar
from timm.layers import Mlp, RmsNorm, SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn
from torch.func import functional_call

import cft.explain.maps as r
from cft.data.models import LinearProbe
from cft.explain.anatomy import split

# --- slow reference: one picture, the rules as the paper writes them, on relevances and not on gradients ----------


def ratio(part, whole):
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole != 0)


def epsilon_rule(x, weight, z, R):
    """R_i = Σ_j x_i w_ji / z_j R_j for one vector x, z including the bias."""
    out = np.zeros(len(x))
    for j in range(len(z)):
        out += x * weight[j] / z[j] * R[j]
    return out


class Slow:
    """A ViT in NumPy whose `run` returns logits and the relevance of the tokens x0, with the ledger as a total."""

    def __init__(self, model: VisionTransformer, rule: str):
        self.model, self.rule = model, rule
        self.weights = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}

    def linear(self, name, x):
        w, b = self.weights[name + ".weight"], self.weights.get(name + ".bias", 0)
        z = np.array([w @ row + b for row in x])
        return z, lambda R: np.array([epsilon_rule(x[t], w, z[t], R[t]) for t in range(len(x))])

    def norm(self, name, x):
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Identity):
            return x, lambda R: R
        w, width = self.weights[name + ".weight"], x.shape[-1]
        rms = isinstance(module, RmsNorm)
        centre = np.eye(width) - (0 if rms else np.ones((width, width)) / width)
        z, matrices = np.zeros_like(x), []
        for t, row in enumerate(x):  # a linear layer of its own for every token, 1/σ a constant in it
            sigma = math.sqrt(np.mean((centre @ row) ** 2) + module.eps)
            matrices.append(np.diag(w) @ centre / sigma)
            z[t] = matrices[t] @ row + self.weights.get(name + ".bias", 0)
        return z, lambda R: np.array([epsilon_rule(x[t], matrices[t], z[t], R[t]) for t in range(len(x))])

    def act(self, module, h):
        return module(torch.from_numpy(h)).numpy(), lambda R: R

    def scale(self, name, x):
        return x * self.weights.get(name + ".gamma", 1.0), lambda R: R

    def head(self, q, k, v, scale):
        scores = np.array([[scale * np.dot(q[i], k[j]) for j in range(len(k))] for i in range(len(q))])
        a = np.exp(scores - scores.max(1, keepdims=True))
        a /= a.sum(1, keepdims=True)
        o = a @ v

        def back(R):
            if self.rule == "cp":
                passed = [sum(a[i, j] * v[j] / o[i] * R[i] for i in range(len(q))) for j in range(len(v))]
                return 0 * q, 0 * k, np.array(passed)
            Ra, Rv, Rq, Rk = np.zeros_like(a), np.zeros_like(v), np.zeros_like(q), np.zeros_like(k)
            for i in range(len(q)):
                for j in range(len(k)):
                    shared = a[i, j] * v[j] / o[i] * R[i]
                    Ra[i, j] += shared.sum() / 2
                    Rv[j] += shared / 2
            for i in range(len(q)):
                Rs = scores[i] * (Ra[i] - a[i] * Ra[i].sum())  # softmax Taylor rule
                for j in range(len(k)):
                    shared = scale * q[i] * k[j] / scores[i, j] * Rs[j]
                    Rq[i] += shared / 2
                    Rk[j] += shared / 2
            return Rq, Rk, Rv

        return o, back

    def attention(self, name, x):
        module = self.model.get_submodule(name)
        heads, dim = module.num_heads, module.head_dim
        qkv, back_qkv = self.linear(name + ".qkv", x)
        outs, backs = [], []
        for h in range(heads):
            q, k, v = (qkv[:, (part * heads + h) * dim : (part * heads + h + 1) * dim] for part in range(3))
            q, back_q = self.norm(name + ".q_norm", q)
            k, back_k = self.norm(name + ".k_norm", k)
            o, back = self.head(q, k, v, module.scale)
            outs.append(o)
            backs.append((back, back_q, back_k))
        merged = np.concatenate(outs, 1)
        normed, back_norm = self.norm(name + ".norm", merged)
        y, back_y = self.linear(name + ".proj", normed)

        def back(R):
            R, out = back_norm(back_y(R)), np.zeros_like(qkv)
            for h in range(heads):
                mixed, back_q, back_k = backs[h]
                Rq, Rk, Rv = mixed(R[:, h * dim : (h + 1) * dim])
                for part, value in enumerate((back_q(Rq), back_k(Rk), Rv)):
                    out[:, (part * heads + h) * dim : (part * heads + h + 1) * dim] = value
            return back_qkv(out)

        return y, back

    def gated(self, name, x):
        module = self.model.get_submodule(name)
        if isinstance(module, SwiGLU):
            (h, back_h), (v, back_v) = self.linear(name + ".fc1_g", x), self.linear(name + ".fc1_x", x)
        else:
            both, back = self.linear(name + ".fc1", x)
            half = both.shape[1] // 2
            h, v = both[:, :half], both[:, half:]
            back_h = lambda R: back(np.concatenate([R, 0 * R], 1))
            back_v = lambda R: back(np.concatenate([0 * R, R], 1))
        z = self.act(module.act, h)[0] * v
        normed, back_norm = self.norm(name + ".norm", z)
        y, back2 = self.linear(name + ".fc2", normed)

        def back_gate(R):
            R = back_norm(back2(R))
            return back_v(R) if self.rule == "cp" else back_h(R / 2) + back_v(R / 2)

        return y, back_gate

    def mlp(self, name, x):
        if not isinstance(self.model.get_submodule(name), Mlp):
            return self.gated(name, x)
        h, back1 = self.linear(name + ".fc1", x)
        z, back_act = self.act(self.model.get_submodule(name + ".act"), h)
        z, back_norm = self.norm(name + ".norm", z)
        y, back2 = self.linear(name + ".fc2", z)
        return y, lambda R: back1(back_act(back_norm(back2(R))))

    def residual(self, x, norm, body, scale):
        n, back_n = self.norm(norm, x)
        f, back_f = (self.attention if body.endswith("attn") else self.mlp)(body, n)
        f, _ = self.scale(scale, f)
        y = x + f
        return y, lambda R: ratio(x, y) * R + back_n(back_f(ratio(f, y) * R))

    def run(self, x0, target):
        model, x, backs = self.model, x0, []
        for i in range(len(model.blocks)):
            for norm, body, scale in (("norm1", "attn", "ls1"), ("norm2", "mlp", "ls2")):
                x, back = self.residual(x, *(f"blocks.{i}.{part}" for part in (norm, body, scale)))
                backs.append(back)
        x, back_norm = self.norm("norm", x)
        first = 0 if model.global_pool == "token" or model.pool_include_prefix else model.num_prefix_tokens
        pooled_tokens = x[:1] if model.global_pool == "token" else x[first:]
        pooled = pooled_tokens.mean(0, keepdims=True)
        f, back_fc = self.norm("fc_norm", pooled)
        z, back_head = self.linear("head", f)
        R = np.zeros_like(z)
        R[0, target] = z[0, target]
        R = back_fc(back_head(R))
        shared = np.zeros_like(x)
        shared[first : first + len(pooled_tokens)] = pooled_tokens / len(pooled_tokens) * ratio(R, pooled)
        R = back_norm(shared)
        for back in reversed(backs):
            R = back(R)
        return z[0], R.sum(1)


@pytest.mark.parametrize("rule", r.RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_slow_reference(family, rule):
    model, images = make(family), pictures()
    target = torch.tensor([1, 3])
    fast = r.relevance(model, images, target, rule)
    with torch.no_grad():
        tokens = split(model, images, 2).x
    for i in range(2):
        logits, signed = Slow(model, rule).run(tokens[i].numpy(), int(target[i]))
        np.testing.assert_allclose(fast.logits[i].detach(), logits, rtol=1e-9)
        np.testing.assert_allclose(fast.tokens[i].detach(), signed, rtol=1e-7, atol=1e-9 * np.abs(signed).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", r.RULES)
def test_conserves_with_the_ledger(family, rule):
    model, images = make(family), pictures(3)
    result = r.relevance(model, images, method=rule, with_ledger=True)
    logit = result.logits.gather(1, result.target[:, None])[:, 0]
    total = result.tokens.sum(1) + sum(result.ledger.values())
    assert ((total - logit) / logit).abs().max() < 1e-10
    assert result.ledger.keys() <= {"linear_bias", "norm_bias", "softmax"}
    assert ("softmax" in result.ledger) == (rule == "attnlrp")


@pytest.mark.parametrize("family", FAMILIES)
def test_cp_conserves_alone_without_biases(family):
    model = make(family)
    with torch.no_grad():
        for path, module in model.named_modules():
            if getattr(module, "bias", None) is not None and path.split(".")[0] not in ("patch_embed", "norm_pre"):
                module.bias.zero_()
    result = r.relevance(model, pictures(), method="cp")
    explained = result.logits.gather(1, result.target[:, None])[:, 0]
    torch.testing.assert_close(result.tokens.sum(1), explained, rtol=1e-10, atol=0)
    taylor = r.relevance(model, pictures(), method="attnlrp")
    assert (taylor.tokens.sum(1) / taylor.logits.gather(1, taylor.target[:, None])[:, 0] - 1).abs().min() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models(family, dtype):
    model, images = make(family, dtype), pictures(dtype=dtype)
    result = r.relevance(model, images)
    torch.testing.assert_close(result.logits, model(images))
    assert result.target.tolist() == model(images).argmax(1).tolist()
    reference = r.relevance(make(family), pictures())
    largest = reference.tokens.abs().max().item()
    torch.testing.assert_close(result.tokens.double(), reference.tokens, rtol=1e-3, atol=1e-3 * largest)


# --- the derivative -----------------------------------------------------------------------------------------------

WEIGHTS = ["patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight",
           "blocks.1.norm2.bias",
           "blocks.1.attn.proj.weight", "blocks.1.mlp.fc1.weight", "blocks.0.mlp.fc2.bias", "head.weight"]


@pytest.mark.parametrize("normalize", r.NORMALIZATIONS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_of_the_map(name, normalize):
    model, images = make("plain"), pictures()
    p = dict(model.named_parameters())[name]
    direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype)
    assert directional_error(lambda: scalar(model, images, normalize), [p], [direction]) < 1e-6


@pytest.mark.parametrize("method", r.RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_family(family, method):
    model, images = make(family), pictures()
    parameters = list(model.parameters())
    if family == "bare":  # the gate of ReLU jumps at 0: small steps, no kink crossed
        parameters = [p for n, p in model.named_parameters() if "head" in n or n.startswith("blocks.1.mlp.fc2")]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    f = lambda: scalar(model, images, "saturating", method) + 0 * sum(p.sum() for p in parameters)
    assert directional_error(f, parameters, direction, h=1e-5) < 1e-6


@pytest.mark.parametrize("method", r.RULES)
@pytest.mark.parametrize("family", [*FAMILIES, "convnext"])
def test_fused_inference_is_the_same(family, method):
    model, images = (make_convnext(), pictures(2, (64, 64))) if family == "convnext" else (make(family), pictures())
    explicit = r.relevance(model, images, method=method)
    fused = r.relevance(model, images, method=method, differentiable=False)
    assert explicit.tokens.requires_grad and not fused.tokens.requires_grad
    torch.testing.assert_close(fused.tokens, explicit.tokens.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fused.logits, explicit.logits.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["plain", "dinov2", "giant", "convnext"])
def test_gradient_with_gamma(family):
    model, images = (make_convnext(), pictures(2, (64, 64))) if family == "convnext" else (make(family), pictures())
    name = "stages.3.blocks.0.mlp.fc2.weight" if family == "convnext" else "blocks.1.attn.proj.weight"
    p = model.get_parameter(name)
    direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype)
    f = lambda: scalar(model, images, "sigmoid", r.Method(gamma=0.25))
    # small steps: the rule jumps where a value changes its sign
    assert directional_error(f, [p], [direction], h=1e-8) < 1e-5


def test_gradcheck():
    model, images = make("plain", embed_dim=6, depth=1, num_heads=2, img_size=8), pictures(2, (8, 8))
    names = ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "norm.weight", "head.weight"]
    start = [p.detach().clone().requires_grad_() for p in (dict(model.named_parameters())[name] for name in names)]

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return scalar(self.model, images, "saturating")

    loss = Scalar()
    call = lambda *values: functional_call(loss, {f"model.{n}": v for n, v in zip(names, values)}, (images,))
    assert torch.autograd.gradcheck(call, start, eps=1e-6, atol=1e-8, rtol=1e-5)


def test_last_block_and_head_learn_from_the_map():
    model = make("dinov2")
    scalar(model, pictures(), "saturating").backward()
    for name in ("attn.proj.weight", "attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight", "ls2.gamma"):
        assert model.blocks[-1].get_parameter(name).grad.norm() > 1e-8, name
    assert model.head.weight.grad.norm() > 1e-8
    assert model.patch_embed.proj.weight.grad.norm() > 1e-8


# --- ConvNeXt-V2 ---------------------------------------------------------------------------------------------------


def convolution_matrix(conv, shape):
    """Dense (outputs, inputs) matrix of a convolution on (channels, height, width), entry by entry."""
    C, H, W = shape
    (kh, kw), (s, _), (pad, _) = conv.kernel_size, conv.stride, conv.padding
    h, w = (H + 2 * pad - kh) // s + 1, (W + 2 * pad - kw) // s + 1
    weight, per = conv.weight.detach().double().numpy(), C // conv.groups
    matrix = np.zeros((conv.out_channels, h, w, C, H, W))
    for o in range(conv.out_channels):
        first = o // (conv.out_channels // conv.groups) * per
        for y in range(h):
            for x in range(w):
                for i in range(kh):
                    for j in range(kw):
                        row, column = y * s + i - pad, x * s + j - pad
                        if 0 <= row < H and 0 <= column < W:
                            matrix[o, y, x, first : first + per, row, column] = weight[o, :, i, j]
    return matrix.reshape(conv.out_channels * h * w, -1), (conv.out_channels, h, w)


class SlowConvNeXt(Slow):
    """ConvNeXt from the output of a stage on; planes are (channels, height, width), tokens (positions, channels)."""

    def conv(self, name, x):
        module = self.model.get_submodule(name)
        matrix, shape = convolution_matrix(module, x.shape)
        bias = np.repeat(module.bias.detach().numpy(), shape[1] * shape[2])
        z = matrix @ x.ravel() + bias
        return z.reshape(shape), lambda R: (x.ravel() * (matrix.T @ (R.ravel() / z))).reshape(x.shape)

    def tokens(self, x):
        return x.reshape(len(x), -1).T

    def planes(self, t, like):
        return t.T.reshape(-1, *like.shape[1:])

    def norm_planes(self, name, x):
        z, back = self.norm(name, self.tokens(x))
        return self.planes(z, x), lambda R: self.planes(back(self.tokens(R)), x)

    def linear(self, name, x):
        self.weights[name + ".weight"] = self.weights[name + ".weight"].reshape(len(self.weights[name + ".weight"]), -1)
        return super().linear(name, x)

    def grn(self, name, z):
        w, b, eps = self.weights[name + ".weight"], self.weights[name + ".bias"], self.model.get_submodule(name).eps
        size = np.array([math.sqrt(sum(v * v for v in z[:, c])) for c in range(z.shape[1])])
        gate = 1 + w * size / (size.mean() + eps)
        y = z * gate + b
        return y, lambda R: z * gate / y * R

    def block(self, name, x):
        u, back_conv = self.conv(name + ".conv_dw", x)
        n, back_norm = self.norm_planes(name + ".norm", u)
        h, back1 = self.linear(name + ".mlp.fc1", self.tokens(n))
        z, _ = self.act(self.model.get_submodule(name + ".mlp.act"), h)
        z, back_grn = self.grn(name + ".mlp.grn", z) if name + ".mlp.grn.weight" in self.weights else (z, lambda R: R)
        f, back2 = self.linear(name + ".mlp.fc2", z)
        f = self.planes(f * self.weights.get(name + ".gamma", 1.0), x)
        y = x + f

        def back(R):
            inner = back1(back_grn(back2(self.tokens(ratio(f, y) * R))))
            return ratio(x, y) * R + back_conv(back_norm(self.planes(inner, x)))

        return y, back

    def run(self, x, target, stage):
        backs = []
        for s in range(stage + 1, 4):
            for step, name in ((self.norm_planes, f"stages.{s}.downsample.0"), (self.conv, f"stages.{s}.downsample.1"),
                               *((self.block, f"stages.{s}.blocks.{i}")
                                 for i in range(len(self.model.stages[s].blocks)))):
                x, back = step(name, x)
                backs.append(back)
        pooled = self.tokens(x).mean(0, keepdims=True)
        f, back_norm = self.norm("head.norm", pooled)
        z, back_head = self.linear("head.fc", f)
        R = np.zeros_like(z)
        R[0, target] = z[0, target]
        R = back_norm(back_head(R))
        R = self.planes(self.tokens(x) / (x.shape[1] * x.shape[2]) * ratio(R, pooled), x)
        for back in reversed(backs):
            R = back(R)
        return z[0], R


CONVNEXTS = {"v2": {}, "v2_conv_mlp": {"conv_mlp": True}, "v1": {"use_grn": False, "ls_init_value": 0.5}}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", CONVNEXTS)
def test_convnext_matches_slow_reference(kind, stage):
    model, images, target = make_convnext(**CONVNEXTS[kind]), pictures(2, (64, 96)), torch.tensor([1, 3])
    fast = r.relevance(model, images, target, r.Method(stage=stage), with_ledger=True)
    torch.testing.assert_close(fast.logits, model(images))
    assert fast.grid == (16 >> stage, 24 >> stage) and fast.prefix == 0
    x = split(model, images, stage).x.detach()
    logit = fast.logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(fast.tokens.sum(1) + sum(fast.ledger.values()), logit, rtol=1e-10, atol=1e-14)
    for i in range(2):
        logits, signed = SlowConvNeXt(model, "attnlrp").run(x[i].numpy(), int(target[i]), stage)
        np.testing.assert_allclose(fast.logits[i].detach(), logits, rtol=1e-9)
        expected = signed.sum(0)
        np.testing.assert_allclose(fast.patches[i].detach(), expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
        weighed = r.relevance(model, images, target, r.Method(stage=stage, magnitude=True)).patches[i].detach()
        a = np.abs(x[i].numpy())
        np.testing.assert_allclose(weighed, (np.maximum(signed, 0) * a / a.max()).sum(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", [r.Method(), r.Method(stage=1), r.Method(magnitude=True),
                                    r.Method("gradcam_tokens", true_gradient=True),
                                    r.Method("input_x_gradient", true_gradient=True)])
def test_convnext_gradient(method):
    model, images = make_convnext(), pictures(2, (64, 64))
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    f = lambda: scalar(model, images, "sigmoid", method) + 0 * sum(p.sum() for p in parameters)
    assert directional_error(f, parameters, direction) < 1e-6


def test_convnext_errors():
    with pytest.raises(r.UnsupportedModule, match="needs attention weights"):
        r.relevance(make_convnext(), pictures(2, (64, 64)), method="gae")
    with pytest.raises(ValueError, match="at least 32×32 pixels, got 16×16"):
        r.relevance(make_convnext(), pictures())
    for unusual in ({"head_norm_first": True}, {"global_pool": "max"}):  # by operations
        conserves(make_convnext(**unusual), pictures(2, (64, 64)))


def conserves(model, images):
    found = r.relevance(model, images, with_ledger=True)
    logit = found.logits.gather(1, found.target[:, None])[:, 0]
    torch.testing.assert_close(found.tokens.sum(1) + sum(found.ledger.values()), logit, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.logits, model(images))


# --- checkpointing, γ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*r.RULES, r.Method(gamma=0.25)])
@pytest.mark.parametrize("family", ["dinov2", "qk_norm", "giant", "convnext"])
def test_checkpointed_is_the_same(family, method):
    model, images = (make_convnext(), pictures(2, (64, 64))) if family == "convnext" else (make(family), pictures())
    results, gradients = [], []
    for checkpointed in (False, True):
        result = r.relevance(model, images, method=method, with_ledger=True, checkpointed=checkpointed)
        absorbed = sum(v.square().sum() for v in result.ledger.values())
        loss = result.map("sigmoid").log().mean() + result.logits.square().sum() + absorbed
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        results.append(result)
        with torch.no_grad():
            again = r.relevance(model, images, method=method, with_ledger=True, checkpointed=checkpointed)
        torch.testing.assert_close(again.tokens, result.tokens.detach())
        torch.testing.assert_close(again.ledger, {kind: v.detach() for kind, v in result.ledger.items()})
    torch.testing.assert_close(results[0].tokens, results[1].tokens)
    torch.testing.assert_close(results[0].ledger, results[1].ledger)
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [*r.RULES, r.Method(gamma=0.25), "gae"])
@pytest.mark.parametrize("family", ["plain", "qk_norm", "convnext"])
def test_classes_of_one_forward_pass(family, method):
    if (family, method) == ("convnext", "gae"):
        return
    model, images = (make_convnext(), pictures(2, (64, 64))) if family == "convnext" else (make(family), pictures())
    targets = torch.tensor([[0, 3, 1], [2, 2, 4]])
    together = r.relevances(model, images, targets, method)
    assert len(together) == 3
    for found, target in zip(together, targets.T):
        alone = r.relevance(model, images, target, method, differentiable=False)
        torch.testing.assert_close(found.tokens, alone.tokens, rtol=1e-11, atol=1e-13)
        assert torch.equal(found.target, target) and found.grid == alone.grid and not found.tokens.requires_grad
    with pytest.raises(ValueError, match="targets must be"):
        r.relevances(model, images, targets[:, 0], method)


@pytest.mark.parametrize("family", ["plain", "dinov2", "giant", "convnext"])
def test_gamma_conserves_and_tends_to_the_default(family):
    model, images = (make_convnext(), pictures(2, (64, 64))) if family == "convnext" else (make(family), pictures())
    plain = r.relevance(model, images)
    logit = plain.logits.gather(1, plain.target[:, None])[:, 0]
    for gamma in (0.05, 1.0):
        result = r.relevance(model, images, method=r.Method(gamma=gamma), with_ledger=True)
        torch.testing.assert_close(result.tokens.sum(1) + sum(result.ledger.values()), logit, rtol=1e-10, atol=1e-14)
        assert (result.tokens - plain.tokens).abs().max() > 1e-3 * plain.tokens.abs().max()
    near = r.relevance(model, images, method=r.Method(gamma=1e-9))
    torch.testing.assert_close(near.tokens, plain.tokens, rtol=1e-4, atol=1e-5 * plain.tokens.abs().max().item())


# --- the call -----------------------------------------------------------------------------------------------------


def test_graph_is_kept_only_when_asked():
    model, images = make(), pictures()
    assert r.relevance(model, images).tokens.requires_grad
    with torch.no_grad():
        assert not r.relevance(model, images).tokens.requires_grad
        assert r.relevance(model, images, differentiable=True).tokens.requires_grad
    quiet = r.relevance(model, images, differentiable=False)
    assert not quiet.tokens.requires_grad and not quiet.logits.requires_grad
    torch.testing.assert_close(quiet.tokens, r.relevance(model, images).tokens.detach(), rtol=1e-12, atol=1e-14)
    with torch.inference_mode():
        torch.testing.assert_close(r.relevance(model, images).tokens, quiet.tokens)
        with pytest.raises(ValueError, match="inference_mode"):
            r.relevance(model, images, differentiable=True)


def test_nothing_is_left_behind():
    model, images = make(), pictures()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    r.relevance(model, images, with_ledger=True)
    with pytest.raises(ValueError):
        r.relevance(model, images, torch.tensor([0, 99]))
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        assert not (module._forward_hooks or module._backward_hooks or module._forward_pre_hooks)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("settings,size,grid", [
    ({"img_size": (16, 24)}, (16, 24), (4, 6)),
    ({"dynamic_img_size": True}, (24, 12), (6, 3)),
    ({"dynamic_img_size": True, "dynamic_img_pad": True}, (18, 16), (5, 4)),
])
def test_other_shapes(settings, size, grid):
    model, images = make(**settings), pictures(2, size)
    result = r.relevance(model, images, with_ledger=True)
    assert result.grid == grid and result.patches.shape == (2, *grid) and result.prefix == 1
    torch.testing.assert_close(result.logits, model(images))
    logit = result.logits.gather(1, result.target[:, None])[:, 0]
    torch.testing.assert_close(result.tokens.sum(1) + sum(result.ledger.values()), logit, rtol=1e-10, atol=0)


def test_custom_stem():
    model, images = make(embed_layer=Stem), pictures()
    result = r.relevance(model, images)
    assert result.grid == (4, 4)
    torch.testing.assert_close(result.logits, model(images))
    p = model.patch_embed.layers[0].weight
    assert directional_error(lambda: scalar(model, images, "saturating"), [p], [torch.ones_like(p)]) < 1e-6


def test_autocast():
    model, images = make(dtype=torch.float32), pictures(dtype=torch.float32)
    exact = r.relevance(model, images, torch.tensor([1, 3]))
    with torch.autocast("cpu", torch.bfloat16):
        rough = r.relevance(model, images, torch.tensor([1, 3]), with_ledger=True)
        reference = model(images)
    assert rough.tokens.dtype == torch.float32
    torch.testing.assert_close(rough.logits.float(), reference.float(), rtol=0.05, atol=0.05)
    assert torch.corrcoef(torch.stack((rough.tokens.flatten(), exact.tokens.flatten())))[0, 1] > 0.99
    rough.map().log().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    halved = make().bfloat16()
    assert torch.isfinite(r.relevance(halved, pictures().bfloat16()).tokens).all()


def test_isolated_patch_has_no_relevance():
    model = make(depth=1)
    with torch.no_grad():  # one head reads only the class token: keys blow up on a feature that only it has
        model.blocks[0].attn.qkv.weight[12:24] = 0
        model.blocks[0].attn.qkv.bias[12:24] = 0
        model.blocks[0].attn.qkv.weight[24:] = 0
        model.blocks[0].attn.qkv.bias[24:] = 0
    result = r.relevance(model, pictures())
    assert result.patches.abs().max() == 0 and result.tokens[:, 0].abs().min() > 0


# --- errors -------------------------------------------------------------------------------------------------------


def test_unsupported():
    with pytest.raises(r.UnsupportedModule, match=r"^head is a Identity: supported here: Linear"):
        r.relevance(make(num_classes=0), pictures())


@pytest.mark.parametrize("changes", [
    {"block_fn": ResPostBlock}, {"block_fn": ParallelScalingBlock}, {"attn_layer": "diff"}, {"global_pool": "map"},
    {"global_pool": "max"}, {"act_layer": "mish"},
], ids=lambda changes: str(*changes.values()))
def test_what_is_not_plain_goes_by_operations(changes):
    conserves(make(**changes), pictures())


def test_a_gate_and_modules_of_ones_own():
    model = make()
    model.blocks[1].attn.gate = nn.Linear(12, 12).double()
    conserves(model, pictures())

    class Odd(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    model = make()
    model.blocks[1].norm2 = Odd(12).double()
    with pytest.raises(r.UnsupportedModule, match=r"^blocks\.1\.norm2 is a Odd"):
        r.relevance(model, pictures())
    message = "^the model is a Sequential: supported here: timm VisionTransformer and ConvNeXt"
    with pytest.raises(r.UnsupportedModule, match=message):
        r.relevance(nn.Sequential(nn.Flatten()), pictures())


@pytest.mark.parametrize("rate,path", [
    ("drop_path_rate", "blocks.1.drop_path1"), ("proj_drop_rate", "blocks.0.attn.proj_drop"),
    ("attn_drop_rate", "blocks.0.attn.attn_drop"),
    ("pos_drop_rate", "pos_drop"), ("patch_drop_rate", "patch_drop"), ("drop_rate", "head_drop"),
])
def test_active_dropout(rate, path):
    model = make(**{rate: 0.2})
    r.relevance(model, pictures())
    model.train()
    with pytest.raises(r.UnsupportedModule, match=f"^{path} is a .*not 0.2"):
        r.relevance(model, pictures())
    assert r.relevance(make().train(), pictures()).tokens.shape == (2, 17)


@pytest.mark.parametrize("target,message", [
    (torch.tensor([0, 5]), r"0…4, got 0…5"), (torch.tensor([-1, 0]), r"got -1…0"),
    (torch.tensor([0]), r"shape \(2,\), got torch.int64 \(1,\)"),
    (torch.tensor([0.0, 1.0]), "got torch.float32"), (torch.tensor([[0], [1]]), r"\(2, 1\)"),
])
def test_bad_target(target, message):
    with pytest.raises(ValueError, match=message) as caught:
        r.relevance(make(), pictures(), target)
    assert "\n" not in str(caught.value)


def test_bad_pictures():
    model = make()
    for images, message in [
        (pictures(2, (16, 20)), "16×16 pixels.*got 16×20"), (pictures()[0], r"\(3, 16, 16\)"),
        (pictures()[:, :2], "3 channels, got 2"),
        (pictures() * float("nan"), "images must be finite"), (pictures().long(), "float"), (pictures()[:0], "float"),
    ]:
        with pytest.raises(ValueError, match=message):
            r.relevance(model, images)
    with pytest.raises(ValueError, match="multiples of 4×4, got 18×16"):
        r.relevance(make(dynamic_img_size=True), pictures(2, (18, 16)))
    with torch.no_grad():
        model.head.bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"logits must be finite.*\[0, 1\]"):
        r.relevance(model, pictures())
    with pytest.raises(ValueError, match="method must be one of attnlrp, cp.*gae_true, got 'lrp'"):
        r.relevance(make(), pictures(), method="lrp")
    for bad in (dict(gamma=-1.0), dict(stage=4), dict(steps=0), dict(gamma=float("nan"))):
        with pytest.raises(ValueError, match="expected gamma >= 0"):
            r.Method(**bad)
    with pytest.raises(ValueError, match="work with attnlrp and cp, not with 'gae'"):
        r.relevance(make(), pictures(), method="gae", with_ledger=True)


# --- maps ---------------------------------------------------------------------------------------------------------


def slow_normalize(name, values):
    """The definitions, one patch at a time, for a list of rows."""
    flat = [v for row in values for v in row]
    mean, low, high = sum(map(abs, flat)) / len(flat), min(flat), max(flat)
    centre = sum(flat) / len(flat)
    std = math.sqrt(sum((v - centre) ** 2 for v in flat) / (len(flat) - 1))
    rule = {
        "saturating": lambda v: max(v, 0) / (max(v, 0) + 0.5 * mean),
        "softsign": lambda v: max(v, 0) / (max(v, 0) + 3 * mean),
        "minmax": lambda v: (v - low) / (high - low),
        "relu_max": lambda v: max(v, 0) / max(high, 0),
        "sigmoid": lambda v: 1 / (1 + math.exp(2 - 4 * v / std)),
    }[name]
    return [[rule(v) for v in row] for row in values]


@pytest.mark.parametrize("name", r.NORMALIZATIONS)
def test_normalizations(name):
    values = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast = r.NORMALIZATIONS[name](values)
    np.testing.assert_allclose(fast, [slow_normalize(name, picture) for picture in values.tolist()], rtol=1e-12)
    np.testing.assert_allclose(r.NORMALIZATIONS[name](1000 * values), fast, rtol=1e-9)  # a scale of r changes nothing
    flat = torch.zeros(1, 4, 5, requires_grad=True)
    constant = r.NORMALIZATIONS[name](flat)
    constant.sum().backward()
    assert torch.isfinite(constant).all() and torch.isfinite(flat.grad).all()


def test_map_sizes_and_bounds():
    result = r.relevance(make(), pictures())
    for name in r.NORMALIZATIONS:
        phi = result.map(name)
        assert phi.shape == (2, 4, 4) and phi.min() >= 0.02 and phi.max() <= 0.98
    assert result.map("minmax").amin((1, 2)).tolist() == pytest.approx([0.02] * 2)
    assert result.map("minmax").amax((1, 2)).tolist() == pytest.approx([0.98] * 2)
    large = result.map(lambda patches: patches, size=(16, 16), epsilon=0)
    assert large.shape == (2, 16, 16)
    # pixel (5, 6) lies a quarter of the way between patch centres: the weights by hand
    p, y, x = result.patches, (5 + 0.5) / 4 - 0.5, (6 + 0.5) / 4 - 0.5
    i, j = int(y), int(x)
    by_hand = sum(w * p[:, i + a, j + b] for a, b, w in [
        (0, 0, (1 - y + i) * (1 - x + j)), (1, 0, (y - i) * (1 - x + j)),
        (0, 1, (1 - y + i) * (x - j)), (1, 1, (y - i) * (x - j))])
    torch.testing.assert_close(large[:, 5, 6], by_hand)
    assert r.bound(torch.tensor([0.0, 0.5, 1.0]), 0.1).tolist() == pytest.approx([0.1, 0.5, 0.9])
    for bad in (dict(normalize="max"), dict(epsilon=0.5), dict(epsilon=-0.1)):
        with pytest.raises(ValueError, match="must"):
            result.map(**bad)


def test_repr():
    result = r.relevance(make("dinov2"), pictures(), torch.tensor([4, 0]))
    assert repr(result) == "Relevance(2 pictures, 20 tokens, grid 4×4, target [4, 0])"
    html = result._repr_html_()
    assert "data:image/png;base64" in html and len(html) < 4000
    assert r.thumbnail(torch.zeros(1, 2, 3)).startswith(b"\x89PNG")


# --- DINOv2's linear classifier ------------------------------------------------------------------------------------


def make_probe():
    torch.manual_seed(0)
    model = LinearProbe(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5, mlp_ratio=2,
                        init_values=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.double().eval()


@pytest.mark.parametrize("rule", r.RULES)
def test_linear_probe(rule):
    model, images = make_probe(), pictures()
    result = r.relevance(model, images, method=rule, with_ledger=True)
    total = result.tokens.sum(1) + sum(result.ledger.values())
    chosen = result.logits.gather(1, result.target[:, None])[:, 0]
    assert ((total - chosen).abs() / chosen.abs()).max() < 1e-10 and torch.allclose(result.logits, model(images))
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype) for p in parameters]
    f = lambda: scalar(model, images, "sigmoid", r.Method(rule)) + 0 * sum(p.sum() for p in parameters)
    assert directional_error(f, parameters, direction) < 1e-6


def test_linear_probe_is_two_heads():
    """The class token's half of the head and the patches' half, each a model of its own, add up."""
    model, images = make_probe(), pictures()
    whole = r.relevance(model, images, torch.tensor([0, 1]), method="cp").tokens
    parts = []
    for pool, rows in (("token", slice(0, 12)), ("avg", slice(12, 24))):
        half = VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5,
                                 mlp_ratio=2, init_values=0.5,
                                 global_pool=pool, fc_norm=False).double().eval()
        state = model.state_dict()
        half.load_state_dict(state | {"head.weight": state["head.weight"][:, rows]})
        parts.append(r.relevance(half, images, torch.tensor([0, 1]), method="cp").tokens)
    assert torch.allclose(whole, sum(parts), atol=1e-12)
