"""A quick grounder for tests of masks, and pictures for it."""
import os
import time
import zlib
from functools import partial

import numpy as np
import torch
from PIL import Image

from cft.concepts.filters import Concept, ConceptSet
from cft.concepts.grounding import Grounding
from cft.concepts.language import ClassName
from cft.concepts.masks import build_masks
from cft.data.folders import list_folder

built = partial(build_masks, progress=False)

TEXTS = ("ghost", "leg", "tail", "wing")


def concept_set(*ids, texts=TEXTS):
    concepts = tuple(Concept(text, tuple(sorted(ids)), ("important",)) for text in texts)
    return ConceptSet(tuple(ClassName(i, f"a {i}") for i in ids), concepts)


def pictures(root, classes=2, each=3, size=(12, 10), seed=0):
    rng = np.random.default_rng(seed)
    for c in range(classes):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(root / f"c{c}/{i:04d}.png")
    return list_folder(root)


def where(image, phrase):
    """What the grounder of these tests finds: bright pixels of a channel that depends on the phrase."""
    values = np.asarray(image)
    return (values[..., zlib.crc32(phrase.encode()) % 3] > 128) & (phrase != "ghost")


class Bright:
    """A quick grounder that notes each call in a file, which outlives its process."""

    name = "bright"

    def __init__(self, log=None, pause=0.0, threshold=128, spoil=None):
        self.log, self.pause, self.threshold, self.spoil = log, pause, threshold, spoil

    def settings(self):
        return {"threshold": self.threshold}

    def __call__(self, image, phrases):
        if self.log:
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{zlib.crc32(image.tobytes())}\n".encode())
            os.close(handle)
        if self.pause:
            time.sleep(self.pause)
        found = []
        for phrase in phrases:
            mask = torch.from_numpy(where(image, phrase))
            n = int(mask.any())
            found.append(Grounding(phrase, torch.tensor([[0.0, 0.0, 4.0, 5.5]])[:n], torch.tensor([0.625])[:n], mask))
        return self.spoil(image, found) if self.spoil else found
