"""DEAL: losses against loops, maps against towers by hand, gradients against differences, bad input."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cft.concepts.language import Answer, ClassName, Record, Reply, ask
from cft.related import deal
from cft.related.deal import Deal, OpenClip, Prompts, attention_maps, concept_maps, disentangle_loss, embed
from cft.train.objectives import Batch

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_maps(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


# ---- small models of open_clip ----


def small_clip(layers, seed=0, **vision):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(seed)
    width = 32 if isinstance(layers, int) else 8
    sizes = {"layers": layers, "width": width, "head_width": 16, "patch_size": 16, "image_size": 64}
    config = CLIPVisionCfg(**(sizes | vision))
    clip = CLIP(24, config, CLIPTextCfg(context_length=8, vocab_size=64, width=16, heads=2, layers=1))
    with torch.no_grad():
        for p in clip.parameters():  # nothing at zero or one, so that nothing is hidden
            if p.ndim:
                p += 0.05 * torch.randn(p.shape)
        for name, p in clip.named_parameters():
            if name.endswith("bn3.weight"):
                p.fill_(1.0)
    tokenize = lambda texts: torch.tensor([[1, 2 + len(t) % 60, 63] + [0] * 5 for t in texts])
    return OpenClip(clip, tokenize).double().eval()


@pytest.fixture(scope="module")
def vit():
    return small_clip(3)


@pytest.fixture(scope="module")
def resnet():
    return small_clip((1, 1, 1, 1))


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(2, 3, 64, 64, generator=generator(3), dtype=torch.float64)


TEXTS = [["bird", "beak", "two wings"], ["boat!", "a sail", "the mast"]]

# ---- concepts and texts ----


def test_the_question_is_one_more_question():
    q = deal.deal_questions([ClassName("n1", "beaver", "a rodent")])[0]
    chat = q.messages("list")
    assert [m["role"] for m in chat] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert json.loads(chat[-1]["content"])["class"] == "beaver" and "6" in json.loads(chat[-1]["content"])["ask"]
    for answer in (chat[2]["content"], chat[4]["content"]):
        items = answer.splitlines()
        assert len(items) == 6 and all(i.startswith("- ") and len(i.split()) <= 6 for i in items)
    assert (q.sampling.temperature, q.sampling.max_tokens, q.sampling.samples, q.kind) == (0.0, 100, 1, "deal")
    assert q.key != deal.deal_questions([ClassName("n1", "beaver")])[0].key and q.key[0] == deal.DEAL_SAMPLING.model


def test_answers_are_recorded_and_replayed_in_their_order(tmp_path):
    record = Record(tmp_path / "r.jsonl")
    questions = deal.deal_questions([ClassName("a", "A"), ClassName("b", "B")])
    record.add(questions[0].key, Reply("- Zebra stripes\n- a tail.\n- ears\n- nose\n- hooves\n- mane", "ok"))
    record.add(questions[1].key, Reply('{"items": ["z", "y", "x", "w", "v", "u"]}', "ok"))
    answers = ask(questions, Record(record.path), replay=True)
    prompts = Prompts.of(answers, ["A", "B"])
    assert prompts.concepts == (("zebra stripes", "a tail", "ears", "nose", "hooves"), ("z", "y", "x", "w", "v"))
    with pytest.raises(ValueError, match=r"7 concepts for each class; fewer for a \(ok, 6\)"):
        Prompts.of(answers, ["A", "B"], used=7)
    with pytest.raises(ValueError, match="fewer for a"):
        Prompts.of([Answer(questions[0], "no", "refused")], ["A"])


def test_the_texts():
    p = Prompts(("cat", "ox"), (("a tail", "has stripes"), ("two horns", "used for work")), ending=".")
    assert p.captions("name") == ("cat.", "ox.")
    assert p.captions() == ("cat. It may contain a tail, has stripes", "ox. It may contain two horns, used for work")
    assert p.captions("sentence")[1] == "An image of ox with two horns, used for work."
    assert p.explained() == (("cat", "a tail", "has stripes"), ("ox", "two horns", "used for work"))
    cat, ox = p.evaluation()
    assert cat == ("cat., which is a tail", "cat., which has stripes")
    assert ox == ("ox., which has two horns", "ox., which is used for work")
    with pytest.raises(ValueError, match="form must be one of"):
        p.captions("poem")
    for concepts in (((),), (("a",), ("b",)), ()):
        with pytest.raises(ValueError, match="the same number of concepts"):
            Prompts(("cat",), concepts)
    with pytest.raises(ValueError, match=r"lists of \[1, 2\]"):
        Prompts(("cat", "ox"), (("a",), ("b", "c")))
    with pytest.raises(ValueError, match="class ids must be unique"):
        deal.deal_questions([ClassName("a", "A"), ClassName("a", "B")])
    with pytest.raises(ValueError, match="one sample for each class, got 2"):
        deal.deal_questions([ClassName("a", "A")], replace(deal.DEAL_SAMPLING, samples=2))


def test_the_demo_has_five_concepts_a_class_in_the_answers_order():
    p = deal.demo_prompts()
    assert len(p.classes) == 12 and {len(c) for c in p.concepts} == {5}
    asked = deal.deal_questions([ClassName("bird", "bird")], deal.DEAL_RECORDED)
    raw = ask(asked, Record(deal.DEAL_ANSWERS), replay=True)[0]
    assert len(raw.items) == 6 and p.concepts[0] == tuple(raw.items[:5])
    assert all(len(c.split()) <= 5 for concepts in p.concepts for c in concepts)


# ---- losses ----


def slow_stretch(m):
    flat = [v for row in m for v in row]
    low, high = min(flat), max(flat)
    return [[(v - low) / (high - low) if high > low else 0.0 for v in row] for row in m]


def slow_overlap(picture):
    maps = [[v for row in slow_stretch(m) for v in row] for m in picture]
    return sum(a * b for j in range(len(maps)) for k in range(j) for a, b in zip(maps[j], maps[k]))


def slow_l1(picture):
    maps = [[v for row in slow_stretch(m) for v in row] for m in picture]
    pairs = [(j, k) for j in range(len(maps)) for k in range(len(maps)) if k != j]
    return -sum(abs(a - b) for j, k in pairs for a, b in zip(maps[j], maps[k]))


def slow_local(picture, category, mean):
    maps, target = [slow_stretch(m) for m in picture], slow_stretch(category)
    total = 0.0
    for i, row in enumerate(target):
        for j, t in enumerate(row):
            s = sum(m[i][j] for m in maps)
            total += ((s / len(maps) if mean else s) - t)**2
    return total


def test_losses_are_what_the_loops_say():
    maps, category = 3 * random_maps(3, 5, 4, 6) - 1, random_maps(3, 4, 6, seed=1)
    each = maps.tolist()
    average = lambda values: sum(values) / len(values)
    assert deal.overlap(maps).tolist() == pytest.approx([slow_overlap(p) for p in each], rel=1e-12)
    assert disentangle_loss(maps).item() == pytest.approx(average([slow_overlap(p) for p in each]), rel=1e-12)
    assert disentangle_loss(maps, "l1").item() == pytest.approx(average([slow_l1(p) for p in each]), rel=1e-12)
    for form in ("mean", "sum"):
        slow = [slow_local(p, c, form == "mean") for p, c in zip(each, category.tolist())]
        assert deal.localise_loss(maps, category, form).item() == pytest.approx(average(slow), rel=1e-12)
    slow = [sum(v for m in p for row in slow_stretch(m) for v in row) for p in each]
    assert deal.sparsity_loss(maps).item() == pytest.approx(average(slow), rel=1e-12)


@pytest.mark.parametrize("m", [1, 6, 48])
@pytest.mark.parametrize("k", [2, 5])
def test_identical_binary_maps_overlap_in_m_k_k_minus_one_over_two(m, k):
    one = torch.zeros(49).index_fill_(0, torch.randperm(49, generator=generator(m))[:m], 1.0).view(7, 7)
    assert deal.overlap(one.expand(2, k, 7, 7)).tolist() == [m * k * (k - 1) / 2] * 2
    assert deal.overlap(7 * one.expand(2, k, 7, 7) - 3).tolist() == [m * k * (k - 1) / 2] * 2  # whatever its scale
    assert disentangle_loss(one.expand(2, k, 7, 7), "l1") == 0


def test_constant_maps_have_no_overlap_and_a_finite_gradient():
    maps = torch.ones(2, 3, 4, 4, requires_grad=True)
    loss = disentangle_loss(maps) + deal.localise_loss(maps, torch.zeros(2, 4, 4)) + deal.sparsity_loss(maps)
    loss.backward()
    assert loss.item() == 0 and maps.grad.isfinite().all()


def slow_contrast(z, t, scale, symmetric, labels):
    unit = lambda v: [x / math.sqrt(sum(y * y for y in v)) for x in v]
    z, t, n = [unit(v) for v in z], [unit(v) for v in t], len(z)
    dot = lambda a, b: scale * sum(x * y for x, y in zip(a, b))

    def side(rows, columns):
        total = 0.0
        for i in range(n):
            usable = [j for j in range(n) if labels is None or j == i or labels[j] != labels[i]]
            total += math.log(sum(math.exp(dot(rows[i], columns[j])) for j in usable)) - dot(rows[i], columns[i])
        return total / n

    return (side(z, t) + side(t, z)) / 2 if symmetric else side(z, t)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2]])
def test_contrast_is_what_the_loops_say(symmetric, labels):
    z, t = (torch.randn(4, 6, generator=generator(seed), dtype=torch.float64) for seed in (1, 2))
    ours = deal.contrastive_loss(z, t, 5.0, symmetric, None if labels is None else torch.tensor(labels))
    assert ours.item() == pytest.approx(slow_contrast(z.tolist(), t.tolist(), 5.0, symmetric, labels), rel=1e-12)


def test_losses_have_the_gradient_of_finite_differences():
    maps = (random_maps(2, 3, 3, 3) + 0.1).requires_grad_()
    category = random_maps(2, 3, 3, seed=4).requires_grad_()
    z, t = (torch.randn(4, 3, generator=generator(s), dtype=torch.float64).requires_grad_() for s in (5, 6))
    for form in ("overlap", "l1"):
        torch.autograd.gradcheck(lambda m, form=form: disentangle_loss(m, form), maps)
    for form in ("mean", "sum"):
        torch.autograd.gradcheck(lambda m, c, form=form: deal.localise_loss(m, c, form), (maps, category))
    torch.autograd.gradcheck(deal.sparsity_loss, maps)
    torch.autograd.gradcheck(lambda a, b: deal.contrastive_loss(a, b, 3.0, True, torch.tensor([0, 1, 0, 1])), (z, t))


def test_losses_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"at least 2 concepts, got \(2, 1, 3, 3\)"):
        deal.overlap(torch.rand(2, 1, 3, 3))
    for bad in (torch.rand(3, 3, 3), torch.ones(1, 2, 3, 3, dtype=torch.long), torch.rand(0, 2, 3, 3)):
        with pytest.raises(ValueError, match="maps must be floating point"):
            disentangle_loss(bad)
        with pytest.raises(ValueError, match="maps must be floating point"):
            deal.sparsity_loss(bad)
    with pytest.raises(ValueError, match="form must be one of overlap, l1; got 'l2'"):
        disentangle_loss(torch.rand(1, 2, 3, 3), "l2")
    with pytest.raises(ValueError, match=r"expected category maps \(1, 3, 3\), got \(1, 3, 4\)"):
        deal.localise_loss(torch.rand(1, 2, 3, 3), torch.rand(1, 3, 4))
    with pytest.raises(ValueError, match="form must be one of mean, sum; got 'max'"):
        deal.localise_loss(torch.rand(1, 2, 3, 3), torch.rand(1, 3, 3), "max")
    with pytest.raises(ValueError, match="embeddings"):
        deal.contrastive_loss(torch.rand(2, 3), torch.rand(3, 3), 1.0)


# ---- maps ----


def slow_attention_map(model, picture, text):
    """The map of one text in one picture, without a hook: the tower by hand, one head after the other."""
    v = model.visual
    x = v.ln_pre(torch.cat([v.class_embedding[None], v.conv1(picture[None]).flatten(2)[0].T]) + v.positional_embedding)
    for block in v.transformer.resblocks[:-1]:
        y = block.ln_1(x)[None]
        x = x + block.attn(y, y, y, need_weights=True)[0][0]
        x = x + block.mlp(block.ln_2(x))
    block = v.transformer.resblocks[-1]
    h, d = block.attn.num_heads, x.shape[1]
    y, w, b = block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias
    heads = []
    for i in range(h):
        part = [slice(k * d + i * d // h, k * d + (i + 1) * d // h) for k in range(3)]
        q, k, value = (y @ w[p].T + b[p] for p in part)
        heads.append((torch.softmax(q @ k.T / math.sqrt(d // h), -1), value))
    leaves = [a.detach().requires_grad_() for a, _ in heads]
    z = x + block.attn.out_proj(torch.cat([a @ value for a, (_, value) in zip(leaves, heads)], 1))
    z = z + block.mlp(block.ln_2(z))
    z = v.ln_post(z)[0] @ v.proj
    score = model.logit_scale.exp() * (z @ text) / (z.norm() * text.norm())
    slopes = torch.autograd.grad(score, leaves)
    relevance = torch.eye(len(x), dtype=x.dtype) + sum((a * g).clamp(min=0) for a, g in zip(leaves, slopes)) / h
    return relevance[0, 1:].view(v.grid_size).detach()


def test_attention_maps_are_what_the_tower_by_hand_says(vit, pictures):
    texts = embed(vit, TEXTS).detach()
    maps = attention_maps(vit, pictures, texts)
    slow = torch.stack([torch.stack([slow_attention_map(vit, p, t) for t in of]) for p, of in zip(pictures, texts)])
    assert maps.shape == (2, 3, 4, 4) and maps.max() > 0
    assert torch.allclose(maps, slow, rtol=1e-9, atol=1e-15)


def slow_gradcam(model, picture, text):
    v = model.visual
    a = v.layer4(v.layer3(v.layer2(v.layer1(v.stem(picture[None]))))).detach().requires_grad_()
    tokens = a.flatten(2)[0].T
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + v.attnpool.positional_embedding
    pool, n = v.attnpool, v.attnpool.num_heads
    layers = (pool.q_proj, pool.k_proj, pool.v_proj)
    q, k, value = (layer(tokens).unflatten(1, (n, -1)).transpose(0, 1) for layer in layers)
    mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]), -1) @ value
    z = pool.c_proj(mixed.transpose(0, 1).flatten(1))[0]
    g = torch.autograd.grad(z @ text, a)[0][0]
    out = torch.zeros_like(a[0, 0])
    for channel, slope in zip(a[0], g):
        out = out + slope.mean() * channel
    return out.clamp(min=0).detach()


def test_gradcam_is_what_the_tower_by_hand_says(resnet, pictures):
    texts = embed(resnet, TEXTS).detach()
    maps = deal.gradcam_maps(resnet, pictures, texts)
    slow = torch.stack([torch.stack([slow_gradcam(resnet, p, t) for t in of]) for p, of in zip(pictures, texts)])
    assert maps.shape == (2, 3, 2, 2) and maps.max() > 0
    assert torch.allclose(maps, slow, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", ["attention", "gradcam"])
def test_maps_leave_the_model_as_it_was(kind, vit, resnet, pictures):
    model = vit if kind == "attention" else resnet
    before, z = {k: v.clone() for k, v in model.state_dict().items()}, model.encode_image(pictures)
    texts = embed(model, TEXTS)
    kept = concept_maps(model, pictures, texts, kind)
    constant = concept_maps(model, pictures, texts, kind, detach=True)
    with torch.no_grad():
        quiet = concept_maps(model, pictures, texts, kind, detach=True)
    assert kept.requires_grad and not constant.requires_grad and not quiet.requires_grad
    assert torch.equal(kept.detach(), constant) and torch.allclose(constant, quiet, rtol=1e-12)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(z, model.encode_image(pictures))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        concept_maps(model, pictures[:, :, :, :60], texts, kind)  # the tower itself fails: the hooks go all the same
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_picture_may_have_any_number_of_texts_and_pictures_do_not_mix(vit, pictures):
    texts = embed(vit, TEXTS)
    together = attention_maps(vit, pictures, texts, detach=True)
    for i in range(2):
        for k in range(3):
            alone = attention_maps(vit, pictures[i:i + 1], texts[i:i + 1, k:k + 1], detach=True)
            assert torch.allclose(alone[0, 0], together[i, k], rtol=1e-9, atol=1e-15)


def test_class_attention_is_the_modules_own():
    from timm.layers.attention import Attention

    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    copied = torch.cat([x[:, :1]] * 2 + [x], 1)  # three copies of the class token
    own = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    weights, values = deal.class_attention(own, copied, 3)
    mixed, theirs = own(x, x, x, average_attn_weights=False)
    assert weights.shape == (2, 3, 3, 5) and torch.allclose(weights, theirs[:, :, :1].expand(-1, -1, 3, -1), atol=1e-6)
    ours = own.out_proj((weights @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(ours, mixed[:, :1].expand(-1, 3, -1), atol=1e-6)
    timms = Attention(12, 3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).eval()
    weights, values = deal.class_attention(timms, x)
    assert torch.allclose(timms.proj((weights @ values).transpose(1, 2).flatten(2)), timms(x)[:, :1], atol=1e-6)


def test_tokens_may_come_first(vit, pictures):
    """Older open_clip towers run with the tokens in the first dimension."""
    import copy

    turned = copy.deepcopy(vit)
    transformer = turned.visual.transformer
    for block in transformer.resblocks:
        block.attn.batch_first = False
    transformer.batch_first = False
    texts = embed(vit, TEXTS).detach()
    assert torch.allclose(turned.encode_image(pictures), vit.encode_image(pictures), rtol=1e-9)
    maps, theirs = attention_maps(vit, pictures, texts), attention_maps(turned, pictures, texts)
    assert torch.allclose(theirs, maps, rtol=1e-9, atol=1e-15)


def test_towers_without_a_rule_are_refused(vit, resnet, pictures):
    import timm

    with pytest.raises(ValueError, match="image tower is a ModifiedResNet"):
        attention_maps(resnet, pictures, embed(resnet, TEXTS))
    with pytest.raises(ValueError, match="layer4"):
        deal.gradcam_maps(vit, pictures, embed(vit, TEXTS))
    with pytest.raises(ValueError, match=r"\(batch, channels, rows, columns\), got"):
        deal.gradcam_maps(vit, pictures, embed(vit, TEXTS), layer=vit.visual.ln_post)
    with pytest.raises(ValueError, match="the image tower is a VisionTransformer"):
        deal.last_attention(timm.create_model("vit_tiny_patch16_224", global_pool="avg"))
    with pytest.raises(ValueError, match="pooled at the class token"):
        deal.last_attention(small_clip(1, pool_type="avg").visual)
    with pytest.raises(ValueError, match="the last attention is a Attention"):
        deal.last_attention(small_clip(1, qk_norm=True).visual)
    with pytest.raises(ValueError, match="checkpointing"):
        tower = small_clip(1).visual
        tower.set_grad_checkpointing(True)
        deal.last_attention(tower)
    with pytest.raises(ValueError, match="explain must be one of"):
        concept_maps(vit, pictures, embed(vit, TEXTS), "saliency")
    for images in (pictures, pictures[0]):
        for shape in ((3, 2, 24), (2, 24), (2, 0, 24)) if images is pictures else ((2, 2, 24),):
            with pytest.raises(ValueError, match="text embeddings"):
                attention_maps(vit, images, torch.rand(shape))
    dropping = small_clip(1, patch_dropout=0.5).train()
    with pytest.raises(ValueError, match="are patches dropped"):
        attention_maps(dropping, pictures, embed(dropping, TEXTS))


# ---- gradients of the second order ----


def penalty(model, pictures, kind, detach=False):
    maps = concept_maps(model, pictures, embed(model, TEXTS), kind, detach)
    return 0.1 * disentangle_loss(maps[:, 1:]) + 0.3 * deal.localise_loss(maps[:, 1:], maps[:, 0])


@pytest.mark.parametrize("kind", ["attention", "gradcam"])
def test_the_regularisers_have_the_gradient_of_finite_differences(kind, vit, resnet, pictures):
    model = vit if kind == "attention" else resnet
    parameters = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    found = torch.autograd.grad(penalty(model, pictures, kind), list(parameters.values()), allow_unused=True)
    grads = dict(zip(parameters, found))
    checked = 0
    for name, p in parameters.items():
        g, k, step = grads[name], None, 1e-6
        if g is None or g.abs().max() < 1e-6:
            continue
        k = int(g.abs().argmax())
        kept = p.detach().flatten()[k].clone()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                p.view(-1)[k] = kept + sign * step
                values.append(penalty(model, pictures, kind, detach=True).item())
            p.view(-1)[k] = kept
        assert g.flatten()[k].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-6), name
        checked += 1
    assert checked > 8


@pytest.mark.parametrize("kind", ["attention", "gradcam"])
def test_the_released_regularisers_train_nothing(kind, vit, resnet, pictures):
    model = vit if kind == "attention" else resnet
    prompts = Prompts(("bird", "boat!"), (("beak", "two wings"), ("a sail", "the mast")))
    batch = Batch(pictures, torch.tensor([0, 1]))
    gradients = {}
    objectives = dict(contrast=Deal(prompts, 0, 0, explain=kind), deal=Deal(prompts, explain=kind),
                      released=Deal(prompts, explain=kind, detach=True))
    for name, objective in objectives.items():
        total, parts = objective(model, None, batch)
        gradients[name] = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        assert set(parts) == ({"contrast"} if name == "contrast" else {"contrast", "disentangle", "localise"})
    assert not penalty(model, pictures, kind, detach=True).requires_grad
    for a, b in zip(gradients["contrast"], gradients["released"], strict=True):
        assert a is b is None or torch.equal(a, b)  # bit for bit
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(gradients["contrast"], gradients["deal"]))


# ---- the objective ----


def test_the_objective_is_the_sum_of_its_parts(vit, pictures):
    prompts = Prompts(("bird", "boat!"), (("beak", "two wings"), ("a sail", "the mast")))
    batch = Batch(pictures, torch.tensor([1, 0]))
    objective = Deal(prompts, 0.3, 0.7, 0.2, overlap="l1", local="sum", caption="sentence", symmetric=False)
    total, parts = objective(vit, None, batch)
    caption = embed(vit, [[prompts.captions("sentence")[k]] for k in (1, 0)])[:, 0]
    maps = attention_maps(vit, pictures, embed(vit, [prompts.explained()[k] for k in (1, 0)]))
    expected = dict(contrast=deal.contrastive_loss(vit.encode_image(pictures), caption, vit.logit_scale.exp(), False),
                    disentangle=disentangle_loss(maps[:, 1:], "l1"), sparsity=deal.sparsity_loss(maps[:, 1:]),
                    localise=deal.localise_loss(maps[:, 1:], maps[:, 0], "sum"))
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-9), name
    weights = {"contrast": 1, "disentangle": 0.3, "localise": 0.7, "sparsity": 0.2}
    assert total.item() == pytest.approx(sum(weights[n] * v.item() for n, v in expected.items()), rel=1e-9)
    assert objective.needs == frozenset()


def test_a_record_of_the_objective_is_plain_json():
    recipe = deal.deal_recipe(deal.demo_prompts(), "CUB")
    text = json.dumps(recipe.as_dict())
    assert json.loads(text)["objective"]["name"] == "Deal" and "pointed beak" in text
    assert (recipe.rate, recipe.weight_decay, recipe.batch, recipe.epochs, recipe.decay) == (5e-7, 1e-3, 128, 1, 1.0)
    assert (recipe.objective.disentangle, recipe.objective.localise, recipe.objective.sparsity) == (0.1, 0.01, 0.0)
    assert len(deal.BATCHES) == 5
    with pytest.raises(ValueError, match="data must be one of"):
        deal.deal_recipe(deal.demo_prompts(), "MNIST")


def test_the_objective_refuses_what_does_not_exist(vit, pictures):
    prompts = Prompts(("bird",), (("beak",),))
    for bad in ({"overlap": "l2"}, {"local": "max"}, {"twins": "both"}, {"caption": "poem"}, {"explain": "guess"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be one of"):
            Deal(prompts, **bad)
    with pytest.raises(ValueError, match=r"labels must be 0 … 0, got \[0, 1\]"):
        Deal(prompts)(vit, None, Batch(pictures, torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="expected a DualEncoder, got VisionTransformer"):
        Deal(prompts)(vit.visual, None, Batch(pictures, torch.tensor([0, 0])))


def test_a_dual_encoder_is_a_tower_and_a_way_with_texts(vit, pictures):
    import copy

    class Letters(deal.DualEncoder):
        """Counts letters."""
        def __init__(self):
            super().__init__()
            self.visual, self.logit_scale = nn.Flatten(), nn.Parameter(torch.tensor(0.0))

        def encode_text(self, texts):
            return torch.tensor([[float(text.count(letter)) for letter in "ab"] for text in texts])

    assert embed(Letters(), [["a", "ab"], ["bb", ""]]).tolist() == [[[1, 0], [1, 1]], [[0, 2], [0, 0]]]
    assert torch.equal(Letters().encode_image(pictures), pictures.flatten(1))
    with pytest.raises(NotImplementedError):
        deal.DualEncoder().encode_text(["a"])
    assert vit.visual is vit.clip.visual and vit.logit_scale is vit.clip.logit_scale
    assert torch.equal(vit.encode_image(pictures), vit.clip.encode_image(pictures))
    assert all(key.startswith("clip.") for key in vit.state_dict())  # nothing is held twice
    again = copy.deepcopy(vit)
    assert again.visual is not vit.visual and torch.equal(again.encode_image(pictures), vit.encode_image(pictures))
    for name in ("clip", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(OpenClip.__new__(OpenClip) if name == "clip" else vit, name)


def test_batch_norms_stay_frozen_in_training(resnet):
    import copy

    model = copy.deepcopy(resnet).train()
    assert model.training and not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model.frozen_norm = False
    assert any(m.training for m in model.train().modules() if isinstance(m, nn.BatchNorm2d))
    with pytest.raises(ValueError, match="no file at"):
        OpenClip.load("nowhere.safetensors")


def test_a_whole_vit_b_32_runs():
    """The real network with random weights: 7 × 7 maps of six texts, with a gradient."""
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, SimpleTokenizer

    torch.manual_seed(0)
    clip = CLIP(512, CLIPVisionCfg(12, 768, patch_size=32), CLIPTextCfg(layers=1))
    model = OpenClip(clip, SimpleTokenizer()).train()
    texts = embed(model, [["a bird", "a pointed beak", "two wings", "a long tail", "thin legs", "an eye"]])
    maps = attention_maps(model, torch.randn(1, 3, 224, 224, generator=generator()), texts)
    assert maps.shape == (1, 6, 7, 7)
    g = torch.autograd.grad(disentangle_loss(maps[:, 1:]), model.visual.transformer.resblocks[0].mlp.c_fc.weight)[0]
    assert g.isfinite().all() and g.abs().max() > 0
    assert np.isfinite(F.normalize(texts, dim=-1).detach().numpy()).all()
