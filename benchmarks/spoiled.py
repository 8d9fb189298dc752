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
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sandbox import Case, Seen, Server, chat

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
    for words in ([*MASKED[:-3], "expected/masked.csv", *MASKED[-2:]], [*TESTED[:-1], "expected/t.csv"], *more,
                  [*JUDGED[:-3], "kept.json", "--audit", "expected/v.csv"]):
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


def table_is(name: str, made: str = "t.csv") -> Callable[[Seen], str]:
    """The table that was made is the expected one; or nothing was made because the command refused."""
    import pandas as pd

    def right(seen: Seen) -> str:
        if seen.code:
            return ""
        if not (seen.home / made).is_file():
            return f"{made} was not written"
        found, wanted = pd.read_csv(seen.home / made), pd.read_csv(seen.home / "expected" / name)
        numbers = [table.select_dtypes("number").to_numpy() for table in (found, wanted)]
        same = numbers[0].shape == numbers[1].shape and np.allclose(*numbers, atol=1e-3, equal_nan=True)
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
        "empty": b"", "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "random": rng.randbytes(500),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 1234\n",
        "zip": b"PK\x03\x04" + rng.randbytes(60), "text": "früher\n".encode("latin-1"), "zeros": bytes(300),
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

# Pictures


def encoded(rng: random.Random, ending: str = "png", size: tuple[int, int] = (64, 64), mode: str = "RGB", **more: Any) -> bytes:
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
        struct.pack(f"{order}HHI4s", tag, rng.randrange(14), rng.choice([0, 1, 2, 3, 1 << 16, (1 << 32) - 1]), rng.randbytes(4))
        for tag in tags)
    data = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, rng.choice([8, 8, 8, 0, 7, 1 << 30]), len(tags))
    data += entries + struct.pack(f"{order}I", rng.choice([0, 0, 8, 1 << 31])) + rng.randbytes(rng.randrange(40))
    return b"Exif\x00\x00" + (mutated(rng, data) if rng.random() < 0.4 else data)


def with_exif(rng: random.Random, data: bytes) -> bytes:
    """A JPEG with such a block."""
    block = exif(rng)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


BAD_NAMES = (
    "bad\x1b]0;owned\x07.png", "bad\nline.png", "bad\r\x1b[2Kgone.png", "bad" + "é" * 110 + ".png", "bad" + "x" * 236 + ".png",
    "bad\udcff\udcfe.png", "bad'\"`$(touch hit).png", "bad {braces} {0} %s %(x)s.png", "bad\u202egnp.jpg", "bade\u0301.png", "-bad.png",
    "bad .png", "bad..png", "bad\u2028x.png", "bad;&|<>.png", "bad\\x.png", "bad🦆.png", "bad\t.png", "bad*?[a].png", "bad#1.png")
LEFT = ("._bad.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/bad-checkpoint.png", "@eaDir/bad.png", "__MACOSX/._bad.png",
        ".bad.png", "bad.png.part", "bad.txt")


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
        return f"bad.{ending}", data[: int(len(data) * rng.uniform(0.05, 0.9))], "any"
    if what == "exif":
        return "bad.jpg", with_exif(rng, jpeg()), "any"
    if what == "junk":
        name, data = rng.choice(list(junk(rng).items()))
        return f"bad.{rng.choice(('jpg', 'png', 'webp'))}", data, "aside"
    if what == "bomb":
        sizes = ((1, 1_000_000), (1, 20_000), (20_000, 1), (40_000, 40_000), (1_000_000, 1), (3, 300_000), (2**31 - 1, 1))
        width, height = rng.choice(sizes)
        rows = min(height, rng.choice((20, 1_000_000)), max(1, 4_000_000 // min(width, 4_000_000)))
        return "bad.png", bomb(width, height, rng.choice((8, 16)), rng.choice((0, 2, 6)), rows), "any" if rows == height else "aside"
    if what == "name":
        return rng.choice(BAD_NAMES), encoded(rng), "read"
    if what == "left":
        return rng.choice(LEFT), rng.choice((encoded(rng), b"\x00\x05\x16\x07" + rng.randbytes(80))), "left"
    if what == "ending":
        name = rng.choice(("bad.heic", "bad.avif", "bad.gif", "bad.HEIC", "bad.svg"))
        return name, encoded(rng, "gif") if name.endswith("gif") else rng.randbytes(200), "aside"
    if what == "other ending":
        return rng.choice((("bad.JPG", jpeg()), ("bad.jfif", jpeg()), ("bad.jpeg", encoded(rng, "png")), ("bad.Png", jpeg()),
                           ("bad.TIFF", encoded(rng, "tif")), ("bad.jpg", encoded(rng, "gif"))))[:2] + ("any", )
    if what == "mode":
        mode, ending = rng.choice((("CMYK", "jpg"), ("L", "png"), ("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"),
                                   ("I;16", "png"), ("F", "tif"), ("I", "tif"), ("YCbCr", "jpg"), ("LAB", "tif"), ("1", "tif")))
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 60), dtype=np.uint8))
        image = image.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "LAB", "RGBA", "P") else image.convert(mode)
        if mode == "F":
            image = Image.fromarray(np.full((50, 60), rng.choice((np.nan, np.inf, -1e30, 0.5)), np.float32))
        image.save(file, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
        return f"bad.{ending}", file.getvalue(), "any"
    if what == "frames":
        ending = rng.choice(("png", "webp", "tiff"))
        frames[0].save(file, ending, save_all=True, append_images=frames[1:])
        return f"bad.{ending}", file.getvalue(), "any"
    if what == "chunks":
        extra = b"".join(png_chunk(rng.choice((b"tEXt", b"iCCP", b"zTXt", b"eXIf", b"tRNS", b"PLTE", b"acTL")), rng.randbytes(rng.randrange(60)))
                         for _ in range(rng.randint(1, 3)))
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
    "evaluate": TESTED, "masks": GROUNDED, "audit": ("audit", "photos", *MODEL, "--out", "a.json"),
    "fit": ("fit", "photos", *MODEL, "--method", "plain", "--rate", "1e-5", "--epochs", 1, "--batch", 4, "--out", "run")}


@kind(90)
def pictures(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """A bad picture among good ones."""
    whats = ("bits", "cut", "exif", "junk", "bomb", "name", "left", "ending", "other ending", "mode", "frames", "chunks",
             "exif", "special", "bomb", "name", "several")
    what, command = whats[number % len(whats)], rng.choice(list(MEETS))
    place = rng.choice(pictures_of(home)).parent
    if what == "special":
        which = rng.choice(SPECIAL[:-1])
        special(rng, place / "bad.png", which)
        return Case(f"{which} in {command}", MEETS[command], names=("bad", ), right=_shown_pictures("left", 2 * CHOSEN))
    if what == "several":
        for k in range(12):
            name, data, _ = _bad_picture(rng, rng.choice(("cut", "junk", "exif", "left")))
            (place / f"{Path(name).stem}{k}{Path(name).suffix}").write_bytes(data)
        return Case(f"twelve bad ones in {command}", MEETS[command], names=("bad", ))
    name, data, verdict = _bad_picture(rng, what)
    file = os.fsencode(place) + b"/" + os.fsencode(name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as out:
        out.write(data)
    return Case(f"{what} ({name!a}) in {command}", MEETS[command], names=("bad", ), right=_shown_pictures(verdict, 2 * CHOSEN))


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

    alpha = lambda m, path, cut: Image.fromarray(np.dstack([rgb(path) * (m[..., None] | (not cut)), m * np.uint8(255)]).astype(np.uint8))
    return {
        "0 and 1": lambda m, p: grey(m, 1, 0), "0 and 255": lambda m, p: grey(m, 255, 0), "one bit": lambda m, p: Image.fromarray(m),
        "class number": lambda m, p: grey(m, rng.randint(2, 250), 0), "palette": lambda m, p: palette(m),
        "palette with void": lambda m, p: palette(m, 255), "grey with void": lambda m, p: grey(m, 1, 255),
        "ImageNet-S": lambda m, p: ids(m, False), "ImageNet-S with ignored": lambda m, p: ids(m, True),
        "alpha": lambda m, p: alpha(m, p, False), "cut out": lambda m, p: alpha(m, p, True),
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
            image.save(path, "jpeg" if chosen[k % len(chosen)][0] == "jpeg" else "png", **({"quality": 60} if chosen[k % len(chosen)][0] == "jpeg" else {}))
        label, same = " and ".join(name for name, _ in chosen), table_is("masked.csv")

        def right(seen: Seen) -> str:
            import pandas as pd

            if "jpeg" in label and not seen.code:  # its edges are not exact
                found, wanted = (pd.read_csv(p).select_dtypes("number").to_numpy(float)
                                 for p in (seen.home / "t.csv", seen.home / "expected/masked.csv"))
                return "" if np.allclose(found, wanted, atol=4, equal_nan=True) else f"other numbers: {found.round(1).tolist()}"
            return same(seen)

        return Case(label, MASKED, names=names, right=right)
    whats = ("empty", "full", "inverted", "transposed", "scaled", "one off", "cut", "bits", "junk", "special", "bomb", "NaN",
             "soft", "other folder", "blue only", "exif turned", "some empty", "missing one")
    what, some = whats[number % len(whats)], files if rng.random() < 0.5 else rng.sample(files, 2)
    folder, words = ("masks", FIT) if what in ("empty", "full", "inverted", "some empty") and rng.random() < 0.5 else ("objects", MASKED)
    some = [home / folder / path.relative_to(home / "objects") for path in (files if what in ("empty", "full", "inverted") else some)]
    said = lambda seen: "" if seen.code or re.search(r"empty|full|invert|whole|every pixel|nothing", seen.text) else "nothing was said"
    right: Callable[[Seen], str] = said if what in ("empty", "full", "inverted", "some empty") else lambda _: ""
    may = "refuse" if what in ("transposed", "scaled", "one off", "cut", "junk", "special", "missing one", "bomb") else "either"
    for path in some:
        mask, data = np.asarray(Image.open(path).convert("L")) > 0, path.read_bytes()
        if what in ("empty", "full", "inverted", "some empty"):
            value = {"empty": mask & False, "some empty": mask & False, "full": mask | True, "inverted": ~mask}[what]
            Image.fromarray(value.astype(np.uint8) * 255).save(path)
        elif what in ("transposed", "scaled", "one off"):
            size = {"transposed": (64, 32), "scaled": (128, 128), "one off": (64, 63)}[what]
            Image.fromarray(mask).resize(size).save(path)
        elif what in ("cut", "bits", "junk"):
            path.write_bytes({"cut": data[: rng.randrange(8, len(data) * 3 // 4)], "bits": mutated(rng, data),
                              "junk": rng.choice(list(junk(rng).values()))}[what])
        elif what in ("special", "missing one"):
            special(rng, path, "missing" if what == "missing one" else rng.choice(SPECIAL))
        elif what == "bomb":
            path.write_bytes(bomb(*rng.choice(((50_000, 50_000), (1, 1_000_000), (30_000, 30_000))), 8, 0, rows=50))
        elif what == "NaN":
            Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(path, "tiff")
        elif what == "soft":
            Image.fromarray(mask.astype(np.uint8) * 255).resize((32, 32)).resize((64, 64), Image.Resampling.BICUBIC).save(path)
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
        "hidden folders": lambda: done("work", action=[add(f"{name}/x.png") for name in (".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX")]),
        "empty class": lambda: done("refuse", "zzz", "class", action=(photos / "zzz").mkdir()),
        "class of hidden files": lambda: done("refuse", "zzz", action=add("zzz/._x.png")),
        "twins": lambda: done("either", first.stem, "mask", action=Image.open(first).save(first.with_suffix(".jpg"))),
        "unknown class": lambda: done("refuse", "zzz", action=add("zzz/x.png")),
        "class for a number": lambda: rename(str(rng.randrange(9))),
        "WordNet id": lambda: rename("n01440764"), "control characters": lambda: rename("a\x1b[2Jb\nc"),
        "not UTF-8": lambda: rename("a\udcffb"), "trailing blank": lambda: rename(ant.name + " "),
        "upper case": lambda: rename(ant.name.upper()),
        "nested": nest, "no pictures": lambda: done("refuse", "photos", action=[shutil.rmtree(p) for p in photos.iterdir()]),
        "pictures at the top": lambda: done("either", "photos", first.name, action=add("loose.png")),
        "only pictures at the top": lambda: done(
            "refuse", "photos", action=(add("loose.png"), [shutil.rmtree(p) for p in photos.iterdir() if p.is_dir()])),
        **{f"{what} for the folder": lambda what=what: done("refuse", "photos", action=special(rng, photos, what)) for what in SPECIAL},
        "a file for the folder": lambda: done("refuse", "photos", action=(shutil.rmtree(photos), photos.write_bytes(b"x"))),
        "a loop of links": lambda: done("either", "photos", "loop", action=(ant / "loop").symlink_to(photos)),
        "a class that is a link": lambda: done("either", "class", "zzz", action=(photos / "zzz").symlink_to(ant)),
        "special class": lambda: done("either", "zzz", "photos", action=special(rng, photos / "zzz", "fifo")),
        "many levels": lambda: done("either", "deep", action=add(f"{ant.name}/" + "d/" * 40 + "deep.png")),
    }


@kind(44)
def folders(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Image folders as tools and people leave them."""
    spoilers = _folder_spoilers(rng, home)
    what = list(spoilers)[number % len(spoilers)]
    words = (MASKED, FIT)[number // len(spoilers) % 2]
    if number % 44 >= 40:
        lines, names = (home / "classes.txt").read_text().split("\n"), ("class", )
        bad = rng.choice(("..", ".", "../objects", "/etc", "a/b", "a\x1b[1m", lines[0]))
        (home / "classes.txt").write_text("\n".join([*lines[:3], bad, *lines[4:]]))
        return Case(f"a class named {bad!a}", [*TESTED, "--classes", "classes.txt"], "either" if "\x1b" in bad else "refuse", names)
    may, names = spoilers[what]()
    right = table_is("masked.csv") if may == "work" and words is MASKED else lambda _: ""
    if what == "twins":
        right = lambda seen: "" if seen.code or first_named(seen, pictures_of(home)[0].stem) else "two pictures share a mask, nothing was said"
    return Case(f"{what} in {words[0]}", words, may, names or ("photos", ), right)


def first_named(seen: Seen, name: str) -> bool:
    """Whether a name stands in what was printed."""
    return name in seen.text


# Checkpoints


class Evil:
    """Code in a pickle."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch hit", )


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

    outer = ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "backbone.", "encoder.", "vit.", "student.", "base_model.model.")
    wraps = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema", "net", "network", "teacher", "weights", "params")
    more = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "args": argparse.Namespace(lr=1e-3),
            "best": np.float64(1.0), "scheduler": None, "arch": TINY}
    prefix, wrap = rng.choice(outer), rng.choice(wraps)
    extra = dict(rng.sample(list(more.items()), rng.randrange(4)))
    return {
        "plain": (state, "work"), f"prefix {prefix}": (pre(prefix), "either"), f"in {wrap}": ({wrap: state} | extra, "either"),
        f"in {wrap} with {prefix}": ({wrap: pre(prefix)} | extra, "either"), "ordered": (OrderedDict(state), "work"),
        "raw and EMA": ({"state_dict": state, "state_dict_ema": ema} | extra, "said"), "model and model_ema": ({"model": state, "model_ema": ema}, "said"),
        "Namespace": ({"model": state, "args": argparse.Namespace(lr=1e-3)}, "either"), "NaN": (put(float("nan")), "refuse"),
        "infinite": (put(float("inf")), "refuse"), "complex": (swap(lambda v: v.to(torch.complex64)), "refuse"),
        "complex buffer": (state | {"freqs": torch.zeros(2, dtype=torch.complex64)}, "refuse"),
        "whole numbers": (swap(lambda v: (v * 100).to(torch.int8)), "refuse"), "halves": ({k: v.half() for k, v in state.items()}, "work"),
        "bfloat16": ({k: v.bfloat16() for k, v in state.items()}, "either"), "doubles": ({k: v.double() for k, v in state.items()}, "work"),
        "a tensor is missing": ({k: v for k, v in state.items() if k != key}, "refuse"), "a tensor too many": (state | {"more.weight": state[key]}, "refuse"),
        "other shape": (swap(lambda v: v.reshape(-1)[:-1]), "refuse"), "turned head": (state | {"head.weight": state["head.weight"].T.contiguous()}, "refuse"),
        "no head": ({k: v for k, v in state.items() if not k.startswith("head.")}, "refuse"), "empty": ({}, "refuse"), "a list": (list(state.values()), "refuse"),
        "one tensor": (state[key], "refuse"), "a number": (7, "refuse"), "None": (None, "refuse"), "text": ("weights", "refuse"),
        "numbers for keys": ({1: state[key], 2: state[key]}, "refuse"), "mixed keys": (state | {3: state[key]}, "refuse"),
        "nothing inside": ({"state_dict": {}}, "refuse"), "None inside": ({"state_dict": None}, "refuse"), "a list inside": ({"model": [1, 2]}, "refuse"),
        "deep": ({"a": {"b": {"state_dict": state}}}, "either"), "a counter": (state | {"epoch": 3}, "either"), "code": (Evil(), "refuse"),
        "code inside": ({"state_dict": state, "hook": Evil()}, "refuse"), "arrays": ({k: v.numpy() for k, v in state.items()}, "either"),
        "of torchvision": ({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(12, 512), "fc.bias": torch.zeros(12)}, "refuse"),
        "of Hugging Face": ({"vit.embeddings.cls_token": torch.zeros(1, 1, 96), "classifier.weight": torch.zeros(12, 96), "classifier.bias": torch.zeros(12)}, "refuse"),
        "sparse": (swap(lambda v: v.to_sparse()), "either"), "other class count": (state | {"head.weight": torch.zeros(7, 96), "head.bias": torch.zeros(7)}, "refuse")}


def _raw_checkpoints(rng: random.Random, home: Path, path: Path) -> dict[str, Callable[[], object]]:
    """Files that are refused, whatever they hold."""
    good = (home / "start.safetensors").read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = lambda text: struct.pack("<Q", len(text)) + text
    write = lambda data: (lambda: path.write_bytes(data))
    return {
        **{f"bytes: {name}": write(data) for name, data in junk(rng).items()}, "cut": write(good[: rng.randrange(10, len(good) - 5)]),
        "bits of the header": write(mutated(rng, good[:8], 3) + good[8:]), "long header": write(struct.pack("<Q", 1 << 60) + good[8:]),
        "broken header": write(header(b'{"a": ' + b"[" * 5000) + bytes(20)), "header of no object": write(header(b"[1, 2]") + bytes(20)),
        "offsets": write(header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}') + bytes(16)),
        "huge shape": write(header(b'{"a":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,16]}}') + bytes(16)),
        "class names of numbers": write(_with_metadata(good, size, '[1, 2, 3]')), "class names of text": write(_with_metadata(good, size, '"abc"')),
        "class names of an object": write(_with_metadata(good, size, '{"a": 1}')), "torn class names": write(_with_metadata(good, size, '["a", ')),
        "class names twice": write(_with_metadata(good, size, json.dumps(["a"] * 12))), "arrays": lambda: np.savez(path.open("wb"), a=np.zeros(3)),
        "an array": lambda: np.save(path.open("wb"), np.zeros(3)), "objects": lambda: np.save(path.open("wb"), np.array([Evil()]), allow_pickle=True),
        **{what: lambda what=what: special(rng, path, what) for what in SPECIAL}}


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
    words = ["evaluate", "photos", "--model", TINY, "--weights", path.name, "--classes", "classes.txt", "--threads", 1, "--out", "t.csv"]
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
        return Case(f"{what} as {path.suffix}", plain, "refuse", ("odd", ))
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
        return ("" if seen.code or "ema" in seen.text.lower() else "nothing was said of two sets of weights") if may == "said" else same(seen)

    return Case(f"{what} as {ending}", words, "either" if may == "said" else may, ("odd", ), right)


# Lists of classes and CSV files


def _csv_files(rng: random.Random) -> dict[str, tuple[bytes, str, list[str]]]:
    """Bytes, what may become of them, and the names that a model would be asked about."""
    rows = [("c1", "yellow thing"), ("c2", "round thing")]
    names, text = [row[1] for row in rows], "id,name\n" + "".join(f"{a},{b}\n" for a, b in rows)
    with_ = lambda line: (text + line + "\n").encode("utf-8", "surrogateescape")
    return {
        "BOM": (text.encode("utf-8-sig"), "either", names), "UTF-16": (text.encode("utf-16"), "either", names),
        "UTF-16 without BOM": (text.encode("utf-16-le"), "refuse", names), "UTF-32": (text.encode("utf-32"), "refuse", names),
        "semicolons": (text.replace(",", ";").encode(), "either", names), "tabs": (text.replace(",", "\t").encode(), "either", names),
        "bars": (text.replace(",", "|").encode(), "refuse", names), "CRLF": (text.replace("\n", "\r\n").encode(), "work", names),
        "CR": (text.replace("\n", "\r").encode(), "either", names), "Latin-1": ((text + "c3,Käfer\n").encode("latin-1"), "refuse", names),
        "an id twice": (with_("c1,other thing"), "refuse", []), "a name twice": (with_("c3,round thing"), "either", [*names, "round thing"]),
        "no header": (text.partition("\n")[2].encode(), "refuse", []), "upper case": (text.replace("id,name", "ID,Name").encode(), "either", names),
        "blanks in the header": (text.replace("id,name", "id, name").encode(), "either", names), "a column twice": (text.replace("id,name", "id,name,name").encode(), "refuse", []),
        "empty": (b"", "refuse", []), "only a header": (b"id,name\n", "refuse", []), "blank lines": (text.replace("\n", "\n\n").encode(), "either", names),
        "one column": (b"name\nyellow thing\n", "refuse", []), "too few cells": (with_("c3"), "refuse", []), "too many cells": (with_("c3,x thing,d,e,f"), "refuse", []),
        "empty name": (with_("c3,"), "refuse", []), "blank name": (with_("c3,   "), "refuse", []), "empty id": (with_(",x thing"), "refuse", []), "slash": (with_("a/b,x thing"), "refuse", []),
        "..": (with_("..,x thing"), "refuse", []), "control": (with_("c3,a\x1b[2Jb"), "refuse", []), "NUL": (with_("c3,a\0b"), "refuse", []),
        "huge field": (with_(f'c3,"{"x" * rng.choice((131_073, 200_000, 1_000_000))}"'), "refuse", []), "open quote": (with_('c3,"x thing'), "either", [*names, "x thing"]),
        "line break in a name": (with_('c3,"x\nthing"'), "refuse", []), "not UTF-8": (with_("c3,x\udcff"), "refuse", []), "numbers": (with_("c3,7"), "refuse", []),
        "JSON": (json.dumps(dict(rows)).encode(), "refuse", []), "zip (xlsx)": (b"PK\x03\x04" + rng.randbytes(200), "refuse", []),
        "quoted": (b'"id","name"\n"c1","yellow thing"\n', "work", names[:1]), "direction": (with_("c3,x\u202ething"), "refuse", []),
        "bits": (mutated(rng, text.encode(), 3, 7), "refuse", []), "random": (rng.randbytes(300), "refuse", [])}


def _class_lists(rng: random.Random, lines: list[str]) -> dict[str, tuple[bytes, str]]:
    text = "\n".join(lines) + "\n"
    shuffled = rng.sample(lines, len(lines))
    return {
        "BOM": (text.encode("utf-8-sig"), "either"), "UTF-16": (text.encode("utf-16"), "either"), "CRLF": (text.replace("\n", "\r\n").encode(), "work"),
        "a name twice": ("\n".join([*lines[:-1], lines[0]]).encode(), "refuse"), "too few": ("\n".join(lines[:-1]).encode(), "refuse"),
        "too many": ((text + "zzz\n").encode(), "refuse"), "empty": (b"", "refuse"), "blank lines": (text.replace("\n", "\n\n").encode(), "either"),
        "numbered": ("\n".join(f"{k} {name}" for k, name in enumerate(lines)).encode(), "refuse"), "commas": (",".join(lines).encode(), "refuse"),
        "JSON": (json.dumps(lines).encode(), "refuse"), "JSON, one a line": (json.dumps(lines, indent=1).encode(), "refuse"), "blanks": (text.replace("\n", "  \n").encode(), "either"),
        "upper case": (text.upper().encode(), "refuse"), "other order": ("\n".join(shuffled).encode(), "order"), "Latin-1": (text.encode() + "é".encode("latin-1"), "refuse"),
        "CSV": ("id,name\n" + "".join(f"{name},{name}\n" for name in lines)).encode() and (("id,name\n" + "".join(f"{name},{name}\n" for name in lines)).encode(), "refuse"),
        "NUL": (text.replace("\n", "\0").encode(), "refuse"), "random": (rng.randbytes(200), "refuse")}


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
        return Case(f"list: {which}", [*TESTED, "--classes", "classes.txt"], "refuse", ("classes.txt", ))
    data, may = lists[what]
    (home / "classes.txt").write_bytes(data)
    same = table_is("t.csv")
    right = (lambda seen: "" if seen.code or not same(seen) or "order" in seen.text else same(seen)) if may == "order" else same
    return Case(f"list: {what}", [*TESTED, "--classes", "classes.txt"], "either" if may == "order" else may, ("classes", ), right)


# Concept sets and stores


def _leaves(value: Any, at: tuple = ()) -> list[tuple]:
    """The paths to all parts of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inner for path in _leaves(part, (*at, key)))]


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


@kind(70)
def concepts(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Concept sets, and mask stores."""
    path = home / "concepts.json"
    text = path.read_text()
    value = json.loads(text)
    words = JUDGED if rng.random() < 0.6 else ("masks", *GROUNDED[1:])
    same = lambda seen: "" if seen.code or words is not JUDGED or _concepts(home / "k.json") == _concepts(home / "kept.json") else "other concepts were kept"
    part = lambda: rng.choice([p for p in _leaves({k: value[k] for k in ("classes", "concepts")}) if p and p[0] in ("classes", "concepts")])
    spoilt: dict[str, tuple[Callable[[], str | bytes], str]] = {
        "torn": (lambda: text[: rng.randrange(1, len(text) - 1)], "refuse"), "a wrong type": (lambda: json.dumps(replaced(value, part(), lambda v: of_other_type(rng, v))), "refuse"),
        "a key twice": (lambda: text.replace('"concepts": [', '"concepts": [], "concepts": [', 1), "refuse"), "empty set": (lambda: json.dumps(value | {"concepts": []}), "refuse"),
        "no classes": (lambda: json.dumps(value | {"concepts": [], "classes": []}), "refuse"), "empty": (lambda: "", "refuse"), "BOM": (lambda: text.encode("utf-8-sig"), "either"),
        "UTF-16": (lambda: text.encode("utf-16"), "either"), "bytes": (lambda: rng.choice(list(junk(rng).values())), "refuse"), "deep": (lambda: "[" * 100_000, "refuse"),
        "a missing key": (lambda: json.dumps({k: v for k, v in value.items() if k != rng.choice(("classes", "concepts"))} if rng.random() < 2 else value), "any"),
        "an unknown owner": (lambda: json.dumps(replaced(value, ("concepts", 0, "owners"), lambda _: ["nobody"])), "refuse"),
        "a class twice": (lambda: json.dumps(value | {"classes": value["classes"] + value["classes"][:1]}), "refuse"),
        "a concept twice": (lambda: json.dumps(value | {"concepts": value["concepts"] + value["concepts"][:1]}), "refuse"),
        "control characters": (lambda: json.dumps(replaced(value, ("concepts", 0, "text"), lambda t: t + "\x1b[2J")), "refuse"),
        "an array": (lambda: json.dumps(value["concepts"]), "refuse"), "NaN": (lambda: text.replace('"settings": {', '"settings": {"a": NaN, ', 1), "refuse"),
        "of other classes": (lambda: json.dumps(replaced(replaced(value, ("classes", 0, "id"), lambda _: "zzz"), ("concepts", ), lambda cs: [c for c in cs if value["classes"][0]["id"] not in c["owners"]])), "refuse"),
        "a concept not looked for": (lambda: json.dumps(replaced(value, ("concepts", 0, "text"), lambda t: t + " and more")), "foreign"),
        "bits": (lambda: mutated(rng, text.encode(), 3), "any")}
    if number % 70 < 36:
        what = list(spoilt)[number % len(spoilt)]
        make, may = spoilt[what]
        data = make()
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        if may == "foreign":
            words, may = JUDGED, "refuse"
        return Case(f"set: {what} in {words[0]}", words, "either" if may == "any" else may, ("concepts.json", "store", "concept set"), same if may == "either" else lambda _: "")
    return _store(rng, number, home)


def _concepts(path: Path) -> list[Any]:
    return sorted((c["text"], c["owners"]) for c in json.loads(path.read_text())["concepts"]) if path.is_file() else []


def _store(rng: random.Random, number: int, home: Path) -> Case:
    store, first, second = home / "store", home / "store/shard-00000.parquet", home / "store/shard-00001.parquet"
    recipe, data = json.loads((store / "store.json").read_text()), first.read_bytes()
    write = lambda value: (store / "store.json").write_text(json.dumps(value))
    part = lambda: rng.choice([p for p in _leaves(recipe) if p and p[0] in ("format", "shards", "grounder", "settings", "area", "pictures")])

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
        return pq.write_table(table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type)), first)

    spoilers: dict[str, tuple[Callable[[], object], str]] = {
        "shard missing": (first.unlink, "refuse"), "shard over another": (lambda: shutil.copy(first, second), "refuse"), "shard of another": (foreign, "refuse"),
        "shard rewritten": (meaningless, "refuse"), "shard cut": (lambda: first.write_bytes(data[: rng.randrange(len(data))]), "refuse"),
        "shard bits": (lambda: first.write_bytes(mutated(rng, data)), "either"), "shard junk": (lambda: first.write_bytes(rng.choice(list(junk(rng).values()))), "refuse"),
        "shard special": (lambda: special(rng, first, rng.choice(SPECIAL)), "refuse"), "json torn": (lambda: (store / "store.json").write_text(json.dumps(recipe)[: rng.randrange(400)]), "refuse"),
        "json empty": (lambda: (store / "store.json").write_bytes(b""), "refuse"), "json typed": (lambda: write(replaced(recipe, part(), lambda v: of_other_type(rng, v))), "refuse"),
        "json without a key": (lambda: write({k: v for k, v in recipe.items() if k != rng.choice(("format", "shards", "area"))}), "refuse"),
        "json of another format": (lambda: write(recipe | {"format": rng.choice((0, 1, 99))}), "refuse"), "json list": (lambda: write([recipe]), "refuse"),
        "json special": (lambda: special(rng, store / "store.json", rng.choice(SPECIAL)), "refuse"), "a file for the store": (lambda: (shutil.rmtree(store), store.write_bytes(b"x")), "refuse"),
        "pictures exchanged": (lambda: [Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(p) for p in pictures_of(home)], "exchanged"),
        "pictures of another size": (lambda: [Image.open(p).resize((80, 60)).save(p) for p in pictures_of(home)], "resized")}
    what = list(spoilers)[number % len(spoilers)]
    spoil, may = spoilers[what]
    spoil()
    fit = ("fit", "photos", *MODEL, "--masks", "store", "--concepts", "kept.json", "--per-class", 1, "--rate", "1e-4", "--epochs", 1, "--batch", 2, "--out", "run")
    words = fit if may in ("exchanged", "resized") or rng.random() < 0.35 else JUDGED
    right = lambda seen: "" if seen.code or words is fit or _concepts(home / "k.json") == _concepts(home / "kept.json") else "other concepts were kept"
    return Case(f"store: {what} in {words[0]}", words, "refuse" if may in ("exchanged", "resized") else may, ("store", "shard", "mask"), right)


# Settings

FIELDS: Mapping[str, Sequence[Any]] = {
    "world": ("mars", 5, ["drawn"]), "stamp": (5, [1], {"a": 1}), "seeds": (-1, 0, 1.5, "many", [1], {"a": 1}, float("nan"), 10**30), "ablation_seeds": (0, "x"),
    "our_form": ("perhaps", 7), "kinds": (["unknown"], "important", 5, [[1]]), "epochs": (0, -3, "ten", 2.5, float("inf")), "batch": (0, -1, "x"), "classes": (0, -1, [2]),
    "per_class": (0, "x"), "pool": (0, 1.5), "rates": ([1], {"demo": 5}, {"demo": {"plain": "x"}}, {"demo": {"plain": float("nan")}}, {"demo": {"plain": -1}}, {"demo": {"nobody": 1e-5}}, {"nowhere": {"plain": 1e-5}}),
    "device": (5, [1], "banana", "cuda:77"), "precision": ("fp8", 16), "chunk": (-1, "x"), "workers": (-1, "x"), "shards": (0, "x"), "test_per_class": (0, "x"),
    "drawn_from": ("x", 1.5, [1]), "bases": ("bought", 1), "together": (0, "x"), "sets": ([1], {"in-x": "a"}, "x"), "weights": ([1], "x", {"nobody": "a"}), "names": (5, [1]),
    "similarity": (["a"], 5, ["a", "b", "c"]), "unknown_field": (1, ), "Seeds": (1, ), 5: (1, ), "": (1, ), "answers": (5, [1]), "train": (5, [1])}


@kind(60)
def settings(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """YAML files for a reproduction."""
    from cft.files import ASSETS

    text, path = (ASSETS / "profiles/smoke.yaml").read_text(), home / "mine.yaml"
    spoilt: dict[str, Callable[[], bytes]] = {
        "tabs": lambda: text.replace("epochs:", "\tepochs:").encode(), "open bracket": lambda: (text + "kinds: [a, b\n").encode(), "a tag": lambda: (text + "x: !!python/object/apply:os.system ['touch hit']\n").encode(),
        "an own tag": lambda: (text + "device: !mine cpu\n").encode(), "in itself": lambda: b"rates: &a\n  demo: *a\n", "in itself, a list": lambda: b"kinds: &a [*a]\n", "laughs": lambda: _laughs(),
        "a name twice": lambda: (text + "seeds: 2\n").encode(), "a name twice inside": lambda: b"rates:\n  demo: {plain: 1.0e-5, plain: 2.0e-5}\n", "empty": lambda: b"", "a list": lambda: b"- seeds\n- 5\n", "a word": lambda: b"seeds\n", "a number": lambda: b"7\n",
        "UTF-16": lambda: text.encode("utf-16"), "Latin-1": lambda: (text + "stamp: früh\n").encode("latin-1"), "NUL": lambda: (text + "stamp: a\0b\n").encode(), "two documents": lambda: (text + "---\n" + text).encode(),
        "torn": lambda: text.encode()[: rng.randrange(60, len(text))] + b"{", "junk": lambda: rng.choice(list(junk(rng).values())), "bits": lambda: mutated(rng, text.encode(), 12), "unknown anchor": lambda: b"seeds: *nobody\n",
        "merge of nothing": lambda: b"<<: 5\nseeds: 1\n", "a date": lambda: b"seeds: 2026-11-27\n", "binary": lambda: b"seeds: !!binary aGFsbG8=\n", "a set": lambda: b"kinds: !!set {a, b}\n"}
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
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9)]
    return "\n".join([*lines, "kinds: *a8"]).encode()


# Options

NUMBERS: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "--batch": (TESTED, (0, -1, "x", 1.5, 10**25)), "--threads": (TESTED, (-1, 99_999_999, "x", 2**63)), "--device": (TESTED, ("banana", "0", "gpu", "mps", "cuda", "cuda:99", "", "cpu:x", "CPU", "cuda:-1", "meta", "xla")),
    "--workers": (TESTED, (-1, "x", 10**9)), "--model": (TESTED, ("", "nobody", "../x", "vit_base_patch16_224", "hf_hub:a/b", "cft_vit_tiny64 ", "\x1b[2J")), "--sets": (TESTED, ("nowhere", ",", "in-v,in-v")), "--protocol": (TESTED, ("x", )),
    "--save-every": (FIT, (0, -1, "x", 1.5)), "--epochs": (FIT, (0, -1, "x", 10**25)), "--rate": (FIT, ("nan", -1, "inf", "abc", 0)), "--seed": (FIT, (2**80, "x", 2**64, -(2**70))), "--chunk": (FIT, (-1, "x")),
    "--precision": (FIT, ("fp8", "", "fp16")), "--method": (FIT, ("", "nobody", "cft.nobody", ".", "CFT", "cft.object.object")), "--validation": (FIT, ("nowhere", "start.safetensors", "")),
    "--shards": (GROUNDED, (0, -1, 999, "x")), "--shard": (GROUNDED, (-1, 5, "x")), "--per-class": (GROUNDED, (-1, "x")), "--grounder": (GROUNDED, ("", "nobody", "groundingdino-swint+sam-vit-h")),
    "--occurrence": (JUDGED, (2, -0.1, "nan", "x", "inf")), "--coverage": (JUDGED, (2, -1, "nan")), "--pictures": (JUDGED, (0, -1, "x")),
    "--profile": (("reproduce", "--dry-run"), ("nobody", "", "../x")), "--only": (("reproduce", "--dry-run"), ("nowhere", "table99", "table1,nobody")), "--models": (("reproduce", "--dry-run"), ("nobody", )),
    "--methods": (("reproduce", "--dry-run"), ("nobody", )), "--seeds": (("reproduce", "--dry-run"), (-1, "x")), "--executor": (("reproduce", ), ("nobody", "")),
    "--clip": (("concepts", "classes.csv", "--dry-run"), ("nowhere", "start.safetensors")), "--model ": (("concepts", "classes.csv", "--dry-run"), ("", "\x1b[2J"))}
LINES: Sequence[tuple[str, Sequence[Any], Sequence[str]]] = (
    ("unknown command", ("teach", ), ("teach", )), ("unknown option", (*TESTED, "--fast"), ("--fast", )), ("no weights", ("evaluate", "photos", "--model", TINY), ("--weights", )),
    ("weights twice", (*TESTED, "--pretrained"), ("--pretrained", )), ("no model", ("evaluate", "photos"), ("model", )), ("no folder", ("fit", ), ("data", "missing")), ("two checkpoints", (*TESTED, "--weights", "start.safetensors"), ("checkpoint", "weights")),
    ("store without concepts", ("fit", "photos", *MODEL, "--masks", "store", "--out", "run"), ("--concepts", )), ("no masks", ("fit", "photos", *MODEL, "--out", "run"), ("--masks", )),
    ("sets and objects", (*MASKED, "--sets", "in-v"), ("--objects", )), ("replay of nothing", ("concepts", "classes.csv", "--replay", "--record", "none.jsonl", "--out", "c.json"), ("none.jsonl", )),
    ("no key", ("concepts", "classes.csv", "--yes", "--out", "c.json", "--record", "a.jsonl"), ("key", )), ("no terminal", ("concepts", "classes.csv", "--base-url", "http://127.0.0.1:9/v1", "--out", "c.json"), ("--yes", )),
    ("folders named by numbers", ("concepts", "numbers", "--dry-run"), ("0", "name")), ("no such source", ("concepts", "nothing.csv", "--dry-run"), ("nothing.csv", )),
    ("after nothing", ("audit", "photos", *MODEL, "--after", "nowhere"), ("nowhere", )), ("audit ending", ("audit", "photos", *MODEL, "--out", "a.pdf"), ("a.pdf", )))
OUTPUTS: Sequence[tuple[Sequence[Any], str]] = ((TESTED[:-2], "t.csv"), (TUNED, "run"), (GROUNDED[:-2], "new"), (JUDGED[:4], "k.json"), (("audit", "photos", *MODEL), "a.json"), (("concepts", ), "c.json"),
                                              (("reproduce", "--profile", "smoke", "--only", "table1"), "r"))


@kind(100)
def options(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Values of options, and outputs that cannot be written."""
    if number % 100 < 50:
        every = [(option, words, value) for option, (words, values) in NUMBERS.items() for value in values]
        step = len(every) // 50 + 1
        option, words, value = every[(number % 100 * step + rng.randrange(step)) % len(every)]
        fine = option in ("--threads", "--workers", "--batch", "--device", "--model", "--rate", "--model ", "--seed", "--validation") and value in (99_999_999, 2**63, 10**9, "CPU", "mps", "cft_vit_tiny64 ", 0, 10**25)
        return Case(f"{option.strip()} {value!a}", [*words, option.strip(), value], "either" if fine else "refuse", (option.strip(" -"), ))
    if number % 100 < 50 + len(LINES):
        what, words, names = LINES[number % 100 - 50]
        for k in range(2):
            (home / "numbers" / str(k)).mkdir(parents=True)
            shutil.copy(pictures_of(home)[0], home / "numbers" / str(k))
        free = (lambda: os.environ.pop("OPENAI_API_KEY", None)) if what == "no key" else None
        return Case(what, words, "refuse", names, before=free)
    words, name = OUTPUTS[number % len(OUTPUTS)]
    url = server.url(home.name, content=json.dumps({"items": ITEMS}))
    words = (*ASKED[:2], *ASKED[4:], url) if words[0] == "concepts" else words
    (home / "file").write_bytes(b"x")
    (home / "full").mkdir()
    (home / "full/mine.txt").write_bytes(b"x")
    folder = "." not in name
    bad = {"below a file": f"file/{name}", "a folder or a file": "file" if folder else "full", "too long": "x" * 300 + name, "in /proc": f"/proc/none/{name}", "a device": f"/dev/full/{name}",
           "NUL": f"a\0{name}", "empty": "", "dangling": f"link/{name}", "too deep": "d/" * 2100 + name}
    (home / "link").symlink_to("/proc/none")
    what = rng.choice(list(bad))
    words, case = [*words, "--out", bad[what]], home.name

    def right(seen: Seen) -> str:
        if server.asked(case):
            return f"{len(server.asked(case))} questions were paid for"
        return "trained before it was refused" if "in the last epoch" in seen.out or (seen.code and (home / "run/state.pt").exists()) else ""

    return Case(f"--out of {words[0]} {what}", words, "refuse", ("out", bad[what][:60] or "out", "full", "file", name), right)


# Answers and servers


def _plans(rng: random.Random) -> dict[str, tuple[dict[str, Any], str, Sequence[str]]]:
    """What a server does; "read" (all ITEMS are found), "any" (these at most), or "refuse" with what must be named."""
    fine, items = json.dumps({"items": ITEMS}), list(ITEMS)
    bullets = lambda mark: "\n".join(f"{mark}{item}" for item in items)
    error = lambda status, message, **more: ({"status": status, "body": {"error": {"message": message}}} | more, "refuse", (message[:20], str(status)))
    dress = rng.choice(("Sure! Here they are:\n\n{}", "<think>\nIt has a head, maybe a tail.\n- tail?\n</think>\n\n{}", "{}\n\nLet me know if you need more!", "Answer:\n{}", "\n\n{}\n\n", "\ufeff{}"))
    read = lambda content, **more: ({"content": content, **more}, "read", ())
    return {
        "dressed JSON": read(dress.format(fine)), "dressed fence": read(dress.format(f"```json\n{fine}\n```")), "dressed list": read(dress.format(bullets(rng.choice(("- ", "* ", "• ", "1. "))))),
        "fence": read(f"```json\n{fine}\n```"), "bare array": read(json.dumps(items)), "another key": read(json.dumps({rng.choice(("concepts", "answer", "parts")): items})), "an extra key": read(json.dumps({"items": items, "note": "done"})),
        "dashes": read(bullets(rng.choice(("– ", "— ", "+ ", "  - ", "-  ")))), "numbers": read("\n".join(f"{k}{rng.choice('.):')} {x}" for k, x in enumerate(items, 1))), "bold": read("\n".join(f"- **{x}**" for x in items)),
        "bold and text": ({"content": "\n".join(f"- **{x.title()}**: very important" for x in items)}, "any", ()), "quotes": read(bullets('- "').replace("\n", '"\n') + '"'), "curly": read("\n".join(f"- “{x}”" for x in items)),
        "think": read(f"<think>{rng.choice(('a tail', '{', '- a beak', fine))}</think>{fine}"), "open think": ({"content": "<think>\n- a tail\n- a beak"}, "refuse", ("answer", "usable")), "upper case": read(json.dumps({"items": [x.upper() for x in items]})),
        "spaces": read(json.dumps({"items": [f"  {x}. " for x in items]})), "twice": read(json.dumps({"items": items + items})), "nested": ({"content": json.dumps({"items": [items]})}, "any", ()), "objects": ({"content": json.dumps({"items": [{"name": x} for x in items]})}, "any", ()),
        "nulls inside": ({"content": json.dumps({"items": [*items, None, 7]})}, "any", ()), "two objects": read(f"{fine}\n{fine}"), "single quotes": ({"content": str({"items": items})}, "any", ()), "trailing comma": ({"content": fine.replace("]", ", ]")}, "any", ()),
        "comma list": ({"content": ", ".join(items)}, "any", ()), "lines": ({"content": "\n".join(items)}, "any", ()), "markdown table": ({"content": "| part |\n|---|\n" + "\n".join(f"| {x} |" for x in items)}, "any", ()),
        "empty items": ({"content": '{"items": []}'}, "refuse", ("answer", "usable", "concept")), "no answer": ({"content": ""}, "refuse", ("answer", "usable")), "null": ({"content": None}, "refuse", ("answer", "usable")), "a refusal": ({"content": "I'm sorry, I can't help with that."}, "refuse", ("answer", "usable")),
        "parts": ({"content": [{"type": "text", "text": fine}]}, "any", ()), "a number": ({"content": 7}, "refuse", ("answer", "usable")), "control": ({"content": json.dumps({"items": [*items, "a\x1b[2Jb", "c\u202ed", "\ud800"]})}, "any", ()), "huge": ({"content": json.dumps({"items": items + ["x" * 100_000]})}, "any", ()),
        "thousand": ({"content": json.dumps({"items": items + [f"part {k}" for k in range(1000)]})}, "loose", ()), "odd usage": read(fine, more={"usage": rng.choice((None, "7", [], {"prompt_tokens": "many"}, {"prompt_tokens": None}, {"prompt_tokens": 1.5}, 7))}), "no usage": read(fine, more={"usage": {}}),
        "length": ({"body": chat(fine[:20], "length")}, "refuse", ("answer", "token", "truncated")), "filter": ({"body": chat(fine, "content_filter")}, "refuse", ("answer", "usable", "refused")), "odd finish": ({"body": chat(fine, rng.choice(("eos", "", "tool_calls")))}, "any", ()),
        "no choices": ({"body": chat(fine) | {"choices": []}}, "refuse", ("answer", "usable")), "null choices": ({"body": chat(fine) | {"choices": None}}, "refuse", ("answer", "usable")), "no message": ({"body": chat(fine) | {"choices": [{}]}}, "refuse", ("answer", "usable")),
        "an array": ({"body": [1, 2]}, "refuse", ("answer", "usable", "server")), "null body": ({"body": None}, "refuse", ("answer", "usable", "server")), "html": ({"text": "<html>Welcome</html>", "headers": {"Content-Type": "text/html"}}, "refuse", ("answer", "usable", "html", "/v1")), "empty body": ({"text": ""}, "refuse", ("answer", "usable", "server")),
        "torn body": ({"text": json.dumps(chat(fine))[:-40]}, "refuse", ("answer", "usable", "server")), "not UTF-8": ({"text": '{"choices": [{"message": {"content": "- a\udcff"}}]}'}, "loose", ()), "200 and an error": ({"body": {"error": "Unexpected endpoint or method. (POST /chat)"}}, "refuse", ("Unexpected endpoint", "/v1")),
        "cut": ({"content": fine, "cut": 50}, "refuse", ("connection", "server", "answer")), "no temperature": (dict(content=fine, forbids={"temperature": "Unsupported value: 'temperature' does not support 0.7 with this model."}), "refuse", ("temperature", )),
        "no max_tokens": (dict(content=fine, forbids={"max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."}), "either", ("max_tokens", )), "no schema": read(fine, forbids={"response_format": "response_format is not supported"}),
        "401": error(401, "Incorrect API key provided"), "402": error(402, "Insufficient credits on this account"), "403": error(403, "Country not supported"), "404": error(404, 'model "m" not found, try pulling it first'), "400": error(400, "This model's maximum context length is 512 tokens"),
        "429": error(429, "You exceeded your current quota"), "500": error(500, "the model runner has crashed"), "503": error(503, "Loading model"), "422": error(422, "Extra inputs are not permitted"), "redirect": ({"status": 302, "text": "", "headers": {"Location": "http://127.0.0.1:9/v1"}}, "refuse", ("connect", "302", "server")),
        "error as text": ({"status": 400, "text": "bad request: no such model"}, "refuse", ("no such model", )), "error as a list": ({"status": 400, "body": {"detail": [{"msg": "field required"}]}}, "refuse", ("field required", )), "key in the error": error(401, "Incorrect API key provided: sk-torture-0123456789"),
        "control in the error": error(400, "bad\x1b]0;owned\x07request"), "long error": error(400, "context " * 3000), "odd charset": ({"content": fine, "headers": {"Content-Type": "application/json; charset=nonsense"}}, "any", ()), "text/plain": read(fine, headers={"Content-Type": "text/plain"})}


@kind(80)
def answers(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Answers as models give them, and servers as they are."""
    plans = _plans(rng)
    what, case = list(plans)[number % len(plans)], home.name
    plan, verdict, names = plans[what]
    (home / "classes.csv").write_text("id,name\nc1,yellow thing\n")
    url = server.url(case, **plan)
    if number % 80 >= 76:
        what, url = (("no server", "http://127.0.0.1:9/v1"), ("no address", "not a url"), ("ftp", "ftp://127.0.0.1/v1"), ("empty address", ""))[number % 4]
        verdict, names = "refuse", ("connect", "base-url", "base_url", "url", "protocol", "key")

    def right(seen: Seen) -> str:
        asked, file = server.asked(case), home / "c.json"
        if any("sk-torture" in text for text in (seen.text, *(p.read_text("utf-8", "replace") for p in (file, home / "a.jsonl") if p.is_file()))):
            return "the key was printed or written"
        if seen.code:
            return "an empty concept set was written" if file.exists() else f"{len(asked)} requests for 6 questions" if len(asked) > 48 else ""
        found = json.loads(file.read_text())
        texts = {each["text"] for each in found["concepts"]}
        known = texts | {each["text"] for each in found["dropped"]}
        if not texts:
            return "an empty concept set, exit 0"
        if verdict != "loose" and (odd := texts - set(ITEMS)):
            return f"concepts that nobody gave: {sorted(odd)[:3]}"
        if verdict == "read" and (lost := set(ITEMS) - known):
            return f"lost {sorted(lost)}"
        return f"{len(asked)} requests for 6 answers" if verdict == "read" and "schema" not in what and len(asked) > 6 else ""

    may = {"read": "work", "refuse": "refuse"}.get(verdict, "either")
    return Case(what, [*ASKED, url], may, names or ("answer", "usable"), right)


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
    spoilers: dict[str, tuple[Callable[[], object], str]] = {
        "store.json empty": (lambda: (store / "store.json").write_bytes(b""), "either"), "store.json torn": (lambda: (store / "store.json").write_text("{"), "either"), "journal empty": (lambda: (first.unlink(), journal.write_bytes(b"")), "work"),
        "journal torn": (lambda: (first.unlink(), journal.write_bytes(b'[{"picture": "a')), "work"), "journal junk": (lambda: (first.unlink(), journal.write_bytes(rng.randbytes(300))), "either"), "journal typed": (lambda: (first.unlink(), journal.write_bytes(rng.choice((b"{}\n", b"[]\n", b"[1]\n", b'[{"a": 1}]\n', b"null\n", b'[{"picture": 7}]\n')))), "either"),
        "journal special": (lambda: (first.unlink(), special(rng, journal, rng.choice(SPECIAL[:-1]))), "either"), "shard cut": (lambda: first.write_bytes(first.read_bytes()[:900]), "either"), "another run's store": (lambda: (store / "store.json").write_text((store / "store.json").read_text().replace('"seed": 0', '"seed": 1')), "refuse"),
        "something else": (lambda: (shutil.rmtree(store), store.mkdir(), (store / "mine.txt").write_text("x")), "refuse"), "a lock folder": (lambda: (first.unlink(), first.with_suffix(".lock").mkdir()), "either"), "shard special": (lambda: special(rng, first, rng.choice(SPECIAL[:-1])), "either")}
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
    line = lambda q, **more: json.dumps({"model": q.key[0], "prompt": q.key[1], "sample": q.key[2], "class": "c1", "kind": q.kind, "mode": "schema", "status": "ok", "tokens": [9, 9], "raw": json.dumps({"items": ITEMS})} | more).encode() + b"\n"
    whole, path = b"".join(map(line, asked)), home / "a.jsonl"
    key = rng.choice(("model", "prompt", "sample", "status", "tokens", "raw"))
    spoilt: dict[str, tuple[bytes, str, int | None]] = {
        "whole": (whole, "work", 0), "torn end": (whole[: rng.randrange(len(whole) - 300, len(whole) - 3)], "work", None), "torn in the middle": (whole[:100] + whole[300:], "work", None), "empty": (b"", "work", 6), "no last break": (whole[:-1], "work", 0), "CRLF": (whole.replace(b"\n", b"\r\n"), "work", 0),
        "BOM": (b"\xef\xbb\xbf" + whole, "either", None), "UTF-16": (whole.decode().encode("utf-16"), "either", None), "a wrong type": (b"".join(line(q, **{key: of_other_type(rng, "") if key != "tokens" else "x"}) for q in asked[:3]) + b"".join(map(line, asked[3:])), "either", None), "junk lines": (b"".join(rng.choice(list(junk(rng).values())) + b"\n" + line(q) for q in asked), "either", None),
        "answers twice": (whole + whole, "work", 0), "junk": (rng.randbytes(500), "either", None), "a list": (b"[" + whole.replace(b"\n", b",")[:-1] + b"]", "either", None), "pretty": (json.dumps(json.loads(line(asked[0])), indent=1).encode(), "either", None), "bits": (mutated(rng, whole), "either", None), "NUL": (bytes(4096) + whole, "either", None),
        "deep": (b"[" * 100_000 + b"\n" + whole, "either", None), "no items": (b"".join(line(q, raw="{}") for q in asked), "either", None), "other model": (b"".join(line(q, model="x") for q in asked), "work", 6)}
    what = list(spoilt)[number % len(spoilt)] if number % 24 < 20 else "special"
    if what == "special":
        which = rng.choice(SPECIAL[:-1])
        special(rng, path, which)
        paid = lambda seen: "paid before it was refused" if seen.code and server.asked(case) else ""
        return Case(f"record: {which}", [*ASKED, url], "either", ("a.jsonl", ), paid)
    data, may, wanted = spoilt[what]
    path.write_bytes(data)

    def right(seen: Seen) -> str:
        number = len(server.asked(case))
        if seen.code:
            return "asked before it was refused" if number else ""
        texts = {each["text"] for each in json.loads((home / "c.json").read_text())["concepts"]} if (home / "c.json").exists() else set()
        if not texts or texts - set(ITEMS):
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
        "untouched": (lambda: None, "work"), "state torn": (lambda: state.write_bytes(data[: rng.randrange(len(data))]), "either"), "state empty": (lambda: state.write_bytes(b""), "either"), "state junk": (lambda: state.write_bytes(rng.choice(list(junk(rng).values()))), "either"), "state of something else": (stored, "either"),
        "state bits": (lambda: state.write_bytes(mutated(rng, data, 4, 2000)), "any"), "state special": (lambda: special(rng, state, rng.choice(SPECIAL[:-1])), "either"), "code in the state": (lambda: _evil(state), "either"), "record torn": (lambda: (finished(), record.write_text(json.dumps(value)[: rng.randrange(1, 400)])), "either"),
        "record empty": (lambda: (finished(), record.write_bytes(b"")), "either"), "record typed": (lambda: (finished(), record.write_text(json.dumps(replaced(value, (rng.choice(list(value)), ), lambda v: of_other_type(rng, v))))), "any"), "record list": (lambda: (finished(), record.write_text("[]")), "either"), "record null": (lambda: (finished(), record.write_text("null")), "either"),
        "record without a key": (lambda: (finished(), record.write_text(json.dumps({k: v for k, v in value.items() if k != rng.choice(list(value))}))), "any"), "model missing": (lambda: (finished(), model.unlink()), "either"), "model empty": (lambda: (finished(), model.write_bytes(b"")), "either"), "model cut": (lambda: (finished(), model.write_bytes(model.read_bytes()[:9000])), "either"),
        "model special": (lambda: (finished(), special(rng, model, rng.choice(SPECIAL[:-1]))), "either"), "something else": (lambda: (shutil.rmtree(home / "run"), (home / "run").mkdir(), (home / "run/record.json").write_text('{"mine": 1}')), "either")}
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

    return Case(f"run: {what}", FIT + ("--save-every", 1), "either" if may == "any" else may, ("run", "state.pt", "record.json", "model.safetensors"), right)


def _evil(path: Path) -> None:
    import torch

    torch.save({"state": Evil()}, path)


# Hugging Face data sets


@kind(20)
def hub(rng: random.Random, number: int, home: Path, server: Server) -> Case:
    """Data sets of Hugging Face with holes."""
    good = lambda: {"bytes": encoded(rng, "png", (64, 64)), "path": None}
    odd = {"null": None, "junk": {"bytes": rng.choice(list(junk(rng).values())), "path": None}, "gone": {"bytes": None, "path": "/gone/x.png"}, "nothing": {"bytes": None, "path": None}, "bomb": {"bytes": bomb(1, 1_000_000), "path": None},
           "cut": {"bytes": encoded(rng, "png", (90, 90))[:300], "path": None}, "exif": {"bytes": with_exif(rng, encoded(rng, "jpg")), "path": None}, "a folder": {"bytes": None, "path": str(home)}}
    labels = {"label -1": [0, -1, 1], "label null": [0, None, 1], "label too large": [0, 99, 1]}
    names = [*odd, *labels, "no picture column", "splits", "no rows", "text for pictures", "label as text"]
    what, row = names[number % len(names)], rng.randrange(3)

    def call() -> None:
        import datasets

        from cft.data.models import load_model
        from cft.data.testsets import hub_set
        from cft.evaluate.passes import Loop, checkpoint, evaluate_sets

        cells, values = [good() for _ in range(3)], labels.get(what, [0, 1, 1])
        if what in odd:
            cells[row] = odd[what]
        kind = datasets.Value("string") if what == "label as text" else datasets.Value("int64") if what in labels else datasets.ClassLabel(names=["a", "b"])
        table: dict[str, Any] = {"image": [] if what == "no rows" else cells, "label": [] if what == "no rows" else list(map(str, values)) if what == "label as text" else values}
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        if what == "no picture column":
            source: Any = datasets.Dataset.from_dict({"label": [0, 1]})
        elif what == "text for pictures":
            source = datasets.Dataset.from_dict({"image": ["a", "b"], "label": [0, 1]})
        else:
            source = datasets.Dataset.from_dict(table, features=features)
        model, names = load_model(TINY, home / "start.safetensors")
        found = hub_set(datasets.DatasetDict({"train": source}) if what == "splits" else source, names if what in labels or what == "label as text" else None, key="mine")
        print(evaluate_sets([checkpoint(model, "m")], [found], home / "o", loop=Loop(2)).rows().to_string())

    datasets_ = "either" if what in odd else "refuse"
    right = lambda seen: "" if seen.code or what == "exif" or re.search(r"row|aside|00000|null|picture", seen.text.partition("top1")[0]) else "nothing was said"
    return Case(what, (), datasets_, ("mine", "row", f"{row:08d}"), right, call)
