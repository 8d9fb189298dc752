"""Measure speed and memory, as ratios where that is possible, into a table.

    python benchmarks/run.py                    everything but `compiled`, in some minutes
    python benchmarks/run.py peers start        some measurements
    python benchmarks/run.py explorer_move_ms   the measurement that makes this row

A row that is measured anew takes the place of the old one; all others stay. With CUDA the steps are measured there.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pipeline
import timm
import torch
from cost import STEPS, compiled_rows, cost_rows, head_rows, make_case, wall_rows
from grounding import grounding_rows
from peers import classes_rows, family_rows, peer_rows
from table import Row, merge, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
VIT_S, VIT_B, DINO = "vit_small_patch16_224", "vit_base_patch16_224", "vit_small_patch14_reg4_dinov2"
CONVNEXT, OURS = "convnextv2_atto", ("cft_step", "checkpointed")


@dataclass(frozen=True)
class Measurement:
    """What is measured at one go."""

    name: str
    rows: tuple[str, ...]  # their names; one may be missing where a library is
    measure: Callable[[], list[Row]]


def with_case(measure: Callable[..., list[Row]], batch: int, name: str, **options: Any) -> Callable[[], list[Row]]:
    """`measure` of a case of a timm model with random weights, which is made when it is needed."""
    def rows() -> list[Row]:
        torch.manual_seed(0)
        return measure(make_case(timm.create_model(name, **options), batch))

    return rows


def with_folder(measure: Callable[[Path], list[Row]]) -> Callable[[], list[Row]]:
    """`measure` in a folder that is removed afterwards."""
    def rows() -> list[Row]:
        with tempfile.TemporaryDirectory() as scratch:
            return measure(Path(scratch))

    return rows


def cost(suffix: str, kinds: Sequence[str], batch: int, name: str, **options: Any) -> Measurement:
    """Operations and memory of steps of a model."""
    names = tuple(f"{kind}_{what}_ratio{suffix}" for kind in kinds for what in ("flops", "memory"))
    measure = partial(cost_rows, kinds=kinds, suffix=suffix)
    return Measurement(f"cost{suffix}", names, with_case(measure, batch, name, **options))


def wall(suffix: str, kinds: Sequence[str], batch: int, name: str) -> Measurement:
    """Wall time of steps of a model."""
    names = tuple(f"{kind}_wall_ratio{suffix}" for kind in kinds)
    return Measurement(f"wall{suffix}", names, with_case(partial(wall_rows, kinds=kinds, suffix=suffix), batch, name))


GROUNDING = ("grounding_speedup_k1", "grounding_speedup_k5", "grounding_speedup_k10", "sam_encodings_per_image")
PEERS, STARTS = ("relevance_vs_lxt_speed", "relevance_vs_captum_speed"), ("import_cft_seconds", "cft_help_seconds")
FAMILIES = tuple(f"relevance_vs_{name}" for name in ("zennit_speed_resnet50", "captum_speed_resnet50",
                                                     "captum_speed_swin_t", "captum_speed_eva02_t"))
PAPER_RUN, DEMO = ("paper_run_step_seconds", "paper_run_hours"), ROOT / "figures/demo/demo.json"
MEASUREMENTS = [
    Measurement("rendering", ("render_images_per_s",), pipeline.rendering_rows),
    Measurement("demo", ("demo_seconds",), partial(pipeline.demo_rows, DEMO)),
    cost("", tuple(STEPS), 8, VIT_S),
    wall("", ("cft_step", "official_step"), 2, VIT_S),
    cost("_vit_b", ("cft_step",), 8, VIT_B),
    cost("_dinov2", OURS, 8, DINO, img_size=224, num_classes=1000),
    cost("_convnextv2", OURS, 4, CONVNEXT),
    wall("_convnextv2", ("cft_step",), 4, CONVNEXT),
    Measurement("features", ("relevance_features_ratio",), with_case(head_rows, 8, VIT_S)),
    Measurement("head", ("relevance_head_seconds_vit_b",), with_folder(pipeline.head_seconds_rows)),
    Measurement("peers", PEERS, with_case(peer_rows, 2, VIT_S)),
    Measurement("grounding", GROUNDING, grounding_rows),
    Measurement("start", STARTS, pipeline.start_rows),
    Measurement("store", ("mask_store_reads_per_s",), with_folder(pipeline.store_rows)),
    Measurement("evaluation", ("eval_throughput_vs_timm", "eval_throughput_of_three_vs_timm"),
                with_folder(pipeline.evaluation_rows)),
    Measurement("paper_run", PAPER_RUN, with_folder(pipeline.paper_run_rows)),
    Measurement("explorer", ("explorer_move_ms",), with_folder(pipeline.explorer_rows)),
    Measurement("classes", ("relevance_classes_speed",), with_case(classes_rows, 2, VIT_S)),
    Measurement("families", FAMILIES, family_rows),
    Measurement("compiled", ("compiled_step_wall_ratio",), with_case(compiled_rows, 4, VIT_S, depth=1))]


def choose(names: Sequence[str]) -> list[Measurement]:
    """The measurements that are named, or make a row that is named; without names all but `compiled`, a slow one.

    Raises ValueError for a name that is neither.
    """
    unknown = set(names).difference(*({each.name, *each.rows} for each in MEASUREMENTS))
    if unknown:
        every = ", ".join(each.name for each in MEASUREMENTS)
        raise ValueError(f"expected some of {every}, or names of rows; got {', '.join(sorted(unknown))}")
    if not names:
        return [each for each in MEASUREMENTS if each.name != "compiled"]
    return [each for each in MEASUREMENTS if {each.name, *each.rows} & set(names)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write every row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ", ".join(each.name for each in MEASUREMENTS)
    parser.add_argument("names", nargs="*", help=f"rows, or some of {every}; compiled only when named")
    parser.add_argument("--out", type=Path, default=ROOT / "figures/bench.csv", help="default: figures/bench.csv")
    given = parser.parse_args(arguments)
    try:
        chosen = choose(given.names)
    except ValueError as error:
        parser.error(str(error))
    for each in chosen:
        rows = each.measure()
        write_rows(merge(read_rows(given.out), rows), given.out)
        for line in rows:
            print(f"{line['name']:40} {line['value']:>10} {line['unit']:18} {line['goal']}", flush=True)


if __name__ == "__main__":
    main()
