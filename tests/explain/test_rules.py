"""Layer rules against loops over single inputs and outputs, on relevances and with the divisions of the papers."""

import math

import numpy as np
import pytest
import torch
from small_models import FAMILIES, make, pictures, scalar
from timm.layers import GluMlp, SwiGLU
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from cft.explain import maps, rules

torch.manual_seed(0)


def dense(layer, shape):
    """Matrix (outputs, inputs) and bias of a linear map on one sample, by unit vectors."""
    size = math.prod(shape)
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64)).detach().flatten()
    units = torch.eye(size, dtype=torch.float64)
    columns = [layer(unit.view(1, *shape)).detach().flatten() - zero for unit in units]
    return torch.stack(columns, 1).numpy(), zero.numpy()


def slow_gamma(matrix, bias, x, gamma, arrived):
    """γ-rule, one output and one input at a time; returns the inputs' relevance and what the biases absorbed."""
    out, absorbed = np.zeros(len(x)), 0.0
    for j in range(len(arrived)):
        terms = [matrix[j, i] * x[i] for i in range(len(x))] + [bias[j]]
        rising = sum(terms) > 0
        terms = [c + gamma * c if (c > 0) == rising else c for c in terms]
        whole = sum(terms)
        for i in range(len(x)):
            out[i] += terms[i] / whole * arrived[j]
        absorbed += terms[-1] / whole * arrived[j]
    return out, absorbed


LAYERS = {
    "linear": (nn.Linear(5, 4), (5,)),
    "no_bias": (nn.Linear(5, 4, bias=False), (5,)),
    "patches": (nn.Conv2d(3, 4, 2, stride=2), (3, 5, 4)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 3, 5)),
    "odd": (nn.Conv2d(4, 2, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2), groups=2), (4, 6, 7)),
}


@pytest.mark.parametrize("gamma", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("name", LAYERS)
def test_linear(name, gamma):
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    tape = rules.Tape(gamma=gamma, ledger={})
    y, pullback = rules.linear(layer, x, tape)
    torch.testing.assert_close(y, layer(x))
    g = torch.randn_like(y)
    fast = (x * pullback(g)).detach()
    matrix, bias = dense(layer, shape)
    for i in range(2):
        slow, absorbed = slow_gamma(matrix, bias, x[i].flatten().numpy(), gamma, (y * g)[i].detach().flatten().numpy())
        np.testing.assert_allclose(fast[i].flatten(), slow, rtol=1e-8, atol=1e-10)
        booked = tape.ledger["linear_bias"][i].detach() if tape.ledger else 0
        np.testing.assert_allclose(booked, absorbed, rtol=1e-8, atol=1e-10)
    if gamma == 0:
        assert rules.linear(layer, x, rules.Tape())[1](g).shape == x.shape


def test_gamma_is_safe_where_outputs_vanish():
    layer = nn.Linear(3, 2).double()
    with torch.no_grad():
        layer.bias.zero_()
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    y, pullback = rules.linear(layer, x, rules.Tape(gamma=0.5))
    g = pullback(torch.ones_like(y))
    g.sum().backward()
    assert torch.isfinite(g).all() and torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("module", [SwiGLU(4, 6), GluMlp(4, 12, act_layer=nn.SiLU, gate_last=False),
                                    GluMlp(4, 12, act_layer=nn.GELU)])
def test_gated(module, rule):
    module = module.double()
    x, tape = torch.randn(1, 3, 4, dtype=torch.float64), rules.Tape(rule, ledger={})
    z, pullback = rules.gated(module, x, tape)
    torch.testing.assert_close(module.fc2(z), module(x))
    g = torch.randn_like(z)
    fast = (x * pullback(g))[0].detach().numpy()
    slow, absorbed = np.zeros((3, 4)), 0.0
    if isinstance(module, SwiGLU):
        gate, value = module.fc1_g, module.fc1_x
        parts = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (gate, value)]
    else:
        halves = list(zip(module.fc1.weight.detach().chunk(2), module.fc1.bias.detach().chunk(2)))
        parts = [(w.numpy(), b.numpy()) for w, b in (halves[::-1] if module.gate_last else halves)]
    for t in range(3):
        arrived = (z * g)[0, t].detach().numpy()
        for (weight, bias), share in zip(parts, (0.5, 0.5) if rule == "attnlrp" else (0, 1)):
            out, lost = slow_gamma(weight, bias, x[0, t].numpy(), 0.0, share * arrived)
            slow[t] += out
            absorbed += lost
    np.testing.assert_allclose(fast, slow, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(tape.ledger["linear_bias"].detach(), [absorbed], rtol=1e-8)


@pytest.mark.parametrize("channels_last", [True, False])
def test_grn(channels_last):
    module = GlobalResponseNorm(4, channels_last=channels_last).double()
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    seen, tape = (x if channels_last else x.movedim(-1, 1)), rules.Tape(ledger={})
    y, pullback = rules.grn(module, seen, tape)
    torch.testing.assert_close(y, module(seen))
    g = torch.randn_like(y)
    fast = pullback(g) if channels_last else pullback(g).movedim(1, -1)
    plain = g if channels_last else g.movedim(1, -1)
    for i in range(2):
        size = [math.sqrt(sum(v * v for v in x[i, :, :, c].flatten().tolist())) for c in range(4)]
        for c in range(4):
            gate = 1 + module.weight[c].item() * size[c] / (sum(size) / 4 + module.eps)
            torch.testing.assert_close(fast[i, ..., c], gate * plain[i, ..., c])
    total = (seen * pullback(g)).flatten(1).sum(1)
    torch.testing.assert_close(total + tape.ledger["norm_bias"] / 2, (y * g).flatten(1).sum(1))  # booked by two calls


@pytest.mark.parametrize("kind", rules.GATES)
def test_gates(kind):
    h = torch.linspace(-6, 6, 41, dtype=torch.float64)
    y, pullback = rules.activation(kind(), h, rules.Tape())
    torch.testing.assert_close(h * pullback(torch.ones_like(h)), y)
    assert torch.equal(y, kind()(h))
    inside = h.clone()
    if kind in (nn.ReLU, nn.SiLU, rules.Swish):
        rules.activation(kind(inplace=True), inside, rules.Tape())
        assert torch.equal(inside, h)


def test_norm_layouts_and_missing_parameters():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    planes, rows = rules.LayerNorm2d(5).double(), nn.LayerNorm(5, eps=1e-6).double()
    with torch.no_grad():
        for p, q in zip(planes.parameters(), rows.parameters()):
            p.normal_()
            q.copy_(p)
    y, pullback = rules.norm(planes, x, rules.Tape())
    z, pull = rules.norm(rows, x.movedim(1, -1), rules.Tape())
    torch.testing.assert_close(y, z.movedim(-1, 1))
    g = torch.randn_like(y)
    torch.testing.assert_close(pullback(g), pull(g.movedim(1, -1)).movedim(-1, 1))
    for module in (nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4), nn.RMSNorm(4, eps=1e-3),
                   nn.LayerNorm(4, bias=False)):
        module = module.double()
        y, pullback = rules.norm(module, x, tape := rules.Tape(ledger={}))
        g = torch.randn_like(y)
        torch.testing.assert_close((x * pullback(g)).sum(), (y * g).sum() - sum(v.sum() for v in tape.ledger.values()))


@pytest.mark.parametrize("layer,module", [
    (rules.linear, nn.Bilinear(2, 2, 2)), (rules.linear, nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")),
    (rules.norm, nn.LayerNorm((3, 4))), (rules.activation, nn.Tanh()), (rules.layer_scale, nn.Linear(2, 2)),
    (rules.grn, nn.Identity()), (rules.block, nn.Identity()), (rules.attention, nn.Identity()),
    (rules.convnext_block, nn.Identity()), (rules.gated, nn.Identity()),
])
def test_refuses_by_name(layer, module):
    with pytest.raises(rules.UnsupportedModule, match=f"^this module is a {type(module).__name__}: supported here: "):
        layer(module, torch.zeros(1, 2, 3, 4), rules.Tape())


def test_full_precision_and_recomputed():
    half = torch.ones(2, dtype=torch.bfloat16)
    assert rules.full_precision(half).dtype == torch.float32
    assert rules.full_precision(half.double()).dtype == torch.float64
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(rules.recomputed(lambda t: t.sin() * t, x).sum(), x)
    torch.testing.assert_close(slope, (x.sin() + x * x.cos()).detach())
    assert torch.autograd.gradcheck(lambda t: rules.recomputed(lambda u: u.sin() * u, t), x)


# ---- derivatives by hand ----


def gradients(model, method="attnlrp"):
    """Of a scalar that depends on all of the map, with respect to every weight."""
    loss = scalar(model, pictures(), "sigmoid", method)
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_by_hand_and_renewed_is_the_slow_twin(family, monkeypatch):
    model, frugal = make(family), rules.renewable
    found, made = gradients(model), []
    monkeypatch.setattr(rules, "_SMALL", 0)

    def renewable(y, again, tape):
        made.append(again)
        return frugal(y, lambda: again().clone(), tape)

    monkeypatch.setattr(rules, "renewable", renewable)
    close(gradients(model), found)
    assert made or family == "rms"
    monkeypatch.setattr(rules, "renewable", lambda y, again, tape: y)
    monkeypatch.setattr(rules, "recomputed", lambda function, *tensors: function(*tensors))
    monkeypatch.setattr(rules, "by_hand", lambda function, back, *tensors: function(*tensors))
    close(gradients(model), found)


def test_a_wrong_recipe_is_used(monkeypatch):
    model, frugal = make(), rules.renewable
    found = gradients(model)
    monkeypatch.setattr(rules, "_SMALL", 0)
    monkeypatch.setattr(rules, "renewable", lambda y, again, tape: frugal(y, lambda: 2 * again(), tape))
    with pytest.raises(AssertionError):
        close(gradients(model), found)


@pytest.mark.parametrize("method", rules.RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_needs_no_more_rows_than_are_read(family, method, monkeypatch):
    model = make(family)
    found, seen = gradients(model, method), maps.relevance(model, pictures(), method=method, with_ledger=True)
    rows = [tape.rows for tape in maps._tapes(maps.split(model, pictures(), 2).steps, rules.Tape())]
    assert rows.count(1) == (model.global_pool == "token") and rows[0] is None
    monkeypatch.setattr(maps, "_tapes", lambda steps, tape: [tape] * len(steps))
    close(found, gradients(model, method))
    whole = maps.relevance(model, pictures(), method=method, with_ledger=True)
    close([seen.tokens, seen.logits, *seen.ledger.values()], [whole.tokens, whole.logits, *whole.ledger.values()])


def mixed(q, k, v, g):
    y, pullback = rules.mix(q, k, v, 0.7, rules.Tape())
    return y, *pullback(g)


NORM, BARE = nn.LayerNorm(4).double(), nn.LayerNorm(4, elementwise_affine=False).double()


def layer(rule, module):
    def both(x, g):
        y, pullback = rule(module, x, rules.Tape())
        return y, pullback(g)

    return both


@pytest.mark.parametrize("function,shapes", [
    (layer(rules.norm, NORM), 2 * [(2, 3, 4)]), (layer(rules.norm, BARE), 2 * [(2, 3, 4)]),
    (layer(rules.activation, nn.GELU()), 2 * [(2, 5)]), (mixed, 4 * [(1, 2, 3, 2)]),
    (mixed, [(1, 2, 1, 2), (1, 2, 3, 2), (1, 2, 3, 2), (1, 2, 1, 2)])])
def test_first_and_second_derivatives_by_finite_differences(function, shapes):
    rng = torch.Generator().manual_seed(3)
    inputs = [torch.randn(s, generator=rng, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


def test_only_what_is_wanted_is_derived():
    q, k, v, g = torch.randn(4, 1, 2, 3, 2, dtype=torch.float64)
    whole = torch.autograd.grad(sum(t.sin().sum() for t in mixed(*(t.requires_grad_() for t in (q, k, v, g)))), g)
    alone = torch.autograd.grad(sum(t.sin().sum() for t in mixed(q.detach(), k.detach(), v.detach(), g)), g)
    close(alone, whole)
    h = torch.randn(5, dtype=torch.float64)
    (slope,) = torch.autograd.grad(rules.activation(nn.GELU(), h, rules.Tape())[1](u := g.flatten()[:5]).sum(), u)
    torch.testing.assert_close(slope * h, nn.GELU()(h))
