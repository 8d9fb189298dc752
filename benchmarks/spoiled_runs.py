"""Bad options, answers of language models, leftovers of earlier runs, and data sets of Hugging Face."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox import Case, Seen, Server, chat
from spoiled import (
    ASKED,
    CHOSEN,
    FIT,
    GROUNDED,
    ITEMS,
    JUDGED,
    MASKED,
    MODEL,
    SPECIAL,
    TESTED,
    TINY,
    TUNED,
    Evil,
    bomb,
    encoded,
    junk,
    kind,
    mutated,
    of_other_type,
    pictures_of,
    replaced,
    special,
    with_exif,
    without_one,
)

# Options

NUMBERS: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "--batch": (TESTED, (0, -1, "x", 1.5, 10**25)),
    "--threads": (TESTED, (-1, 99_999_999, "x", 2**63)),
    "--device":
        (TESTED, ("banana", "0", "gpu", "mps", "cuda", "cuda:99", "", "cpu:x", "CPU", "cuda:-1", "meta", "xla")),
    "--workers": (TESTED, (-1, "x", 10**9)),
    "--model": (TESTED, ("", "nobody", "../x", "vit_base_patch16_224", "hf_hub:a/b", "cft_vit_tiny64 ", "\x1b[2J")),
    "--sets": (TESTED, ("nowhere", ",", "in-v,in-v")),
    "--protocol": (TESTED, ("x",)),
    "--save-every": (FIT, (0, -1, "x", 1.5)),
    "--epochs": (FIT, (0, -1, "x", 2.5)),
    "--rate": (FIT, ("nan", -1, "inf", "abc", 0)),
    "--seed": (FIT, (2**80, "x", 2**64, -(2**70))),
    "--chunk": (FIT, (-1, "x")),
    "--precision": (FIT, ("fp8", "", "fp16")),
    "--method": (FIT, ("", "nobody", "cft.nobody", ".", "CFT", "cft.object.object")),
    "--validation": (FIT, ("nowhere", "start.safetensors", "")),
    "--shards": (GROUNDED, (0, -1, 999, "x")),
    "--shard": (GROUNDED, (-1, 5, "x")),
    "--per-class": (GROUNDED, (-1, "x")),
    "--grounder": (GROUNDED, ("", "nobody", "groundingdino-swint+sam-vit-h")),
    "--occurrence": (JUDGED, (2, -0.1, "nan", "x", "inf")),
    "--coverage": (JUDGED, (2, -1, "nan")),
    "--pictures": (JUDGED, (0, -1, "x")),
    "--profile": (("reproduce", "--dry-run"), ("nobody", "", "../x")),
    "--only": (("reproduce", "--dry-run"), ("nowhere", "table99", "table1,nobody")),
    "--models": (("reproduce", "--dry-run"), ("nobody",)),
    "--methods": (("reproduce", "--dry-run"), ("nobody",)),
    "--seeds": (("reproduce", "--dry-run"), (-1, "x")),
    "--executor": (("reproduce",), ("nobody", "")),
    "--clip": (("concepts", "classes.csv", "--dry-run"), ("nowhere", "start.safetensors")),
    "--model ": (("concepts", "classes.csv", "--dry-run"), ("", "\x1b[2J"))}
FINE = {("--threads", 99_999_999), ("--workers", 10**9), ("--batch", 10**25), ("--device", "CPU"), ("--device", "mps"),
        ("--model", "cft_vit_tiny64 "), ("--rate", 0), ("--validation", "")}  # may work
CLASSES_CSV = ("concepts", "classes.csv")
LINES: Sequence[tuple[str, Sequence[Any], str]] = (  # what is wrong, the command, and what must be named
    ("unknown command", ("teach", ), "teach"),
    ("unknown option", (*TESTED, "--fast"), "--fast"),
    ("no weights", ("evaluate", "photos", "--model", TINY), "--weights"),
    ("weights twice", (*TESTED, "--pretrained"), "--pretrained"),
    ("no model", ("evaluate", "photos"), "model"),
    ("no folder", ("fit", ), "missing"),
    ("two checkpoints", (*TESTED, "--weights", "start.safetensors"), "checkpoint"),
    ("store without concepts", ("fit", "photos", *MODEL, "--masks", "store", "--out", "run"), "--concepts"),
    ("no masks", ("fit", "photos", *MODEL, "--out", "run"), "--masks"),
    ("sets and objects", (*MASKED, "--sets", "in-v"), "--objects"),
    ("replay of nothing", (*CLASSES_CSV, "--replay", "--record", "none.jsonl", "--out", "c.json"), "none.jsonl"),
    ("no key", (*CLASSES_CSV, "--yes", "--out", "c.json", "--record", "a.jsonl"), "key"),
    ("no terminal", (*CLASSES_CSV, "--base-url", "http://127.0.0.1:9/v1", "--out", "c.json"), "--yes"),
    ("folders named by numbers", ("concepts", "numbers", "--dry-run"), "name"),
    ("no such source", ("concepts", "nothing.csv", "--dry-run"), "nothing.csv"),
    ("after nothing", ("audit", "photos", *MODEL, "--after", "nowhere"), "nowhere"),
    ("audit ending", ("audit", "photos", *MODEL, "--out", "a.pdf"), "a.pdf"))
OUTPUTS: Sequence[tuple[Sequence[Any], str]] = (
    (TESTED[:-2], "t.csv"), (TUNED, "run"), (GROUNDED[:-2], "new"), (JUDGED[:4], "k.json"),
    (("audit", "photos", *MODEL), "a.json"), (("concepts", ), "c.json"),
    (("reproduce", "--profile", "smoke", "--only", "table1"), "r"))


@kind(100)
def options(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Values of options, and outputs that cannot be written."""
    if number % 100 < 50:
        every = [(option, words, value) for option, (words, values) in NUMBERS.items() for value in values]
        step = len(every) // 50 + 1
        option, words, value = every[(number % 100 * step + rng.randrange(step)) % len(every)]
        may = "either" if (option, value) in FINE else "refuse"
        names = (option.strip(" -"), str(value).rpartition(",")[2] if len(str(value)) > 2 else f"got {value}")
        return Case(f"{option.strip()} {value!a}", [*words, option.strip(), value], may, names)
    if number % 100 < 50 + len(LINES):
        what, words, name = LINES[number % 100 - 50]
        for k in range(2):
            (home / "numbers" / str(k)).mkdir(parents=True)
            shutil.copy(pictures_of(home)[0], home / "numbers" / str(k))
        free = (lambda: os.environ.pop("OPENAI_API_KEY", None)) if what == "no key" else None
        return Case(what, words, "refuse", (name, ), before=free)
    words, name = OUTPUTS[number % len(OUTPUTS)]
    url = server.url(home.name, content=json.dumps({"items": ITEMS}))
    words = (*ASKED[:2], *ASKED[4:], url) if words[0] == "concepts" else words
    (home / "file").write_bytes(b"x")
    (home / "full").mkdir()
    (home / "full/mine.txt").write_bytes(b"x")
    folder = "." not in name
    bad = {
        "below a file": f"file/{name}",
        "a folder or a file": "file" if folder else "full",
        "too long": "x" * 300 + name,
        "in /proc": f"/proc/none/{name}",
        "a device": f"/dev/full/{name}",
        "NUL": f"a\0{name}",
        "empty": "",
        "dangling": f"link/{name}",
        "too deep": "d/" * 2100 + name}
    (home / "link").symlink_to("/proc/none")
    what = rng.choice(list(bad))
    words, case = [*words, "--out", bad[what]], home.name

    def right(seen: Seen) -> str:
        if server.asked(case):
            return f"{len(server.asked(case))} questions were paid for"
        return "trained before it was refused" if "in the last epoch" in seen.out or (
            seen.code and (home / "run/state.pt").exists()) else ""

    return Case(f"--out of {words[0]} {what}", words, "refuse", ("out", bad[what][:60] or "out", "full", "file", name),
                right)


# Answers and servers


Plan = tuple[dict[str, Any], str, Sequence[str]]  # what a server does, what may become of it, what must be named


def _dressed(rng: random.Random) -> dict[str, Plan]:
    """Answers around the three ITEMS: "work" (all are found), "any" (some of these), "loose" (others as well)."""
    items, fine = list(ITEMS), json.dumps({"items": ITEMS})
    bullets = lambda *marks: "\n".join(f"{rng.choice(marks)}{item}" for item in items)
    dress = rng.choice(("Sure! Here they are:\n\n{}", "<think>\nA head, maybe a tail.\n- tail?\n</think>\n\n{}",
                        "{}\n\nLet me know if you need more!", "Answer:\n{}", "\n\n{}\n\n", "\ufeff{}"))
    usage = rng.choice((None, "7", [], 7, {"prompt_tokens": "many"}, {"prompt_tokens": None}, {"prompt_tokens": 1.5}))
    read = {
        "dressed JSON": dress.format(fine),
        "dressed fence": dress.format(f"```json\n{fine}\n```"),
        "dressed list": dress.format(bullets("- ", "* ", "• ")),
        "fence": f"```json\n{fine}\n```",
        "bare array": json.dumps(items),
        "another key": json.dumps({rng.choice(("concepts", "answer", "parts")): items}),
        "an extra key": json.dumps({"items": items, "note": "done"}),
        "dashes": bullets("– ", "— ", "+ ", "  - ", "-  "),
        "numbers": "\n".join(f"{k}{rng.choice('.):')} {x}" for k, x in enumerate(items, 1)),
        "bold": "\n".join(f"- **{x}**" for x in items),
        "quotes": "\n".join(f'- "{x}"' for x in items),
        "curly": "\n".join(f"- “{x}”" for x in items),
        "think": f"<think>{rng.choice(('a tail', '{', '- a beak', fine))}</think>{fine}",
        "upper case": json.dumps({"items": [x.upper() for x in items]}),
        "spaces": json.dumps({"items": [f"  {x}. " for x in items]}),
        "twice": json.dumps({"items": items + items}),
        "two objects": f"{fine}\n{fine}"}
    some = {
        "bold and text": "\n".join(f"- **{x.title()}**: very important" for x in items),
        "nested": json.dumps({"items": [items]}),
        "objects": json.dumps({"items": [{"name": x} for x in items]}),
        "nulls inside": json.dumps({"items": [*items, None, 7]}),
        "single quotes": str({"items": items}),
        "trailing comma": fine.replace("]", ", ]"),
        "comma list": ", ".join(items),
        "lines": "\n".join(items),
        "markdown table": "| part |\n|---|\n" + "\n".join(f"| {x} |" for x in items),
        "parts": [{"type": "text", "text": fine}],
        "control": json.dumps({"items": [*items, "a\x1b[2Jb", "c\u202ed", "\ud800"]}),
        "huge": json.dumps({"items": [*items, "x" * 100_000]})}
    unusable = {
        "open think": "<think>\n- a tail\n- a beak",
        "empty items": '{"items": []}',
        "no answer": "",
        "null": None,
        "a refusal": "I'm sorry, I can't help with that.",
        "a number": 7}
    plans: dict[str, Plan] = {}
    for verdict, answers in (("work", read), ("either", some), ("refuse", unusable)):
        plans |= {name: ({"content": text}, verdict, ()) for name, text in answers.items()}
    return plans | {
        "odd usage": ({"content": fine, "more": {"usage": usage}}, "work", ()),
        "no usage": ({"content": fine, "more": {"usage": {}}}, "work", ()),
        "thousand": ({"content": json.dumps({"items": items + [f"part {k}" for k in range(1000)]})}, "loose", ())}


def _plans(rng: random.Random) -> dict[str, Plan]:
    """What a server does."""
    fine = json.dumps({"items": ITEMS})
    whole = chat(fine)
    error = lambda status, message: ({"status": status, "body": {"error": {"message": message}}}, "refuse",
                                     (message[:20], str(status)))
    body = lambda value, *names: ({"body": value}, "refuse", names)
    text = lambda value, *names, **more: ({"text": value, **more}, "refuse", names)
    forbids = lambda name, message: {"content": fine, "forbids": {name: message}}
    own = "Unsupported value: 'temperature' does not support 0.7 with this model."
    return _dressed(rng) | {
        "length": body(chat(fine[:20], "length"), "token", "truncated"),
        "filter": body(chat(fine, "content_filter"), "refused", "filter"),
        "odd finish": ({"body": chat(fine, rng.choice(("eos", "", "tool_calls")))}, "either", ()),
        "no choices": body(whole | {"choices": []}),
        "null choices": body(whole | {"choices": None}),
        "no message": body(whole | {"choices": [{}]}),
        "an array": body([1, 2]),
        "null body": body(None),
        "html": text("<html>Welcome</html>", "html", "/v1", headers={"Content-Type": "text/html"}),
        "empty body": text(""),
        "torn body": text(json.dumps(whole)[:-40]),
        "not UTF-8": ({"text": '{"choices": [{"message": {"content": "- a\udcff"}}]}'}, "loose", ()),
        "200 and an error": body({"error": "Unexpected endpoint or method. (POST /chat)"}, "Unexpected endpoint"),
        "cut": ({"content": fine, "cut": 50}, "refuse", ("connection", )),
        "no temperature": (forbids("temperature", own), "either", ("temperature", )),
        "no max_tokens": (forbids("max_tokens", "'max_tokens' is not supported with this model."), "either", ("max", )),
        "no schema": (forbids("response_format", "response_format is not supported"), "work", ()),
        "401": error(401, "Incorrect API key provided"),
        "402": error(402, "Insufficient credits on this account"),
        "403": error(403, "Country not supported"),
        "404": error(404, 'model "m" not found, try pulling it first'),
        "400": error(400, "This model's maximum context length is 512 tokens"),
        "422": error(422, "Extra inputs are not permitted"),
        "429": error(429, "You exceeded your current quota"),
        "500": error(500, "the model runner has crashed"),
        "503": error(503, "Loading model"),
        "key in the error": error(401, "Incorrect API key provided: sk-torture-0123456789"),
        "control in the error": error(400, "bad\x1b]0;owned\x07request"),
        "long error": error(400, "context " * 3000),
        "error as text": text("bad request: no such model", "no such model", status=400),
        "error as a list": ({"status": 400, "body": {"detail": [{"msg": "field required"}]}}, "refuse", ("field", )),
        "redirect": text("", "connect", "302", status=302, headers={"Location": "http://127.0.0.1:9/v1"}),
        "odd charset": ({"content": fine, "headers": {"Content-Type": "application/json; charset=x"}}, "either", ()),
        "text/plain": ({"content": fine, "headers": {"Content-Type": "text/plain"}}, "work", ())}


@kind(80)
def answers(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Answers as models give them, and servers as they are."""
    plans = _plans(rng)
    what, case = list(plans)[number % len(plans)], home.name
    plan, may, names = plans[what]
    (home / "classes.csv").write_text("id,name\nc1,yellow thing\n")
    url = server.url(case, **plan)
    if number % 80 >= 76:
        what, url = (("no server", "http://127.0.0.1:9/v1"), ("no address", "not a url"),
                     ("ftp", "ftp://127.0.0.1/v1"), ("empty address", ""))[number % 4]
        may, names = "refuse", ("connect", "base-url", "base_url", "url", "protocol", "key")

    def right(seen: Seen) -> str:
        asked, file = server.asked(case), home / "c.json"
        written = (path.read_text("utf-8", "replace") for path in (file, home / "a.jsonl") if path.is_file())
        if any("sk-torture" in text for text in (seen.text, *written)):
            return "the key was printed or written"
        if seen.code:
            empty = file.exists() and "an empty concept set was written"
            return empty or (f"{len(asked)} requests for 6 questions" if len(asked) > 48 else "")
        found = json.loads(file.read_text())
        texts = {each["text"] for each in found["concepts"]}
        if not texts:
            return "an empty concept set, exit 0"
        if may != "loose" and (odd := texts - set(ITEMS)):
            return f"concepts that nobody gave: {sorted(odd)[:3]}"
        if may == "work" and (lost := set(ITEMS) - texts - {each["text"] for each in found["dropped"]}):
            return f"lost {sorted(lost)}"
        paid = may == "work" and what != "no schema" and len(asked) > 6
        return f"{len(asked)} requests for 6 answers" if paid else ""

    good = ("answer", "usable", "server", *names) if not names or may == "either" else names
    return Case(what, [*ASKED, url], "either" if may == "loose" else may, good, right)


# Records and states


@kind(60)
def records(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """What earlier runs left: records of answers, states of a training, journals of a store."""
    case, url = home.name, server.url(home.name, content=json.dumps({"items": ITEMS}))
    if number % 60 < 24:
        return _record(rng, number, home, server, case, url)
    if number % 60 < 46:
        return _state(rng, number, home)
    store = home / "new"
    shutil.copytree(home / "store", store)
    first, journal = store / "shard-00000.parquet", store / "shard-00000.jsonl"
    words = [*GROUNDED, "--shards", 2]
    typed = (b"{}\n", b"[]\n", b"[1]\n", b'[{"a": 1}]\n', b"null\n", b'[{"picture": 7}]\n')
    spoilers: dict[str, tuple[Callable[[], object], str]] = {
        "store.json empty": (lambda: (store / "store.json").write_bytes(b""), "either"),
        "store.json torn": (lambda: (store / "store.json").write_text("{"), "either"),
        "journal empty": (lambda: (first.unlink(), journal.write_bytes(b"")), "work"),
        "journal torn": (lambda: (first.unlink(), journal.write_bytes(b'[{"picture": "a')), "work"),
        "journal junk": (lambda: (first.unlink(), journal.write_bytes(rng.randbytes(300))), "either"),
        "journal typed": (lambda: (first.unlink(), journal.write_bytes(rng.choice(typed))), "either"),
        "journal special": (lambda: (first.unlink(), special(rng, journal, rng.choice(SPECIAL[:-1]))), "either"),
        "shard cut": (lambda: first.write_bytes(first.read_bytes()[:900]), "either"),
        "another run's store": (lambda: (store / "store.json").write_text(
            (store / "store.json").read_text().replace('"seed": 0', '"seed": 1')), "refuse"),
        "something else": (lambda: (shutil.rmtree(store), store.mkdir(),
                                    (store / "mine.txt").write_text("x")), "refuse"),
        "a lock folder": (lambda: (first.unlink(), first.with_suffix(".lock").mkdir()), "either"),
        "shard special": (lambda: special(rng, first, rng.choice(SPECIAL[:-1])), "either")}
    what = list(spoilers)[number % len(spoilers)]
    spoil, may = spoilers[what]
    spoil()

    def right(seen: Seen) -> str:
        from cft.concepts.store import MaskStore

        if seen.code:
            return ""
        try:
            found = MaskStore(store)
            return "" if len(found.pictures) == 2 * CHOSEN else f"{len(found.pictures)} of {2 * CHOSEN} pictures"
        except ValueError as error:
            return f"exit 0, and the store cannot be read: {error}"

    return Case(f"store: {what}", words, may, ("new", "shard", "store"), right)


def _record(rng: random.Random, number: int, home: Path, server: Server, case: str, url: str) -> Case:
    from cft.concepts.language import ClassName, Sampling, questions

    (home / "classes.csv").write_text("id,name\nc1,yellow thing\n")
    asked = questions([ClassName("c1", "yellow thing")], Sampling(model="m"))
    line = lambda q, **more: json.dumps({
        "model": q.key[0],
        "prompt": q.key[1],
        "sample": q.key[2],
        "class": "c1",
        "kind": q.kind,
        "mode": "schema",
        "status": "ok",
        "tokens": [9, 9],
        "raw": json.dumps({"items": ITEMS})} | more).encode() + b"\n"
    whole, path = b"".join(map(line, asked)), home / "a.jsonl"
    key = rng.choice(("model", "prompt", "sample", "status", "tokens", "raw"))
    spoilt: dict[str, tuple[bytes, str, int | None]] = {
        "whole": (whole, "work", 0),
        "torn end": (whole[:rng.randrange(len(whole) - 300, len(whole) - 3)], "work", None),
        "torn in the middle": (whole[:100] + whole[300:], "work", None),
        "empty": (b"", "work", 6),
        "no last break": (whole[:-1], "work", 0),
        "CRLF": (whole.replace(b"\n", b"\r\n"), "work", 0),
        "BOM": (b"\xef\xbb\xbf" + whole, "either", None),
        "UTF-16": (whole.decode().encode("utf-16"), "either", None),
        "a wrong type":
            (b"".join(line(q, **{key: of_other_type(rng, "") if key != "tokens" else "x"})
                      for q in asked[:3]) + b"".join(map(line, asked[3:])), "either", None),
        "junk lines": (b"".join(rng.choice(list(junk(rng).values())) + b"\n" + line(q) for q in asked), "either", None),
        "answers twice": (whole + whole, "work", 0),
        "junk": (rng.randbytes(500), "either", None),
        "a list": (b"[" + whole.replace(b"\n", b",")[:-1] + b"]", "either", None),
        "pretty": (json.dumps(json.loads(line(asked[0])), indent=1).encode(), "either", None),
        "bits": (mutated(rng, whole), "either", None),
        "NUL": (bytes(4096) + whole, "either", None),
        "deep": (b"[" * 100_000 + b"\n" + whole, "either", None),
        "no items": (b"".join(line(q, raw="{}") for q in asked), "either", None),
        "other model": (b"".join(line(q, model="x") for q in asked), "work", 6)}
    what = list(spoilt)[number % len(spoilt)] if number % 24 < 20 else "special"
    if what == "special":
        which = rng.choice(SPECIAL[:-1])
        special(rng, path, which)
        paid = lambda seen: "paid before it was refused" if seen.code and server.asked(case) else ""
        return Case(f"record: {which}", [*ASKED, url], "either", ("a.jsonl",), paid)
    data, may, wanted = spoilt[what]
    path.write_bytes(data)

    def right(seen: Seen) -> str:
        number = len(server.asked(case))
        if seen.code:
            return "asked before it was refused" if number else ""
        texts = {each["text"]
                 for each in json.loads((home / "c.json").read_text())["concepts"]} if (home /
                                                                                        "c.json").exists() else set()
        if not texts or what != "bits" and texts - set(ITEMS):
            return f"concepts {sorted(texts)[:4]}"
        return f"{number} requests for {wanted} missing answers" if wanted is not None and number != wanted else ""

    return Case(f"record: {what}", [*ASKED, url], may, ("a.jsonl", "record", "answer"), right)


def _state(rng: random.Random, number: int, home: Path) -> Case:
    shutil.copytree(home / "half", home / "run")
    state, record, model = (home / "run" / name for name in ("state.pt", "record.json", "model.safetensors"))
    finished = lambda: (shutil.rmtree(home / "run"), shutil.copytree(home / "expected/run", home / "run"))
    data = state.read_bytes()
    value = json.loads((home / "expected/run/record.json").read_text())

    def stored() -> object:
        import torch

        return torch.save(rng.choice(({}, [], 7, None, {"step": "x"}, {"step": 1})), state)

    spoilers: dict[str, tuple[Callable[[], object], str]] = {
        "untouched": (lambda: None, "work"),
        "state torn": (lambda: state.write_bytes(data[:rng.randrange(len(data))]), "either"),
        "state empty": (lambda: state.write_bytes(b""), "either"),
        "state junk": (lambda: state.write_bytes(rng.choice(list(junk(rng).values()))), "either"),
        "state of something else": (stored, "either"),
        "state bits": (lambda: state.write_bytes(mutated(rng, data, 4, 2000)), "any"),
        "state special": (lambda: special(rng, state, rng.choice(SPECIAL[:-1])), "either"),
        "code in the state": (lambda: _evil(state), "either"),
        "record torn": (lambda: (finished(), record.write_text(json.dumps(value)[:rng.randrange(1, 400)])), "either"),
        "record empty": (lambda: (finished(), record.write_bytes(b"")), "either"),
        "record typed": (lambda: (finished(
        ), record.write_text(json.dumps(replaced(value, (rng.choice(list(value)),), lambda v: of_other_type(rng, v))))),
                         "any"),
        "record list": (lambda: (finished(), record.write_text("[]")), "either"),
        "record null": (lambda: (finished(), record.write_text("null")), "either"),
        "record without a key":
            (lambda: (finished(), record.write_text(json.dumps(without_one(rng, value, list(value))))), "any"),
        "model missing": (lambda: (finished(), model.unlink()), "either"),
        "model empty": (lambda: (finished(), model.write_bytes(b"")), "either"),
        "model cut": (lambda: (finished(), model.write_bytes(model.read_bytes()[:9000])), "either"),
        "model special": (lambda: (finished(), special(rng, model, rng.choice(SPECIAL[:-1]))), "either"),
        "something else": (lambda: (shutil.rmtree(home / "run"), (home / "run").mkdir(),
                                    (home / "run/record.json").write_text('{"mine": 1}')), "either")}
    what = list(spoilers)[number % len(spoilers)]
    spoil, may = spoilers[what]
    spoil()

    def right(seen: Seen) -> str:
        from safetensors.torch import load_file

        if (home / "hit").exists():
            return "code of a pickle ran"
        if seen.code or may == "any":
            return ""
        try:
            found, wanted = load_file(model), load_file(home / "expected/run/model.safetensors")
        except Exception as error:
            return f"exit 0, and the model cannot be read: {error}"
        return "" if all(found[key].equal(wanted[key]) for key in wanted) else "other weights"

    return Case(f"run: {what}", FIT + ("--save-every", 1), "either" if may == "any" else may,
                ("run", "state.pt", "record.json", "model.safetensors"), right)


def _evil(path: Path) -> None:
    import torch

    torch.save({"state": Evil()}, path)


# Hugging Face data sets


@kind(20)
def hub(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Data sets of Hugging Face with holes."""
    good = lambda: {"bytes": encoded(rng, "png", (64, 64)), "path": None}
    odd = {
        "null": None,
        "junk": {"bytes": rng.choice(list(junk(rng).values())), "path": None},
        "gone": {"bytes": None, "path": "/gone/x.png"},
        "nothing": {"bytes": None, "path": None},
        "bomb": {"bytes": bomb(1, 1_000_000), "path": None},
        "cut": {"bytes": encoded(rng, "png", (90, 90))[:300], "path": None},
        "exif": {"bytes": with_exif(rng, encoded(rng, "jpg")), "path": None},
        "a folder": {"bytes": None, "path": str(home)}}
    labels = {"label -1": [0, -1, 1], "label null": [0, None, 1], "label too large": [0, 99, 1]}
    whats = [*odd, *labels, "no picture column", "splits", "no rows", "text for pictures", "label as text"]
    what, row = whats[number % len(whats)], rng.randrange(3)

    def call() -> None:
        import datasets

        from cft.data import backdrop
        from cft.data.models import base_model
        from cft.data.testsets import hub_set
        from cft.evaluate.passes import Loop, checkpoint, evaluate_sets

        cells, values = [good() for _ in range(3)], labels.get(what, [0, 1, 1])
        if what in odd:
            cells[row] = odd[what]
        kind = datasets.Value("string") if what == "label as text" else datasets.Value(
            "int64") if what in labels else datasets.ClassLabel(names=["a", "b"])
        table: dict[str, Any] = {
            "image": [] if what == "no rows" else cells,
            "label": [] if what == "no rows" else list(map(str, values)) if what == "label as text" else values}
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        if what == "no picture column":
            source: Any = datasets.Dataset.from_dict({"label": [0, 1]})
        elif what == "text for pictures":
            source = datasets.Dataset.from_dict({"image": ["a", "b"], "label": [0, 1]})
        elif what == "nothing":  # as Arrow holds it; `datasets` itself would not encode it
            plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            source = datasets.Dataset.from_dict(table, datasets.Features({"image": plain, "label": kind}))
            source = source.cast_column("image", datasets.Image())
        else:
            source = datasets.Dataset.from_dict(table, features=features)
        names = list(backdrop.CLASSES) if what in labels or what == "label as text" else None
        source = datasets.DatasetDict({"train": source}) if what == "splits" else source
        found = hub_set(source, names, key="mine")
        print(evaluate_sets([checkpoint(base_model(0), "m")], [found], home / "o", loop=Loop(2)).rows().to_string())

    def right(seen: Seen) -> str:
        said = re.search(r"row|aside|00000|null|picture", seen.text.partition("top1")[0])
        return "" if seen.code or what == "exif" or said else "nothing was said"

    names = ("mine", "row", f"{row:08d}", "/gone/x.png")
    return Case(what, (), "either" if what in odd else "refuse", names, right, call)
