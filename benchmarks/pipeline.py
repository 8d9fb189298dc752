"""Around the training step: drawing, the mask store, evaluation, the paper's run, the explorer, start-up, the demo.

What needs files takes a folder `root`, new or empty.
"""

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from table import Row, device, place, row
from timm.data.config import resolve_model_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from timm.utils.metrics import AverageMeter, accuracy
from torch import nn

from cft.apps.explorer import Explorer, Material, first_view
from cft.concepts.filters import Concept, ConceptSet, demo_concepts
from cft.concepts.grounding import Grounding
from cft.concepts.language import ClassName
from cft.concepts.masks import build_masks
from cft.concepts.store import read_back
from cft.data import backdrop
from cft.data.folders import Folder, MaskedImages, Preprocess, list_folder
from cft.data.models import TINY
from cft.data.testsets import folder_set
from cft.demo.toy_grounder import toy_grounder
from cft.evaluate.passes import Loop, checkpoint, reading_of, run_pass, seconds, times_slower
from cft.files import ASSETS, read_json
from cft.train.closed import Head
from cft.train.loop import noise_folder, rehearse
from cft.train.objectives import RECIPES


def rendering_rows(per_class: int = 16) -> list[Row]:
    """Pictures drawn a second, one core: `per_class` pictures of each class of the ordinary world."""
    backdrop.render("val", 1, 0)
    pictures = []
    took = seconds(lambda: pictures.extend(range(len(backdrop.render("val", per_class, 1)))))
    note = "set val, 64 x 64, one core, not written to disk"
    return [row("render_images_per_s", len(pictures) / took, "1/s", ">= 300", note=note)]


class Stripes:
    """A grounder that finds a stripe for every phrase, at once."""

    name = "stripes"

    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def __call__(self, image: Image.Image, phrases: Sequence[str]) -> list[Grounding]:
        """A stripe of the picture for each phrase."""
        masks = torch.zeros(len(phrases), image.height, image.width, dtype=torch.bool)
        for i, mask in enumerate(masks):
            mask[:, 4 * i:4 * i + 4] = True
        box = torch.tensor([[0.0, 0.0, 4.0, float(image.height)]])
        return [Grounding(phrase, box, torch.ones(1), mask) for phrase, mask in zip(phrases, masks, strict=True)]


def store_rows(root: Path, pictures: int = 1000) -> list[Row]:
    """Masks a second read back from a store of ten masks for each picture."""
    (root / "images/thing").mkdir(parents=True)
    for i in range(pictures):
        Image.new("RGB", (64, 48), (i % 256, 0, 0)).save(root / f"images/thing/{i:05d}.png")
    asked = tuple(Concept(f"part {letter}", ("thing",), ("important",)) for letter in "abcdefghi")
    concepts = ConceptSet((ClassName("thing", "thing"),), asked, ())
    store = build_masks(list_folder(root / "images"), concepts, Stripes(), root / "store", progress=False)
    read: list[int] = []
    took = seconds(lambda: read.append(read_back(store)))
    note = f"{read[0]} masks of 64 x 48, in order, one process"
    return [row("mask_store_reads_per_s", read[0] / took, "masks/s", note=note)]


def timm_validation(model: nn.Module, folder: Folder, batch: int = 256) -> tuple[float, float]:
    """Top-1 and top-5 in percent by timm's data pipeline and the loop of its `validate.py`, on the model's device."""
    numbers, on = {name: number for number, name in enumerate(folder.classes)}, next(model.parameters()).device
    dataset: Any = create_dataset("", root=str(folder.root), class_map=numbers)
    config: dict[str, Any] = resolve_model_data_config(model)
    loader = create_loader(dataset, batch_size=batch, use_prefetcher=True, num_workers=0, device=on,
                           pin_memory=on.type == "cuda", **config)
    losses, top1, top5, criterion = AverageMeter(), AverageMeter(), AverageMeter(), nn.CrossEntropyLoss().to(on)
    model.eval()
    with torch.inference_mode():
        for images, target in loader:
            output = model(images)
            loss = criterion(output, target)
            acc1, acc5 = accuracy(output.detach(), target, topk=(1, 5))
            losses.update(loss.item(), len(images))
            top1.update(acc1.item(), len(images))
            top5.update(acc5.item(), len(images))
    return top1.avg, top5.avg


def evaluation_rows(root: Path, name: str = "vit_small_patch16_224", pictures: int = 64, rounds: int = 3) -> list[Row]:
    """Our evaluation's pictures a second over those of timm's validation loop, of one checkpoint and of three."""
    (root / "thing").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(pictures):
        Image.fromarray(rng.integers(256, size=(300, 400, 3), dtype=np.uint8)).save(root / f"thing/{i}.jpg")
    folder, models = list_folder(root), [timm.create_model(name, num_classes=1) for _ in range(3)]
    note = (f"{name}, {pictures} JPEGs of 400 x 300, batch 16, no workers, {place('cpu')}, "
            f"median of {rounds} alternating pairs")
    for which, tested in (("", models[:1]), ("_of_three", models)):
        checkpoints = [checkpoint(model, str(k)) for k, model in enumerate(tested)]
        ours = partial(run_pass, folder_set(folder), checkpoints, reading_of(models[0]), Loop(batch=16))
        theirs = partial(lambda models: [timm_validation(model, folder, 16) for model in models], tested)
        ratio = times_slower(theirs, ours, rounds)
        rows.append(row(f"eval_throughput{which}_vs_timm", ratio, "ours / theirs", ">= 0.95", "timm", note))
    return rows


def paper_run_rows(root: Path, name: str = "vit_base_patch16_224", steps: int = 2, precision: str = "no") -> list[Row]:
    """Seconds and memory of a step of the paper's run, on random weights and noise, and the hours of all of it."""
    model = timm.create_model(name, num_classes=1000).to(device())
    images = MaskedImages(noise_folder(root), Preprocess.of(model), train=True)
    price = rehearse(model, images, replace(RECIPES["cft-paper"], precision=precision), steps)
    note = (f"{name}, {len(images)} pictures, {price['steps']} steps of 8, {precision} autocast, random weights, "
            f"{steps} steps measured, {place(device())}")
    each = [("step_seconds", price["seconds_per_step"], "s"), ("hours", price["seconds"] / 3600, "h, extrapolated")]
    if "memory" in price:
        each.append(("memory", price["memory"] / 1e9, "GB"))
    return [row(f"paper_run_{what}", value, unit, note=note) for what, value, unit in each]


def head_seconds_rows(scratch: Path, pictures: int = 75) -> list[Row]:
    """Seconds of the relevance head, from files to weights, on a ViT-B at 224 pixels."""
    folder = noise_folder(scratch / "noise", classes=pictures // 3, per_class=3)
    folder = replace(folder, samples=tuple(replace(s, object=s.mask) for s in folder.samples))
    model = timm.create_model("vit_base_patch16_224", num_classes=pictures // 3).eval()
    images, began = MaskedImages(folder, Preprocess.of(model)), time.perf_counter()
    Head("relevance-head").solve(model, images, 0.1)
    note = f"{len(images)} pictures, vit_base_patch16_224, random weights, float32, {place(device())}"
    return [row("relevance_head_seconds_vit_b", time.perf_counter() - began, "s", "", "", note)]


def explorer_rows(root: Path, moves: int = 5) -> list[Row]:
    """Milliseconds from a move in the explorer to its answer, for the slowest kind; medians over `moves` of a kind.

    The widgets are driven in this process; what a browser adds is not in it. Attribution by `iia`, slow, is left out.
    """
    pictures = backdrop.write(root / "world", {"train": 8}, seed=4) / "images/train"
    build_masks(list_folder(pictures), demo_concepts(), toy_grounder(), root / "store", progress=False)
    demo_concepts().save(root / "concepts.json")
    (root / "run").mkdir()
    shutil.copy(ASSETS / "base_1.safetensors", root / "run/model.safetensors")
    material = Material.open(pictures, TINY, ASSETS / "base_0.safetensors", store=root / "store",
                             concepts=root / "concepts.json", run=root / "run")
    live = Explorer(material, first_view(material, "bird"), by="bench")
    for widget in (live.class_id, live.picture, live.method, live.normalize, live.explain):
        options = [option[1] if isinstance(option, tuple) else option for option in widget.options]
        for value in ([value for value in options if value not in ("iia", widget.value)] * moves)[:moves]:
            widget.value = value
    for widget in (live.occurrence, live.coverage, live.strength):
        for k in range(moves):
            widget.value = (k + 1) / (moves + 1)
    for box, _ in list(live.boxes.values())[:moves]:
        box.value = not box.value
    kinds = {what: 1000 * statistics.median(s for kind, s in live.timings if kind == what) for what, _ in live.timings}
    worst = max(kinds, key=lambda what: kinds[what])
    note = f"slowest kind, {worst}; {pictures.name}: {len(material.folder)} pictures, {len(backdrop.CLASSES)} classes"
    note = f"{note}; medians of {moves}: " + ", ".join(f"{what} {ms:.0f}" for what, ms in kinds.items())
    return [row("explorer_move_ms", kinds[worst], "ms", "<= 200", note=note)]


def start_rows(rounds: int = 5) -> list[Row]:
    """Seconds of a fresh process for `import cft` and `cft --help`, less those of an empty one; medians."""
    def took(*command: str) -> float:
        call = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        return statistics.median(seconds(call) for _ in range(rounds))

    python, command = sys.executable, str(Path(sys.executable).with_name("cft"))
    empty, note = took(python, "-c", ""), f"median of {rounds} fresh processes, less an empty one"
    opened = row("import_cft_seconds", took(python, "-c", "import cft") - empty, "s", "<= 0.3", note=note)
    return [opened, row("cft_help_seconds", took(command, "--help") - empty, "s", note=note)]


def demo_rows(record: Path) -> list[Row]:
    """Seconds of the last demo, from the record that it left; no row without one."""
    if not record.is_file():
        return []
    found = read_json(record)
    note = f"{len(found['seeds'])} seeds x {len(found['methods'])} methods, of the last `make demo`, set-up not counted"
    return [row("demo_seconds", found["seconds"], "s", "<= 300", note=note)]
