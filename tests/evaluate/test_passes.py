"""Passes against loops: sorting for ranks, lists drawn with replacement for intervals, one pass for each model."""

import gc
import hashlib
import math
import os
import random
import signal
import time

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from cft.data import backdrop
from cft.data.folders import list_folder
from cft.data.models import base_model, save_model, weights_digest
from cft.data.testsets import EvalSet, folder_set, miniature, open_set
from cft.evaluate.metrics import COLUMNS, COUNTS, image_scores, segmentation_scores, wilson_interval
from cft.evaluate.passes import (
    BY,
    ROWS,
    Loop,
    MaskedSet,
    Results,
    accuracy_rows,
    answer_columns,
    answers,
    checkpoint,
    compare_methods,
    evaluate_folder,
    evaluate_sets,
    headline,
    macro_accuracy,
    reading_of,
    relevance_of_set,
    run_pass,
    seconds,
    segmentation_rows,
    times_slower,
)
from cft.explain.maps import relevance


class Colours(EvalSet):
    """Pictures made on demand: one number a picture decides about everything. Counts what is read, and may fail."""

    def __init__(self, key="colours", count=23, size=16, classes=4, fail_at=None, fail=None):
        targets = [(i % classes, (i + 1) % classes) if i % 3 == 0 else (i % classes,) for i in range(count)]
        super().__init__(key, [f"{i:04d}.png" for i in range(count)], targets, [f"g{i % 5}" for i in range(count)])
        self.pixels, self.reads, self.fail_at, self.fail = size, [], fail_at, fail

    def __getitem__(self, index):
        if index == self.fail_at:
            self.fail()
        self.reads.append(index)
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (self.pixels, self.pixels, 3), dtype=np.uint8)), self.targets[index]

    def digest(self, full=False):
        return hashlib.sha256(f"{self.key} {len(self)} {self.pixels}".encode()).hexdigest()


class Linear(nn.Module):
    """A random linear classifier of 16 × 16 pictures."""

    def __init__(self, seed=0, classes=4, size=16, mean=0.5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_classes, self.size = classes, size
        self.weight = nn.Parameter(torch.randn(3 * size * size, classes, generator=generator))
        self.drop = nn.Dropout(0.5)
        self.pretrained_cfg = {"architecture": "linear", "input_size": (3, size, size), "crop_pct": 1.0,
                               "interpolation": "bilinear", "mean": (mean,) * 3, "std": (0.25,) * 3}

    def forward(self, x):
        return self.drop(x.flatten(1)) @ self.weight


def linear(seed, name=None, **options):
    return checkpoint(Linear(seed, **options), name or f"linear {seed}", method="linear", seed=seed)


def slow_rank(scores, label):
    return sorted(range(len(scores)), key=lambda c: (-scores[c], c)).index(label)


def made_up(n=60, classes=5, seed=0):
    """A table of pictures with random answers, several right classes for some."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        accepted = (rng.randrange(classes),) if rng.random() < 0.6 else tuple(rng.sample(range(classes), 2))
        row = {"id": f"{i:03d}", "group": f"g{rng.randrange(3)}", "targets": accepted}
        for space in ("full", "subset"):
            for k in (1, 5):
                row[f"{space}_first{k}"] = rng.random() < (0.3 if k == 1 else 0.6)
                row[f"{space}_top{k}"] = row[f"{space}_first{k}"] or (len(accepted) > 1 and rng.random() < 0.5)
            row[f"{space}_predicted"] = rng.randrange(classes)
        rows.append(row)
    return pd.DataFrame(rows)


# ---- when an answer is right ----


def test_judge_against_sorting():
    rng = random.Random(0)
    for _ in range(30):
        classes, n = rng.randrange(7, 12), 5
        logits = [[float(rng.randrange(4)) for _ in range(classes)] for _ in range(n)]  # ties everywhere
        targets = [tuple(rng.sample(range(classes), rng.randrange(1, 4))) for _ in range(n)]
        present = sorted({c for accepted in targets for c in accepted} | {rng.randrange(classes)})
        found = answer_columns(torch.tensor(logits), targets, present)
        for i in range(n):
            shown = [logits[i][c] if c in present else -math.inf for c in range(classes)]
            for space, scores in (("full", logits[i]), ("subset", shown)):
                ranks = [slow_rank(scores, c) for c in targets[i]]
                for k in (1, 5):
                    assert found[f"{space}_top{k}"][i] == (min(ranks) < k)
                    assert found[f"{space}_first{k}"][i] == (ranks[0] < k)
                assert scores[found[f"{space}_predicted"][i]] == max(scores)
            assert found["subset_predicted"][i] in present
        for rule in ("top1", "top5", "first1", "first5"):
            assert (found[f"full_{rule}"] <= found[f"subset_{rule}"]).all()


def test_judge_refuses_what_cannot_be_judged():
    with pytest.raises(ValueError, match="NaN"):
        answer_columns(torch.full((1, 4), float("nan")), [(0,)], (0,))
    with pytest.raises(ValueError, match="class 4; the model has 4"):
        answer_columns(torch.zeros(1, 4), [(4,)], (4,))


def test_full_is_never_above_subset_on_the_miniatures(tmp_path):
    torch.manual_seed(0)
    model = checkpoint(timm.create_model("test_vit"), "random")
    for key in ("in-a", "in-v2", "objectnet"):
        source = open_set(key, miniature(key, tmp_path, count=6), check_counts=False)
        (found,) = run_pass(source, [model], reading_of(model.model))
        table = accuracy_rows(found, 1000).set_index(["labels", "targets", "split", "metric"]).value
        for (labels, *rest), value in table.items():
            if labels == "full1000" and ("subset", *rest) in table:
                assert value <= table["subset", *rest]
        first_class = open_set(key, tmp_path, check_counts=False, first_mapping_only=True)  # the released code's way
        (released,) = run_pass(first_class, [model], reading_of(model.model))
        assert released.full_top1.equals(found.full_first1)


# ---- numbers ----


def test_accuracy_rows_against_counting():
    pictures, tuned = made_up(), {0, 3}
    rows = accuracy_rows(pictures, 1000, fine_tuned=sorted(tuned)).set_index(["labels", "targets", "split", "metric"])
    assert rows.index.is_unique
    seen = set()
    for space, labels in (("full", "full1000"), ("subset", "subset")):
        for rule, word in (("any", "top"), ("first", "first")):
            for split in ("all", "fine-tuned", "other"):
                for k in (1, 5):
                    hits, per_class = [], {}
                    for _, p in pictures.iterrows():
                        if split == "all" or (split == "fine-tuned") == any(c in tuned for c in p.targets):
                            hits.append(bool(p[f"{space}_{word}{k}"]))
                            per_class.setdefault(p.targets, []).append(hits[-1])
                    name = f"top{k}"
                    row = rows.loc[labels, rule, split, name]
                    assert row.n == len(hits) and row.value == pytest.approx(100 * sum(hits) / len(hits))
                    assert (row.low, row.high) == pytest.approx(wilson_interval(sum(hits), len(hits)))
                    macro = rows.loc[labels, rule, split, f"{name}_macro"]
                    each = [sum(hit) / len(hit) for hit in per_class.values()]
                    assert macro.value == pytest.approx(100 * sum(each) / len(each))
                    seen |= {(labels, rule, split, name), (labels, rule, split, f"{name}_macro")}
            for k in (1, 5):
                groups = pictures.groupby("group")[f"{space}_{word}{k}"].mean()
                assert rows.loc[labels, rule, "worst group", f"top{k}"].value == pytest.approx(100 * groups.min())
                seen.add((labels, rule, "worst group", f"top{k}"))
    assert seen == set(rows.index)


def test_groups_of_the_caller_and_classes_that_are_groups():
    pictures = made_up().assign(targets=[(i % 3,) for i in range(60)])
    own = ["water" if hit else "land" for hit in pictures.full_top1]
    rows = accuracy_rows(pictures.assign(group=own), 1000).set_index(["labels", "split", "metric"])
    assert rows.loc[("full1000", "worst group", "top1"), "value"] == 0
    assert set(rows.targets) == {"any"}
    as_classes = accuracy_rows(pictures.assign(group=[f"class {i % 3}" for i in range(60)]), 1000)
    assert "worst group" not in set(as_classes.split)
    with pytest.raises(ValueError, match="fine_tuned must hold classes 0 … 999, got .0, 1000"):
        accuracy_rows(pictures, 1000, fine_tuned=[1000, 0])


def test_top5_of_few_classes_is_called_what_it_is():
    pictures = made_up(classes=3).assign(targets=[(i % 3,) for i in range(60)])
    rows = accuracy_rows(pictures, 1000)
    assert set(rows[rows.labels == "subset"].metric) == {"top1", "top3", "top1_macro", "top3_macro"}
    assert set(rows[rows.labels == "full1000"].metric) == {"top1", "top5", "top1_macro", "top5_macro"}
    single = accuracy_rows(pictures.assign(targets=[(0,)] * 60), 1000)
    assert set(single[single.labels == "subset"].metric) == {"top1", "top1_macro"}


def test_macro_interval_against_drawing_lists():
    rng = random.Random(1)
    classes = [0] * 30 + [1] * 8 + [2] * 3 + [3]
    correct = [rng.random() < 0.6 for _ in classes]

    def macro(indices):
        seen = {}
        for i in indices:
            seen.setdefault(classes[i], []).append(correct[i])
        return 100 * sum(sum(v) / len(v) for v in seen.values()) / len(seen)

    value, low, high = macro_accuracy(np.array(correct), np.array(classes), draws=4000)
    drawn = sorted(macro([rng.randrange(len(classes)) for _ in classes]) for _ in range(4000))
    assert value == pytest.approx(macro(range(len(classes))))
    assert low == pytest.approx(drawn[100], abs=1.5) and high == pytest.approx(drawn[3900], abs=1.5)
    again = [macro_accuracy(np.array([True, False]), np.array([7, 7])) for _ in range(2)]
    assert again[0] == again[1]


def made_up_maps(n, seed=0):
    """Maps and masks (n, 5, 6) that agree more often than not."""
    generator = torch.Generator().manual_seed(seed)
    maps, masks = torch.rand(n, 5, 6, generator=generator), torch.rand(n, 5, 6, generator=generator) < 0.3
    return 0.7 * maps + 0.3 * masks, masks


def test_segmentation_rows_are_the_scores_with_intervals():
    maps, masks = made_up_maps(30)
    rows, images = segmentation_rows(image_scores(maps, masks)), image_scores(maps, masks)
    assert rows.n.eq(30).all() and set(rows["split"]) == {"all"} and set(rows.labels) == set(rows.targets) == {""}
    assert rows.set_index("metric").value.to_dict() == segmentation_scores(maps, masks)
    pd.testing.assert_frame_equal(rows, segmentation_rows(images))
    assert not segmentation_rows(images, seed=1).low.equals(rows.low)
    single = segmentation_rows(images[:1])  # resampling one image gives it again
    assert np.allclose(single.low, single.value) and np.allclose(single.high, single.value)
    with pytest.raises(ValueError, match="draws"):
        segmentation_rows(images, draws=0)


def test_bootstrap_equals_drawing_images_one_by_one():
    images = image_scores(*made_up_maps(25, seed=9))
    table = segmentation_rows(images, draws=4000).set_index("metric")
    dice, counts, drawn = random.Random(0), images[list(COUNTS)].to_numpy().tolist(), []
    for _ in range(4000):
        tp, fp, fn, tn = (sum(column) for column in zip(*dice.choices(counts, k=25)))
        drawn.append(50 * (tp / (tp + fp + fn) + tn / (tn + fp + fn)))
    drawn.sort()
    width = drawn[3899] - drawn[99]
    assert table.low["mean_iou"] == pytest.approx(drawn[99], abs=0.08 * width)
    assert table.high["mean_iou"] == pytest.approx(drawn[3899], abs=0.08 * width)


# ---- a folder and a model ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small drawn world with object masks."""
    return backdrop.write(tmp_path_factory.mktemp("drawn") / "world", {"val": 3, "segmentation": 1}, seed=7)


def folder_of(world, name, objects=False):
    folder = list_folder(world / "images" / name, list(backdrop.CLASSES))
    return folder.with_masks(object=world / "objects" / name) if objects else folder


def test_a_folder_against_loops(world):
    folder, base, tuned = folder_of(world, "val"), base_model(0), {0, 5, 7}
    table = evaluate_folder(base, folder, "mine", fine_tuned=sorted(tuned), loop=Loop(batch=10))
    assert tuple(table.columns) == COLUMNS and set(table["set"]) == {"mine"}
    found = table.set_index(["split", "metric"])
    assert found.index.is_unique and len(found) == 6
    answered = []
    for sample in folder.samples:
        x = torch.tensor(np.asarray(Image.open(sample.path)) / 255).permute(2, 0, 1).float()
        answered.append((sample.label, slow_rank(base((x[None] - 0.5) / 0.25)[0].tolist(), sample.label)))
    for split in ("all", "fine-tuned", "other"):
        ranks = [rank for label, rank in answered if split == "all" or (split == "fine-tuned") == (label in tuned)]
        for k in (1, 5):
            row, hits = found.loc[split, f"top{k}"], sum(rank < k for rank in ranks)
            assert row.n == len(ranks) and row.value == pytest.approx(100 * hits / len(ranks))
            assert (row.low, row.high) == pytest.approx(wilson_interval(hits, len(ranks)))
    whole = evaluate_folder(base, folder, "mine")
    pd.testing.assert_frame_equal(whole, table[table.split == "all"].reset_index(drop=True))
    every = evaluate_folder(base, folder, "mine", fine_tuned=range(12))  # an empty side gives no rows
    assert set(every.split) == {"all", "fine-tuned"}


def test_a_folder_with_object_masks(world):
    folder, base = folder_of(world, "segmentation", objects=True), base_model(0)
    table = evaluate_folder(base, folder, "mine", objects=True)
    assert tuple(table.columns) == COLUMNS and table.n.eq(12).all() and table.split.eq("all").all()
    images = torch.stack([torch.tensor(np.asarray(Image.open(s.path)) / 255).permute(2, 0, 1) for s in folder.samples])
    masks = torch.stack([torch.tensor(np.asarray(Image.open(s.object)) > 0) for s in folder.samples])
    maps = relevance(base, (images.float() - 0.5) / 0.25, differentiable=False).map("minmax", (64, 64), 0.0)
    expected, scores = segmentation_scores(maps, masks), table.set_index("metric")
    assert scores.value[list(expected)].to_dict() == pytest.approx(expected, abs=0.01)
    assert (scores.low <= scores.value).all() and (scores.value <= scores.high).all()
    assert set(evaluate_folder(base, folder, "mine").metric) == {"top1", "top5"}  # masks that nobody asked about


def test_top5_of_a_model_of_few_classes_is_called_what_it_is(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (20 * ord(name) % 256, 0, 0)).save(tmp_path / name / "0.png")
    folder = list_folder(tmp_path)
    for classes, names in ((7, ["top1", "top5"]), (4, ["top1", "top4"]), (3, ["top1", "top3"])):
        assert evaluate_folder(Linear(0, classes=classes), folder, "few").metric.tolist() == names
    assert evaluate_folder(Linear(0, classes=1), folder.only([0]), "one").metric.tolist() == ["top1"]


def test_folders_that_cannot_be_judged(world, tmp_path):
    val, drawn = folder_of(world, "val"), folder_of(world, "segmentation", objects=True)
    with pytest.raises(ValueError, match=r"mine: expected object masks for its 36 pictures, got 0"):
        evaluate_folder(base_model(0), val, "mine", objects=True)
    with pytest.raises(ValueError, match="fine_tuned must hold classes 0 … 11, got .*12"):
        evaluate_folder(base_model(0), val, "mine", fine_tuned=[3, 12])
    with pytest.raises(ValueError, match="on mine: the set has class 11; the model has 4 classes only"):
        evaluate_folder(Linear(0), val, "mine")
    with pytest.raises(ValueError, match="mine: expected pictures"):
        evaluate_folder(base_model(0), val.choose([]), "mine")
    broken = Linear(0, classes=12)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="on mine: logits must not hold NaN"):
        evaluate_folder(broken, val, "mine")
    with pytest.raises(ValueError, match="got 0"):
        MaskedSet(drawn.choose([]), "nothing")


def test_a_folder_of_masks_is_a_set(world):
    folder = folder_of(world, "segmentation", objects=True)
    source = MaskedSet(folder, "objects")
    assert len(source) == 12 and source.ids == tuple(folder.names) and source.digest() == folder.digest()
    image, mask = source[3]
    assert image.mode == "RGB" and mask.dtype == np.uint8 and set(mask.flat) == {0, 1}
    assert np.array_equal(mask, np.asarray(Image.open(folder.samples[3].object)) > 0)


# ---- relevance of some pictures ----


def test_relevance_of_drawn_pictures_against_one_at_a_time(world):
    source, base = folder_of(world, "val"), base_model(1)
    source = folder_set(source, key="val")
    found = relevance_of_set(base, source, 7, "maps val", batch=3)
    drawn = sorted(random.Random("maps val").sample(range(36), 7))
    assert found["ids"].tolist() == [source.ids[i] for i in drawn] and found["relevance"].dtype == np.float16
    assert found["pictures"].shape == (7, 64, 64, 3) and found["pictures"].dtype == np.uint8
    for k, i in enumerate(drawn):
        image, accepted = source[i]
        pixels = np.asarray(image)
        assert np.array_equal(found["pictures"][k], pixels) and found["label"][k] == accepted[0]
        x = (torch.tensor(pixels / 255).permute(2, 0, 1).float()[None] - 0.5) / 0.25
        alone = relevance(base, x, torch.tensor([accepted[0]]), differentiable=False)
        assert found["predicted"][k] == alone.logits.argmax()
        assert np.allclose(found["relevance"][k], alone.patches[0].numpy(), atol=2e-3)


def test_which_pictures_depends_on_the_key_alone(world):
    source = folder_set(folder_of(world, "val"), key="val")
    one, other = (relevance_of_set(base_model(seed), source, 5, "a key") for seed in (0, 1))
    elsewhere = relevance_of_set(base_model(0), source, 5, "another key")
    assert one["ids"].tolist() == other["ids"].tolist() != elsewhere["ids"].tolist()
    assert relevance_of_set(base_model(0), source, 99, "all")["ids"].tolist() == list(source.ids)
    training = base_model(0).train()
    again = relevance_of_set(training, source, 5, "a key")
    assert training.training and all(np.array_equal(one[name], again[name]) for name in one)


# ---- reading ----


@pytest.mark.parametrize("name", [
    "vit_small_patch16_224.augreg_in21k_ft_in1k", "convnextv2_tiny.fcmae_ft_in22k_in1k_384",
    "swin_tiny_patch4_window7_224.ms_in1k"])
@pytest.mark.parametrize("size", [(400, 300), (231, 517)])
def test_pictures_are_read_as_timm_reads_them(name, size):
    with torch.device("meta"):
        model = timm.create_model(name)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    own, config = reading_of(model), resolve_model_data_config(model)
    assert torch.equal(own.transform()(photo), create_transform(**config, use_prefetcher=True)(photo))
    floats = create_transform(**config, use_prefetcher=False)(photo)
    assert torch.allclose(own.normalise(own.transform()(photo)[None])[0], floats, atol=1e-5)


def test_official_reading_and_squeezed_pictures():
    model = timm.create_model("test_vit")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8))
    official = reading_of(model, "official")
    by_hand = np.asarray(photo.resize((256, 341), Image.BILINEAR))[58:282, 16:240]
    assert np.abs(np.asarray(official.transform()(photo)).transpose(1, 2, 0).astype(int) - by_hand).max() <= 1
    assert official.preprocess.mean == official.preprocess.std == (0.5, 0.5, 0.5)
    whole = reading_of(model, "official", whole=True).transform()(photo)
    assert np.array_equal(np.asarray(whole).transpose(1, 2, 0), np.asarray(photo.resize((224, 224), Image.BILINEAR)))


def test_the_size_that_a_model_takes_decides():
    dino = timm.create_model("vit_small_patch14_dinov2", img_size=224, depth=1)
    assert resolve_model_data_config(dino)["input_size"] == (3, 518, 518)
    assert reading_of(dino).preprocess.size == (224, 224) == reading_of(dino, "official").preprocess.size
    with pytest.raises(ValueError, match="384 × 384 only"):
        reading_of(timm.create_model("vit_tiny_patch16_384", depth=1), "official")
    with pytest.raises(ValueError, match="protocol must be one of model, official"):
        reading_of(dino, "paper")


# ---- passes ----


def test_a_pass_against_single_pictures():
    source, models = Colours(), [linear(0), linear(1)]
    reading = reading_of(models[0].model)
    tables = run_pass(source, models, reading, Loop(batch=7))
    assert source.reads == list(range(23))
    for tested, table in zip(models, tables):
        tested.model.eval()
        for i, row in table.iterrows():
            image, accepted = source[i]
            x = torch.tensor((np.asarray(image) / 255 - 0.5) / 0.25).permute(2, 0, 1).float()
            scores = tested.model(x[None])[0].tolist()
            ranks = [slow_rank(scores, c) for c in accepted]
            assert row.full_predicted == slow_rank_inverse(scores) and row.full_top1 == (min(ranks) < 1)
            assert row.full_first1 == (ranks[0] < 1) and row.id == source.ids[i] and row.group == source.groups[i]
    alone = [run_pass(source, [tested], reading, Loop(batch=23))[0] for tested in models]
    assert all(a.equals(b) for a, b in zip(tables, alone))


def slow_rank_inverse(scores):
    return sorted(range(len(scores)), key=lambda c: (-scores[c], c))[0]


def test_workers_change_nothing(tmp_path):
    base = checkpoint(base_model(0), "base")
    segmentation = open_set("in-segmentation", miniature("in-segmentation", tmp_path, count=5), check_counts=False)
    reading = reading_of(base.model, whole=True)
    one, two = (run_pass(segmentation, [base], reading, Loop(batch=2, workers=workers))[0] for workers in (0, 2))
    assert one.equals(two) and len(one) == 5


def test_segmentation_pass_against_a_loop(tmp_path):
    base = checkpoint(base_model(0), "base")
    source = open_set("in-segmentation", miniature("in-segmentation", tmp_path, count=4), check_counts=False)
    (found,) = run_pass(source, [base], reading_of(base.model, whole=True), Loop(batch=3))
    for i, row in found.iterrows():
        image, labels = source[i]
        x = torch.tensor(np.asarray(image.resize((64, 64), Image.BILINEAR)) / 255).permute(2, 0, 1).float()
        result = relevance(base.model, (x[None] - 0.5) / 0.25, differentiable=False)
        values = result.map("minmax", (64, 64), 0.0)[0].double()
        rows, columns = ([int((k + 0.5) * side / 64) for k in range(64)] for side in labels.shape)
        mask = np.array([[labels[y, z] for z in columns] for y in rows])
        above = (values > values.mean()).numpy()
        assert row.predicted == result.logits.argmax() and mask.sum() > 0
        assert abs(row.true_positive - (above & (mask == 1)).sum()) <= 1
        assert abs(row.true_negative - (~above & (mask == 0)).sum()) <= 1


def test_models_come_back_as_they_were_also_after_a_failure():
    model = Linear(0).train()
    model.drop.eval()
    run_pass(Colours(), [checkpoint(model, "a")], reading_of(model))
    assert model.training and not model.drop.training
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="broken on colours: logits must not hold NaN"):
        run_pass(Colours(), [checkpoint(model, "broken")], reading_of(model))
    assert model.training and not model.drop.training


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory from /proc")
def test_memory_does_not_grow_with_the_set():
    class Watched(Linear):
        def forward(self, x):
            peaks.append(resident())
            return x.mean((2, 3)) @ self.weight[:3]

    model, most = Watched(0, size=256), []
    for count in (50, 50, 500):  # the first fills caches
        gc.collect()
        peaks, before = [], resident()
        run_pass(Colours(count=count, size=256), [checkpoint(model, "a")], reading_of(model), Loop(batch=10))
        most.append(max(peaks) - before)
    assert most[2] - most[1] < 40, most  # 450 more pictures are 84 MiB of bytes, 337 of floats


def test_autocast_and_bad_options():
    source, tested = Colours(), linear(0)
    reading, loops = reading_of(tested.model), (Loop(), Loop(precision="bfloat16"))
    plain, half = (run_pass(source, [tested], reading, loop)[0] for loop in loops)
    assert (plain.full_predicted == half.full_predicted).mean() > 0.8
    for options in ({"precision": "int8"}, {"batch": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match="expected precision"):
            Loop(**options)


# ---- the store ----


def test_nothing_finished_is_redone_after_a_kill(tmp_path):
    models = [linear(0), linear(1)]
    child = os.fork()
    if child == 0:  # this process dies in the middle of the second set
        dying = Colours("second", fail_at=9, fail=lambda: os.kill(os.getpid(), signal.SIGKILL))
        evaluate_sets(models, [Colours("first"), dying, Colours("third")], tmp_path, loop=Loop(batch=4))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    assert len(done) == 2
    again = [Colours("first"), Colours("second"), Colours("third")]
    resumed = evaluate_sets(models, again, tmp_path, loop=Loop(batch=4))
    assert [len(s.reads) for s in again] == [0, 23, 23]
    assert all((tmp_path / "pictures" / name).stat().st_mtime_ns == when for name, when in done.items())
    direct = evaluate_sets(models, [Colours("first"), Colours("second"), Colours("third")], tmp_path / "new")
    pd.testing.assert_frame_equal(resumed.rows(), direct.rows())


def test_a_file_that_was_being_written_does_not_count(tmp_path, monkeypatch):
    def full_disk(*paths):
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr("os.replace", full_disk)
        evaluate_sets([linear(0)], [Colours()], tmp_path)
    source = Colours()
    assert len(evaluate_sets([linear(0)], [source], tmp_path).rows()) > 0 and len(source.reads) == 23


def test_each_picture_is_read_once_for_each_reading(tmp_path):
    models = [linear(0), linear(1), linear(2, mean=0.4), linear(3, mean=0.4)]
    source = Colours()
    store = evaluate_sets(models, [source], tmp_path)
    assert sorted(source.reads) == sorted(list(range(23)) * 2)
    alone = Colours()
    for tested in models:
        assert store.pictures("colours", tested.name).equals(
            evaluate_sets([tested], [alone], tmp_path / tested.name).pictures("colours", tested.name))


def test_rows_say_where_they_come_from(tmp_path):
    models = [linear(0), checkpoint(Linear(1), "nobody")]
    store = evaluate_sets(models, [Colours()], tmp_path, loop=Loop(precision="bfloat16"))
    rows = store.rows()
    assert tuple(rows.columns) == ROWS and set(rows.set) == {"colours"} and set(rows.labels) == {"full4", "subset"}
    assert set(rows[rows.checkpoint == "linear 0"].sha256) == {weights_digest(models[0].model)}
    assert rows.seed.isna().sum() == (rows.checkpoint == "nobody").sum() and set(rows.method) == {"linear", "nobody"}
    assert set(rows.data) == {Colours().digest()} and set(rows.precision) == {"bfloat16"}
    assert '"bilinear"' in rows.reading[0]
    assert store.about("colours", "linear 0")["versions"]["torch"] == torch.__version__
    assert set(rows.split) == {"all", "worst group"}
    assert "linear 0" in store._repr_html_() and "none yet" in Results(tmp_path / "nowhere")._repr_html_()
    table = headline(rows)
    right = store.pictures("colours", "linear 0").full_top1
    assert table.loc[("linear 0", "model"), ("colours", "top1")] == pytest.approx(100 * right.mean())


def test_rows_for_each_seed_and_its_split(tmp_path):
    models, splits = [checkpoint(Linear(0), "original"), linear(1)], {3: [0], 8: [1, 2]}
    store = evaluate_sets(models, [Colours()], tmp_path)
    plain = store.rows()
    source = Colours()
    evaluate_sets(models, [source], tmp_path, splits=splits)
    rows = store.rows()
    assert source.reads == [] and set(rows.seed) == {3, 8} and str(rows.seed.dtype) == "Int64"
    assert set(plain.split) == {"all", "worst group"} and set(rows.split) == {*plain.split, "fine-tuned", "other"}
    for name, seed in (("original", 3), ("linear 1", 8)):
        mine = rows[(rows.checkpoint == name) & (rows.seed == seed)].reset_index(drop=True)
        expected = accuracy_rows(store.pictures("colours", name), 4, fine_tuned=splits[seed])
        pd.testing.assert_frame_equal(mine[expected.columns], expected)
    pd.testing.assert_frame_equal(headline(rows), headline(plain))
    assert "original" in store._repr_html_()
    evaluate_sets(models, [source], tmp_path)  # another question, no new pass
    pd.testing.assert_frame_equal(store.rows(), plain)


def test_headlines_of_several_right_classes_and_protocols():
    key = {"checkpoint": "one", "set": "a", "labels": "full4", "split": "all", "metric": "top1", "seed": 0}
    rows = [key | {"protocol": "model", "targets": "any", "value": 1.0},
            key | {"protocol": "model", "targets": "first", "value": 2.0},
            key | {"protocol": "official", "targets": "any", "value": 3.0},
            key | {"protocol": "official", "targets": "first", "value": 4.0},
            key | {"protocol": "official", "targets": "any", "value": 5.0, "set": "b"},
            key | {"protocol": "model", "targets": "", "value": 6.0, "set": "c", "labels": "", "metric": "mean_iou"}]
    table = headline(pd.DataFrame(rows))
    assert table.loc[("one", "model"), ("a", "top1")] == 1 and table.loc[("one", "official"), ("a", "top1")] == 4
    assert table.loc[("one", "official"), ("b", "top1")] == 5 and table.loc[("one", "model"), ("c", "mean_iou")] == 6


def test_a_set_with_masks_in_the_store(world, tmp_path):
    source = MaskedSet(folder_of(world, "segmentation", objects=True), "objects")
    base = checkpoint(base_model(0), "base")
    store = evaluate_sets([base], [source], tmp_path, splits={0: [1], 1: [2]})
    rows, pictures = store.rows(), store.pictures("objects", "base")
    assert pictures.id.tolist() == list(source.ids) and store.about("objects", "base")["relevance"] == "attnlrp"
    for seed in (0, 1):
        mine = rows[rows.seed == seed].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine[["metric", "value", "low", "high", "n"]],
                                      segmentation_rows(pictures)[["metric", "value", "low", "high", "n"]])
    assert store.about("objects", "nobody") == {} and len(rows) == 10


@pytest.mark.parametrize("changed, what", [
    (lambda: ([checkpoint(Linear(5), "linear 0")], Colours(), Loop()), "another sha256"),
    (lambda: ([linear(0)], Colours(count=22), Loop()), "another data"),
    (lambda: ([linear(0, mean=0.3)], Colours(), Loop()), "another reading"),
    (lambda: ([linear(0)], Colours(), Loop(precision="bfloat16")), "another precision"),
])
def test_results_of_something_else_are_neither_used_nor_lost(tmp_path, changed, what):
    store = evaluate_sets([linear(0)], [Colours()], tmp_path)
    before = store.rows()
    models, source, loop = changed()
    with pytest.raises(ValueError, match=what):
        evaluate_sets(models, [source], tmp_path, loop=loop)
    assert store.rows().equals(before) and source.reads == []


def test_names_that_cannot_be(tmp_path):
    for bad in ("", "a--b", "../a", "a:b"):
        with pytest.raises(ValueError, match="become file names"):
            Results(tmp_path).path("pictures", "set", bad, "model")
    with pytest.raises(ValueError, match="checkpoints with different names"):
        evaluate_sets([linear(0), linear(0)], [Colours()], tmp_path)
    with pytest.raises(ValueError, match="sets with different names"):
        evaluate_sets([linear(0)], [Colours(), Colours()], tmp_path)
    with pytest.raises(ValueError, match="no results in"):
        Results(tmp_path).rows()
    with pytest.raises(ValueError, match="no results of 'a' on 'b'"):
        Results(tmp_path).pictures("b", "a")
    with pytest.raises(ValueError, match="space full or subset"):
        answers(made_up(), "half")


def test_the_hash_is_of_the_weights(tmp_path):
    one, same, other = Linear(0), Linear(0), Linear(1)
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    base = base_model(0)
    path = save_model(tmp_path / "a.safetensors", base)
    assert checkpoint(base, "a", path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != weights_digest(base)
    assert weights_digest(nn.BatchNorm1d(2)) == weights_digest(nn.BatchNorm1d(2))  # holds a tensor without dimensions


def test_methods_are_compared_seed_by_seed():
    values = {"a": {0: 10.0, 1: 30.0, 2: 20.0}, "b": {2: 19.0, 0: 12.0, 1: 25.0}}
    key = dict(zip(BY, ("val", "model", "full4", "any", "all", "top1")))
    rows = [key | {"method": m, "seed": s, "value": v} for m, each in values.items() for s, v in each.items()]
    rows = pd.DataFrame(rows)
    found = compare_methods(rows, "a", "b")
    differences = [-2.0, 5.0, 1.0]
    mean = sum(differences) / 3
    half = 4.303 * math.sqrt(sum((d - mean) ** 2 for d in differences) / 2) / math.sqrt(3)
    assert len(found) == 1 and found.n[0] == 3 and found.value[0] == pytest.approx(mean)
    assert (found.low[0], found.high[0]) == pytest.approx((mean - half, mean + half), abs=1e-3)
    with pytest.raises(ValueError, match="expected two of the methods a, b"):
        compare_methods(rows, "a", "c")


# ---- times ----


def test_times_slower_is_the_median_of_ratios_taken_in_turn(monkeypatch):
    clock, calls = [0.0], []
    lasts = {"slow": iter([100, 6, 8, 10]), "fast": iter([100, 2, 1, 2])}  # the first pair is the warm-up

    def take(name):
        calls.append(name)
        clock[0] += next(lasts[name])

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert times_slower(lambda: take("slow"), lambda: take("fast"), rounds=3) == 5  # the median of 3, 8 and 5
    assert calls == ["slow", "fast"] * 4


def test_a_cuda_device_is_waited_for(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: log.append("clock") or len(log))
    assert seconds(lambda: log.append("step")) == 3
    assert log == ["wait", "clock", "step", "wait", "clock"]
