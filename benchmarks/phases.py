"""Where a training step spends its time and memory: by phase and by operator, over a plain step.

    python benchmarks/phases.py                   some minutes; writes figures/profile.csv
    python benchmarks/phases.py convnextv2_atto   one model, printed

Time is the processor's, so that other work on the machine disturbs it little, and is taken around single operations:
the interpreter between them is not counted. Memory is the most that is alive at a time during a phase.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
import torch.nn.functional as F
from cost import Case, LiveBytes, make_case
from torch import Tensor

from cft.explain.anatomy import split
from cft.explain.maps import Relevance, run
from cft.explain.rules import Tape
from cft.files import write_csv
from cft.train.losses import cft_loss, classification_loss, patch_mask
from cft.train.objectives import CFT

OUT = Path(__file__).resolve().parents[1] / "figures/profile.csv"
CASES = {  # model → batch
    "vit_small_patch16_224": 4, "vit_base_patch16_224": 2, "vit_small_patch14_reg4_dinov2": 3, "convnextv2_atto": 4}
PHASES = ("forward", "pullback", "losses", "back through the pullback", "back through the forward", "optimiser")


class Watch(LiveBytes):
    """Seconds of every operator and highest live bytes, by phase."""
    def __init__(self) -> None:
        super().__init__()
        self.phase, self.peaks = PHASES[0], Counter[str]()
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """What follows belongs to this phase."""
        self.phase = phase

    def call(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """Run one operation by the clock."""
        began = time.process_time()
        made = func(*args, **kwargs)
        self.seconds[self.phase, func.__name__.partition(".")[0]] += time.process_time() - began
        return made

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Run one operation, and look at what is alive after it."""
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
        return made


def plain_step(case: Case, enter: Callable[[str], None]) -> None:
    """Plain fine-tuning, without the optimiser."""
    logits = case.model(case.batch.images)
    enter("losses")
    loss = classification_loss(logits, case.batch.labels)
    enter("back through the forward")
    loss.backward()


def cft_step(case: Case, enter: Callable[[str], None]) -> None:
    """RECIPES["cft"] in its parts, without the optimiser."""
    parts = split(case.model, case.batch.images, 2)
    logits, pullbacks = run(parts.steps, parts.x, Tape())
    logits.register_hook(lambda _: enter("back through the forward"))  # the pullback came later, its way back is first
    enter("pullback")
    g: Tensor = F.one_hot(case.batch.labels, logits.shape[1]).to(logits.dtype)
    while pullbacks:
        g = pullbacks.pop()(g)
    enter("losses")
    tokens = (parts.per_token(parts.x) * parts.per_token(g)).sum(-1)
    result = Relevance(logits, tokens, parts.grid, parts.prefix, case.batch.labels)
    region = patch_mask(case.batch.given("masks"), result.grid)
    phi = result.map(CFT.normalize, epsilon=CFT.epsilon)
    loss, _ = cft_loss(phi, region, logits, weights=CFT.weights, norm=CFT.norm)
    enter("back through the pullback")
    loss.backward()


STEPS = {"plain": plain_step, "cft": cft_step}


def watched(case: Case, step: Callable, optimizer: torch.optim.Optimizer) -> Watch:
    """One step under observation."""
    case.model.zero_grad(set_to_none=False)
    with Watch() as watch:
        step(case, watch.enter)
        watch.enter("optimiser")
        optimizer.step()
    return watch


def profile(case: Case, rounds: int = 2, least: float = 0.003) -> pd.DataFrame:
    """What every phase of both steps took, over the whole plain step: time by operator, and peaks of memory.

    Medians over `rounds`, in which the steps take turns. Operators below `least` of the plain step stand together as
    "other".
    """
    optimizer = torch.optim.AdamW(case.model.parameters(), 1e-6, foreach=True)
    seen = [{name: watched(case, step, optimizer) for name, step in STEPS.items()} for _ in range(1 + rounds)][1:]
    whole = pd.Series([sum(turn["plain"].seconds.values()) for turn in seen]).median()
    room = max(seen[0]["plain"].peaks.values())
    rows = []
    for name in STEPS:
        table = pd.DataFrame([turn[name].seconds for turn in seen]).fillna(0).median() / whole
        for phase in PHASES:
            of_phase = {op: table[at, op] for at, op in table.index if at == phase}
            found = {op: share for op, share in of_phase.items() if share >= least}
            found["other"] = sum(of_phase.values()) - sum(found.values())
            rows += [(name, phase, "time", op, share) for op, share in sorted(found.items(), key=lambda x: -x[1])]
            rows.append((name, phase, "memory", "", seen[0][name].peaks[phase] / room))
    table = pd.DataFrame(rows, columns=pd.Index(["step", "phase", "what", "operator", "over_plain"]))
    return table[table["over_plain"] > 0].round(4)


def main() -> None:
    """Profile the models that are named and print, or all of CASES and write."""
    tables = []
    for name in sys.argv[1:] or CASES:
        torch.manual_seed(0)
        more: Any = {"img_size": 224, "num_classes": 1000} if "dinov2" in name else {}
        table = profile(make_case(timm.create_model(name, **more), CASES.get(name, 4)))
        tables.append(table.assign(model=name)[["model", *table]])
        print(tables[-1].to_string(index=False), flush=True)
    if not sys.argv[1:]:
        write_csv(OUT, pd.concat(tables))


if __name__ == "__main__":
    main()
