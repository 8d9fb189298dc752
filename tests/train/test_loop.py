"""The loop: schedule, resuming, parts of batches, several processes, divergence."""
import copy
import json
import math
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, list_folder, scan
from cft.data.models import TINY, base_model
from cft.train import loop
from cft.train.closed import Head
from cft.train.loop import (
    Diverged,
    Sampler,
    _pace,
    averaged,
    draw,
    fine_tune,
    model_card,
    noise_folder,
    pieces,
    prepare,
    rehearse,
    tracked,
)
from cft.train.objectives import RECIPES, CrossEntropy


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = backdrop.write(tmp_path_factory.mktemp("w") / "b", {"train": 2}, seed=1)
    masks, objects = root / "masks/train", root / "objects/train"
    folder = scan(root / "images/train", masks, objects, list(backdrop.CLASSES)).only([0, 2, 4])
    return MaskedImages(folder, Preprocess.of(timm.create_model(TINY), margin=1.0), train=True, cached=True)


@pytest.mark.slow
def test_schedule_and_order(images):
    recipe = replace(RECIPES["plain"], epochs=50, batch=1, rate=1.0)
    sampler = Sampler(images, recipe)
    assert sampler.per_epoch * 50 == 300 and sorted(i for s in range(6) for i in sampler.indices(s)) == list(range(6))
    assert [sampler.indices(s) for s in range(6)] != [sampler.indices(s) for s in range(6, 12)]
    rates = []
    model = base_model(0)

    class Spy(CrossEntropy):
        def __call__(self, model, original, batch):
            rates.append(optimizer_rate())
            return super().__call__(model, original, batch)

    import cft.train.loop as module

    seen = {}
    adamw = torch.optim.AdamW
    optimizer_rate = lambda: seen["o"].param_groups[0]["lr"]
    try:
        torch.optim.AdamW = lambda *a, **k: seen.setdefault("o", adamw(*a, **k))
        module.fine_tune(model, images, replace(recipe, objective=Spy(), rate=1e-6), progress=False)
    finally:
        torch.optim.AdamW = adamw
    slow = [1e-6 * 0.85 ** (epoch // 2) for epoch in range(50) for _ in range(6)]  # the released code's schedule
    assert rates == pytest.approx(slow)


def test_contexts_come_from_other_classes(images):
    sampler = Sampler(images, RECIPES["rrda"])
    labels = torch.tensor([s.label for s in images.folder.samples])
    assert all((labels[sampler._others[k]] != k).all() for k in (0, 2, 4))


def test_contexts_come_from_given_scenes(images, tmp_path):
    for k, shade in enumerate((30, 220)):
        (tmp_path / f"b/{k}").mkdir(parents=True)
        Image.new("RGB", (80, 64), (shade, shade, shade)).save(tmp_path / f"b/{k}/0.png")
    given = MaskedImages(images.folder, images.preprocess, train=True, backgrounds=list_folder(tmp_path / "b"))
    sampler = Sampler(given, replace(RECIPES["rrda"], batch=6))
    shades = {round(v, 2) for v in sampler.batch(0).contexts.flatten(1).mean(1).tolist()}
    mean, std = images.preprocess.mean[0], images.preprocess.std[0]
    assert shades == {round((shade / 255 - mean) / std, 2) for shade in (30, 220)}
    assert sampler.batch(0).contexts.flatten(1).std(1).max() < 1e-5
    plain = Sampler(MaskedImages(images.folder, images.preprocess, train=True), RECIPES["rrda"]).identity()
    assert sampler.identity() == plain | {"backgrounds": given.backgrounds.digest()}


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not isinstance(r.objective, Head)])
def test_every_method_runs_and_head_only_means_head_only(images, name):
    model = base_model(0)
    recipe = replace(RECIPES[name], rate=1e-4, epochs=1)
    tuned, record = fine_tune(model, images, recipe, progress=False, validation=images)
    changed = {n for (n, a), b in zip(model.named_parameters(), tuned.parameters()) if not torch.equal(a, b)}
    assert changed == {"head.weight", "head.bias"} if name == "dfr-like" else len(changed) > 20
    assert math.isfinite(record["epochs"][0]["loss"]) and json.dumps(record)
    assert not tuned.training and all(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize("blocks", [1, 3])
def test_only_the_last_blocks_are_trained(images, blocks):
    model = base_model(0)
    recipe = replace(RECIPES["plain"], rate=1e-4, epochs=1, trainable=blocks)
    tuned, record = fine_tune(model, images, recipe, progress=False)
    changed = {n for (n, a), b in zip(model.named_parameters(), tuned.named_parameters()) if not torch.equal(a, b[1])}
    depth = len(model.blocks)
    last = tuple(f"blocks.{depth - 1 - k}." for k in range(blocks))
    assert {n for n, _ in model.named_parameters() if n.startswith((*last, "norm.", "head."))} == changed
    assert record["recipe"]["trainable"] == blocks


@pytest.mark.parametrize("which", [0, 99, "tail"])
def test_what_cannot_be_trained_is_named(images, which):
    with pytest.raises(ValueError, match=rf"all, head or a number of the \d last blocks; got {which!r}"):
        prepare(base_model(0), replace(RECIPES["plain"], trainable=which))


@pytest.mark.slow
def test_resume_is_bit_equal(images, tmp_path):
    recipe = replace(RECIPES["cft+"], rate=1e-4, epochs=4, batch=2)
    whole = fine_tune(base_model(0), images, recipe, progress=False).model
    for stop in (0, 5, 10):
        def cut(step, _, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        run = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(base_model(0), images, recipe, run, progress=False, save_every=3, on_step=cut)
        resumed, record = fine_tune(base_model(0), images, recipe, run, progress=False)
        assert record["resumed_at"] == stop // 3 * 3 + (3 if stop % 3 == 2 else 0)
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
        assert not (run / "state.pt").exists() and len(record["epochs"]) == 4


def test_random_state_and_model_are_left_alone(images):
    model = base_model(0)
    weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    fine_tune(model, images, replace(RECIPES["cft+"], rate=1e-3, epochs=1), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), model.state_dict().values()))


def test_another_job_is_refused(images, tmp_path):
    recipe = replace(RECIPES["plain"], epochs=1)
    fine_tune(base_model(0), images, recipe, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="finished run of another job"):
        fine_tune(base_model(0), images, replace(recipe, rate=1e-3), tmp_path / "a", progress=False)

    def cut(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        longer = replace(recipe, epochs=3)
        fine_tune(base_model(0), images, longer, tmp_path / "b", progress=False, save_every=1, on_step=cut)
    with pytest.raises(ValueError, match="unfinished run of another job"):
        fine_tune(base_model(0), images, replace(recipe, rate=1e-3, epochs=3), tmp_path / "b", progress=False)


def test_divergence_names_the_pictures(images, tmp_path):
    recipe = replace(RECIPES["plain"], rate=1e20, epochs=20, batch=3)
    with pytest.raises(Diverged, match=r"step \d+: .*batch: .*\.png") as error:
        fine_tune(base_model(0), images, recipe, tmp_path / "r", progress=False, save_every=1)
    step = int(str(error.value).split(":")[0].split()[1])
    state = torch.load(tmp_path / "r/state.pt", weights_only=True)
    assert state["step"] == step


def test_averaging():
    a, b = base_model(0), base_model(1)
    target = [p.detach() * 0.3 + q.detach() * 0.7 for p, q in zip(a.parameters(), b.parameters())]
    averaged(a, b, 0.7)
    assert all(torch.allclose(p, t, atol=1e-6) for p, t in zip(b.parameters(), target))


def test_rates_by_part_and_cosine(images):
    rates = {"blocks": 0, "patch_embed": 1e-5}
    recipe = replace(RECIPES["plain"], rate=1e-3, rates=rates, schedule="cosine", epochs=2, batch=3)
    original, tuned, optimizer = prepare(base_model(0), recipe)
    assert not tuned.blocks.training and tuned.training and [g["peak"] for g in optimizer.param_groups] == [1e-3, 1e-5]
    sizes = [sum(p.numel() for p in g["params"]) for g in optimizer.param_groups]
    small = sum(p.numel() for p in tuned.patch_embed.parameters())
    assert sizes == [sum(p.numel() for n, p in tuned.named_parameters() if p.requires_grad) - small, small]
    paces, model = [], base_model(0)
    note = lambda step, _: paces.append(_pace(recipe, step, 4))
    done = fine_tune(model, images, recipe, progress=False, on_step=note)
    assert paces == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    moved = {n for (n, a), b in zip(model.named_parameters(), done.model.parameters()) if not torch.equal(a, b)}
    assert {"head.weight", "patch_embed.net.0.weight"} <= moved and not any(n.startswith("blocks.") for n in moved)


def test_restart_begins_anew(images, tmp_path):
    recipe = replace(RECIPES["plain"], epochs=1)
    first = fine_tune(base_model(0), images, recipe, tmp_path, progress=False)
    again = fine_tune(base_model(0), images, recipe, tmp_path, progress=False, restart=True)
    assert again.record == first.record, "the same job is not done twice"
    other = replace(recipe, rate=1e-3)
    done = fine_tune(base_model(0), images, other, tmp_path, progress=False, restart=True)
    assert done.record["recipe"]["rate"] == 1e-3
    assert fine_tune(base_model(0), images, other, tmp_path).record == done.record


def test_missing_masks_and_bad_settings(images):
    samples = tuple(replace(s, mask=None) for s in images.folder.samples)
    bare = MaskedImages(replace(images.folder, samples=samples), images.preprocess)
    with pytest.raises(ValueError, match="needs mask masks"):
        fine_tune(base_model(0), bare, RECIPES["cft"])


def same_up_to_rounding(one, other):
    """Weights that have a gradient agree; the keys' biases have none but rounding, of which AdamW makes full steps."""
    for (name, a), b, start in zip(one.named_parameters(), other.parameters(), base_model(0).parameters()):
        if name.endswith("qkv.bias"):
            a, b, start = (torch.cat([t[:96], t[192:]]) for t in (a, b, start))
        assert (a - b).norm() < 0.01 * (a - start).norm(), name


def test_a_batch_in_chunks_is_the_batch(images):
    for name in ("cft", "cft+", "rrr"):
        recipe = replace(RECIPES[name], rate=1e-4, epochs=2, batch=5)
        both = (replace(recipe, chunk=chunk) for chunk in (0, 2))
        whole, parts = (fine_tune(base_model(0), images, one, progress=False) for one in both)
        same_up_to_rounding(whole.model, parts.model)
        assert whole.record["epochs"][-1]["loss"] == pytest.approx(parts.record["epochs"][-1]["loss"], rel=1e-3)


def test_pieces_cover_the_batch_once():
    for size, chunk, world in ((8, 0, 1), (8, 3, 2), (5, 2, 3), (1, 0, 2), (7, 1, 4)):
        dealt = [list(range(*p.indices(size))) for rank in range(world) for p in pieces(size, chunk, rank, world)]
        assert [i for part in dealt for i in part] == list(range(size))
        assert all(0 < len(part) <= (chunk or size) for part in dealt)


WORKER = """
import os, sys
import torch
from dataclasses import replace
from pathlib import Path
torch.set_num_threads(1)
from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, list_folder, scan
from cft.train.loop import Diverged, fine_tune
from cft.data.models import base_model
from cft.train.objectives import RECIPES
root, out = Path(sys.argv[1]), Path(sys.argv[2])
masks, objects = root / "masks/train", root / "objects/train"
folder = scan(root / "images/train", masks, objects, list(backdrop.CLASSES)).only([0, 2, 4])
images = MaskedImages(folder, Preprocess.of(base_model(0), margin=1.0), train=True, cached=True)
recipe = replace(RECIPES["cft+"], rate=1e-4, epochs=3, batch=5)
tuned, record = fine_tune(base_model(0), images, recipe, out / "run", progress=False)
print(f"processes {record['processes']}\\n", end="", flush=True)
try:
    fine_tune(base_model(0), images, replace(RECIPES["plain"], rate=1e20, epochs=9, batch=5), progress=False)
except Diverged as error:
    print(f"stopped {str(error)[:6]}\\n", end="", flush=True)
os.environ["ACCELERATE_USE_FSDP"] = "true"  # as by accelerate launch --use_fsdp
recipe = replace(recipe, chunk=2, best=True)  # the last batch is of one picture: for one process there is none

def cut(step, parts):
    if step == 4:
        raise InterruptedError

for on_step in (cut, None):
    try:
        fine_tune(base_model(0), images, recipe, out / "dealt", progress=False, save_every=2, on_step=on_step,
                  validation=images)
    except InterruptedError:
        torch.distributed.barrier()
"""


@pytest.mark.slow
def test_two_processes_are_one(images, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    root = images.folder.root.parents[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run([*torchrun, tmp_path / "worker.py", root, tmp_path], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [done.stdout.count(words) for words in ("processes 2", "stopped step ")]
    assert counts == [2, 2], done.stdout + done.stderr[-2000:]
    recipe = replace(RECIPES["cft+"], rate=1e-4, epochs=3, batch=5)
    alone = fine_tune(base_model(0), images, recipe, progress=False)
    together = fine_tune(base_model(0), images, recipe, tmp_path / "run", progress=False)
    assert together.record["processes"] == 2
    best = {"recipe": replace(recipe, chunk=2, best=True), "validation": images, "progress": False}
    kept, dealt = (fine_tune(base_model(0), images, run=run, **best) for run in (None, tmp_path / "dealt"))
    assert (dealt.record["dealt"], dealt.record["processes"], dealt.record["resumed_at"]) == (True, 2, 4)
    for one, two in ((alone, together), (kept, dealt)):
        same_up_to_rounding(one.model, two.model)
        assert one.record["epochs"][-1]["loss"] == pytest.approx(two.record["epochs"][-1]["loss"], rel=1e-4)
        assert one.record.get("best_step") == two.record.get("best_step")


def test_the_best_epoch_is_kept(images, tmp_path):
    recipe = replace(RECIPES["plain"], rate=3e-2, epochs=4, batch=3, best=True, decays=0)  # such a rate does harm
    with pytest.raises(ValueError, match="needs validation pictures"):
        fine_tune(base_model(0), images, recipe)

    def loss(model):
        model.eval()
        return sum(torch.nn.functional.cross_entropy(model(b["image"][None]), torch.tensor([b["label"]])).item()
                   for b in (validation[i] for i in range(len(validation)))) / len(validation)

    validation = MaskedImages(images.folder, images.preprocess)
    kept, record = fine_tune(base_model(0), images, recipe, progress=False, validation=validation)
    shorter = (replace(recipe, best=False, epochs=n) for n in (1, 2, 3, 4))
    ends = [fine_tune(base_model(0), images, one, progress=False).model for one in shorter]
    losses = [loss(model) for model in ends]
    assert record["best_step"] == 2 * (1 + losses.index(min(losses)))
    assert loss(kept) == pytest.approx(min(losses), rel=1e-5)

    def cut(step, _):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(base_model(0), images, recipe, tmp_path, False, 2, on_step=cut, validation=validation)
    resumed, again = fine_tune(base_model(0), images, recipe, tmp_path, False, validation=validation)
    assert again["best_step"] == record["best_step"]
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), resumed.parameters()))


def test_half_precision_is_close(images):
    recipe = replace(RECIPES["cft"], rate=1e-5, epochs=1)
    both = (replace(recipe, precision=precision) for precision in ("no", "bf16"))
    full, half = (fine_tune(base_model(0), images, one, progress=False) for one in both)
    assert half.record["epochs"][0]["loss"] == pytest.approx(full.record["epochs"][0]["loss"], rel=0.03)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.model.parameters())


def test_draw(images):
    drawn = draw(images.folder, 3, classes=2, per_class=1)
    assert len(drawn) == 2 == len(drawn.labels) and draw(images.folder, 3, 2, 1).samples == drawn.samples
    shuffled = replace(images.folder, samples=images.folder.samples[::-1])
    assert draw(shuffled, 3, 2, 1).samples == drawn.samples
    assert len({draw(images.folder, seed, 1, 1).samples for seed in range(20)}) > 3
    with pytest.raises(ValueError, match="at least 500 classes.*got 3"):
        draw(images.folder, 0)
    with pytest.raises(ValueError, match="at least 3 pictures of bird, got 2|at least 3 pictures of .*, got 2"):
        draw(images.folder, 0, classes=2)


def test_card_and_rehearsal(images, tmp_path):
    done = fine_tune(base_model(0), images, replace(RECIPES["cft"], epochs=1), tmp_path, progress=False)
    record, shown = done.record, done._repr_html_()
    assert f"{record['data']['pictures']} pictures, {record['steps']} steps" in shown
    assert f"{record['epochs'][0]['loss']:.4f}" in shown
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == model_card(record, TINY) and record["data"]["digest"] in card and "patented" in card
    price = rehearse(base_model(0), images, RECIPES["cft"])
    assert price["steps"] == 50 and price["seconds"] == pytest.approx(50 * price["seconds_per_step"])
    assert price["seconds"] > 0


def test_a_rehearsal_is_timed_from_idle_to_idle(images, monkeypatch):
    """By `seconds`, which waits for a CUDA device (see the test of passes)."""
    steps = []
    monkeypatch.setattr(loop, "seconds", lambda take: steps.append(len(take())) or 6.0)
    price = rehearse(base_model(0), images, replace(RECIPES["plain"], batch=2), 3)
    assert steps == [3] and price["seconds_per_step"] == 2


def test_noise_is_the_same_noise_again(tmp_path):
    one, two = (noise_folder(tmp_path / name, 4, 2) for name in "ab")
    assert len(one) == 8 and sorted(one.labels) == [0, 1, 2, 3]
    held = [[(s.label, s.path.read_bytes(), s.mask.read_bytes()) for s in folder.samples] for folder in (one, two)]
    assert held[0] == held[1]
    assert len({s.path.read_bytes() for s in one.samples}) == 8


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"junk" * 99, None])
def test_a_damaged_state_is_left_behind(images, tmp_path, caplog, content):
    recipe = replace(RECIPES["plain"], epochs=1)
    whole, _ = fine_tune(base_model(0), images, recipe, progress=False)
    for run, restart in ((tmp_path / "a", False), (tmp_path / "b", True)):
        run.mkdir()
        torch.save({"job": "x"}, run / "state.pt") if content is None else (run / "state.pt").write_bytes(content)
        tuned, record = fine_tune(base_model(0), images, recipe, run, progress=False, restart=restart)
        assert record["resumed_at"] == 0 and "state.pt is damaged; the run starts from the beginning" in caplog.text
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), tuned.state_dict().values()))
        assert not (run / "state.pt").exists()


def test_a_damaged_record_is_named_or_made_again(images, tmp_path):
    recipe = replace(RECIPES["plain"], epochs=1)
    fine_tune(base_model(0), images, recipe, tmp_path, progress=False)
    for content, words in (("", "is no sound JSON"), ("[]", "holds a list; expected a dict")):
        (tmp_path / "record.json").write_text(content)
        with pytest.raises(ValueError, match=f"record.json {words}"):
            fine_tune(base_model(0), images, recipe, tmp_path, progress=False)
    fine_tune(base_model(0), images, recipe, tmp_path, progress=False, restart=True)
    assert json.loads((tmp_path / "record.json").read_text())["steps"]


def two_steps(images, name, folder):
    recipe = replace(RECIPES["plain"], epochs=1, batch=3, rate=1e-6)
    with tracked(name, folder, {"method": "plain", "rate": 1e-6}) as on_step:
        return fine_tune(base_model(0), images, recipe, progress=False, on_step=on_step).record["steps"]


def test_tensorboard_shows_every_step(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert two_steps(images, "tensorboard", tmp_path / "run") == 2
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1]
    assert len([*(tmp_path / "run").rglob("hparams.yml")]) == 1


def test_wandb_is_offline_unless_it_was_told_otherwise(images, tmp_path, monkeypatch):
    said = []

    class Run:
        def log(self, values, step):
            said.append((step, os.environ["WANDB_MODE"], {*values} >= {"loss"}))

        def finish(self):
            said.append("end")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda project, dir: said.append((project, os.path.isdir(dir))) or Run()
    wandb.config = types.SimpleNamespace(update=lambda values, **_: said.append(values["method"]))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for told, mode in ((None, "offline"), ("online", "online")):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if told:
            monkeypatch.setenv("WANDB_MODE", told)
        two_steps(images, "wandb", tmp_path / "run")
        assert said == [("cft", True), "plain", (0, mode, True), (1, mode, True), "end"]
        said.clear()


def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch):
    for name, install in {"wandb": "'wandb'", "tensorboard": r"'cft\[track\]'"}.items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"tracking needs {name}; install it with: pip install {install}"):
            tracked(name, tmp_path)
    with pytest.raises(ValueError, match="by tensorboard or wandb; got mlflow"):
        tracked("mlflow", tmp_path)
    assert not [*tmp_path.iterdir()]
