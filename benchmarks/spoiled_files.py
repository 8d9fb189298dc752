"""Bad checkpoints, lists of classes, concept sets, mask stores and settings."""

import io
import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sandbox import Case, Seen, Server
from spoiled import (
    ASKED,
    GROUNDED,
    ITEMS,
    JUDGED,
    MODEL,
    SPECIAL,
    TESTED,
    TINY,
    Evil,
    junk,
    kind,
    leaves,
    mutated,
    of_other_type,
    pictures_of,
    replaced,
    special,
    table_is,
    without_one,
)

# Checkpoints


def _contents(rng: random.Random, home: Path) -> dict[str, tuple[Any, str]]:
    """What a checkpoint holds, and what may become of it."""
    import argparse
    from collections import OrderedDict

    import torch
    from safetensors.torch import load_file

    state = {key: value.float() for key, value in load_file(home / "start.safetensors").items()}
    ema = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    key = rng.choice([key for key in state if key.endswith("weight")])
    pre = lambda *names: {"".join(names) + k: v for k, v in state.items()}
    swap = lambda change: state | {key: change(state[key].clone())}

    def put(value: float) -> dict[str, Any]:
        spoilt = state[key].clone()
        spoilt.view(-1)[rng.randrange(spoilt.numel())] = value
        return state | {key: spoilt}

    outer = ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "backbone.", "encoder.", "vit.",
             "student.", "base_model.model.")
    wraps = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema", "net", "network",
             "teacher", "weights", "params")
    more = {
        "epoch": 3,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=1e-3),
        "best": np.float64(1.0),
        "scheduler": None,
        "arch": TINY}
    prefix, wrap = rng.choice(outer), rng.choice(wraps)
    extra = dict(rng.sample(list(more.items()), rng.randrange(4)))
    return {
        "plain": (state, "work"),
        f"prefix {prefix}": (pre(prefix), "either"),
        f"in {wrap}": ({wrap: state} | extra, "either"),
        f"in {wrap} with {prefix}": ({wrap: pre(prefix)} | extra, "either"),
        "ordered": (OrderedDict(state), "work"),
        "raw and EMA": ({"state_dict": state, "state_dict_ema": ema} | extra, "said"),
        "model and model_ema": ({"model": state, "model_ema": ema}, "said"),
        "Namespace": ({"model": state, "args": argparse.Namespace(lr=1e-3)}, "either"),
        "NaN": (put(float("nan")), "refuse"),
        "infinite": (put(float("inf")), "refuse"),
        "complex": (swap(lambda v: v.to(torch.complex64)), "refuse"),
        "complex buffer": (state | {"freqs": torch.zeros(2, dtype=torch.complex64)}, "refuse"),
        "whole numbers": (swap(lambda v: (v * 100).to(torch.int8)), "refuse"),
        "halves": ({k: v.half() for k, v in state.items()}, "work"),
        "bfloat16": ({k: v.bfloat16() for k, v in state.items()}, "either"),
        "doubles": ({k: v.double() for k, v in state.items()}, "work"),
        "a tensor is missing": ({k: v for k, v in state.items() if k != key}, "refuse"),
        "a tensor too many": (state | {"more.weight": state[key]}, "refuse"),
        "other shape": (swap(lambda v: v.reshape(-1)[:-1]), "refuse"),
        "turned head": (state | {"head.weight": state["head.weight"].T.contiguous()}, "refuse"),
        "no head": ({k: v for k, v in state.items() if not k.startswith("head.")}, "refuse"),
        "empty": ({}, "refuse"),
        "a list": (list(state.values()), "refuse"),
        "one tensor": (state[key], "refuse"),
        "a number": (7, "refuse"),
        "None": (None, "refuse"),
        "text": ("weights", "refuse"),
        "numbers for keys": ({1: state[key], 2: state[key]}, "refuse"),
        "mixed keys": (state | {3: state[key]}, "refuse"),
        "nothing inside": ({"state_dict": {}}, "refuse"),
        "None inside": ({"state_dict": None}, "refuse"),
        "a list inside": ({"model": [1, 2]}, "refuse"),
        "deep": ({"a": {"b": {"state_dict": state}}}, "either"),
        "a counter": (state | {"epoch": 3}, "either"),
        "code": (Evil(), "refuse"),
        "code inside": ({"state_dict": state, "hook": Evil()}, "refuse"),
        "arrays": ({k: v.numpy() for k, v in state.items()}, "either"),
        "of torchvision": ({
            "conv1.weight": torch.zeros(64, 3, 7, 7),
            "fc.weight": torch.zeros(12, 512),
            "fc.bias": torch.zeros(12)}, "refuse"),
        "of Hugging Face": ({
            "vit.embeddings.cls_token": torch.zeros(1, 1, 96),
            "classifier.weight": torch.zeros(12, 96),
            "classifier.bias": torch.zeros(12)}, "refuse"),
        "sparse": (swap(lambda v: v.to_sparse()), "either"),
        "other class count": (state | {
            "head.weight": torch.zeros(7, 96),
            "head.bias": torch.zeros(7)}, "refuse")}


def _raw_checkpoints(rng: random.Random, home: Path, path: Path) -> dict[str, Callable[[], object]]:
    """Files that are refused, whatever they hold."""
    good = (home / "start.safetensors").read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = lambda text: struct.pack("<Q", len(text)) + text
    write = lambda data: (lambda: path.write_bytes(data))
    return {
        **{
            f"bytes: {name}": write(data) for name, data in junk(rng).items()}, "cut": write(
            good[:rng.randrange(10,
                                len(good) - 5)]),
        "bits of the header": write(mutated(rng, good[:8], 3) + good[8:]),
        "long header": write(struct.pack("<Q", 1 << 60) + good[8:]),
        "broken header": write(header(b'{"a": ' + b"[" * 5000) + bytes(20)),
        "header of no object": write(header(b"[1, 2]") + bytes(20)),
        "offsets": write(header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}') + bytes(16)),
        "huge shape":
            write(header(b'{"a":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,16]}}') + bytes(16)),
        "class names of numbers": write(_with_metadata(good, size, '[1, 2, 3]')),
        "class names of text": write(_with_metadata(good, size, '"abc"')),
        "class names of an object": write(_with_metadata(good, size, '{"a": 1}')),
        "torn class names": write(_with_metadata(good, size, '["a", ')),
        "class names twice": write(_with_metadata(good, size, json.dumps(["a"] * 12))),
        "arrays": lambda: np.savez(path.open("wb"), a=np.zeros(3)),
        "an array": lambda: np.save(path.open("wb"), np.zeros(3)),
        "objects": lambda: np.save(path.open("wb"), np.array([Evil()]), allow_pickle=True),
        **{
            what: lambda what=what: special(rng, path, what) for what in SPECIAL}}


def _with_metadata(good: bytes, size: int, classes: str) -> bytes:
    head = json.loads(good[8:8 + size])
    head["__metadata__"] = {"format": "pt", "classes": classes}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + good[8 + size:]


@kind(80)
def checkpoints(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Checkpoints in all wrappings, and files that are none."""
    import pickle

    import torch

    ending = rng.choice((".pth", ".pt", ".bin", ".ckpt", ".tar"))
    path = home / f"odd{ending}"
    words = [
        "evaluate", "photos", "--model", TINY, "--weights", path.name, "--classes", "classes.txt", "--threads", 1,
        "--out", "t.csv"]
    if number % 80 >= 48:
        path = home / ("odd.safetensors" if rng.random() < 0.6 else path.name)
        raws = _raw_checkpoints(rng, home, path)
        what = list(raws)[number % len(raws)]
        if "header" in what or "class names" in what or what in ("offsets", "huge shape"):
            path = home / "odd.safetensors"
            raws = _raw_checkpoints(rng, home, path)
        raws[what]()
        words[5] = path.name
        plain = words[:6] + words[8:] if "class names" in what else words
        return Case(f"{what} as {path.suffix}", plain, "refuse", ("odd", "checkpoint"))
    contents = _contents(rng, home)
    what = list(contents)[number % len(contents)]
    value, may = contents[what]
    if rng.random() < 0.15 and isinstance(value, dict):
        path.write_bytes(pickle.dumps(value))
        may = "either" if may == "work" else may
    else:
        torch.save(value, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    same = table_is("t.csv")

    def right(seen: Seen) -> str:
        if (seen.home / "hit").exists():
            return "code of a pickle ran"
        return ("" if seen.code or "ema" in seen.text.lower() else
                "nothing was said of two sets of weights") if may == "said" else same(seen)

    names = ("odd", "checkpoint", "classes.txt")
    return Case(f"{what} as {ending}", words, "either" if may == "said" else may, names, right)


# Lists of classes and CSV files


def _csv_files(rng: random.Random) -> dict[str, tuple[bytes, str, list[str]]]:
    """Bytes, what may become of them, and the names that a model would be asked about."""
    rows = [("c1", "yellow thing"), ("c2", "round thing")]
    names, text = [row[1] for row in rows], "id,name\n" + "".join(f"{a},{b}\n" for a, b in rows)
    with_ = lambda line: (text + line + "\n").encode("utf-8", "surrogateescape")
    return {
        "BOM": (text.encode("utf-8-sig"), "either", names),
        "UTF-16": (text.encode("utf-16"), "either", names),
        "UTF-16 without BOM": (text.encode("utf-16-le"), "refuse", names),
        "UTF-32": (text.encode("utf-32"), "refuse", names),
        "semicolons": (text.replace(",", ";").encode(), "either", names),
        "tabs": (text.replace(",", "\t").encode(), "either", names),
        "bars": (text.replace(",", "|").encode(), "refuse", names),
        "CRLF": (text.replace("\n", "\r\n").encode(), "work", names),
        "CR": (text.replace("\n", "\r").encode(), "either", names),
        "Latin-1": ((text + "c3,Käfer\n").encode("latin-1"), "refuse", names),
        "an id twice": (with_("c1,other thing"), "refuse", []),
        "a name twice": (with_("c3,round thing"), "either", [*names, "round thing"]),
        "no header": (text.partition("\n")[2].encode(), "refuse", []),
        "upper case": (text.replace("id,name", "ID,Name").encode(), "either", names),
        "blanks in the header": (text.replace("id,name", "id, name").encode(), "either", names),
        "a column twice": (text.replace("id,name", "id,name,name").encode(), "refuse", []),
        "empty": (b"", "refuse", []),
        "only a header": (b"id,name\n", "refuse", []),
        "blank lines": (text.replace("\n", "\n\n").encode(), "either", names),
        "one column": (b"name\nyellow thing\n", "refuse", []),
        "too few cells": (with_("c3"), "refuse", []),
        "too many cells": (with_("c3,x thing,d,e,f"), "refuse", []),
        "empty name": (with_("c3,"), "refuse", []),
        "blank name": (with_("c3,   "), "refuse", []),
        "empty id": (with_(",x thing"), "refuse", []),
        "slash": (with_("a/b,x thing"), "refuse", []),
        "..": (with_("..,x thing"), "refuse", []),
        "control": (with_("c3,a\x1b[2Jb"), "refuse", []),
        "NUL": (with_("c3,a\0b"), "refuse", []),
        "huge field": (with_(f'c3,"{"x" * rng.choice((131_073, 200_000, 1_000_000))}"'), "refuse", []),
        "open quote": (with_('c3,"x thing'), "either", [*names, "x thing"]),
        "line break in a name": (with_('c3,"x\nthing"'), "refuse", []),
        "not UTF-8": (with_("c3,x\udcff"), "refuse", []),
        "numbers": (with_("c3,7"), "refuse", []),
        "JSON": (json.dumps(dict(rows)).encode(), "refuse", []),
        "zip (xlsx)": (b"PK\x03\x04" + rng.randbytes(200), "refuse", []),
        "quoted": (b'"id","name"\n"c1","yellow thing"\n', "work", names[:1]),
        "direction": (with_("c3,x\u202ething"), "refuse", []),
        "bits": (mutated(rng, text.encode(), 3, 7), "refuse", []),
        "random": (rng.randbytes(300), "refuse", [])}


def _class_lists(rng: random.Random, lines: list[str]) -> dict[str, tuple[bytes, str]]:
    text = "\n".join(lines) + "\n"
    shuffled = rng.sample(lines, len(lines))
    return {
        "BOM": (text.encode("utf-8-sig"), "either"),
        "UTF-16": (text.encode("utf-16"), "either"),
        "CRLF": (text.replace("\n", "\r\n").encode(), "work"),
        "a name twice": ("\n".join([*lines[:-1], lines[0]]).encode(), "refuse"),
        "too few": ("\n".join(lines[:-1]).encode(), "refuse"),
        "too many": ((text + "zzz\n").encode(), "refuse"),
        "empty": (b"", "refuse"),
        "blank lines": (text.replace("\n", "\n\n").encode(), "either"),
        "numbered": ("\n".join(f"{k} {name}" for k, name in enumerate(lines)).encode(), "refuse"),
        "commas": (",".join(lines).encode(), "refuse"),
        "JSON": (json.dumps(lines).encode(), "refuse"),
        "JSON, one a line": (json.dumps(lines, indent=1).encode(), "refuse"),
        "blanks": (text.replace("\n", "  \n").encode(), "either"),
        "upper case": (text.upper().encode(), "refuse"),
        "other order": ("\n".join(shuffled).encode(), "order"),
        "Latin-1": (text.encode() + "é".encode("latin-1"), "refuse"),
        "CSV": (("id,name\n" + "".join(f"{name},{name}\n" for name in lines)).encode(), "refuse"),
        "NUL": (text.replace("\n", "\0").encode(), "refuse"),
        "random": (rng.randbytes(200), "refuse")}


@kind(60)
def classes(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Lists of classes for a network, and CSV files for a language model."""
    if number % 60 < 40:
        files = _csv_files(rng)
        what = list(files)[number % len(files)]
        data, may, names = files[what]
        (home / "classes.csv").write_bytes(data)
        url, case = server.url(home.name, content=json.dumps({"items": ITEMS})), home.name

        def right(seen: Seen) -> str:
            asked = {json.loads(text)["class"] for text in server.asked(case)}
            if seen.code:
                return "asked before it was refused" if asked else ""
            return "" if asked == set(names) else f"asked about {sorted(asked)} for {sorted(names)}"

        return Case(f"CSV: {what}", [*ASKED, url], may, ("classes.csv", "class"), right)
    lists = _class_lists(rng, (home / "classes.txt").read_text().split())
    what = list(lists)[number % len(lists)] if number % 60 < 58 else "special"
    if what == "special":
        which = rng.choice(SPECIAL)
        special(rng, home / "classes.txt", which)
        return Case(f"list: {which}", [*TESTED, "--classes", "classes.txt"], "refuse", ("classes.txt",))
    data, may = lists[what]
    (home / "classes.txt").write_bytes(data)
    same, words = table_is("t.csv"), [*TESTED, "--classes", "classes.txt"]
    if may == "order":
        return Case(f"list: {what}", words, "either", ("class", ),
                    lambda seen: "" if "order" in seen.text else same(seen))
    return Case(f"list: {what}", words, may, ("class", ), same)


# Concept sets and stores


@kind(70)
def concepts(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Concept sets, and mask stores."""
    path = home / "concepts.json"
    text = path.read_text()
    value = json.loads(text)
    words = JUDGED if rng.random() < 0.6 else ("masks", *GROUNDED[1:])
    same = lambda seen: "" if seen.code or words is not JUDGED or _concepts(home / "k.json") == _concepts(
        home / "kept.json") else "other concepts were kept"
    part = lambda: rng.choice([
        p for p in leaves({k: value[k] for k in ("classes", "concepts")}) if p and p[0] in ("classes", "concepts")])
    spoilt: dict[str, tuple[Callable[[], str | bytes], str]] = {
        "torn": (lambda: text[:rng.randrange(1, len(text) - 1)], "refuse"),
        "a wrong type": (lambda: json.dumps(replaced(value, part(), lambda v: of_other_type(rng, v))), "refuse"),
        "a key twice": (lambda: text.replace('"concepts": [', '"concepts": [], "concepts": [', 1), "refuse"),
        "empty set": (lambda: json.dumps(value | {"concepts": []}), "refuse"),
        "no classes": (lambda: json.dumps(value | {"concepts": [], "classes": []}), "refuse"),
        "empty": (lambda: "", "refuse"),
        "BOM": (lambda: text.encode("utf-8-sig"), "either"),
        "UTF-16": (lambda: text.encode("utf-16"), "either"),
        "bytes": (lambda: rng.choice(list(junk(rng).values())), "refuse"),
        "deep": (lambda: "[" * 100_000, "refuse"),
        "a missing key": (lambda: json.dumps(without_one(rng, value, ("classes", "concepts"))), "any"),
        "an unknown owner": (lambda: json.dumps(replaced(value,
                                                         ("concepts", 0, "owners"), lambda _: ["nobody"])), "refuse"),
        "a class twice": (lambda: json.dumps(value | {"classes": value["classes"] + value["classes"][:1]}), "refuse"),
        "a concept twice":
            (lambda: json.dumps(value | {"concepts": value["concepts"] + value["concepts"][:1]}), "refuse"),
        "control characters":
            (lambda: json.dumps(replaced(value, ("concepts", 0, "text"), lambda t: t + "\x1b[2J")), "refuse"),
        "an array": (lambda: json.dumps(value["concepts"]), "refuse"),
        "NaN": (lambda: text.replace('"settings": {', '"settings": {"a": NaN, ', 1), "either"),
        "of other classes": (lambda: json.dumps(
            replaced(replaced(value, ("classes", 0, "id"), lambda _: "zzz"),
                     ("concepts",), lambda cs: [c for c in cs
                                                if value["classes"][0]["id"] not in c["owners"]])), "refuse"),
        "a concept not looked for":
            (lambda: json.dumps(replaced(value, ("concepts", 0, "text"), lambda t: t + " and more")), "foreign"),
        "bits": (lambda: mutated(rng, text.encode(), 3), "any")}
    if number % 70 < 36:
        what = list(spoilt)[number % len(spoilt)]
        make, may = spoilt[what]
        data = make()
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        if may == "foreign":
            words, may = JUDGED, "refuse"
        return Case(f"set: {what} in {words[0]}", words, "either" if may == "any" else may,
                    ("concepts.json", "store", "concept set"), same if may == "either" else lambda _: "")
    return _store(rng, number, home)


def _concepts(path: Path) -> list[Any]:
    return sorted((c["text"], c["owners"]) for c in json.loads(path.read_text())["concepts"]) if path.is_file() else []


def _store(rng: random.Random, number: int, home: Path) -> Case:
    store, first, second = home / "store", home / "store/shard-00000.parquet", home / "store/shard-00001.parquet"
    recipe, data = json.loads((store / "store.json").read_text()), first.read_bytes()
    write = lambda value: (store / "store.json").write_text(json.dumps(value))
    part = lambda: rng.choice([
        p for p in leaves(recipe) if p and p[0] in ("format", "shards", "grounder", "settings", "area", "pictures")])

    def foreign() -> object:
        import pyarrow as pa
        import pyarrow.parquet as pq

        other = io.BytesIO()
        pq.write_table(pa.table({"a": [1, 2]}), other)
        return first.write_bytes(other.getvalue())

    def meaningless() -> object:
        import pyarrow.parquet as pq

        table = pq.read_table(first)
        column = rng.choice(("rle", "status", "kind", "phrase", "class_id", "picture"))
        index = table.schema.get_field_index(column)
        import pyarrow as pa

        values = [rng.choice(("", "zzz", None, "\x1b[2J")) for _ in range(len(table))]
        return pq.write_table(
            table.set_column(index, table.schema.field(index), pa.array(values,
                                                                        table.schema.field(index).type)), first)

    spoilers: dict[str, tuple[Callable[[], object], str]] = {
        "shard missing": (first.unlink, "refuse"),
        "shard over another": (lambda: shutil.copy(first, second), "refuse"),
        "shard of another": (foreign, "refuse"),
        "shard rewritten": (meaningless, "refuse"),
        "shard cut": (lambda: first.write_bytes(data[:rng.randrange(len(data))]), "refuse"),
        "shard bits": (lambda: first.write_bytes(mutated(rng, data)), "either"),
        "shard junk": (lambda: first.write_bytes(rng.choice(list(junk(rng).values()))), "refuse"),
        "shard special": (lambda: special(rng, first, rng.choice(SPECIAL)), "refuse"),
        "json torn": (lambda: (store / "store.json").write_text(json.dumps(recipe)[:rng.randrange(400)]), "refuse"),
        "json empty": (lambda: (store / "store.json").write_bytes(b""), "refuse"),
        "json typed": (lambda: write(replaced(recipe, part(), lambda v: of_other_type(rng, v))), "refuse"),
        "json without a key": (lambda: write(without_one(rng, recipe, ("format", "shards", "area"))), "refuse"),
        "json of another format": (lambda: write(recipe | {"format": rng.choice((0, 1, 99))}), "refuse"),
        "json list": (lambda: write([recipe]), "refuse"),
        "json special": (lambda: special(rng, store / "store.json", rng.choice(SPECIAL)), "refuse"),
        "a file for the store": (lambda: (shutil.rmtree(store), store.write_bytes(b"x")), "refuse"),
        "pictures exchanged":
            (lambda: [Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(p)
                      for p in pictures_of(home)], "exchanged"),
        "pictures of another size": (lambda: [Image.open(p).resize((80, 60)).save(p)
                                              for p in pictures_of(home)], "resized")}
    what = list(spoilers)[number % len(spoilers)]
    spoil, may = spoilers[what]
    spoil()
    fit = ("fit", "photos", *MODEL, "--masks", "store", "--concepts", "kept.json", "--per-class", 1, "--rate", "1e-4",
           "--epochs", 1, "--batch", 2, "--out", "run")
    words = fit if may in ("exchanged", "resized") or rng.random() < 0.35 else JUDGED
    right = lambda seen: "" if seen.code or words is fit or _concepts(home / "k.json") == _concepts(
        home / "kept.json") else "other concepts were kept"
    return Case(f"store: {what} in {words[0]}", words, "refuse" if may in ("exchanged", "resized") else may,
                ("store", "shard", "mask"), right)


# Settings

FIELDS: Mapping[Any, Sequence[Any]] = {
    "world": ("mars", 5, ["drawn"]),
    "stamp": (5, [1], {"a": 1}),
    "seeds": (-1, 0, 1.5, "many", [1], {"a": 1}, float("nan"), 10**30),
    "ablation_seeds": (0, "x"),
    "our_form": ("perhaps", 7),
    "kinds": (["unknown"], "important", 5, [[1]]),
    "epochs": (0, -3, "ten", 2.5, float("inf")),
    "batch": (0, -1, "x"),
    "classes": (0, -1, [2]),
    "per_class": (0, "x"),
    "pool": (0, 1.5),
    "rates": ([1], {
        "demo": 5}, {
            "demo": {"plain": "x"}}, {
                    "demo": {"plain": float("nan")}}, {
                            "demo": {"plain": -1}}, {
                                    "demo": {"nobody": 1e-5}}, {
                                            "nowhere": {
                                                "plain": 1e-5}}),
    "device": (5, [1], "banana", "cuda:77"),
    "precision": ("fp8", 16),
    "chunk": (-1, "x"),
    "workers": (-1, "x"),
    "shards": (0, "x"),
    "test_per_class": (0, "x"),
    "drawn_from": ("x", 1.5, [1]),
    "bases": ("bought", 1),
    "together": (0, "x"),
    "sets": ([1], {"in-x": "a"}, "x"),
    "weights": ([1], "x", {"nobody": "a"}),
    "names": (5, [1]),
    "similarity": (["a"], 5, ["a", "b", "c"]),
    "unknown_field": (1,),
    "Seeds": (1,),
    5: (1,),
    "": (1,),
    "answers": (5, [1]),
    "train": (5, [1])}


@kind(60)
def settings(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """YAML files for a reproduction."""
    from cft.files import ASSETS

    text, path = (ASSETS / "profiles/smoke.yaml").read_text(), home / "mine.yaml"
    spoilt: dict[str, Callable[[], bytes]] = {
        "tabs": lambda: text.replace("epochs:", "\tepochs:").encode(),
        "open bracket": lambda: (text + "kinds: [a, b\n").encode(),
        "a tag": lambda: (text + "x: !!python/object/apply:os.system ['touch hit']\n").encode(),
        "an own tag": lambda: (text + "device: !mine cpu\n").encode(),
        "in itself": lambda: b"rates: &a\n  demo: *a\n",
        "in itself, a list": lambda: b"kinds: &a [*a]\n",
        "laughs": lambda: _laughs(),
        "a name twice": lambda: (text + "seeds: 2\n").encode(),
        "a name twice inside": lambda: b"rates:\n  demo: {plain: 1.0e-5, plain: 2.0e-5}\n",
        "empty": lambda: b"",
        "a list": lambda: b"- seeds\n- 5\n",
        "a word": lambda: b"seeds\n",
        "a number": lambda: b"7\n",
        "UTF-16": lambda: text.encode("utf-16"),
        "Latin-1": lambda: (text + "stamp: früh\n").encode("latin-1"),
        "NUL": lambda: (text + "stamp: a\0b\n").encode(),
        "two documents": lambda: (text + "---\n" + text).encode(),
        "torn": lambda: text.encode()[:rng.randrange(60, len(text))] + b"{",
        "junk": lambda: rng.choice(list(junk(rng).values())),
        "bits": lambda: mutated(rng, text.encode(), 12),
        "unknown anchor": lambda: b"seeds: *nobody\n",
        "merge of nothing": lambda: b"<<: 5\nseeds: 1\n",
        "a date": lambda: b"seeds: 2026-11-27\n",
        "binary": lambda: b"seeds: !!binary aGFsbG8=\n",
        "a set": lambda: b"kinds: !!set {a, b}\n"}
    words = ["reproduce", "--profile", "mine.yaml", "--only", "table1", "--dry-run", "--out", "r"]
    base = {key: value for key, value in yaml.safe_load(text).items()}
    if number % 60 < 26:
        what = list(spoilt)[number % len(spoilt)]
        path.write_bytes(spoilt[what]())
        may = "either" if what in ("bits", "empty", "UTF-16", "laughs", "torn") else "refuse"
    elif number % 60 < 54:
        options = [(key, value) for key, values in FIELDS.items() for value in values]
        some = dict(rng.sample(options, rng.choice((1, 1, 1, 2))))
        path.write_text(yaml.safe_dump(base | some, sort_keys=False))
        what, may = f"fields {some}", "refuse"
    else:
        which = rng.choice((*SPECIAL, "other ending"))
        if which == "other ending":
            words[2] = rng.choice(("mine.json", "mine", "mine.yaml.bak", "../mine", "", "demo.yaml", "Demo"))
        else:
            special(rng, path, which)
        what, may = f"{which} {words[2]}", "refuse"
    right = lambda seen: "code of a tag ran" if (home / "hit").exists() else ""
    return Case(what, words, may, ("mine", "profile", "settings", "field", "names", "yaml"), right)


def _laughs() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9)]
    return "\n".join([*lines, "kinds: *a8"]).encode()
