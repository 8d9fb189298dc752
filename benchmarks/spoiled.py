"""Bad inputs by kind. A kind is a function of a random number generator, a number and a world; it spoils the world's
files and says which command meets them, and what a good answer would be."""

import io
import json
import os
import random
import re
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sandbox import Case, Seen, Server

TINY, CHOSEN = "cft_vit_tiny64", 3  # classes of the drawn pictures that are used
MODEL = ("--model", TINY, "--weights", "start.safetensors", "--threads", 1)
TESTED = ("evaluate", "photos", *MODEL, "--out", "t.csv")
MASKED = (*TESTED, "--objects", "objects")
GROUNDED = ("masks", "photos", "--concepts", "concepts.json", "--grounder", "toy", "--threads", 1, "--out", "new")
TUNED = ("fit", "photos", *MODEL, "--masks", "masks", "--rate", "1e-4", "--epochs", 1, "--batch", 3)
FIT = (*TUNED, "--out", "run")
JUDGED = ("validate", "store", "--concepts", "concepts.json", "--out", "k.json", "--audit", "v.csv")
ASKED = ("concepts", "classes.csv", "--out", "c.json", "--record", "a.jsonl", "--yes", "--model", "m", "--base-url")
ITEMS = ("six thin legs", "striped abdomen", "clear wings")
WORLD = Path  # a folder with photos, masks, objects, concepts.json, store, kept.json, start.safetensors, classes.*
Make = Callable[[random.Random, Path, Server], Case]
KINDS: dict[str, tuple[int, Callable[[random.Random, int, Path, Server], Case]]] = {}


def make_world(home: Path) -> None:
    """Draw the files that all cases begin with; `expected` holds what the commands make of them. For a child."""
    from cft.apps.cli import main
    from cft.concepts.filters import demo_concepts
    from cft.data import backdrop
    from cft.files import ASSETS

    drawn = backdrop.write(home / "drawn", {"train": 2}, 1)
    chosen = list(backdrop.CLASSES)[:CHOSEN]
    for kind, name in (("images", "photos"), ("masks", "masks"), ("objects", "objects")):
        for each in chosen:
            shutil.copytree(drawn / kind / "train" / each, home / name / each)
    shutil.rmtree(drawn)
    shutil.copy(ASSETS / "base_0.safetensors", home / "start.safetensors")
    (home / "classes.txt").write_text("".join(f"{name}\n" for name in backdrop.CLASSES))
    (home / "classes.csv").write_text("id,name\nc1,yellow thing\nc2,round thing\n")
    demo_concepts().save(home / "concepts.json")
    os.chdir(home)
    _, *more = (home / "expected").mkdir(), [*GROUNDED[:-1], "store", "--shards", 2], [*FIT[:-1], "expected/run"]
    for words in ([*MASKED[:-3], "expected/masked.csv",
                   *MASKED[-2:]], [*TESTED[:-1],
                                   "expected/t.csv"], *more, [*JUDGED[:-3], "kept.json", "--audit", "expected/v.csv"]):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{words} ended with {end.code}") from None


def kind(count: int) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register a kind, with the number of its cases."""
    def register(function: Callable[..., Case]) -> Callable[..., Case]:
        KINDS[function.__name__] = count, function
        return function

    return register


def pictures_of(home: Path, folder: str = "photos") -> list[Path]:
    """The files of an image folder, sorted."""
    return sorted(path for path in (home / folder).rglob("*") if path.is_file())


def table_is(name: str, made: str = "t.csv", tolerance: float = 1e-3) -> Callable[[Seen], str]:
    """The table that was made is the expected one; or nothing was made because the command refused."""
    import pandas as pd

    def right(seen: Seen) -> str:
        if seen.code:
            return ""
        if not (seen.home / made).is_file():
            return f"{made} was not written"
        found, wanted = pd.read_csv(seen.home / made), pd.read_csv(seen.home / "expected" / name)
        numbers = [table.select_dtypes("number").to_numpy() for table in (found, wanted)]
        same = numbers[0].shape == numbers[1].shape and np.allclose(*numbers, atol=tolerance, equal_nan=True)
        return "" if same else f"other numbers: {numbers[0].round(2).tolist()} for {numbers[1].round(2).tolist()}"

    return right


def mutated(rng: random.Random, data: bytes, flips: int = 8, until: int | None = None) -> bytes:
    """Some bits flipped, in the first `until` bytes."""
    spoilt = bytearray(data)
    for _ in range(rng.randint(1, flips)):
        spoilt[rng.randrange(min(until or len(spoilt), len(spoilt)))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def junk(rng: random.Random) -> dict[str, bytes]:
    """Bytes that stand where something else should."""
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "random": rng.randbytes(500),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 1234\n",
        "zip": b"PK\x03\x04" + rng.randbytes(60),
        "text": "früher\n".encode("latin-1"),
        "zeros": bytes(300),
        "json error": b'{"error": "Access to this file is denied"}'}


def special(rng: random.Random, path: Path, what: str) -> None:
    """Something that is no regular file, or one that cannot be followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a long path is too long for a socket
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)
    elif what == "dangling link":
        path.symlink_to("nowhere" + str(rng.random()))
    elif what == "link to itself":
        path.symlink_to(path.name)
    elif what != "missing":
        raise ValueError(what)


SPECIAL = ("fifo", "folder", "socket", "dangling link", "link to itself", "missing")


class Evil:
    """Code in a pickle."""
    def __reduce__(self) -> tuple:
        return os.system, ("touch hit",)


def leaves(value: Any, at: tuple = ()) -> list[tuple]:
    """The paths to all parts of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inner for path in leaves(part, (*at, key)))]


def replaced(value: Any, path: Sequence[Any], new: Callable[[Any], Any]) -> Any:
    """A JSON value with one part changed."""
    value = json.loads(json.dumps(value))
    if not path:
        return new(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new(place[path[-1]])
    return value


WRONG = (None, 7, -1.5, True, "text", [], {}, [1, [2]], {"a": None}, "x" * 2000, "\x1b[2J", "\ud800")


def of_other_type(rng: random.Random, value: Any) -> Any:
    """Something that is of another type."""
    return rng.choice([each for each in WRONG if type(each) is not type(value)])


def without_one(rng: random.Random, value: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A JSON object that lacks one of these."""
    gone = rng.choice(names)
    return {key: part for key, part in value.items() if key != gone}


# Pictures


def encoded(rng: random.Random, ending: str = "png", size: tuple[int, int] = (64, 64), mode: str = "RGB",
            **more: Any) -> bytes:
    """A valid picture of noise."""
    values = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending), **more)
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int, depth: int = 8, colour: int = 2, rows: int | None = None) -> bytes:
    """A PNG that says it is of this size; with few `rows` it is short of data."""
    press = zlib.compressobj(9)
    bits = {0: 1, 2: 3, 3: 1, 6: 4}[colour] * depth
    row = bytes(1 + min((width * bits + 7) // 8, 1 << 22))
    data = b"".join(press.compress(row) for _ in range(height if rows is None else rows)) + press.flush()
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def exif(rng: random.Random) -> bytes:
    """An Exif block whose entries have odd types, counts, values and offsets; some bytes of it flipped."""
    order = rng.choice("<>")
    tags = [0x0112, *rng.sample([0x010F, 0x011A, 0x0132, 0x8769, 0x8825, 0x9286, 0xA005, 0x0201], 3)]
    entries = b"".join(
        struct.pack(f"{order}HHI4s", tag, rng.randrange(14), rng.choice([0, 1, 2, 3, 1 << 16, (1 << 32) -
                                                                         1]), rng.randbytes(4)) for tag in tags)
    data = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, rng.choice([8, 8, 8, 0, 7, 1 << 30]),
                       len(tags))
    data += entries + struct.pack(f"{order}I", rng.choice([0, 0, 8, 1 << 31])) + rng.randbytes(rng.randrange(40))
    return b"Exif\x00\x00" + (mutated(rng, data) if rng.random() < 0.4 else data)


def with_exif(rng: random.Random, data: bytes) -> bytes:
    """A JPEG with such a block."""
    block = exif(rng)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


BAD_NAMES = ("bad\x1b]0;owned\x07.png", "bad\nline.png", "bad\r\x1b[2Kgone.png", "bad" + "é" * 110 + ".png",
             "bad" + "x" * 236 + ".png", "bad\udcff\udcfe.png", "bad'\"`$(touch hit).png",
             "bad {braces} {0} %s %(x)s.png", "bad\u202egnp.jpg", "bade\u0301.png", "-bad.png", "bad .png", "bad..png",
             "bad\u2028x.png", "bad;&|<>.png", "bad\\x.png", "bad🦆.png", "bad\t.png", "bad*?[a].png", "bad#1.png")
LEFT = ("._bad.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/bad-checkpoint.png", "@eaDir/bad.png",
        "__MACOSX/._bad.png", ".bad.png", "bad.png.part", "bad.txt")


def _bad_picture(rng: random.Random, what: str) -> tuple[str, bytes, str]:
    """The name and the bytes, and "aside" (must be said to be left out), "read", "any", or "left" (said or not)."""
    ending = rng.choice(("jpg", "png", "webp", "bmp", "tif"))
    jpeg = lambda: encoded(rng, "jpg", (rng.randint(40, 90), rng.randint(40, 90)))
    frames = [Image.fromarray(np.full((40, 40, 3), 40 * k, np.uint8)) for k in range(3)]
    file = io.BytesIO()
    if what == "bits":
        return f"bad.{ending}", mutated(rng, encoded(rng, ending), 20), "any"
    if what == "cut":
        data = encoded(rng, ending, (90, 90))
        return f"bad.{ending}", data[:int(len(data) * rng.uniform(0.05, 0.9))], "any"
    if what == "exif":
        return "bad.jpg", with_exif(rng, jpeg()), "any"
    if what == "junk":
        name, data = rng.choice(list(junk(rng).items()))
        return f"bad.{rng.choice(('jpg', 'png', 'webp'))}", data, "aside"
    if what == "bomb":
        sizes = ((1, 1_000_000), (1, 20_000), (20_000, 1), (40_000, 40_000), (1_000_000, 1), (3, 300_000), (2**31 - 1,
                                                                                                            1))
        width, height = rng.choice(sizes)
        rows = min(height, rng.choice((20, 1_000_000)), max(1, 4_000_000 // min(width, 4_000_000)))
        return "bad.png", bomb(width, height, rng.choice((8, 16)), rng.choice((0, 2, 6)),
                               rows), "any" if rows == height else "aside"
    if what == "name":
        return rng.choice(BAD_NAMES), encoded(rng), "read"
    if what == "left":
        return rng.choice(LEFT), rng.choice((encoded(rng), b"\x00\x05\x16\x07" + rng.randbytes(80))), "left"
    if what == "ending":
        name = rng.choice(("bad.heic", "bad.avif", "bad.gif", "bad.HEIC", "bad.svg"))
        return name, encoded(rng, "gif") if name.endswith("gif") else rng.randbytes(200), "aside"
    if what == "other ending":
        return rng.choice(
            (("bad.JPG", jpeg()), ("bad.jfif", jpeg()), ("bad.jpeg", encoded(rng, "png")), ("bad.Png", jpeg()),
             ("bad.TIFF", encoded(rng, "tif")), ("bad.jpg", encoded(rng, "gif"))))[:2] + ("any",)
    if what == "mode":
        mode, ending = rng.choice(
            (("CMYK", "jpg"), ("L", "png"), ("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png"),
             ("F", "tif"), ("I", "tif"), ("YCbCr", "jpg"), ("LAB", "tif"), ("1", "tif")))
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 60), dtype=np.uint8))
        image = image.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "LAB", "RGBA",
                                                               "P") else image.convert(mode)
        if mode == "F":
            image = Image.fromarray(np.full((50, 60), rng.choice((np.nan, np.inf, -1e30, 0.5)), np.float32))
        image.save(file, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
        return f"bad.{ending}", file.getvalue(), "any"
    if what == "frames":
        ending = rng.choice(("png", "webp", "tiff"))
        frames[0].save(file, ending, save_all=True, append_images=frames[1:])
        return f"bad.{ending}", file.getvalue(), "any"
    if what == "chunks":
        extra = b"".join(
            png_chunk(rng.choice((b"tEXt", b"iCCP", b"zTXt", b"eXIf", b"tRNS", b"PLTE",
                                  b"acTL")), rng.randbytes(rng.randrange(60))) for _ in range(rng.randint(1, 3)))
        data = encoded(rng)
        return "bad.png", data[:33] + extra + data[33:], "any"
    raise ValueError(what)


def _shown_pictures(verdict: str, present: int) -> Callable[[Seen], str]:
    """What was said of the bad picture beside `present` good ones."""
    def right(seen: Seen) -> str:
        if seen.code:
            return "refused for a picture that can be left out" if verdict in ("left", "read") else ""
        number = re.search(r"data +(\d+) pictures", seen.out)
        if number:
            count = int(number[1])
        elif (seen.home / "new/store.json").is_file():
            from cft.concepts.store import MaskStore

            count = len(MaskStore(seen.home / "new").pictures)
        else:
            return "" if verdict != "aside" or "bad" in seen.text else "left out without a word"
        named = "bad" in seen.text
        if count not in (present, present + 1):
            return f"{count} pictures for {present} good ones"
        if verdict == "aside" and (count > present or not named):
            return "counted as a picture" if count > present else "left out without a word"
        if verdict == "left":
            return "counted as a picture" if count > present else ""
        if verdict == "read" and count == present:
            return "a good picture was left out"
        return "" if count > present or named else "left out without a word"

    return right


MEETS: Mapping[str, Sequence[Any]] = {
    "evaluate": TESTED,
    "masks": GROUNDED,
    "audit": ("audit", "photos", *MODEL, "--out", "a.json"),
    "fit":
        ("fit", "photos", *MODEL, "--method", "plain", "--rate", "1e-5", "--epochs", 1, "--batch", 4, "--out", "run")}


@kind(90)
def pictures(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """A bad picture among good ones."""
    whats = ("bits", "cut", "exif", "junk", "bomb", "name", "left", "ending", "other ending", "mode", "frames",
             "chunks", "exif", "special", "bomb", "name", "several")
    what, command = whats[number % len(whats)], rng.choice(list(MEETS))
    place = rng.choice(pictures_of(home)).parent
    if what == "special":
        which = rng.choice(SPECIAL[:-1])
        special(rng, place / "bad.png", which)
        return Case(f"{which} in {command}", MEETS[command], names=("bad",), right=_shown_pictures("left", 2 * CHOSEN))
    if what == "several":
        for k in range(12):
            name, data, _ = _bad_picture(rng, rng.choice(("cut", "junk", "exif", "left")))
            (place / f"{Path(name).stem}{k}{Path(name).suffix}").write_bytes(data)
        return Case(f"twelve bad ones in {command}", MEETS[command], names=("bad",))
    name, data, verdict = _bad_picture(rng, what)
    file = os.fsencode(place) + b"/" + os.fsencode(name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as out:
        out.write(data)
    return Case(f"{what} ({name!a}) in {command}", MEETS[command], names=("bad",),
                right=_shown_pictures(verdict, 2 * CHOSEN))


# Masks

VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]


def _ring(mask: np.ndarray) -> np.ndarray:
    """The pixels just outside of a mask."""
    grown = mask.copy()
    for axis in (0, 1):
        grown |= np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
    return grown & ~mask


def _conventions(rng: random.Random) -> dict[str, Callable[[np.ndarray, Path], Image.Image]]:
    """How people write a mask down: of its pixels, and of its picture's file. All mean the same object."""
    grey = lambda m, *values: Image.fromarray(np.select([m, _ring(m)], [values[0], values[1]], 0).astype(np.uint8))
    rgb = lambda path: np.asarray(Image.open(path).convert("RGB").resize((64, 64)))

    def palette(m: np.ndarray, void: int = 0) -> Image.Image:
        image = grey(m, 1, void)
        image.putpalette([c for colour in VOC + [(224, 224, 192)] * 252 for c in colour])
        return image

    def ids(m: np.ndarray, ignored: bool) -> Image.Image:
        number = rng.randint(1, 919)
        value = np.select([m, _ring(m) & ignored], [number, 1000], 0)
        return Image.fromarray(np.stack([value % 256, value // 256, 0 * value], -1).astype(np.uint8))

    alpha = lambda m, path, cut: Image.fromarray(
        np.dstack([rgb(path) * (m[..., None] | (not cut)), m * np.uint8(255)]).astype(np.uint8))
    return {
        "0 and 1": lambda m, p: grey(m, 1, 0),
        "0 and 255": lambda m, p: grey(m, 255, 0),
        "one bit": lambda m, p: Image.fromarray(m),
        "class number": lambda m, p: grey(m, rng.randint(2, 250), 0),
        "palette": lambda m, p: palette(m),
        "palette with void": lambda m, p: palette(m, 255),
        "grey with void": lambda m, p: grey(m, 1, 255),
        "ImageNet-S": lambda m, p: ids(m, False),
        "ImageNet-S with ignored": lambda m, p: ids(m, True),
        "alpha": lambda m, p: alpha(m, p, False),
        "cut out": lambda m, p: alpha(m, p, True),
        "grey and alpha": lambda m, p: Image.fromarray(np.dstack([np.full_like(m, 255, np.uint8), m * np.uint8(255)])),
        "16 bits": lambda m, p: Image.fromarray((m * rng.choice((1, 300, 65535))).astype(np.uint16)),
        "white": lambda m, p: Image.fromarray(np.repeat((m * np.uint8(255))[..., None], 3, 2)),
        "opaque black and white": lambda m, p: grey(m, 255, 0).convert("RGBA"),
        "jpeg": lambda m, p: grey(m, 255, 0)}


@kind(64)
def masks(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Object masks in every convention, and wrong ones."""
    files, known = pictures_of(home, "objects"), list(_conventions(rng).items())
    whole = lambda path: np.asarray(Image.open(path).convert("L")) > 0
    picture = lambda path: home / "photos" / path.relative_to(home / "objects")
    names = ("mask", "objects", files[0].name)
    if number % 64 < 36:
        chosen = [known[number % len(known)]] if number % 64 < len(known) + 4 else rng.sample(known, 2)
        for k, path in enumerate(files):
            image = chosen[k % len(chosen)][1](whole(path), picture(path))
            image.save(path, "jpeg" if chosen[k % len(chosen)][0] == "jpeg" else "png",
                       **({
                           "quality": 60} if chosen[k % len(chosen)][0] == "jpeg" else {}))
        label = " and ".join(name for name, _ in chosen)  # a JPEG's edges are not exact
        return Case(label, MASKED, names=names, right=table_is("masked.csv", tolerance=4 if "jpeg" in label else 1e-3))
    whats = ("empty", "full", "inverted", "transposed", "scaled", "one off", "cut", "bits", "junk", "special", "bomb",
             "NaN", "soft", "other folder", "blue only", "exif turned", "some empty", "missing one")
    what, some = whats[number % len(whats)], files if rng.random() < 0.5 else rng.sample(files, 2)
    folder, words = ("masks",
                     FIT) if what in ("empty", "full", "inverted", "some empty") and rng.random() < 0.5 else ("objects",
                                                                                                              MASKED)
    some = [
        home / folder / path.relative_to(home / "objects")
        for path in (files if what in ("empty", "full", "inverted") else some)]
    said = lambda seen: "" if seen.code or re.search(r"empty|full|invert|whole|every|nothing|cover|most", seen.text
                                                     ) else "nothing was said"
    right: Callable[[Seen], str] = said if what in ("empty", "full", "inverted", "some empty") else lambda _: ""
    may = "refuse" if what in ("transposed", "scaled", "one off", "cut", "junk", "special", "missing one",
                               "bomb") else "either"
    for path in some:
        mask, data = np.asarray(Image.open(path).convert("L")) > 0, path.read_bytes()
        if what in ("empty", "full", "inverted", "some empty"):
            value = {"empty": mask & False, "some empty": mask & False, "full": mask | True, "inverted": ~mask}[what]
            Image.fromarray(value.astype(np.uint8) * 255).save(path)
        elif what in ("transposed", "scaled", "one off"):
            size = {"transposed": (64, 32), "scaled": (128, 128), "one off": (64, 63)}[what]
            Image.fromarray(mask).resize(size).save(path)
        elif what in ("cut", "bits", "junk"):
            path.write_bytes({
                "cut": data[:rng.randrange(8, len(data) * 3 // 4)],
                "bits": mutated(rng, data),
                "junk": rng.choice(list(junk(rng).values()))}[what])
        elif what in ("special", "missing one"):
            special(rng, path, "missing" if what == "missing one" else rng.choice(SPECIAL))
        elif what == "bomb":
            path.write_bytes(bomb(*rng.choice(((50_000, 50_000), (1, 1_000_000), (30_000, 30_000))), 8, 0, rows=50))
        elif what == "NaN":
            Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(path, "tiff")
        elif what == "soft":
            Image.fromarray(mask.astype(np.uint8) * 255).resize((32, 32)).resize((64, 64),
                                                                                 Image.Resampling.BICUBIC).save(path)
        elif what == "other folder":
            Image.fromarray(np.roll(mask, 20, 1)).save(path.with_suffix(".bmp"))
        elif what == "blue only":
            Image.fromarray(np.dstack([0 * mask, 0 * mask, mask * 255]).astype(np.uint8)).save(path)
        elif what == "exif turned":
            turn = Image.Exif()
            turn[0x0112] = 6
            Image.fromarray(mask).save(path, exif=turn)
    return Case(f"{what} in {words[0]}", words, may, ("mask", folder), right)


# Image folders


def _folder_spoilers(rng: random.Random, home: Path) -> dict[str, Callable[[], tuple[str, Sequence[str]]]]:
    photos, first = home / "photos", pictures_of(home)[0]
    ant = first.parent

    def add(name: str, source: Path = first) -> None:
        path = photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)

    def done(may: str, *names: str, action: object = None) -> tuple[str, Sequence[str]]:
        return may, names

    def irregular(what: str) -> tuple[str, Sequence[str]]:
        special(rng, photos, what)
        return "refuse", ("photos", )

    def rename(name: str) -> tuple[str, Sequence[str]]:
        os.rename(ant, os.fsencode(photos) + b"/" + os.fsencode(name))
        return "refuse", ("class", "folder")

    def nest() -> tuple[str, Sequence[str]]:
        os.rename(photos, home / "inner")
        os.rename(home / "inner", photos.parent / "inner2")
        photos.mkdir()
        os.rename(home / "inner2", photos / "train")
        return "refuse", ("photos", "class")

    return {
        "hidden folders": lambda: done(
            "work", action=[add(f"{name}/x.png") for name in (".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX")]),
        "empty class": lambda: done("refuse", "zzz", "class", action=(photos / "zzz").mkdir()),
        "class of hidden files": lambda: done("refuse", "zzz", action=add("zzz/._x.png")),
        "twins": lambda: done("either", first.stem, "mask", action=Image.open(first).save(first.with_suffix(".jpg"))),
        "unknown class": lambda: done("refuse", "zzz", action=add("zzz/x.png")),
        "class for a number": lambda: rename(str(rng.randrange(9))),
        "WordNet id": lambda: rename("n01440764"),
        "control characters": lambda: rename("a\x1b[2Jb\nc"),
        "not UTF-8": lambda: rename("a\udcffb"),
        "trailing blank": lambda: rename(ant.name + " "),
        "upper case": lambda: rename(ant.name.upper()),
        "nested": nest,
        "no pictures": lambda: done("refuse", "photos", action=[shutil.rmtree(p) for p in photos.iterdir()]),
        "pictures at the top": lambda: done("either", "photos", first.name, action=add("loose.png")),
        "only pictures at the top": lambda: done(
            "refuse", "photos", action=(add("loose.png"), [shutil.rmtree(p) for p in photos.iterdir() if p.is_dir()])),
        **{f"{what} for the folder": partial(irregular, what) for what in SPECIAL},
        "a file for the folder": lambda: done(
            "refuse", "photos", action=(shutil.rmtree(photos), photos.write_bytes(b"x"))),
        "a loop of links": lambda: done("either", "photos", "loop", action=(ant / "loop").symlink_to(photos)),
        "a class that is a link": lambda: done("either", "class", "zzz", action=(photos / "zzz").symlink_to(ant)),
        "special class": lambda: done("either", "zzz", "photos", action=special(rng, photos / "zzz", "fifo")),
        "many levels": lambda: done("either", "deep", action=add(f"{ant.name}/" + "d/" * 40 + "deep.png"))}


@kind(44)
def folders(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Image folders as tools and people leave them."""
    spoilers = _folder_spoilers(rng, home)
    what = list(spoilers)[number % len(spoilers)]
    words = (MASKED, FIT)[number // len(spoilers) % 2]
    if number % 44 >= 40:
        lines, names = (home / "classes.txt").read_text().split("\n"), ("class",)
        bad = rng.choice(("..", ".", "../objects", "/etc", "a/b", "a\x1b[1m", lines[0]))
        (home / "classes.txt").write_text("\n".join([*lines[:3], bad, *lines[4:]]))
        return Case(f"a class named {bad!a}", [*TESTED, "--classes", "classes.txt"],
                    "either" if bad in ("a/b", "a\x1b[1m") else "refuse", names)
    may, names = spoilers[what]()
    right = table_is("masked.csv") if may == "work" and words is MASKED else lambda _: ""
    if what == "twins":
        right = lambda seen: "" if seen.code or first_named(seen,
                                                            pictures_of(home)[0].stem
                                                            ) else "two pictures share a mask, nothing was said"
    return Case(f"{what} in {words[0]}", words, may, names or ("photos",), right)


def first_named(seen: Seen, name: str) -> bool:
    """Whether a name stands in what was printed."""
    return name in seen.text
