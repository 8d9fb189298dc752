"""Kills at random moments and at every touch of the disk; full and read-only disks; two processes on one output."""

import csv
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox import Case, Seen, Server, die_at, finish, judge, run, start, strays
from spoiled import ASKED, FIT, GROUNDED, ITEMS, JUDGED, MODEL, TESTED

UNSTABLE = re.compile(r"second|time|date|resumed|duration|host|pid|commit", re.I)
Result = tuple[str, str, str, str]  # kind, what, one of CLASSES, why


def facts(root: Path, only: Sequence[str]) -> dict[str, Any]:
    """What the files say: every value of a JSON file by its place, every line of a text, the digest of all others."""
    found: dict[str, Any] = {}
    files = [
        path for name in only
        for path in (sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name])]
    for path in files:
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            continue
        if not path.exists():
            found[name] = "missing"
        elif path.suffix == ".json":
            found |= {f"{name}:{key}": value for key, value in _flat(json.loads(path.read_text()))}
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                rows = enumerate(csv.DictReader(file))
                found |= {f"{name}:{k}.{column}": value for k, row in rows for column, value in row.items()}
        elif path.suffix == ".md":
            lines = re.sub(r"[\d.]+ s\b", "… s", path.read_text()).splitlines()
            found |= {f"{name}:{k}": line for k, line in enumerate(lines)}
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            found |= {f"{name}:{column}": str(values) for column, values in pq.read_table(path).to_pydict().items()}
        elif path.suffix not in (".jsonl", ".pdf"):  # a PDF holds the date
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {key: value for key, value in found.items() if not UNSTABLE.search(key.partition(":")[2])}


def _flat(value: Any, at: str = "") -> list[tuple[str, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return [(at, value)] if inner is None else [pair for key, part in inner for pair in _flat(part, f"{at}.{key}")]


@dataclass(frozen=True)
class Target:
    """A command that is killed, and the files that it leaves."""

    name: str
    words: Sequence[Any]
    files: Sequence[str]
    random: int  # kills at random moments
    counted: int  # kills at the n-th touch of the disk, at most
    before: Callable[[], None] | None = None
    patience: float = 120.0


def _small_sets() -> None:
    """Published sets may have a handful of pictures."""
    from functools import partial

    import cft.data.testsets as module

    module.open_set = partial(module.open_set, check_counts=False)


TARGETS = (Target("masks", (*GROUNDED, "--shards", 2), ("new",), 20,
                  60), Target("fit", (*FIT, "--save-every", 1), ("run",), 20, 40),
           Target("fit from a store",
                  ("fit", "photos", *MODEL, "--masks", "store", "--concepts", "kept.json", "--per-class", 1, "--rate",
                   "1e-4", "--epochs", 1, "--batch", 2, "--save-every", 1, "--out", "run"), ("run",), 4,
                  16), Target("concepts", ASKED, ("c.json",), 20, 44), Target("evaluate", TESTED, ("t.csv",), 6, 10),
           Target("evaluate sets", ("evaluate", "sets/a", "sets/r", "--sets", "in-a,in-r", "--model", "cft_vit_tiny64",
                                    "--weights", "thousand.safetensors", "--threads", 1, "--out", "e"), ("e",), 8, 24,
                  _small_sets), Target("validate", JUDGED, ("k.json", "v.csv"), 8, 24),
           Target("audit", ("audit", "photos", *MODEL, "--objects", "objects", "--out", "a.json"), ("a.json",), 4, 8))
SMOKE = Target("reproduce",
               ("reproduce", "--profile", "mine.yaml", "--only", "fig1", "--seeds", 1, "--cores", 2, "--out", "r"),
               ("r/artefacts",), 2, 0, patience=300.0)


def more_world(home: Path) -> None:
    """What only kills need. For a child."""
    import timm
    import torch

    from cft.data.models import save_model
    from cft.data.testsets import miniature

    torch.manual_seed(0)
    save_model(home / "thousand.safetensors", timm.create_model("cft_vit_tiny64", num_classes=1000))
    miniature("in-a", home / "sets/a", 1)
    miniature("in-r", home / "sets/r", 1)


def _words(target: Target, server: Server, case: str) -> list[Any]:
    answer = json.dumps({"items": ITEMS})
    return [*target.words, *([server.url(case, content=answer, delay=0.01)] if target.words is ASKED else [])]


def _paid(home: Path) -> int:
    """The answers of a record that are whole and usable."""
    count = 0
    for line in (home / "a.jsonl").read_bytes().splitlines() if (home / "a.jsonl").exists() else ():
        try:
            count += json.loads(line).get("status") == "ok"
        except ValueError:
            continue
    return count


def kill_once(target: Target, world: Path, scratch: Path, server: Server, wanted: dict[str, Any],
              moment: float | int) -> Result:
    """Kill a command after `moment` seconds, or at that touch of the disk if it is a whole number; then finish it."""
    home, kind = scratch / "home", f"kills: {target.name}"
    shutil.copytree(world, home, symlinks=True)
    words, case = _words(target, server, scratch.name), scratch.name
    before = target.before

    def armed() -> None:
        if before:
            before()
        if isinstance(moment, int):
            die_at(moment, home)()

    killed = Case(target.name, words, before=armed)
    first = finish(start(killed, home, scratch / "first"), home, scratch / "first", target.patience,
                   None if isinstance(moment, int) else moment)
    what = f"at touch {moment}" if isinstance(moment, int) else f"after {moment:.2f} s"
    if first.hang:
        return kind, what, "hang", "the command that was to be killed hangs"
    if first.code != -signal.SIGKILL:
        return kind, what, "missed", f"exit {first.code}"
    time.sleep(0.05 if target.words is not ASKED else 0.1)  # what was on its way arrives
    asked, paid = len(server.asked(case)), _paid(home)
    again = Case(target.name, words, "work", before=before, right=lambda seen: differs(seen, wanted, target.files))
    last = run(again, home, scratch / "last", target.patience, 0)
    verdict, why = judge(again, last)
    if verdict == "good" and target.words is ASKED and len(server.asked(case)) - asked != 12 - paid:
        verdict, why = "silent", f"{len(server.asked(case)) - asked} requests for {12 - paid} missing answers"
    return kind, what, verdict, why


def differs(seen: Seen, wanted: dict[str, Any], files: Sequence[str]) -> str:
    """How the files differ from those of an uninterrupted run; empty if they do not."""
    if seen.code:
        return f"exit {seen.code}"
    found = facts(seen.home, files)
    odd = sorted(key for key, value in wanted.items() if found.get(key) != value)
    odd += sorted(name for name in {key.partition(":")[0] for key in found} - {key.partition(":")[0] for key in wanted})
    if odd:
        key = odd[0]
        return f"{len(odd)} facts differ, first {key}: {str(found.get(key))[:90]} for {str(wanted.get(key))[:90]}"
    left = strays(seen.home)
    return f"leaves {left[0]}" if left else ""


def reference(target: Target, world: Path, scratch: Path, server: Server,
              twice: bool = True) -> tuple[dict[str, Any], float]:
    """What two uninterrupted runs agree on, and the seconds that they take."""
    made, seconds = [], 0.0
    for k in range(1 + twice):
        home = scratch / f"whole-{k}"
        shutil.copytree(world, home, symlinks=True)
        seen = run(Case(target.name, _words(target, server, f"{scratch.name}-{k}"), before=target.before), home,
                   scratch / f"log-{k}", target.patience, 0)
        if seen.code:
            raise RuntimeError(f"{target.name} ended with {seen.code}: {seen.err[-400:]}")
        made.append(facts(home, target.files))
        seconds = seen.seconds
    first, last = made[0], made[-1]
    unsure = {key for key in {*first, *last} if first.get(key) != last.get(key)}
    if unsure:
        print(f"         {target.name}: two runs differ in {', '.join(sorted(unsure)[:5])}", flush=True)
    return {key: value for key, value in first.items() if key not in unsure}, seconds


# Full and read-only disks: the system call fails as the system would let it fail


def _no_space(root: Path, after: int) -> Callable[[], None]:
    """No file may grow beyond `after` bytes; a write that would is short or fails."""
    def before() -> None:
        for number in (1, 2):  # what is printed goes through a process without the limit
            ours, theirs = os.pipe()
            if not os.fork():
                os.close(theirs)
                while data := os.read(ours, 1 << 16):
                    os.write(number, data)
                os._exit(0)
            os.close(ours)
            os.dup2(theirs, number)
            os.close(theirs)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))

    return before


def _failing(code: int, calls: Sequence[str], root: Path, after: int) -> Callable[[], None]:
    """Calls that touch `root` fail from the `after`-th on."""
    def before() -> None:
        import builtins
        import io

        count, mark = 0, str(root)

        def fails(path: Any) -> None:
            nonlocal count
            name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else mark
            if os.path.abspath(name).startswith(mark):
                count += 1
                if count >= after:
                    raise OSError(code, os.strerror(code), name)

        def guarded(real: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                if writes(*arguments, **more):
                    fails(arguments[0])
                return real(*arguments, **more)

            return call

        for name in calls:
            setattr(os, name, guarded(getattr(os, name), lambda *a, **k: name_writes(a)))
        opened = guarded(io.open, lambda file, mode="r", *a, **k: any(c in mode for c in "wax+"))
        if "open" in calls:
            io.open = builtins.open = opened  # type: ignore[assignment]

    def name_writes(arguments: tuple[Any, ...]) -> bool:
        return len(arguments) < 2 or not isinstance(arguments[1], int) or bool(arguments[1]
                                                                               & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    return before


DISKS = ("short", "full at fsync", "full at open", "full at rename", "read-only", "no locks")


def disk(target: Target, world: Path, scratch: Path, server: Server, wanted: dict[str, Any], what: str,
         rng: random.Random) -> Result:
    """A disk that is full or read-only: one sentence; then, with room, the same command ends as if nothing had been."""
    home, kind = scratch / "home", "disks"
    shutil.copytree(world, home, symlinks=True)
    after = rng.choice((1, 1, 2, 3, 5))
    before = {
        "short": lambda: _no_space(home, rng.choice((0, 10, 300, 2000))),
        "full at fsync": lambda: _failing(errno.ENOSPC, ("fsync",), home, after),
        "full at open": lambda: _failing(errno.ENOSPC, ("open", "mkdir"), home, after),
        "full at rename": lambda: _failing(errno.ENOSPC, ("replace", "rename"), home, after),
        "read-only": lambda: _failing(errno.EROFS, ("open", "mkdir", "unlink", "replace", "rename"), home, 1),
        "no locks": _no_locks}[what]()
    words, case = _words(target, server, scratch.name), scratch.name

    def armed() -> None:
        if target.before:
            target.before()
        if before:
            before()

    def right(seen: Seen) -> str:
        return f"{len(server.asked(case))} questions were asked first" if what == "read-only" and server.asked(
            case) else ""

    names = ("no space", "full", "disk", "too large", "read-only", "written", "lock", *target.files, "a.jsonl")
    first = Case(f"{what} ({after}) in {target.name}", words, "either", names, right, before=armed)
    seen = run(first, home, scratch / "first", 90, 0)
    verdict, why = judge(first, seen)
    if seen.hang:
        return kind, first.name, verdict, why
    paid, asked = _paid(home), len(server.asked(case))
    again = Case(target.name, words, "work", before=target.before,
                 right=lambda seen: differs(seen, wanted, target.files))
    ended = judge(again, run(again, home, scratch / "last", target.patience, 0))
    if ended[0] == "good" and target.words is ASKED and len(server.asked(case)) - asked > 12 - paid:
        ended = "silent", f"{len(server.asked(case)) - asked} requests for {12 - paid} missing answers"
    if verdict == "good" and ended[0] != "good":
        verdict, why = ended[0], f"afterwards: {ended[1]}"
    return kind, first.name, verdict, why


def _no_locks() -> Callable[[], None]:
    """A file system without flock."""
    def before() -> None:
        import fcntl

        def flock(*_: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.flock = flock

    return before


def together(target: Target, world: Path, scratch: Path, server: Server, wanted: dict[str, Any], gap: float) -> Result:
    """The same command twice at once on one output: both good, or one refuses by name; nothing is paid twice."""
    home, kind = scratch / "home", "two at once"
    shutil.copytree(world, home, symlinks=True)
    words, case = _words(target, server, scratch.name), scratch.name
    each = Case(target.name, words, "either", ("another", "other", "use", "lock", *target.files, "a.jsonl"),
                before=target.before)
    logs = [scratch / name for name in ("one", "two")]
    pids = []
    for log in logs:
        pids.append(start(each, home, log, 0))
        time.sleep(gap)
    both = [finish(pid, home, log, target.patience) for pid, log in zip(pids, logs)]
    found = [judge(each, seen) for seen in both]
    verdict, why = next((pair for pair in found if pair[0] != "good"), ("good", ""))
    if verdict == "good":
        if all(seen.code for seen in both):
            verdict, why = "unclear", f"both refuse: {both[0].err[-200:]} | {both[1].err[-200:]}"
        elif wrong := differs(next(seen for seen in both if not seen.code), wanted, target.files):
            verdict, why = "silent", wrong
        elif target.words is ASKED and len(server.asked(case)) > 12:
            verdict, why = "silent", f"{len(server.asked(case))} requests for 12 answers"
    return kind, f"{target.name}, {gap:.2f} s apart", verdict, why


def tally(results: Sequence[Result]) -> dict[str, Counter[str]]:
    """Counts of each kind."""
    counts: dict[str, Counter[str]] = {}
    for kind, _, verdict, _ in results:
        counts.setdefault(kind, Counter())[verdict] += 1
    return counts
