"""A command of cft in a forked child of a process that has imported everything once; what is seen of it is judged."""

import importlib
import io
import json
import os
import pkgutil
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CLASSES = ("good", "unclear", "traceback", "silent", "hang")
PATIENCE, MEMORY = 60.0, 6 << 30  # seconds until a command hangs, bytes of address space that it may have
STRAY = re.compile(r"\.(draft|half|old|tmp|part)$")
_BAR = re.compile(r"\d+%\||\[\d\d:\d\d|it/s|\?it")  # a line of a progress bar
_JARGON = re.compile(r"<class '|object at 0x|'NoneType' object|site-packages")  # words of Python, not of a user


@dataclass(frozen=True)
class Seen:
    """What a user sees of a command, and the folder in which it worked."""

    code: int
    out: str
    err: str
    seconds: float
    hang: bool
    home: Path
    strays: tuple[str, ...] = ()  # new ones

    @property
    def text(self) -> str:
        """All that was printed."""
        return self.out + self.err

    @property
    def sentences(self) -> list[str]:
        """The lines on standard error that are no progress bar."""
        lines = (line.rpartition("\r")[2].strip() for line in self.err.splitlines())
        return [line for line in lines if line and not _BAR.search(line)]


@dataclass(frozen=True)
class Case:
    """A bad input: what is bad, the command that meets it, and what a good answer is.

    may: "refuse", "work", or "either". names: one of them is in a good refusal. right: what is wrong with the state
    that the command left, whether it worked or refused; empty if nothing is.
    """

    name: str
    words: Sequence[Any]
    may: str = "either"
    names: Sequence[str] = ()
    right: Callable[[Seen], str] = lambda _: ""
    call: Callable[[], object] | None = None  # instead of the command line
    before: Callable[[], object] | None = None  # in the child


def judge(case: Case, seen: Seen) -> tuple[str, str]:
    """One of CLASSES for what was seen of a case, and why."""
    last = (seen.err.strip().splitlines() or ["nothing was said"])[-1][-300:]
    if seen.hang:
        return "hang", f"not done after {seen.seconds:.0f} s"
    fallen = "Traceback (most recent call last)" in seen.text or "an unforeseen " in seen.err  # caught, but not meant
    if fallen or seen.code not in (0, 1, 2, 130):
        return "traceback", f"exit {seen.code}: {last}"
    if case.may == "refuse" and not seen.code:
        return "silent", f"accepted: {(seen.out.strip().splitlines() or [''])[-1][:200]}"
    wrong = case.right(seen)
    if wrong and (not seen.code or case.may == "work"):
        return ("unclear", f"{wrong}: {last}") if seen.code else ("silent", wrong)
    if any(not c.isprintable() and c not in "\n\r\t" for c in seen.text.replace("\x1b[A", "")):
        return "unclear", "characters that a terminal obeys are printed"
    if seen.strays:
        return "unclear", f"leaves {', '.join(seen.strays[:3])}"
    if not seen.code:
        return "good", ""
    if case.may == "work":
        return "unclear", f"refused: {last}"
    if wrong:
        return "unclear", f"{wrong}: {last}"
    if seen.code == 2 and len(seen.sentences) != 1:
        return "unclear", f"{len(seen.sentences)} lines on standard error: {' | '.join(seen.sentences)[:300]}"
    said = " ".join(seen.sentences) if seen.code == 2 else seen.text
    if not any(name.lower() in said.lower() for name in case.names):
        return "unclear", f"names none of {', '.join(case.names)}: {said[:300]}"
    if found := _JARGON.search(said):
        return "unclear", f"speaks Python ({found[0]}): {said[:300]}"
    return "good", ""


def strays(root: Path) -> list[str]:
    """Files below a folder that a finished command should have removed."""
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if STRAY.search(p.name))
    return sorted(name for name in found if not name.startswith("half/"))  # a training that was killed for all cases


def warm() -> None:
    """Import everything once, with one thread, so that a fork is ready at once."""
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "sk-torture-0123456789", "NO_PROXY": "*"})
    import torch

    import cft

    torch.set_num_threads(1)
    names = [each.name for each in pkgutil.walk_packages(cft.__path__, "cft.")]
    for name in ["cft.apps.cli", "openai", "openai.resources.chat", "pandas", "pyarrow.parquet", *names]:
        with suppress(ImportError):
            importlib.import_module(name)


def _child(case: Case, home: Path, log: Path, memory: int) -> int:
    """In the forked child: run the command, and give its exit code."""
    os.setsid()
    for number, name in ((0, os.devnull), (1, log.with_suffix(".out")), (2, log.with_suffix(".err"))):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), number)
    sys.stdin = open(0, closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = os.fdopen(number, "wb", buffering=0, closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", errors="backslashreplace", write_through=True))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(home)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        if case.before:
            case.before()
        if case.call:
            case.call()
        else:
            from cft.apps.cli import main

            main([os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in case.words])
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (ValueError, OSError) as error:
        if not case.call:
            traceback.print_exc()
            return 70
        print(f"cft: {' '.join(str(error).split())}", file=sys.stderr)  # of a function: as its command would say it
        return 2
    except BaseException:
        traceback.print_exc()
        return 70


def start(case: Case, home: Path, log: Path, memory: int = MEMORY) -> int:
    """Begin a command in a child of its own; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 71
    try:
        code = _child(case, home, log, memory)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def finish(pid: int, home: Path, log: Path, patience: float = PATIENCE, kill_after: float | None = None) -> Seen:
    """Wait for a child, perhaps kill it after some seconds, and say what was seen."""
    began, hang, nap = time.monotonic(), False, 0.002
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        passed = time.monotonic() - began
        if done:
            break
        if passed > patience or kill_after is not None and passed > kill_after:
            hang = passed > patience
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            break
        time.sleep(nap)
        nap = min(0.02, nap * 1.5)
    time.sleep(0.02)  # what is on its way to a log arrives
    read = lambda ending: log.with_suffix(ending).read_text("utf-8", "replace") if log.with_suffix(ending).exists(
    ) else ""
    return Seen(os.waitstatus_to_exitcode(status), read(".out"), read(".err"), time.monotonic() - began, hang, home)


def run(case: Case, home: Path, log: Path, patience: float = PATIENCE, memory: int = MEMORY) -> Seen:
    """A command, to its end."""
    before = strays(home)
    seen = finish(start(case, home, log, memory), home, log, patience)
    return replace(seen, strays=tuple(name for name in strays(home) if name not in before))


def die_at(number: int, root: Path, last: Callable[[str], bool] = lambda _: False) -> Callable[[], None]:
    """For `Case.before`: die just before the `number`-th touch of the disk below `root`, or of a `last` name."""

    def before() -> None:
        count, mark = 0, str(root)

        def touched(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event == "open":
                path, mode, flags = arguments
                writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if not writes:
                    return
            elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "fsync"):
                return
            names = [os.fsdecode(each) for each in arguments if isinstance(each, (str, bytes, os.PathLike))]
            if event != "fsync" and not any(os.path.abspath(name).startswith(mark) for name in names):
                return
            count += 1
            if count == number or names and last(names[-1]):
                os.kill(os.getpid(), signal.SIGKILL)

        real = os.fsync

        def fsync(file: Any) -> None:
            touched("fsync", ())
            real(file)

        os.fsync = fsync
        sys.addaudithook(touched)

    return before


# A server that speaks OpenAI's protocol. The address of a case says what it answers, so that cases do not meet:
# http://127.0.0.1:PORT/CASE/v1, with PLACE/CASE.json = {"status", "body" or "content", …}; asked questions: CASE.asked


@dataclass
class Server:
    """A chat server on loopback, in a process of its own; the answers of a case are a file in `place`."""

    place: Path
    port: int = 0
    pid: int = field(default=0)

    def url(self, case: str, **answer: Any) -> str:
        """The address at which this is answered; see `_answer`."""
        (self.place / f"{case}.json").write_text(json.dumps(answer), encoding="utf-8")
        return f"http://127.0.0.1:{self.port}/{case}/v1"

    def asked(self, case: str) -> list[str]:
        """The question of each request, in order."""
        file = self.place / f"{case}.asked"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def chat(content: Any, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 9, "completion_tokens": 9}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage, "choices": [choice]
            } | more


def _answer(plan: dict[str, Any], body: dict[str, Any], path: str) -> tuple[int, bytes]:
    """Status and body. A plan has `content` (an answer), `body` or `text` (a whole response), `status`, `forbids`."""
    for name, message in plan.get("forbids", {}).items():
        if name in body or name == "/v1" and "/v1/" in path:
            return 400, json.dumps({"error": {"message": message, "code": "unsupported"}}).encode()
    if "text" in plan:
        return plan.get("status", 200), plan["text"].encode("utf-8", "surrogateescape")
    value = plan["body"] if "body" in plan else chat(plan.get("content"), **plan.get("more", {}))
    return plan.get("status", 200), json.dumps(value).encode()


@contextmanager
def served(place: Path) -> Iterator[Server]:
    """Serve until the block ends."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            case = self.path.split("/")[1]
            plan = json.loads((place / f"{case}.json").read_text("utf-8"))
            body = json.loads(raw) if raw[:1] == b"{" else {}
            messages = body.get("messages") or [{"content": ""}]
            with open(place / f"{case}.asked", "ab", buffering=0) as file:
                file.write(json.dumps(messages[-1]["content"]).encode() + b"\n")
            time.sleep(plan.get("delay", 0))
            status, data = _answer(plan, body, self.path)
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "retry-after-ms": "1"}
            for name, value in (headers | plan.get("headers", {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[:plan.get("cut", len(data))])
            self.close_connection = "cut" in plan

        do_GET = do_POST

    place.mkdir(parents=True, exist_ok=True)
    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed is no error."""

    server = Quiet(("127.0.0.1", 0), Handler)
    pid = os.fork()
    if not pid:
        try:
            threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
            server.serve_forever()
        finally:
            os._exit(0)
    server.server_close()
    try:
        yield Server(place, server.server_address[1], pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
