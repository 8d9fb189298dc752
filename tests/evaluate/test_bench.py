"""The bench counts what a hand counts, and writes what it says it writes."""

import csv

import pandas as pd
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import cft.data.models  # noqa: F401  (registers cft_vit_tiny64)
from cft.apps.explorer import bench_explorer
from cft.evaluate import bench
from cft.train.objectives import RECIPES


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return bench.make_case(timm.create_model("cft_vit_tiny64"), 2, 64)


@pytest.mark.parametrize("rows,wide,narrow", [(5, 7, 3), (1, 4, 9)])
def test_flops_of_a_linear_layer(rows, wide, narrow):
    layer, x = nn.Linear(wide, narrow), torch.randn(rows, wide, requires_grad=True)
    product = 2 * rows * wide * narrow
    assert bench.count_flops(lambda: layer(x)) == product
    assert bench.count_flops(lambda: layer(x).sum().backward()) == 3 * product


def vit_flops_by_hand(model, batch, size):
    """Forward FLOPs of a plain ViT, and what the relevance pass adds, product by product."""
    patch, depth, width, heads = 4, len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads
    patches, hidden, classes = (size // patch) ** 2, model.blocks[0].mlp.fc1.out_features, model.num_classes
    tokens, head = patches + 1, width // heads
    stem = 2 * batch * patches * (3 * patch * patch) * width
    linears = 2 * batch * tokens * (width * 3 * width + width * width + 2 * width * hidden)
    product = 2 * batch * heads * tokens * tokens * head  # q kᵀ, or A v, of one block
    readout = 2 * batch * width * classes
    forward = stem + depth * (linears + 2 * product) + readout
    relevance = depth * (linears + 4 * product) + readout  # Aᵀg, g vᵀ, gS k, gSᵀ q
    return forward, forward + relevance


def test_flops_of_a_vision_transformer():
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5, mlp_ratio=2).eval()
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    forward, both = vit_flops_by_hand(model, 2, 16)
    with torch.no_grad():
        assert bench.count_flops(lambda: model(images)) == forward
    assert bench.count_flops(lambda: bench.relevance(model, images, labels, differentiable=True)) == both


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device the allocator counts")
def test_memory_of_a_chain():
    x, w = torch.randn(10, 100), torch.randn(100, 100, requires_grad=True)
    w.grad = torch.zeros_like(w)

    def kept():
        return (x @ w).sin().sin()

    peak = bench.peak_bytes(kept)
    assert peak == 3 * 4000  # sin keeps what it was given: the product and the first result, and makes the second
    with torch.no_grad():
        assert bench.peak_bytes(kept) == 2 * 4000  # a value in, a value out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device the allocator counts")
def test_memory_counts_storages_once_and_forgets_them():
    before = torch.zeros(1000)
    with bench.LiveBytes() as counter:
        before.view(10, 100).T.mul_(2)  # nothing is made
        assert counter.live == counter.peak == 0
        made = [before + i for i in range(3)]
        views = [m[10:20] for m in made]
        assert counter.live == counter.peak == 12_000
        del made
        assert counter.live == 12_000  # a view keeps its storage
        views.pop()
        assert (counter.live, counter.peak) == (8_000, 12_000)
        del views
        small = before[:10] * 1
    assert (counter.live, counter.peak) == (40, 12_000)
    assert small.numel() == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device the allocator counts")
def test_memory_sees_checkpointing():
    x, scale = torch.randn(1000), torch.ones((), requires_grad=True)
    scale.grad = torch.zeros(())

    def piece(x):
        for _ in range(8):
            x = (x * scale).sin()
        return x

    whole = bench.peak_bytes(lambda: piece(piece(x)).sum().backward())
    spared = bench.peak_bytes(lambda: checkpoint(piece, checkpoint(piece, x, use_reentrant=False), use_reentrant=False).sum().backward())
    assert 32 * 4000 <= whole < 36 * 4000 and 17 * 4000 <= spared < 21 * 4000


def test_wall_ratio_is_slow_over_fast(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    lasts = iter([100, 100, 6, 2, 8, 1, 10, 2])  # the first pair is the warm-up

    def work():
        clock[0] += next(lasts)

    assert bench.wall_ratio(work, work, rounds=3) == 5  # the median of 3, 8 and 5


def test_a_checkpointed_step_is_the_same_step(tiny):
    gradients = []
    for objective in (RECIPES["cft"].objective, bench.checkpointed_objective):
        bench.training_step(tiny, objective)()
        gradients.append([p.grad.clone() for p in tiny.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_official_rollout_is_gae(tiny):
    """The official algorithm's map is `gae`, min–max scaled at pixels; its graph misses the last block's projection."""
    labels, seen = tiny.batch.labels, {}

    def spy(phi, mask, logits, **_):
        seen["phi"] = phi
        return (phi.sum(), {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "cft_loss", spy)
        loss = bench.official_objective(tiny.model, tiny.model, tiny.batch)[0]
    map_ = bench.relevance(tiny.model, tiny.batch.images, labels, "gae", differentiable=False).map("minmax", tuple(tiny.batch.masks.shape[1:]))
    assert seen["phi"].shape[1:] == (64, 64)
    torch.testing.assert_close(seen["phi"], map_, rtol=1e-4, atol=1e-4)
    last = tiny.model.blocks[-1]
    grads = torch.autograd.grad(loss, [last.attn.proj.weight, last.mlp.fc1.weight, last.attn.qkv.weight], allow_unused=True)
    assert grads[0] is None and grads[1] is None and grads[2].abs().max() > 0


def test_rows_and_file(tiny, tmp_path):
    rows = [*bench.bench_cost(tiny, suffix="_here"), *bench.bench_wall(tiny, ("cft_step",), 1, "_here")]
    kinds = ("cft_step", "checkpointed", "official_step")
    assert [r["name"] for r in rows] == [*(f"{kind}_{what}_ratio_here" for kind in kinds for what in ("flops", "memory")), "cft_step_wall_ratio_here"]
    assert all(r["value"] > 0.5 and "cft_vit_tiny64, batch 2" in r["note"] for r in rows)
    bench.write_bench(rows, tmp_path / "bench.csv")
    with open(tmp_path / "bench.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == bench.BENCH_COLUMNS == ("name", "value", "unit", "goal", "peer", "note")
    assert [float(line["value"]) for line in table] == [r["value"] for r in rows]
    assert [p.name for p in tmp_path.iterdir()] == ["bench.csv"]


def test_no_demo_no_row(tmp_path):
    assert bench.bench_demo(tmp_path / "demo.json") == []
    (tmp_path / "demo.json").write_text('{"seeds": [0, 1], "methods": ["a", "b", "c"], "seconds": 12.5}')
    (row,) = bench.bench_demo(tmp_path / "demo.json")
    assert row["value"] == 12.5 and row["note"].startswith("2 seeds x 3 methods")


def test_no_peers_no_rows(tiny, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.bench_peers(tiny, rounds=1) == []


def test_the_explorer_is_moved_in_every_way(tmp_path):
    (row,) = bench_explorer(tmp_path / "e", 1)
    assert row["value"] > 0 and all(f" {what} " in row["note"] for what in ("class", "picture", "occurrence", "coverage", "concept", "method", "normalize", "explain", "strength"))
    bench.write_bench([bench.bench_row("a", 1, "s", "", "", "x, y"), bench.bench_row("explorer_move_ms", 9, "ms", "", "", "old")], tmp_path / "b.csv")
    bench.add_bench([row], tmp_path / "b.csv")
    table = pd.read_csv(tmp_path / "b.csv")
    assert table["name"].tolist() == ["a", "explorer_move_ms"] and table["value"].tolist() == [1, row["value"]]
