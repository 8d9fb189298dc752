"""The bench counts what a hand counts, and writes what it says it writes."""

import csv
from functools import partial
from pathlib import Path

import cost
import numpy as np
import peers
import phases
import pipeline
import pytest
import run
import timm
import torch
from grounding import grounding_rows
from PIL import Image
from table import COLUMNS, merge, read_rows, row, write_rows
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import cft.data.models  # noqa: F401  (registers cft_vit_tiny64)
from cft.data.folders import list_folder
from cft.data.testsets import folder_set
from cft.evaluate.passes import Checkpoint, Loop, reading_of, run_pass
from cft.explain.maps import relevance
from cft.train.objectives import RECIPES

TABLE = Path(__file__).parents[2] / "figures/bench.csv"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return cost.make_case(timm.create_model("cft_vit_tiny64"), 2, 64)


@pytest.mark.parametrize("rows,wide,narrow", [(5, 7, 3), (1, 4, 9)])
def test_flops_of_a_linear_layer(rows, wide, narrow):
    layer, x = nn.Linear(wide, narrow), torch.randn(rows, wide, requires_grad=True)
    product = 2 * rows * wide * narrow
    assert cost.count_flops(lambda: layer(x)) == product
    assert cost.count_flops(lambda: layer(x).sum().backward()) == 3 * product


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
    unread = 2 * batch * (tokens - 1) * (width * width + 2 * width * hidden) * 2  # of the last block, both ways
    unread += 6 * 2 * batch * heads * (tokens - 1) * tokens * head
    return forward, forward + relevance - unread


def test_flops_of_a_vision_transformer():
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    model = VisionTransformer(**sizes, num_classes=5).eval()
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    forward, both = vit_flops_by_hand(model, 2, 16)
    with torch.no_grad():
        assert cost.count_flops(lambda: model(images)) == forward
    assert cost.count_flops(lambda: relevance(model, images, labels, differentiable=True)) == both


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device the allocator counts")
def test_memory_of_a_chain():
    x, w = torch.randn(10, 100), torch.randn(100, 100, requires_grad=True)
    w.grad = torch.zeros_like(w)

    def kept():
        return (x @ w).sin().sin()

    peak = cost.peak_bytes(kept)
    assert peak == 3 * 4000  # sin keeps what it was given: the product and the first result, and makes the second
    with torch.no_grad():
        assert cost.peak_bytes(kept) == 2 * 4000  # a value in, a value out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device the allocator counts")
def test_memory_counts_storages_once_and_forgets_them():
    before = torch.zeros(1000)
    with cost.LiveBytes() as counter:
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

    whole = cost.peak_bytes(lambda: piece(piece(x)).sum().backward())
    spare = lambda x: checkpoint(piece, x, use_reentrant=False)
    spared = cost.peak_bytes(lambda: spare(spare(x)).sum().backward())
    assert 32 * 4000 <= whole < 36 * 4000 and 17 * 4000 <= spared < 21 * 4000


def test_a_checkpointed_step_is_the_same_step(tiny):
    gradients = []
    for objective in (RECIPES["cft"].objective, cost.checkpointed_objective):
        cost.training_step(tiny, objective)()
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
        patch.setattr(cost, "cft_loss", spy)
        loss = cost.official_objective(tiny.model, tiny.model, tiny.batch)[0]
    found = relevance(tiny.model, tiny.batch.images, labels, "gae", differentiable=False)
    map_ = found.map("minmax", tuple(tiny.batch.masks.shape[1:]))
    assert seen["phi"].shape[1:] == (64, 64)
    torch.testing.assert_close(seen["phi"], map_, rtol=1e-4, atol=1e-4)
    last = tiny.model.blocks[-1]
    weights = [last.attn.proj.weight, last.mlp.fc1.weight, last.attn.qkv.weight]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    assert grads[0] is None and grads[1] is None and grads[2].abs().max() > 0


def test_rows_and_file(tiny, tmp_path):
    rows = [*cost.cost_rows(tiny, suffix="_here"), *cost.wall_rows(tiny, ("cft_step",), 1, "_here")]
    kinds = ("cft_step", "checkpointed", "official_step")
    names = [f"{kind}_{what}_ratio_here" for kind in kinds for what in ("flops", "memory")]
    assert [r["name"] for r in rows] == [*names, "cft_step_wall_ratio_here"]
    assert all(r["value"] > 0.5 and "cft_vit_tiny64, batch 2" in r["note"] for r in rows)
    ratios = {r["name"].removesuffix("_ratio_here"): r["value"] for r in rows}
    assert 1.5 < ratios["cft_step_flops"] < 1.65 < 2.1 < ratios["official_step_flops"]  # one block of a few is spared
    assert ratios["checkpointed_memory"] < ratios["cft_step_memory"] < 2
    write_rows(rows, tmp_path / "bench.csv")
    with open(tmp_path / "bench.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS == ("name", "value", "unit", "goal", "peer", "note")
    assert [float(line["value"]) for line in table] == [r["value"] for r in rows]
    assert [p.name for p in tmp_path.iterdir()] == ["bench.csv"]


def test_goals_are_those_of_vision_transformers():
    assert cost.step_row("cft_step_flops_ratio", "_dinov2", 2, "")["goal"] == "<= 2.05"
    assert cost.step_row("cft_step_flops_ratio", "_convnextv2", 2, "")["goal"] == ""


def test_a_new_row_takes_its_place_and_no_other_byte_changes(tmp_path):
    before = TABLE.read_bytes()
    assert write_rows(merge(read_rows(TABLE), []), tmp_path / "same.csv").read_bytes() == before
    new = [row("cft_help_seconds", 1 / 3, "s", note="a, b"), row("another", 2, "s")]
    write_rows(merge(read_rows(TABLE), new), tmp_path / "new.csv")
    old, now = before.decode().splitlines(), (tmp_path / "new.csv").read_text().splitlines()
    (changed,) = (k for k, line in enumerate(old) if line.startswith("cft_help_seconds,"))
    assert now == [*old[:changed], 'cft_help_seconds,0.333,s,,,"a, b"', *old[changed + 1:], "another,2.0,s,,,"]
    assert read_rows(tmp_path / "none.csv") == []


# ---- the command ----


def test_every_row_of_the_table_is_made_and_every_measurement_has_its_rows():
    made = [name for each in run.MEASUREMENTS if each.name != "compiled" for name in each.rows]
    assert made == [line["name"] for line in read_rows(TABLE)]
    names = [each.name for each in run.MEASUREMENTS]
    assert len({*names, *made}) == len(names) + len(made)


def test_choosing():
    names = lambda *given: [each.name for each in run.choose(given)]
    assert names() == [each.name for each in run.MEASUREMENTS if each.name != "compiled"]
    assert names("peers", "import_cft_seconds", "cft_help_seconds") == ["peers", "start"]
    assert names("compiled") == ["compiled"]
    with pytest.raises(ValueError, match="expected some of rendering, demo, cost, .* got nonsense"):
        names("peers", "nonsense")


def test_the_command_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    values = iter([1.0, 2.0, 3.0])
    measured = lambda name: [row(name, next(values), "s")]
    fake = [run.Measurement(name, (f"{name}_s",), partial(measured, f"{name}_s")) for name in "ab"]
    monkeypatch.setattr(run, "MEASUREMENTS", fake)
    out = tmp_path / "new" / "bench.csv"
    run.main(["--out", str(out)])
    assert [(line["name"], line["value"]) for line in read_rows(out)] == [("a_s", "1.0"), ("b_s", "2.0")]
    run.main(["a_s", "--out", str(out)])
    assert [(line["name"], line["value"]) for line in read_rows(out)] == [("a_s", "3.0"), ("b_s", "2.0")]
    assert capsys.readouterr().out.split()[::3] == ["a_s", "b_s", "a_s"]
    with pytest.raises(SystemExit):
        run.main(["c", "--out", str(out)])
    assert "got c" in capsys.readouterr().err


def test_a_case_is_made_when_it_is_needed():
    seen = []
    measure = run.with_case(lambda case: seen.append(case) or [], 1, "cft_vit_tiny64", img_size=64)
    assert seen == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_case", lambda model, batch: cost.make_case(model, batch, 64))
        assert measure() == [] and seen[0].note.startswith("cft_vit_tiny64, batch 1, float32, ")


# ---- single measurements ----


def test_no_demo_no_row(tmp_path):
    assert pipeline.demo_rows(tmp_path / "demo.json") == []
    (tmp_path / "demo.json").write_text('{"seeds": [0, 1], "methods": ["a", "b", "c"], "seconds": 12.5}')
    (line,) = pipeline.demo_rows(tmp_path / "demo.json")
    assert line["value"] == 12.5 and line["note"].startswith("2 seeds x 3 methods")


def test_no_peers_no_rows(tiny, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.peer_rows(tiny, rounds=1) == []


def test_captum_is_a_peer(tiny, monkeypatch):
    pytest.importorskip("captum")
    found = peers.importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "lxt" else found(name))
    (line,) = peers.peer_rows(tiny, rounds=1)
    assert line["name"] == "relevance_vs_captum_speed" and line["value"] > 0


def test_classes_together(tiny):
    (line,) = peers.classes_rows(tiny, 3, rounds=1)
    assert line["value"] > 0.5 and line["note"].startswith("inference, 3 classes, ")


# ---- the profile ----


@pytest.mark.parametrize("name", phases.STEPS)
def test_a_profiled_step_is_the_step(tiny, name):
    cost.training_step(tiny, RECIPES[name].objective)()
    expected = [p.grad.clone() for p in tiny.model.parameters()]
    tiny.model.zero_grad(set_to_none=False)
    entered = []
    phases.STEPS[name](tiny, entered.append)
    for p, g in zip(tiny.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
    own = [phase for phase in phases.PHASES[1:-1] if name == "cft" or "pull" not in phase]
    assert entered == own


def test_profile(tiny):
    table = phases.profile(tiny, rounds=1, least=0.05)
    times, rooms = (table[table.what == what] for what in ("time", "memory"))
    assert abs(times[times.step == "plain"].over_plain.sum() - 1) < 0.01
    assert rooms[rooms.step == "plain"].over_plain.max() == 1
    assert set(times[times.step == "cft"].phase) == set(rooms[rooms.step == "cft"].phase) == set(phases.PHASES)
    assert (times[times.operator != "other"].over_plain >= 0.05).all() and "mm" in set(times.operator)


def test_drawing():
    (line,) = pipeline.rendering_rows(1)
    assert line["name"] == "render_images_per_s" and line["value"] > 0


def test_the_store_gives_back_its_masks(tmp_path):
    (line,) = pipeline.store_rows(tmp_path, 20)
    assert line["value"] > 0 and "200 masks" in line["note"]


def test_our_loop_and_timms_give_the_same_answers(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10)
    (pictures,) = run_pass(folder_set(tmp_path), [Checkpoint("a", model, "")], reading_of(model), Loop(batch=4))
    top1, top5 = pipeline.timm_validation(model, list_folder(tmp_path), 4)
    assert top1 == pytest.approx(100 * pictures.full_top1.mean(), abs=1e-3)
    assert top5 == pytest.approx(100 * pictures.full_top5.mean(), abs=1e-3)


def test_evaluation_against_timm(tmp_path):
    lines = pipeline.evaluation_rows(tmp_path, "test_vit", 4, 1)
    assert [line["name"] for line in lines] == ["eval_throughput_vs_timm", "eval_throughput_of_three_vs_timm"]
    for line in lines:
        assert line["value"] > 0 and line["note"].startswith("test_vit, 4 JPEGs of 400 x 300, batch 16")


def test_a_rehearsal_of_the_papers_run(tmp_path, monkeypatch):
    real = pipeline.noise_folder
    monkeypatch.setattr(pipeline, "noise_folder", lambda root: real(root, 6, 3))
    step, hours, *memory = pipeline.paper_run_rows(tmp_path, "cft_vit_tiny64", 1)
    assert (step["name"], hours["name"]) == ("paper_run_step_seconds", "paper_run_hours")
    assert len(memory) == torch.cuda.is_available()
    assert step["value"] > 0 and "18 pictures, 150 steps of 8, no autocast" in step["note"]


@pytest.mark.slow
def test_grounding_together_encodes_once():
    pytest.importorskip("segment_anything")
    pytest.importorskip("groundingdino")
    *ratios, encodings = grounding_rows((1, 2), 1)
    assert [line["name"] for line in ratios] == ["grounding_speedup_k1", "grounding_speedup_k2"]
    assert encodings["value"] == 1 and encodings["note"] == "2 concepts" and all(line["value"] > 0 for line in ratios)


@pytest.mark.slow
def test_a_start_takes_time():
    opened, helped = pipeline.start_rows(1)
    assert opened["name"] == "import_cft_seconds" and helped["name"] == "cft_help_seconds" and helped["value"] < 60


@pytest.mark.slow
def test_the_explorer_is_moved_in_every_way(tmp_path):
    (line,) = pipeline.explorer_rows(tmp_path, 1)
    kinds = ("class", "picture", "occurrence", "coverage", "concept", "method", "normalize", "explain", "strength")
    assert line["value"] > 0 and all(f" {what} " in line["note"] for what in kinds)
