"""Every way to the alignment gradient against finite differences of exactly what it claims to differentiate."""
import copy
import math

import numpy as np
import pytest
import torch
from timm.layers import RmsNorm, SwiGLU
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import cft.evaluate.exactness as e
from cft.explain import attributions
from cft.explain.anatomy import pooled_tokens, split
from cft.explain.maps import Relevance, run
from cft.explain.rules import Tape, UnsupportedModule, activation, attention, norm
from cft.train.objectives import RECIPES, Batch

FAMILIES = {
    "plain": {},
    "deit3": {"init_values": 0.5, "no_embed_class": True},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "act_layer": "silu"},
    "qk_norm": {"qk_norm": True, "global_pool": "avg", "class_token": False},
    "scaled": {"scale_attn_norm": True, "scale_mlp_norm": True, "act_layer": "quick_gelu"},
}


def make(family="plain", seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5,
                "mlp_ratio": 2}
    model = VisionTransformer(**(settings | FAMILIES[family] | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.double().eval()


@pytest.fixture(scope="module")
def batch():
    rng = torch.Generator().manual_seed(7)
    masks = torch.rand(3, 16, 16, generator=rng) < 0.4
    return Batch(torch.randn(3, 3, 16, 16, generator=rng, dtype=torch.float64), torch.tensor([1, 4, 0]), masks)


SMOOTH = e.Align(normalize="sigmoid")  # no kinks, so that finite differences are accurate


def difference(loss, parameter, index, h=1e-5):
    """Central difference of loss() when one weight moves."""
    values = []
    with torch.no_grad():
        for move in (h, -2 * h, h):
            parameter.view(-1)[index] += move
            values.append(loss())
    return (values[0] - values[1]) / (2 * h)


def some(parameter, n=3):
    rng, size = np.random.default_rng(parameter.numel()), parameter.numel()
    return rng.choice(size, min(n, size), replace=False).tolist()


def check(model, found, loss, names=None):
    """All of some weights of every tensor agree with differences of loss()."""
    seen = 0
    for name, p in model.named_parameters():
        if names is None or names(name):
            for i in some(p):
                assert found[name].view(-1)[i].item() == pytest.approx(difference(loss, p, i), rel=1e-5, abs=1e-8), name
                seen += found[name].view(-1)[i].item() != 0
    assert seen > 10


# --- each way is the derivative of what it says ---------------------------------------------------------------------


@pytest.mark.parametrize("way,map_of", [("exact", e.WAYS["exact"]), ("true rollout", e.WAYS["true rollout"])])
def test_true_ways_are_the_derivative_of_the_loss(batch, way, map_of):
    model = make()
    found = e.gradient(model, batch, way, SMOOTH)
    check(model, found, lambda: e.map_loss(map_of(model, batch.images, batch.labels), batch.masks, SMOOTH).item())


def test_detached_is_the_derivative_with_the_coefficients_of_another_forward_pass(batch):
    model = make()
    found = e.gradient(model, batch, "detached", SMOOTH)
    with torch.no_grad():
        parts = split(model, batch.images, 2)
        pullbacks = run(parts.steps, parts.x, Tape())[1]  # coefficients of the unchanged weights

    def loss():
        g = F.one_hot(batch.labels, 5).double()
        for pullback in reversed(pullbacks):  # reads the matrices anew
            g = pullback(g)
        tokens = (split(model, batch.images, 2).x * g).sum(-1)
        return e.map_loss(Relevance(None, tokens, parts.grid, parts.prefix, batch.labels), batch.masks, SMOOTH).item()

    check(model, found, loss, lambda name: "norm" not in name)
    assert not any(g.any() for name, g in found.items() if "norm" in name)


def test_rollout_is_the_derivative_with_constant_gradients(batch):
    model = make()
    found = e.gradient(model, batch, "rollout", SMOOTH)

    def maps():
        tape, parts = Tape(maps=[]), split(model, batch.images, 2)
        return run(parts.steps, parts.x, tape)[0], tape.maps, parts

    logits, weights, parts = maps()
    slopes = torch.autograd.grad(logits.gather(1, batch.labels[:, None]).sum(), weights)
    start = attributions.seed(17, *pooled_tokens(model, 17), slopes[0])

    def loss():
        tokens = attributions.gae(maps()[1], slopes, start)
        return e.map_loss(Relevance(None, tokens, parts.grid, parts.prefix, batch.labels), batch.masks, SMOOTH).item()

    check(model, found, loss)


def test_naive_on_a_single_neuron_by_hand():
    """R = x·c·w with gate c = Φ(w x): the truth is d/dw [x w Φ(w x)], the naive way forgets that c depends on w."""
    x, w = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.7, 1.3))
    gate = lambda h: 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    (g,) = torch.autograd.grad(e._cut_gate(gate, w * x), x, create_graph=True)
    (naive,) = torch.autograd.grad((x * g).sum(), w)
    a, b = 0.7, 1.3
    cdf, density = 0.5 * (1 + math.erf(a * b / math.sqrt(2))), math.exp(-(a * b) ** 2 / 2) / math.sqrt(2 * math.pi)
    assert naive.item() == pytest.approx(a * cdf, abs=1e-12)
    assert naive.item() != pytest.approx(a * cdf + a * b * density * a, abs=1e-3)


def test_naive_applies_the_rules_to_the_backward_pass_of_the_loss():
    """The value q of a product is passed a quarter of the gradient by rule, and once more when the loss comes back."""
    w, x = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 3.0))
    q = e._scaled(w * x, 0.25)
    (g,) = torch.autograd.grad(q * q, x, create_graph=True)  # 2q·¼·w
    assert g.item() == pytest.approx(2 * 6 * 0.25 * 2)
    (naive,) = torch.autograd.grad(g, w)  # by product rule 2q·¼ + (2·¼·w)·(¼ x): the last ¼ should be 1
    assert naive.item() == pytest.approx(2 * 6 * 0.25 + 2 * 0.25 * 2 * 0.25 * 3)


# --- the twin -------------------------------------------------------------------------------------------------------


def test_exchanged_modules_have_the_forward_of_the_original_and_the_backward_of_the_rule():
    model = make("qk_norm")
    block, tape = model.blocks[0], Tape()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 12, dtype=torch.float64)
    for module, layer in ((block.norm1, norm), (block.attn, attention), (block.mlp.act, activation)):
        other = copy.deepcopy(module)
        e._exchange(other)
        y, pullback = layer(module, x, tape)
        assert torch.allclose(other(x), module(x), atol=1e-12)
        assert torch.allclose(torch.autograd.grad(other(x), x, g)[0], pullback(g), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_ways_give_one_map_and_three_gradients(batch, family):
    model = make(family)
    exact = e.WAYS["exact"](model, batch.images, batch.labels)
    truth = e.gradient(model, batch, "exact", SMOOTH)
    for way in ("detached", "naive"):
        other = e.WAYS[way](model, batch.images, batch.labels)
        assert torch.allclose(other.tokens, exact.tokens, rtol=1e-10, atol=1e-12)
        assert torch.allclose(other.logits, exact.logits, rtol=1e-10) and other.grid == exact.grid
        cosine = e.compare_gradients(e.gradient(model, batch, way, SMOOTH), truth)["cosine"].iloc[-1]
        assert -1 < cosine < 0.99


def test_nothing_is_left_behind(batch):
    model = make()
    kinds = [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    forwards = (nn.LayerNorm.forward, nn.GELU.forward, VisionTransformer.forward)
    for way in e.WAYS:
        e.gradient(model, batch, way)
        with pytest.raises(ValueError, match="target must lie"):
            e.WAYS[way](model, batch.images, torch.tensor([1, 5, 0]))
    e.slope(model, batch, e.gradient(model, batch))
    assert kinds == [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert forwards == (nn.LayerNorm.forward, nn.GELU.forward, VisionTransformer.forward)
    twin = e.twin_of(model)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert not {id(m) for m in twin.modules() if list(m.children())} & {id(m) for m in model.modules()}


def test_frozen_inputs_of_the_naive_way(batch):
    model = make().requires_grad_(False)
    tokens = e.naive_map(model, batch.images, batch.labels).tokens
    assert torch.allclose(tokens, e.WAYS["exact"](model, batch.images, batch.labels).tokens)


# --- who is reached -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [RECIPES["cft"].objective, RECIPES["cft-paper"].objective])
def test_the_rollout_never_reaches_the_top(batch, align):
    model = make()
    silent = e.unreached(e.gradient(model, batch, "rollout", align))
    upper = ("blocks.1.attn.proj", "blocks.1.norm2", "blocks.1.mlp", "norm", "head")
    top = [name for name, _ in model.named_parameters() if name.startswith(upper)]
    assert silent == top
    rollout, exact = e.gradient(model, batch, "rollout", align), e.gradient(model, batch, "exact", align)
    assert not rollout["blocks.1.attn.qkv.weight"][24:].any() and rollout["blocks.1.attn.qkv.weight"][:24].any()
    assert exact["blocks.1.attn.qkv.weight"][24:].any()
    assert e.unreached(exact) == ["norm.bias", "head.bias"]


# --- tables ---------------------------------------------------------------------------------------------------------


def test_layer_groups():
    model = make("deit3")
    expected = {"cls_token": "stem", "pos_embed": "stem", "patch_embed.proj.weight": "stem",
                "blocks.0.norm1.weight": "0 attention",
                "blocks.0.attn.qkv.bias": "0 attention", "blocks.1.attn.proj.weight": "1 projection",
                "blocks.1.ls1.gamma": "1 projection",
                "blocks.0.norm2.bias": "0 MLP", "blocks.1.mlp.fc2.weight": "1 MLP", "blocks.1.ls2.gamma": "1 MLP",
                "norm.weight": "head", "head.bias": "head"}
    assert set(expected) <= {name for name, _ in model.named_parameters()}
    assert {name: e.layer_group(name) for name in expected} == expected


def test_compare_against_numpy():
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, 4), "blocks.0.mlp.fc1.weight": (3, 4), "blocks.0.norm2.weight": (4,),
              "head.weight": (2, 4)}
    a, b = ({k: torch.tensor(rng.normal(size=s)) for k, s in shapes.items()} for _ in range(2))
    a["head.weight"] = torch.zeros(2, 4, dtype=torch.float64)
    table = e.compare_gradients(a, b).set_index("group")
    assert list(table.index) == ["stem", "0 MLP", "head", "all"]
    for group, names in {"stem": ["cls_token"], "0 MLP": list(shapes)[1:3], "all": list(shapes)}.items():
        x, y = (np.concatenate([g[name].numpy().ravel() for name in names]) for g in (a, b))
        assert table.loc[group, "cosine"] == pytest.approx(sum(x * y) / math.sqrt(sum(x * x) * sum(y * y)), abs=1e-12)
        assert table.loc[group, "length"] == pytest.approx(math.sqrt(sum(x * x) / sum(y * y)), abs=1e-12)
    assert math.isnan(table.loc["head", "cosine"]) and table.loc["head", "length"] == 0


def test_slope_measures_length_and_cosine(batch):
    model = make()
    exact, naive = e.gradient(model, batch, "exact", SMOOTH), e.gradient(model, batch, "naive", SMOOTH)
    size = math.sqrt(sum(g.square().sum().item() for g in exact.values()))
    assert e.slope(model, batch, exact, SMOOTH) == pytest.approx(size, rel=1e-6)
    cosine = e.compare_gradients(naive, exact)["cosine"].iloc[-1]
    assert e.slope(model, batch, naive, SMOOTH) == pytest.approx(size * cosine, rel=1e-5)
    rollout = e.gradient(model, batch, "true rollout", SMOOTH)
    size = math.sqrt(sum(g.square().sum().item() for g in rollout.values()))
    assert e.slope(model, batch, rollout, SMOOTH, "gae") == pytest.approx(size, rel=1e-6)


def test_study_compares_with_both_truths(batch):
    model = make()
    ways = {way: e.gradient(model, batch, way) for way in e.WAYS}
    table = e.study({"one": ways})
    whole = table[table["group"] == "all"].set_index("way")
    assert list(table.columns) == ["model", "way", "group", "cosine", "length", "own"]
    assert whole.loc["exact", "cosine"] == pytest.approx(1) and whole.loc["true rollout", "own"] == pytest.approx(1)
    assert whole.loc["naive", "own"] == whole.loc["naive", "cosine"]
    own = e.compare_gradients(ways["rollout"], ways["true rollout"])["cosine"].iloc[-1]
    assert whole.loc["rollout", "own"] == pytest.approx(own)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input(batch):
    model = make()
    for call, message in (
        (lambda: e.gradient(model, batch, "lrp"), "way must be one of exact"),
        (lambda: e.gradient(model, batch._replace(masks=None)), "batch with masks"),
        (lambda: e.gradient(make().requires_grad_(False), batch), "require gradients"),
        (lambda: e.compare_gradients({"norm.bias": torch.ones(1)}, {"head.bias": torch.ones(1)}), "same parameters"),
        (lambda: e.slope(model, batch, {}), "every parameter"),
        (lambda: e.slope(model, batch, {k: 0 * p for k, p in model.named_parameters()}), "must not be zero"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    convnext = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), use_grn=True).eval()
    for other, message in (
        (convnext, "the model is a ConvNeXt"),
        (make(mlp_layer=SwiGLU, act_layer="silu"), "blocks.0.mlp is a SwiGLU"),
        (make(norm_layer=RmsNorm), "blocks.0.norm1 is a RmsNorm"),
        (make(act_layer=nn.Tanh), "blocks.0.mlp.act is a Tanh"),
    ):
        with pytest.raises(UnsupportedModule, match=message):
            e.twin_of(other)
