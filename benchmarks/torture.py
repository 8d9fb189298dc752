"""Thousands of small wrongs: kill the commands, spoil what they read, fill their disk; count the good answers.

    python benchmarks/torture.py --out figures/reliability.csv     everything, in some twenty minutes on two cores
    python benchmarks/torture.py --only masks,settings --list-bad bad.txt
    python benchmarks/torture.py --sample 40                       some cases of every kind, drawn by the seed

A good answer is the right result, or exit code 2 with one sentence that names the file or the option. Otherwise:
unclear (exit code 2, but not such a sentence), traceback (also a crash), silent (exit code 0 and a wrong result, or
nothing said), hang (more than a minute). What the commands do to the files of a case is done in a copy.
"""

import argparse
import multiprocessing
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import kills
import pandas as pd
import spoiled
import spoiled_files  # noqa: F401  (registers its kinds)
import spoiled_runs  # noqa: F401
from sandbox import CLASSES, Case, Server, die_at, judge, run, served, warm

ROOT = Path(__file__).resolve().parents[1]
KINDS = (*(f"kills: {target.name}" for target in (*kills.TARGETS, kills.SMOKE)), *spoiled.KINDS, "disks", "two at once")
SINGLE = {"evaluate", "audit", "validate"}  # commands that are not tried two at once


class Job(NamedTuple):
    """One try, by the name of its kind and its number in it."""

    kind: str
    number: int


class Place(NamedTuple):
    """What all tries share."""

    world: Path
    scratch: Path
    server: Server
    seed: int
    wanted: dict[str, tuple[dict[str, Any], float]]


def make_place(root: Path, server: Server, seed: int) -> Place:
    """The world that all cases copy; made in a child, so that this process stays as it is."""
    home = root / "world"
    home.mkdir(parents=True)
    for name, call in (("world", partial(spoiled.make_world, home)), ("more", partial(kills.more_world, home))):
        seen = run(Case(name, (), call=call), home, root / name, 300, 0)
        if seen.code:
            raise RuntimeError(f"the {name} could not be made: {seen.err[-2000:]}")
    finished = lambda path: path.endswith("model.safetensors")
    half = Case("half", (*spoiled.FIT, "--save-every", 1), before=die_at(-1, home / "run", finished))
    if run(half, home, root / "half", 300, 0).code != -signal.SIGKILL:
        raise RuntimeError("a training could not be stopped halfway")
    (home / "run").rename(home / "half")
    from cft.reproduce.settings import profile_file

    shutil.copy(profile_file("smoke"), home / "mine.yaml")
    return Place(home, root / "tries", server, seed, {})


def try_job(place: Place, job: Job) -> kills.Result:
    """Do one try in a folder of its own, which is removed."""
    rng = random.Random(f"{place.seed} {job.kind} {job.number}")
    scratch = place.scratch / f"{KINDS.index(job.kind)}-{job.number}"
    scratch.mkdir(parents=True)
    try:
        if job.kind in spoiled.KINDS:
            return _spoil(place, job, rng, scratch)
        name = job.kind.removeprefix("kills: ")
        if job.kind.startswith("kills: "):
            target = _target(name)
            wanted, seconds = place.wanted[name]
            counted = job.number - target.random
            moment = rng.uniform(0.02, seconds) if counted < 0 else counted + 1
            return kills.kill_once(target, place.world, scratch, place.server, wanted, moment)
        targets = [target for target in kills.TARGETS if job.kind == "disks" or target.name not in SINGLE]
        target = targets[job.number % len(targets)]
        wanted = place.wanted[target.name][0]
        if job.kind == "disks":
            what = kills.DISKS[job.number // len(targets) % len(kills.DISKS)]
            return kills.disk(target, place.world, scratch, place.server, wanted, what, rng)
        return kills.together(target, place.world, scratch, place.server, wanted, rng.choice((0, 0.02, 0.2, 0.5)))
    except Exception:  # of the harness: it is said, and counts as no answer of the package
        return job.kind, str(job.number), "broken", traceback.format_exc()[-1500:]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _target(name: str) -> kills.Target:
    return next(target for target in (*kills.TARGETS, kills.SMOKE) if target.name == name)


def _spoil(place: Place, job: Job, rng: random.Random, scratch: Path) -> kills.Result:
    home = scratch / scratch.name
    shutil.copytree(place.world, home, symlinks=True)
    case = spoiled.KINDS[job.kind][1](rng, job.number, home, place.server)
    verdict, why = judge(case, seen := run(case, home, scratch / "log"))
    command = shlex.join(["cft", *map(str, case.words)])[:300] if case.words else "hub_set(…)"
    seen_as = f"{why}\n    {command}\n    {seen.seconds:.1f} s, exit {seen.code}"
    return job.kind, case.name, verdict, "" if verdict == "good" else seen_as


def jobs_of(kinds: Sequence[str], sample: int, seed: int) -> list[Job]:
    """The tries of some kinds, in an order that spreads the long ones; with `sample` so many, drawn by the seed."""
    counts = {name: count for name, (count, _) in spoiled.KINDS.items()}
    counts |= {f"kills: {target.name}": target.random + target.counted for target in (*kills.TARGETS, kills.SMOKE)}
    counts |= {"disks": len(kills.DISKS) * len(kills.TARGETS), "two at once": 3 * (len(kills.TARGETS) - len(SINGLE))}
    jobs = [Job(kind, number) for kind in kinds for number in range(counts[kind])]
    rng = random.Random(seed)
    jobs.sort(key=lambda job: job.kind != f"kills: {kills.SMOKE.name}")  # the longest first
    return rng.sample(jobs, min(sample, len(jobs))) if sample else jobs


@contextmanager
def prepared(seed: int, kinds: Iterable[str], root: Path, say: Callable[[str], object] = print) -> Any:
    """A warm process, a server, a world, and what uninterrupted commands make of it."""
    with served(root / "server") as server:
        warm()
        place = make_place(root, server, seed)
        say("the world is made")
        chosen = set(kinds)
        for target in (*kills.TARGETS, kills.SMOKE):
            used = f"kills: {target.name}" in chosen or target is not kills.SMOKE and chosen & {"disks", "two at once"}
            if used:
                scratch = root / f"whole-{target.name.replace(' ', '-')}"
                scratch.mkdir()
                place.wanted[target.name] = kills.reference(target, place.world, scratch, server, target
                                                            is not kills.SMOKE)
                say(f"{target.name} takes {place.wanted[target.name][1]:.1f} s")
        yield place


def table_of(results: Iterable[kills.Result]) -> pd.DataFrame:
    """One row for each kind, and one for all."""
    counts: dict[str, Counter[str]] = {}
    for kind, _, verdict, _ in results:
        if verdict in CLASSES:
            counts.setdefault(kind, Counter())[verdict] += 1
    rows = [{"kind": kind, "tried": found.total(), **{name: found[name] for name in CLASSES}}
            for kind, found in sorted(counts.items(), key=lambda item: KINDS.index(item[0]))]
    table = pd.DataFrame(rows, columns=pd.Index(["kind", "tried", *CLASSES]))
    return pd.concat([table, pd.DataFrame([{"kind": "all", **table.drop(columns="kind").sum().to_dict()}])],
                     ignore_index=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try, tell the progress, and write the table; the exit code is 1 if the harness itself broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "figures/reliability.csv",
                        help="default: figures/reliability.csv")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--only", default="", help=f"some of {', '.join(KINDS)}; kills: all of them")
    parser.add_argument("--sample", type=int, default=0, help="so many tries only, drawn by the seed")
    parser.add_argument("--list-bad", type=Path, help="a file for every case that is not good")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    named = [name.strip() for name in given.only.split(",") if name.strip()]
    kinds = [kind for kind in KINDS if not named or kind in named or kind.partition(":")[0] in named]
    if unknown := [name for name in named if name not in KINDS and name != "kills"]:
        parser.error(f"expected some of {', '.join(KINDS)}; got {', '.join(unknown)}")
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="torture-") as box, prepared(given.seed, kinds, Path(box)) as place:
        jobs = jobs_of(kinds, given.sample, given.seed)
        with multiprocessing.get_context("fork").Pool(given.workers) as pool:
            for result in pool.imap_unordered(partial(try_job, place), jobs):
                results.append(result)
                kind, name, verdict, why = result
                if verdict not in ("good", "missed"):
                    shown = why if verdict == "broken" else why.splitlines()[0][:110]
                    print(f"{verdict:10} {kind}: {name[:90]}: {shown}", flush=True)
                if len(results) % 50 == 0:
                    print(f"{len(results)} of {len(jobs)} after {time.monotonic() - began:.0f} s", flush=True)
    table = table_of(results)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(given.out, index=False)
    if given.list_bad:
        given.list_bad.parent.mkdir(parents=True, exist_ok=True)
        bad = sorted(f"{verdict} | {kind} | {name}\n    {why}\n" for kind, name, verdict, why in results
                     if verdict not in ("good", "missed"))
        given.list_bad.write_text("".join(bad), encoding="utf-8")
    print(table.to_string(index=False), f"\n{time.monotonic() - began:.0f} s; written to {given.out}")
    return int(any(verdict == "broken" for _, _, verdict, _ in results))


if __name__ == "__main__":
    sys.exit(main())
