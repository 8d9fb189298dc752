"""SEG-MIL-CBM: attention, alignment, contributions against slow references; what padding and order cannot change."""
import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from cft.data import backdrop
from cft.data.models import base_model
from cft.data.testsets import PictureFiles
from cft.evaluate.passes import checkpoint, reading_of, run_pass
from cft.related import segmil
from cft.related.groups import answer_table, backdrop_set
from cft.related.segments import similarities
from cft.related.segmil import (
    BAG_RULES,
    BAG_VARIANTS,
    SEGMIL_LABELS,
    BagBatches,
    ConceptAlignment,
    SegMil,
    Standard,
    alignment,
    attention_on,
    backbone_of,
    demo_vocabulary,
    explain,
    featured,
    group_rows,
    predict_bags,
    segment_targets,
    segmil_recipe,
    segmil_steps,
    segmil_table,
    worst_group,
)
from cft.reproduce.paper import claims, scores_of, verdicts
from cft.reproduce.settings import Work, read_settings
from cft.reproduce.steps import PaperSteps, make_steps
from cft.train.loop import Diverged, fine_tune

torch.set_num_threads(1)
NAMES = list(backdrop.CLASSES)

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def small(concepts=7, classes=3, features=5, **changes):
    return SegMil(nn.Identity(), concepts, classes, features,
                  **({"width": 6, "attention": 4} | changes)).double().eval()

def random_bag(lengths=(3, 1, 4), features=5):
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*valid.shape, features, dtype=torch.float64), valid

# ---- the model

def slow_answer(model, bag, valid):
    """The equations, one segment at a time."""
    numbers = {name: p.detach().tolist() for name, p in model.named_parameters()}
    U, v, lines = numbers["key.weight"], numbers["score.weight"][0], lambda name: list(
        zip(numbers[f"{name}.weight"], numbers[f"{name}.bias"]))
    logits, attention = [], []
    for segments, real in zip(bag, valid):
        rows = [s.tolist() for s, r in zip(segments, real) if r]
        concepts = []
        for x in rows:
            h = [max(0.0, sum(a * k for a, k in zip(w, x)) + b) for w, b in lines("embed.0")]
            concepts.append([sum(a * k for a, k in zip(row, h)) + b for row, b in lines("concept")])
        scores = [
            sum(vk * math.tanh(sum(u * c for u, c in zip(row, cs))) for vk, row in zip(v, U)) / model.temperature
            for cs in concepts]
        total = sum(math.exp(s) for s in scores)
        alpha = [math.exp(s) / total for s in scores]
        z = [sum(a * c[m] for a, c in zip(alpha, concepts)) for m in range(len(concepts[0]))]
        logits.append([sum(a * zm for a, zm in zip(row, z)) + b for row, b in lines("classifier")])
        attention.append(alpha + [0.0] * int((~real).sum()))
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(attention, dtype=torch.float64)

@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_model_against_the_equations(temperature):
    model, (bag, valid) = small(temperature=temperature), random_bag()
    answer = model(bag, valid)
    logits, attention = slow_answer(model, bag, valid)
    assert torch.allclose(answer.logits, logits, atol=1e-12) and torch.allclose(answer.attention, attention, atol=1e-12)
    assert torch.allclose(
        answer.pooled,
        torch.stack([sum(a * c for a, c in zip(x, y)) for x, y in zip(answer.attention, answer.concepts)]))

def test_order_and_padding_do_not_matter():
    model, (bag, valid) = small(), random_bag()
    before = model(bag, valid).logits
    other = bag.clone()
    other[~valid] = torch.randn_like(other[~valid]) * 1e6
    assert torch.equal(model(other, valid).logits, before)
    other[~valid] = torch.nan
    assert torch.equal(model(other, valid).logits, before)
    order = torch.tensor([2, 0, 1, 3])
    shuffled, seen = bag.clone(), valid.clone()
    shuffled[0], seen[0] = bag[0][order], valid[0][order]
    assert torch.allclose(model(shuffled, seen).logits, before, atol=1e-13)
    wider = torch.cat([bag, torch.ones_like(bag)], 1)
    assert torch.allclose(model(wider, torch.cat([valid, ~torch.ones_like(valid)], 1)).logits, before, atol=1e-13)
    swapped = bag.clone()
    swapped[0, 0] = bag[2, 3]
    assert not torch.allclose(model(swapped, valid).logits[0], before[0], atol=1e-3), "valid segments do matter"

def test_order_and_padding_through_a_real_backbone_in_training():
    """Batch norm in training mode sees the real segments only, too."""
    backbone = timm.create_model("resnet18", pretrained=False, num_classes=0)
    model = SegMil(backbone, 6, 3, width=8, dropout=0.0).train()
    bag, valid = torch.randn(2, 3, 3, 64, 64), torch.tensor([[True, True, False], [True, False, False]])
    before = copy.deepcopy(model)(bag, valid).logits
    bag[~valid] = 1e3
    assert torch.equal(copy.deepcopy(model)(bag, valid).logits, before)
    bag[0, :2] = bag[0, :2].flip(0)
    assert torch.allclose(copy.deepcopy(model)(bag, valid).logits, before, atol=1e-5)

def test_contributions_are_the_logit():
    model, (bag, valid) = small(), random_bag()
    answer = model(bag, valid)
    for target in ([0, 1, 2], [2, 2, 0]):
        parts = model.contributions(answer, torch.tensor(target))
        assert parts.shape == (3, 4, 7) and (parts[~valid] == 0).all()
        for b, k in enumerate(target):
            assert torch.allclose(parts[b].sum() + model.classifier.bias[k], answer.logits[b, k], atol=1e-12)
            i, m = 0, 3
            assert torch.allclose(parts[b, i, m],
                                  answer.attention[b, i] * answer.concepts[b, i, m] * model.classifier.weight[k, m])

@pytest.mark.parametrize("level", ["bag", "segment"])
def test_gradients_by_finite_differences(level):
    model, (bag, valid) = small(), random_bag()
    wide = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    batch = {"bag": bag, "valid": valid, "label": torch.tensor([0, 2, 1]), "target": wide(3, 7)}
    batch["segment_target"] = wide(3, 4, 7)
    loss = lambda: ConceptAlignment(0.5, level)(model, model, batch)[0]
    loss().backward()
    for name, parameter in model.named_parameters():
        where = tuple(0 for _ in parameter.shape)
        with torch.no_grad():
            value = parameter[where].item()
            ends = []
            for step in (1e-6, -1e-6):
                parameter[where] = value + step
                ends.append(loss().item())
            parameter[where] = value
        assert parameter.grad[where].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7), name
    model.zero_grad()
    bag.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, valid).logits, (bag,))
    assert (torch.autograd.grad(loss(), bag)[0][~valid] == 0).all()

def test_alignment_is_a_mean_cosine():
    vectors, targets, valid = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(
        2, 3, 4, dtype=torch.float64), torch.tensor([[True, True, False], [True, False, False]])
    cos = lambda a, b: sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    v, t = vectors.tolist(), targets.tolist()
    assert alignment(vectors[:, 0],
                     targets[:, 0]).item() == pytest.approx(-(cos(v[0][0], t[0][0]) + cos(v[1][0], t[1][0])) / 2)
    assert alignment(vectors, targets, valid).item() == pytest.approx(
        -((cos(v[0][0], t[0][0]) + cos(v[0][1], t[0][1])) / 2 + cos(v[1][0], t[1][0])) / 2)
    assert alignment(targets, 3 * targets, valid).item() == pytest.approx(-1)

def test_loss_adds_up_and_weight_zero_needs_no_target():
    model, (bag, valid) = small(), random_bag()
    batch = {"bag": bag, "valid": valid, "label": torch.tensor([0, 2, 1])}
    plain = ConceptAlignment(0.0)(model, model, batch)[0]
    assert plain == nn.functional.cross_entropy(model(bag, valid).logits, batch["label"])
    batch["target"] = torch.randn(3, 7, dtype=torch.float64)
    total, parts = ConceptAlignment(0.25)(model, model, batch)
    assert total.item() == pytest.approx((plain + 0.25 * parts["align"]).item())
    assert [ConceptAlignment(*c).needs
            for c in ((0.0, "segment"), (1.0,), (1.0, "segment"))] == [set(), {"target"}, {"segment_target"}]

@pytest.mark.parametrize("valid, word",
                         [(torch.ones(3, 4), "torch.float32"), (torch.ones(3, 3, dtype=torch.bool), r"\(3, 3\)"),
                          (torch.tensor([[True] * 4, [False] * 4, [True] * 4]), "true somewhere in each bag")])
def test_model_refuses(valid, word):
    with pytest.raises(ValueError, match=word):
        small()(random_bag()[0], valid)

def test_backbones_of_timm():
    with pytest.raises(ValueError, match="expected a backbone with num_features"):
        SegMil(nn.Identity(), 3, 2)
    with pytest.raises(ValueError, match="temperature > 0"):
        SegMil(nn.Identity(), 3, 2, 4, temperature=0)
    for name in ("cft_vit_tiny64", "mobilenetv3_small_050", "resnet10t"):
        model = SegMil(backbone_of(timm.create_model(name, pretrained=False)), 5, 2, width=8).eval()
        assert model(torch.randn(2, 1, 3, 64, 64), torch.ones(2, 1, dtype=torch.bool)).logits.shape == (2, 2), name
    base = base_model(0)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(base.head(backbone_of(base)(x)), base(x), atol=1e-6) and base.head.out_features == 12

def test_standardised_targets():
    similarity = np.random.default_rng(0).normal(0.2, 0.05, (9, 4))
    similarity[:, 2] = 0.3
    standard = Standard.of(similarity)
    slow = (similarity - similarity.mean(0)) / [s if s > 0 else 1 for s in similarity.std(0).round(12)]
    slow /= np.sqrt((slow**2).sum(1, keepdims=True))
    assert np.allclose(standard.targets(similarity), slow, atol=1e-6) and (standard.targets(similarity)[:, 2]
                                                                           == 0).all()

# ---- bags and training

def test_targets_of_segments(bags, tools):
    _, encoder, vocabulary = tools
    standard = Standard(np.full(len(vocabulary), 0.1), np.full(len(vocabulary), 2.0))
    source = PictureFiles(bags.source.root, "few", bags.source.ids[:2], bags.source.targets[:2], bags.source.groups[:2])
    few = replace(bags, source=source, phrases=bags.phrases[:2], extra={})
    for k, found in enumerate(segment_targets(few, encoder, vocabulary, standard)):
        crops = [Image.fromarray((cut * 255).byte().permute(1, 2, 0).numpy()) for cut in bags.cuts(k)]
        slow = (similarities(encoder, crops, vocabulary) - 0.1) / 2
        assert np.allclose(found, slow / np.linalg.norm(slow, axis=1, keepdims=True), atol=1e-5) and len(found) == len(
            bags.segments(k))

def test_featured_bags_are_the_same_bags(bags):
    backbone = backbone_of(base_model(0))
    ready = featured(bags, backbone, batch=7)
    model = SegMil(backbone, bags.extra["target"].shape[1], 12, width=16).eval()
    fast = copy.deepcopy(model)
    fast.backbone = nn.Identity()
    assert torch.allclose(predict_bags(fast, ready), predict_bags(model, bags, 5), atol=1e-4)
    short = replace(ready, kept=[bag[:2] for bag in ready.kept])
    assert [len(short[k]["bag"]) for k in range(len(short))] == [min(2, len(bags[k]["bag"])) for k in range(len(bags))]

@pytest.fixture(scope="module")
def ready(bags):
    return featured(bags, backbone_of(base_model(0)))

def fresh(concepts, **changes):
    torch.manual_seed(3)
    return SegMil(nn.Identity(), concepts, 12, 96, **({"width": 32} | changes))

def train(model, bags, recipe, run=None, **more):
    return fine_tune(model, BagBatches(bags, recipe), recipe, run, progress=False, **more)

def test_training_learns_and_leaves_the_model_alone(ready):
    model = fresh(ready.extra["target"].shape[1])
    before = copy.deepcopy(model.state_dict())
    trained = train(model, ready, segmil_recipe(3e-3, 0, weight=1.0, epochs=40))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    labels = torch.tensor([t[0] for t in ready.source.targets])
    assert (predict_bags(trained.model, ready).argmax(1) == labels).float().mean() > 0.9
    first, last = trained.record["epochs"][0], trained.record["epochs"][-1]
    assert last["classify"] < 0.3 * first["classify"] and last["align"] < first["align"] - 0.2
    assert not trained.model.training

@pytest.mark.parametrize("stop", [2, 6])
def test_a_killed_run_goes_on_bit_by_bit(ready, tmp_path, stop):
    recipe, model = segmil_recipe(1e-3, 0, epochs=5, seed=4), fresh(ready.extra["target"].shape[1])
    straight = train(model, ready, recipe)

    def dying(step, parts):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, ready, recipe, tmp_path / "run", save_every=1, on_step=dying)
    with pytest.raises(ValueError, match="unfinished run of another job"):
        train(model, ready, segmil_recipe(epochs=5), tmp_path / "run")
    resumed = train(model, ready, recipe, tmp_path / "run")
    again = train(model, ready, recipe, tmp_path / "run")
    for one in (resumed, again):
        pairs = zip(straight.model.state_dict().values(), one.model.state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not (tmp_path / "run/state.pt").exists() and again.record["epochs"] == straight.record["epochs"]
    assert resumed.record["resumed_at"] == stop + 1

def test_the_backbone_trains_at_its_own_rate(bags):
    model = SegMil(backbone_of(base_model(0)), bags.extra["target"].shape[1], 12, width=16)
    still = train(model, bags, segmil_recipe(backbone_rate=0, epochs=1)).model
    moved = train(model, bags, segmil_recipe(1e-3, 1e-5, epochs=1, weight_decay=0.0)).model

    def step(one, part):
        pairs = zip(one.named_parameters(), model.parameters())
        return max((a - b).abs().max().item() for (n, a), b in pairs if n.startswith(part))

    assert step(still, "backbone") == 0 and step(still, "concept") > 0
    assert 1e-6 < step(moved, "backbone") < 3e-5 and 1e-4 < step(moved, "concept") < 3e-3, "AdamW moves by the rate"

def test_the_best_worst_group_is_kept(ready, monkeypatch):
    worst, weights = iter([10.0, 40.0, 40.0, 20.0]), []
    monkeypatch.setattr(segmil, "group_scores", lambda pictures: {"worst": next(worst)})
    real = segmil.predict_bags
    seen = lambda model, some: weights.append(copy.deepcopy(model.state_dict())) or real(model, some)
    monkeypatch.setattr(segmil, "predict_bags", seen)
    recipe = segmil_recipe(1e-3, 0, epochs=4, best=True)
    done = train(fresh(ready.extra["target"].shape[1]), ready, recipe, validation=worst_group(ready))
    assert done.record["best_step"] == 2 * -(-len(ready) // 32)
    assert all(torch.equal(weights[1][k], v) for k, v in done.model.state_dict().items())

def test_training_refuses(ready):
    model = fresh(ready.extra["target"].shape[1])
    bare = replace(ready, extra={})
    with pytest.raises(ValueError, match="alignment needs target for each picture"):
        train(model, bare, segmil_recipe())
    with pytest.raises(ValueError, match="needs segment_target"):
        train(model, ready, segmil_recipe(level="segment"))
    train(model, bare, segmil_recipe(backbone_rate=0, weight=0, epochs=1))
    spoilt = replace(ready, kept=[f * torch.nan if k == 5 else f for k, f in enumerate(ready.kept)])
    with pytest.raises(Diverged, match="step [01]: the loss is nan; batch: .*bird_0"):
        train(model, spoilt, segmil_recipe(backbone_rate=0))
    for change in ({"weight": -1}, {"level": "pixel"}):
        with pytest.raises(ValueError, match="expected weight >= 0 and level bag or segment"):
            segmil_recipe(**change)

# ---- explanations and the experiment

def test_an_explanation_adds_up(bags, tools):
    import matplotlib

    matplotlib.use("Agg")
    vocabulary = tools[2]
    model = SegMil(backbone_of(base_model(0)), len(vocabulary), 12, width=16)
    with torch.no_grad():
        logits = predict_bags(model, bags)
    for target in (None, 5):
        found = explain(model, bags, 3, vocabulary, NAMES, target)
        k = int(logits[3].argmax()) if target is None else target
        assert found.name == NAMES[k] and found.logit == pytest.approx(logits[3, k].item(), abs=1e-4)
        assert found.parts.sum().item() + found.bias == pytest.approx(found.logit, abs=1e-5)
        table = found.table(4)
        assert table["contribution"].abs().is_monotonic_decreasing and len(table) == 4
        row = table.iloc[0]
        i = [s.phrase for s in found.segments].index(row["segment"])
        assert found.parts[i, vocabulary.index(row["concept"])].item() == pytest.approx(row["contribution"])
        assert found.parts.abs().max().item() == pytest.approx(abs(row["contribution"]))
        assert f"{found.logit:+.2f}" in repr(found) and "<table" in found._repr_html_()
    figure = found.figure()
    assert len(figure.axes) == 4  # a colour bar, too
    matplotlib.pyplot.close(figure)
    with pytest.raises(ValueError, match="expected names of .* concepts and 12 classes, got 1 and 12"):
        explain(model, bags, 3, ["one"], NAMES)

def test_attention_on_the_object_by_hand(world, bags, ready):
    model = fresh(ready.extra["target"].shape[1]).eval()
    slow = []
    for k, name in enumerate(bags.source.ids):
        mask = np.asarray(Image.open(world / "objects/train" / name)) > 0
        with torch.no_grad():
            alpha = model(ready.kept[k][None], torch.ones(1, len(ready.kept[k]), dtype=torch.bool)).attention[0]
        slow.append(sum(float(a) * np.mean(mask[s.mask]) for a, s in zip(alpha, bags.segments(k))))
    assert attention_on(model, ready, world / "objects/train") == pytest.approx(100 * np.mean(slow), abs=1e-4)

def test_rows_of_a_test_in_groups(world):
    source = backdrop_set(world)
    logits = torch.randn(len(source), 12, generator=torch.Generator().manual_seed(2))
    logits[range(len(source)), [t[0] for t in source.targets]] += 2
    hits = logits.argmax(1).numpy() == [t[0] for t in source.targets]
    rows = group_rows(answer_table(source, logits)).set_index(["set", "split"])["value"]
    val = np.array([name.startswith("val/") for name in source.ids])
    assert rows["groups", "all"] == pytest.approx(100 * hits.mean()) and rows["val", "all"] == pytest.approx(
        100 * hits[val].mean())
    assert rows["adversarial", "all"] == pytest.approx(100 * hits[~val].mean()) and len(rows) == 4
    assert rows["groups", "worst group"] == min(100 * hits[[g == group for g in source.groups]].mean()
                                                for group in set(source.groups))

def test_vocabularies_and_variants():
    small, large = set(demo_vocabulary()), set(demo_vocabulary(context=True))
    assert small < large and "blue sky" in large - small and "a beak" in small
    assert BAG_VARIANTS["segmil"].rules == BAG_RULES and not BAG_VARIANTS["segmil"].context
    assert BAG_VARIANTS["cbm"].rules is None
    assert {c.method for c in claims("segmil")} | {c.against for c in claims("segmil")} <= set(SEGMIL_LABELS)
    assert set(BAG_VARIANTS) < set(SEGMIL_LABELS)

@pytest.mark.slow
def test_the_step_of_a_seed(tmp_path, monkeypatch):
    few = ("original", "cbm", "segmil", "segmil.bag-1")
    monkeypatch.setattr(segmil, "SEGMIL_LABELS", {m: SEGMIL_LABELS[m] for m in few})
    recipe = segmil.segmil_recipe
    monkeypatch.setattr(segmil, "segmil_recipe", lambda *a, **more: recipe(*a, **more, epochs=2))
    settings = read_settings("smoke", pool=1, test_per_class=1)
    steps = PaperSteps(Work(settings, ("segmil",)), tmp_path)
    assert make_steps([*steps.pictures(1), *segmil_steps(steps, (1,))], tmp_path)
    scores = pd.read_csv(tmp_path / "related/segmil/1.csv")
    methods = list(dict.fromkeys(scores["method"]))
    assert methods == ["original", "cbm", "segmil", "segmil.bag-1"] and set(scores["seed"]) == {1}
    source = backdrop_set(tmp_path / "worlds/1")
    hits = run_pass(source, [checkpoint(base_model(1), "base")], reading_of(base_model(1)))[0]["full_top1"]
    original = scores.query("method == 'original' and set == 'groups' and split == 'all'")
    assert original["value"].item() == pytest.approx(100 * hits.mean(), abs=1e-3) and original["n"].item() == 24
    attention = scores[scores["metric"] == "attention"].set_index("method")["value"]
    assert list(attention.index) == methods[1:] and attention.between(0, 100).all()
    masks = [np.asarray(Image.open(tmp_path / "worlds/1/objects" / name)) > 0 for name in source.ids]
    assert attention["cbm"] == pytest.approx(100 * np.mean(masks), abs=1e-3)
    costs = scores[scores["metric"].isin(["preparing", "training", "answering"])]
    assert set(costs["method"]) == {"segmil"} and (costs["value"] > 0).all() and len(costs) == 3
    assert costs.set_index("metric")["value"]["answering"] > 1.5, "it grounds every picture and reads every segment"
    table = segmil_table(scores)
    assert table.loc["SEG-MIL-CBM", "attention on object"] == f"{attention['segmil']:.1f}"
    assert table.loc["Original", "attention on object"] == ""
    assert list(table.columns) == ["val", "adversarial", "groups", "groups, worst group", "attention on object"]

def test_claims_read_the_rows():
    rows = [{"method": m, "seed": s, "set": "groups", "split": "worst group", "metric": "top1", "value": v + s, "n": 5}
            for m, v in (("segmil", 30.0), ("cbm", 10.0), ("original", 32.5), ("segmil.lambda-0", 30.0))
            for s in range(4)]
    rows += [{
        "method": "segmil.lambda-0", "seed": 9, "set": "groups", "split": "all", "metric": "attention", "value": 1.0,
        "n": 5}]
    frame = pd.DataFrame(rows)
    frame.loc[(frame["method"] == "segmil.lambda-0") & (frame["seed"] == 2), "value"] += 7
    found = verdicts(scores_of(frame), claims("segmil")).set_index(["artefact", "claim"])["verdict"]
    assert [found.iloc[k] for k in range(4)] == ["holds", "contradicted", "not run", "open"]
    assert segmil_table(frame).loc["Original", "groups, worst group"] == "34.0 ± 1.3"
