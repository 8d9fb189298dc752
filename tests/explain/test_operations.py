"""Operations against loops over single inputs and outputs, networks against the walk, zennit and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import zennit_relevance
from small_families import NETWORKS, make_network
from small_models import FAMILIES, directional_error, make, make_convnext, pictures, scalar
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import cft.explain.maps as r
from cft.explain.operations import HELD, THROUGH_ZERO, OnePicture, Recorder
from cft.explain.places import trace
from cft.explain.rules import UnsupportedModule

ALL = [*NETWORKS, "torchvision_vit", "hugging_face_vit"]
TARGET = torch.tensor([1, 3])


def through(function, *inputs, rule="attnlrp", fallback="refuse", gamma=0.0):
    """Output, its G, what each input gets, and the ledger as a sum."""
    recorder = Recorder(nn.Identity(), OnePicture(rule, gamma, {}), keep=True, fallback=fallback)
    inputs = [x.clone().requires_grad_() for x in inputs]
    recorder.begin(*inputs)
    with recorder:
        y = function(*inputs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    seen = {}
    recorder.tape.absorb = lambda kind, g, amount: seen.update({kind: seen.get(kind, 0) + (
        0 if amount is None else float(torch.where(g == 0, 0, g * amount).sum().detach()))})
    y = recorder.value(y)
    first = recorder.pull(y, g)
    beside = seen.pop("beside", 0.0)
    return y.detach().numpy(), (y * g).detach().numpy(), (inputs[0] * first).detach().numpy(), beside, sum(
        seen.values())


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_affine(function, x, arrived):
    """Every output shares its relevance among `M_ji x_i` and what it is at 0, in proportion."""
    zero = function(torch.zeros_like(x)).numpy().ravel()
    columns = [function(unit.view(x.shape)).numpy().ravel() - zero for unit in torch.eye(x.numel(), dtype=x.dtype)]
    out, absorbed = np.zeros(x.numel()), 0.0
    for j, whole in enumerate(function(x).numpy().ravel()):
        if whole == 0:
            continue
        for i, part in enumerate(x.numpy().ravel()):
            out[i] += columns[i][j] * part / whole * arrived.ravel()[j]
        absorbed += zero[j] / whole * arrived.ravel()[j]
    return out.reshape(x.shape), absorbed


W, B, M, V = values(4, 2, 3, 3), values(4), values(4), values(4).abs() + 0.5
AFFINE_CASES = {
    "grouped convolution": ((1, 4, 4, 4), lambda x: F.conv2d(x, W, B, stride=2, padding=1, groups=2)),
    "depthwise convolution": ((1, 4, 3, 3), lambda x: F.conv2d(x, W[:, :1], B, padding=1, groups=4)),
    "batch norm": ((1, 4, 2, 2), lambda x: F.batch_norm(x, M, V, B, M)),
    "average pooling": ((1, 2, 4, 4), lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "global pooling": ((1, 2, 3, 3), lambda x: F.adaptive_avg_pool2d(x, 1)),
    "padding with a value": ((1, 1, 2, 3), lambda x: F.pad(x, (1, 0, 2, 0), value=0.7)),
    "class token": ((1, 2, 4), lambda x: torch.cat([B.view(1, 1, 4), x], 1) + M),
    "window": ((1, 4, 4), lambda x: x.roll(1, 1).view(1, 2, 2, 4).transpose(1, 2).reshape(2, 2, 4)),
    "resampling": ((1, 1, 2, 2), lambda x: F.interpolate(x, size=(3, 3), mode="bilinear")),
    "transposed convolution": ((1, 4, 2, 2), lambda x: F.conv_transpose2d(x, W, B[:2], stride=2)),
    "addcmul": ((1, 4), lambda x: torch.addcmul(B, x, M)),
    "subtraction": ((1, 4), lambda x: 1 - x), "quotient": ((1, 4), lambda x: x / V),
    "in place": ((1, 4), lambda x: (x * 1).add_(B).mul_(M)),
}


@pytest.mark.parametrize("name", AFFINE_CASES)
def test_affine(name):
    shape, function = AFFINE_CASES[name]
    x = values(*shape, seed=3)
    y, arrived, fast, _, booked = through(function, x)
    slow, absorbed = slow_affine(function, x, arrived)
    np.testing.assert_allclose(y, function(x).numpy())
    np.testing.assert_allclose(fast, slow, atol=1e-12)
    assert math.isclose(booked, absorbed, rel_tol=1e-9, abs_tol=1e-12)


V6, B6 = values(6, seed=8).abs() + 0.5, values(6, seed=9)
NORMS = {"layer_norm": (lambda x: F.layer_norm(x, (6,), V6, B6), 6),
         "group_norm": (lambda x: F.group_norm(x, 2, V6, B6), 3),
         "rms_norm": (lambda x: F.rms_norm(x, (6,), V6, 1e-5), 6), "normalize": (F.normalize, 6)}


@pytest.mark.parametrize("name", NORMS)
def test_norms_hold_their_spread(name):
    (function, rows), x = NORMS[name], values(1, 6, seed=4)
    _, arrived, fast, _, booked = through(function, x)
    centred = name in ("layer_norm", "group_norm")

    def held(z):
        """The same function, with a spread that was read off x."""
        out = []
        for i in range(0, 6, rows):
            group, part = x[0, i:i + rows].tolist(), z[0, i:i + rows]
            if name == "normalize":
                out.append(part / math.sqrt(sum(v * v for v in group)))
                continue
            centre = sum(group) / rows * centred
            sigma = math.sqrt(sum((v - centre)**2 for v in group) / rows + 1e-5)
            out.append((part - part.mean() * centred) / sigma * V6[i:i + rows] + centred * B6[i:i + rows])
        return torch.cat(out)[None]

    slow, absorbed = slow_affine(held, x, arrived)
    torch.testing.assert_close(held(x), function(x))
    np.testing.assert_allclose(fast, slow, atol=1e-12)
    assert math.isclose(booked, absorbed, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("rule", r.RULES)
def test_products_and_gates(rule):
    x, y = values(1, 5, seed=1), values(1, 5, seed=2)
    _, arrived, fast, beside, booked = through(lambda x, y: x * y, x, y, rule=rule)
    np.testing.assert_allclose(fast, arrived / 2)  # every factor one half
    assert math.isclose(beside, arrived.sum() / 2) and booked == 0
    _, arrived, fast, beside, _ = through(lambda x, y: F.silu(x) * y, x, y, rule=rule)
    np.testing.assert_allclose(fast, arrived * (0.5 if rule == "attnlrp" else 0), atol=1e-15)
    assert math.isclose(beside, arrived.sum() * (0.5 if rule == "attnlrp" else 1))
    for gate in (torch.sigmoid, F.hardsigmoid):  # the signal takes all
        _, arrived, fast, beside, booked = through(lambda x, y, gate=gate: x * gate(y), x, y, rule=rule)
        np.testing.assert_allclose(fast, arrived)
        assert beside == booked == 0
    _, arrived, fast, beside, _ = through(lambda x, y: x / y.exp(), x, y, rule=rule)
    np.testing.assert_allclose(fast, arrived)


def test_matrix_product_shares_every_term():
    a, b = values(3, 4, seed=1), values(4, 2, seed=2)
    y, arrived, fast, _, _ = through(torch.matmul, a, b)
    for i in range(3):
        for k in range(4):
            terms = [a[i, k].item() * b[k, j].item() / y[i, j] * arrived[i, j] / 2 for j in range(2)]
            assert math.isclose(fast[i, k], sum(terms), rel_tol=1e-10)


def test_maximum_goes_to_the_winner():
    x = values(1, 1, 4, 4, seed=5)
    _, arrived, fast, _, booked = through(lambda x: F.max_pool2d(x, 2), x)
    slow = np.zeros((4, 4))
    for i in range(2):
        for j in range(2):
            cells = [(x[0, 0, a, b].item(), a, b) for a in (2 * i, 2 * i + 1) for b in (2 * j, 2 * j + 1)]
            _, a, b = max(cells)
            slow[a, b] = arrived[0, 0, i, j]
    np.testing.assert_allclose(fast[0, 0], slow)
    assert booked == 0


@pytest.mark.parametrize("rule", r.RULES)
def test_softmax(rule):
    s, v = values(1, 5, seed=1), values(5, seed=2)
    recorder = Recorder(nn.Identity(), OnePicture(rule, ledger={}), keep=False)
    s.requires_grad_()
    recorder.begin(s)
    with recorder:
        a = s.softmax(-1)
        y = (a * v).sum(-1) + s.sum(-1) * 0
    g = torch.ones_like(y)
    fast = (s * recorder.pull(y, g)).detach().numpy()[0]
    ra = (a * v).detach().numpy()[0] * (rule == "attnlrp")  # under cp the weights are constant
    slow = [s[0, i].item() * (ra[i] - a[0, i].item() * ra.sum()) for i in range(5)]
    np.testing.assert_allclose(fast, slow, atol=1e-14)
    booked = sum(float(t.detach()) for t in recorder.tape.ledger.values())
    assert math.isclose(fast.sum() + booked, y.item(), rel_tol=1e-10)


@pytest.mark.parametrize("name", THROUGH_ZERO)
def test_functions_through_zero_keep_relevance(name):
    h = torch.linspace(-4, 4, 33, dtype=torch.float64)
    more = {"prelu": (torch.tensor([0.2], dtype=torch.float64),), "clamp": (-1, 2), "pow": (3,)}.get(name, ())
    function = getattr(F, name, None) or getattr(torch, name)
    _, arrived, fast, _, booked = through(lambda x: function(x, *more), h)
    np.testing.assert_allclose(fast, arrived, atol=1e-14)
    assert booked == 0


def test_clamp_without_zero_is_held():
    with pytest.raises(KeyError):  # nothing live comes out
        through(lambda x: x.clamp(min=0.1), values(3))
    assert "sigmoid" in HELD


# --- a slow twin of a network -------------------------------------------------------------------------------------


def dense(function, x):
    zero = function(torch.zeros_like(x)).ravel()
    units = torch.eye(x.numel(), dtype=x.dtype)
    return torch.stack([function(unit.view(x.shape)).ravel() - zero for unit in units], 1).numpy(), zero.numpy()


def slow_linear(function, x):
    """Value and the ε-rule as it is written, one output at a time."""
    matrix, _ = dense(function, x)
    z, flat = function(x), x.numpy().ravel()

    def back(R):
        out = np.zeros(len(flat))
        for j, whole in enumerate(z.numpy().ravel()):
            if whole:
                out += flat * matrix[j] / whole * R[j]
        return out

    return z, back


@torch.no_grad()
def slow_resnet(model, x, target):
    """Relevance of x, the output of layer2, of a ResNet of one BasicBlock with squeeze-and-excitation a stage."""
    backs = []
    for stage in (model.layer3, model.layer4):
        block = stage[0]
        y, branch = x, []
        for part in (nn.Sequential(block.conv1, block.bn1), block.act1, nn.Sequential(block.conv2, block.bn2)):
            if part is block.act1:
                y = part(y)
                continue
            y, back = slow_linear(part, y)
            branch.append(back)
        y = block.se(y)  # a gate: every unit keeps its relevance
        short, back_short = slow_linear(block.downsample, x)
        total = y + short

        def back(R, branch=branch, y=y, short=short, total=total, back_short=back_short):
            share = np.divide(R, total.numpy().ravel(), out=np.zeros(len(R)), where=total.numpy().ravel() != 0)
            Ry, Rs = y.numpy().ravel() * share, short.numpy().ravel() * share
            for each in reversed(branch):
                Ry = each(Ry)
            return Ry + back_short(Rs)

        backs.append(back)
        x = total.relu()
    pooled, back_pool = slow_linear(lambda t: t.mean((2, 3)), x)
    z, back_head = slow_linear(model.fc, pooled)
    R = np.zeros(z.numel())
    R[target] = z[0, target]
    R = back_pool(back_head(R))
    for back in reversed(backs):
        R = back(R)
    return R


def test_a_network_against_its_slow_twin():
    torch.manual_seed(0)
    settings = {"channels": (4, 4, 5, 6), "num_classes": 5, "block_args": {"attn_layer": "se"}}
    model = ResNet(BasicBlock, (1, 1, 1, 1), **settings).double().eval()
    assert type(model.layer3[0].se).__name__ == "SEModule"
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point():
            p.data += 0.2 * (torch.randn_like(p) if "var" not in name else torch.rand_like(p))
    images = pictures(2, (48, 48))
    fast = r.relevance(model, images, TARGET, r.Method(stage=1))
    for i in range(2):
        x = trace(model, images[i:i + 1], 1, False).x.detach()
        slow = slow_resnet(model, x, int(TARGET[i])).reshape(x[0].shape).sum(0)
        np.testing.assert_allclose(fast.patches[i].detach(), slow, rtol=1e-8, atol=1e-12)


# --- against the walk, and against zennit -------------------------------------------------------------------------


def by_operations(model, images, method):
    return r.record(model, images, TARGET, method, True, True)


@pytest.mark.parametrize("rule", r.RULES)
@pytest.mark.parametrize("family", [*FAMILIES, "convnext"])
def test_operations_agree_with_the_walk(family, rule):
    model, images = (make_convnext(), pictures(2, (64, 64))) if family == "convnext" else (make(family), pictures())
    walked = r.relevance(model, images, TARGET, rule, with_ledger=True)
    found = by_operations(model, images, r.Method(rule))
    torch.testing.assert_close(found.tokens, walked.tokens, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(found.ledger.values()), sum(walked.ledger.values()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["plain", "convnext"])
def test_gamma_agrees_with_the_walk(family):
    model, images = (make_convnext(), pictures(2, (64, 64))) if family == "convnext" else (make(family), pictures())
    walked = r.relevance(model, images, TARGET, r.Method(gamma=0.3), with_ledger=True)
    found = by_operations(model, images, r.Method(gamma=0.3))
    torch.testing.assert_close(found.tokens, walked.tokens, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(found.ledger.values()), sum(walked.ledger.values()), rtol=1e-9, atol=1e-12)


def test_a_resnet_is_zennits():
    """It shares sums and means, too."""
    pytest.importorskip("zennit")
    model, images = make_network("torchvision_resnet")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-15  # zennit's folded norms still divide by √(1 + ε)
    ours = r.relevance(model, images, TARGET, differentiable=False).patches
    theirs = zennit_relevance(model, "layer3", images, TARGET, 1e-15)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * float(ours.abs().max()))


# --- every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_family(name):
    model, images = make_network(name)
    with torch.no_grad():
        plain = model(images)
    for rule in r.RULES:
        found = r.relevance(model, images, TARGET, rule, with_ledger=True, differentiable=False)
        logit = found.logits.gather(1, TARGET[:, None])[:, 0]
        assert ((found.tokens.sum(1) + sum(found.ledger.values()) - logit) / logit).abs().max() < 1e-10
        torch.testing.assert_close(found.logits, getattr(plain, "logits", plain))
        once = r.relevance(model, images, TARGET, rule, differentiable=False)  # autograd takes the notes
        torch.testing.assert_close(once.tokens, found.tokens, rtol=1e-7, atol=1e-10)
    both = r.relevance(model, images, TARGET, rule, differentiable=True)  # both pictures at once, with a graph
    assert both.tokens.requires_grad and not found.tokens.requires_grad
    torch.testing.assert_close(both.tokens.detach(), found.tokens, rtol=1e-7, atol=1e-10)
    assert found.patches.abs().amax((1, 2)).min() > 0


SMOOTH = {"convnext", "convnext_clip", "eva02", "dinov3", "perception_encoder", "beit", "swin", "swin_v2", "siglip",
          "deit_distilled", "cait", "xcit", "mixer", "naflex", "sam", "torchvision_vit", "hugging_face_vit"}


@pytest.mark.parametrize("name", ALL)
def test_gradient_of_every_family(name):
    """Gates of ReLU and the winners of a maximum jump: where a network has them, steps are small."""
    model, images = make_network(name)
    named = [(n, p) for n, p in model.named_parameters() if name != "naflex" or "pos_embed" not in n]  # it rounds these
    parameters, generator = [p for _, p in named], torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) / 50 for p in parameters]
    f = lambda: scalar(model, images, "saturating") + 0 * sum(p.sum() for p in parameters)
    assert directional_error(f, parameters, direction, h=1e-5 if name in SMOOTH else 1e-7) < 1e-6


# --- what the recorder minds ---------------------------------------------------------------------------------------


def test_frozen_and_plain_methods():
    model, images = make_network("se_resnet")
    exact, frozen = (r.relevance(model, images, TARGET, r.Method(frozen=f)) for f in (False, True))
    torch.testing.assert_close(exact.tokens, frozen.tokens)
    weight = model.layer4[0].conv1.weight
    slope = lambda found: torch.autograd.grad(found.tokens.square().sum(), weight, allow_unused=True)
    assert slope(frozen)[0] is None and slope(exact)[0].abs().max() > 0
    torch.testing.assert_close(r.relevance(model, images, TARGET, "gradcam_tokens").logits, exact.logits)
    found = r.relevance(model, images, TARGET, "input_x_gradient", differentiable=False)
    x = trace(model, images, 2, False)
    (g,) = torch.autograd.grad(x.logits.gather(1, TARGET[:, None]).sum(), x.x)
    torch.testing.assert_close(found.patches, (x.x * g).sum(1).detach())
    with torch.inference_mode():
        torch.testing.assert_close(r.relevance(model, images, TARGET).tokens, exact.tokens.detach())
    with pytest.raises(ValueError, match="checkpointed works with plain vision transformers and ConvNeXt, not ResNet"):
        r.relevance(model, images, checkpointed=True)
    with pytest.raises(UnsupportedModule, match="needs attention weights"):
        r.relevance(model, images, method="gae")


def test_training_mode():
    model, images = make_network("resnet")
    model.train()
    with pytest.raises(UnsupportedModule, match=r"^layer4\.0\.bn1 is a .*batch norm in training mode"):
        model.layer3.eval()
        r.relevance(model, images)


def test_nothing_is_left_behind():
    model, images = make_network("resnet")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    r.relevance(model, images)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_writing_in_place():
    x, y = values(1, 6, seed=1), values(1, 6, seed=2)

    def written(x):
        z = x * 2
        z += y
        F.relu(z, inplace=True)
        return z + x

    out, arrived, fast, _, booked = through(written, x)
    np.testing.assert_allclose(out, ((x * 2 + y).relu() + x).numpy())
    assert math.isclose(fast.sum() + booked, arrived.sum(), rel_tol=1e-10)

    def by_a_view(x):
        z = x * 2
        z[:, :3].add_(1)
        return z

    def into_a_part(x):
        z = torch.zeros(1, 6, dtype=x.dtype)
        z[:, :3] = x[:, :3]
        return z + x

    for function, why in ((by_a_view, "read a value after a write"), (into_a_part, "writing into a part")):
        with pytest.raises(UnsupportedModule, match=why):
            through(function, x)


def test_fallback_books_what_it_cannot_explain():
    x = values(1, 6, seed=1)
    function = lambda x: torch.atan2(x, x.square() + 1) + x
    with pytest.raises(UnsupportedModule, match="operations with a rule; there is none for 'atan2'"):
        through(function, x)
    _, arrived, fast, _, booked = through(function, x, fallback="gradient")
    assert math.isclose(fast.sum() + booked, arrived.sum(), rel_tol=1e-10) and abs(booked) > 1e-3

    class Odd(nn.Module):
        def forward(self, x):
            return torch.atan2(x, x.square() + 1)

    model, images = make_network("swin")
    model.layers[3].blocks[0].mlp.act = Odd()
    with pytest.raises(UnsupportedModule, match=r"^layers\.3\.blocks\.0\.mlp\.act is a Odd: .*fallback='gradient'"):
        r.relevance(model, images)
    found = r.relevance(model, images, TARGET, r.Method(fallback="gradient"), with_ledger=True)
    logit = found.logits.gather(1, TARGET[:, None])[:, 0]
    torch.testing.assert_close(found.tokens.sum(1) + sum(found.ledger.values()), logit, rtol=1e-10, atol=0)
    assert found.ledger["gradient"].abs().min() > 0
    with pytest.raises(ValueError, match="fallback must be refuse or gradient, got 'skip'"):
        r.Method(fallback="skip")


class Twice(torch.autograd.Function):
    """Twice x, by torch, or by numpy, which no recorder sees."""

    @staticmethod
    def forward(ctx, x, by_numpy):
        return torch.from_numpy(2 * x.detach().numpy()) if by_numpy else 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g, None


@pytest.mark.parametrize("by_numpy", [False, True])
def test_functions_with_a_backward_pass_in_python(by_numpy):
    for function in (lambda x: Twice.apply(x, by_numpy) + x, lambda x: Twice.apply(x + x, by_numpy)):
        with pytest.raises(UnsupportedModule, match="none for a function that has its backward pass in Python"):
            through(function, values(4))  # its share of relevance would be lost


@pytest.mark.parametrize("rule", r.RULES)
def test_autograd_takes_the_same_way(rule):
    """Held factors, gates, quotients, softmax, writing in place, γ: by the notes and by autograd's graph."""
    weight = values(5, 5, seed=3)

    def function(x, y):
        z = F.silu(F.linear(x, weight, weight[0])) * y + x * torch.sigmoid(y) + x / (1 + y.square())
        z = F.layer_norm(z + (x * 2).softmax(-1) @ weight, (5,), weight[1], weight[2]).unflatten(-1, (5, 1))
        z += F.normalize(z, dim=1) * F.hardtanh(x)[..., None]
        return F.relu(z, inplace=True).flatten(1).split(3, -1)[0]

    for gamma in (0.0, 0.3):
        found = []
        for ledger in (None, {}):
            x, y = (values(2, 5, seed=i).requires_grad_() for i in (1, 2))
            recorder = Recorder(nn.Identity(), OnePicture(rule, gamma, ledger), keep=False)
            recorder.begin(x, y)
            with recorder, torch.enable_grad():
                z = function(x, y)
            found.append(recorder.pull(z, torch.ones_like(z)).detach())
        torch.testing.assert_close(*found)
        assert found[0].abs().min() > 0
