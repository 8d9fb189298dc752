"""A training step through relevance over a plain one: operations, live bytes and wall time.

The two sides of a ratio see the same model and batch, in one process. Nothing here is about the optimiser.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from table import Row, device, place, row
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from cft.evaluate.passes import times_slower
from cft.evaluate.support import flops as count_flops
from cft.explain.anatomy import split
from cft.explain.attributions import contribution
from cft.explain.maps import bound, minmax, relevance, run
from cft.explain.rules import Tape
from cft.train.closed import penultimate, relevance_features
from cft.train.losses import cft_loss, patch_mask
from cft.train.objectives import RECIPES, Batch

Objective = Callable[[nn.Module, nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A model in training mode and a random batch for it."""

    model: Any  # a timm model, an nn.Module with attributes that torch's types do not know
    batch: Batch
    note: str  # the circumstances, in words


def make_case(model: Any, batch: int, size: int = 224) -> Case:
    """A case of `model`, a timm model for pictures of size × size pixels, its gradients allocated."""
    rng, on = torch.Generator().manual_seed(0), device()
    images = torch.randn(batch, 3, size, size, generator=rng).to(on)
    labels = torch.randint(model.num_classes, (batch,), generator=rng).to(on)
    masks = (torch.rand(batch, size, size, generator=rng) < 0.3).to(on)
    model = model.to(on).train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    note = f"{model.pretrained_cfg['architecture']}, batch {batch}, float32, {place(on)}"
    return Case(model, Batch(images, labels, masks), note)


def training_step(case: Case, objective: Objective) -> Step:
    """A function that runs forward and backward of one step, without the optimiser; gradients are there already."""
    def step() -> None:
        case.model.zero_grad(set_to_none=False)
        objective(case.model, case.model, case.batch)[0].backward()

    return step


# ---- operations and memory ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations in this context make: `live` now, and the `peak` so far.

    A storage counts from the operation that makes it until it dies; views share one. Scratch space inside a single
    operation is not seen.
    """
    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> object:
        """Run one operation and register the storages it made."""
        for given in _storages((args, kwargs)):
            self._known.setdefault(given, 0)  # it was there before
        made = self.call(func, args, kwargs or {})
        for storage in _storages(made):
            if storage not in self._known:
                size = self._known[storage] = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, size)
        return made

    def call(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Run one operation."""
        return func(*args, **kwargs)

    def _forget(self, size: int) -> None:
        self.live -= size


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def peak_bytes(step: Step) -> int:
    """Most bytes that one call held at a time, beyond what was there: on a CUDA device its allocator's figure."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counter:
        step()
    return counter.peak


# ---- two more ways to take an aligning step ----


def checkpointed_objective(model: nn.Module, original: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of RECIPES["cft"], its relevance checkpointed block by block."""
    align: Any = RECIPES["cft"].objective
    masks: Any = batch.masks  # every case has some
    result = relevance(model, batch.images, batch.labels, align.method, differentiable=True, checkpointed=True)
    phi = result.map(align.normalize, epsilon=align.epsilon)
    return cft_loss(phi, patch_mask(masks, result.grid), result.logits, weights=align.weights, norm=align.norm)


def official_objective(model: nn.Module, original: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The algorithm of the paper's official code, in our words: a rollout with constant gradients, aligned at pixels.

    One forward pass keeps the attention maps A; for each block a backward pass of its own finds ∂z/∂A, a constant in
    what follows, and R ← R + mean_h ReLU(∂z/∂A ⊙ A) R. The row of the class token is enlarged to pixels, min–max scaled
    and compared with the mask there. Cross-entropy takes a second forward pass, the log one of the original model.
    """
    assert isinstance(model, VisionTransformer)
    parts, maps = split(model, batch.images, 0), list[Tensor]()
    masks: Any = batch.masks
    chosen = run(parts.steps, parts.x, Tape(maps=maps))[0].gather(1, batch.labels[:, None]).sum()
    rows = torch.eye(parts.x.shape[1], device=chosen.device).expand(len(batch.images), -1, -1)
    for weights in maps:
        slope = torch.autograd.grad(chosen, weights, retain_graph=True)[0]
        rows = rows + contribution(weights, slope) @ rows
    patches = rows[:, 0, parts.prefix:].unflatten(1, parts.grid)
    pixels = F.interpolate(patches[:, None], masks.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    with torch.no_grad():
        original(batch.images)
    return cft_loss(bound(minmax(pixels), 0.02), masks, model(batch.images), norm="image")


# ---- rows ----

STEPS: dict[str, Objective] = {
    "cft_step": RECIPES["cft"].objective, "checkpointed": checkpointed_objective, "official_step": official_objective}
GOALS = {
    "cft_step_flops_ratio": "<= 2.05", "cft_step_memory_ratio": "<= 2", "cft_step_wall_ratio": "<= 2.2",
    "checkpointed_flops_ratio": "<= 3.3", "checkpointed_memory_ratio": "<= 0.6"}


def step_row(name: str, suffix: str, value: float, note: str) -> Row:
    """One line of the bench about a step; the goals are those of vision transformers."""
    goal = "" if "convnext" in suffix else GOALS.get(name, "")
    return row(name + suffix, value, "over plain step", goal, "plain fine-tuning", note)


def cost_rows(case: Case, kinds: Sequence[str] = tuple(STEPS), suffix: str = "") -> list[Row]:
    """Operations and peak memory of each of STEPS over those of a plain step.

    Operations are proportional to the batch and are counted on its first picture. Memory is watched on all of it, in a
    run of its own: counting operations keeps some values alive that a checkpoint would have dropped.
    """
    one = replace(case, batch=case.batch.part(slice(1)))

    def cost(objective: Objective) -> tuple[int, int]:
        return count_flops(training_step(one, objective)), peak_bytes(training_step(case, objective))

    plain, rows = cost(RECIPES["plain"].objective), []
    watched = "peak of storages alive that the step made, weights and gradients not counted"
    notes = ("counted on one picture", "allocator's peak" if torch.cuda.is_available() else watched)
    for kind in kinds:
        for what, ours, theirs, note in zip(("flops", "memory"), cost(STEPS[kind]), plain, notes, strict=True):
            rows.append(step_row(f"{kind}_{what}_ratio", suffix, ours / theirs, f"{note}; {case.note}"))
    return rows


def wall_rows(case: Case, kinds: Sequence[str], rounds: int = 3, suffix: str = "") -> list[Row]:
    """Wall time of each of STEPS over that of a plain step."""
    plain, note = training_step(case, RECIPES["plain"].objective), f"median of {rounds} alternating pairs; {case.note}"
    ratios = {kind: times_slower(training_step(case, STEPS[kind]), plain, rounds) for kind in kinds}
    return [step_row(f"{kind}_wall_ratio", suffix, ratio, note) for kind, ratio in ratios.items()]


def head_rows(case: Case, rounds: int = 3) -> list[Row]:
    """Wall time of the relevance features of two regions over that of a forward pass."""
    images, model = case.batch.images, case.model.eval()
    inside = lambda grid: (torch.rand(len(images), *grid, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    regions = lambda grid: [inside(grid).to(images.device), 1 - inside(grid).to(images.device)]
    ratio = times_slower(lambda: relevance_features(model, images, regions), lambda: penultimate(model, images), rounds)
    note = f"two regions; median of {rounds} alternating pairs; {case.note}"
    return [row("relevance_features_ratio", ratio, "over forward pass", "", "the model's forward pass", note)]


def compiled_rows(case: Case, rounds: int = 3) -> list[Row]:
    """Wall time of a CFT step through `torch.compile` over the same step as it is."""
    objective = RECIPES["cft"].objective
    fused = training_step(case, torch.compile(objective))
    ratio = times_slower(fused, training_step(case, objective), rounds)
    torch.compiler.reset()
    note = f"median of {rounds} alternating pairs, compilation not counted"
    note = f"{note}; {len(case.model.blocks)} block(s); {case.note}"
    return [row("compiled_step_wall_ratio", ratio, "compiled / eager", "< 1", "our eager step", note)]
