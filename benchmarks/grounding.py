"""Grounding all concepts of a picture together, against one pass and one encoding for each, as the released script."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from table import Row, place, row

from cft.concepts.grounding import GroundedSAM, Grounding, GroundingConfig, small_grounded_sam
from cft.evaluate.passes import times_slower

PHRASES = [f"a {colour} {part}" for colour in ("red", "blue") for part in ("beak", "wing", "tail", "leg", "eye")]


def per_concept_loop(grounder: GroundedSAM, image: Image.Image, phrases: Sequence[str]) -> list[Grounding]:
    """The released script's way to the same results: everything anew for each phrase, each box by itself."""
    results = []
    for phrase in phrases:
        (prompt,) = grounder.prompts([phrase])
        found = grounder.find(grounder.detector.prepare(image), prompt, image.size, image.size)
        boxes, scores, words = found[prompt.phrases[0]]
        mask = torch.zeros(image.height, image.width, dtype=torch.bool)
        if len(boxes):
            grounder.counts["sam_encodings"] += 1
            encoded = grounder.segmenter.encode(image)
            for box in boxes:
                grounder.counts["sam_decodings"] += 1
                mask |= grounder.segmenter.masks(encoded, box[None])[0]
        results.append(Grounding(phrase, boxes, scores, mask, words))
    return results


def grounding_rows(concepts: Sequence[int] = (1, 5, 10), rounds: int = 3) -> list[Row]:
    """Time of a loop over K concepts over that of all together, and encodings of the latter for the largest K.

    The code of both networks is real, their weights are random.
    """
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(96, 128, 3), dtype=np.uint8))
    grounder, rows = small_grounded_sam(GroundingConfig(box_threshold=0.5)), []
    note, peer = f"median of {rounds} alternating pairs, random networks, {place('cpu')}", "one pass per concept"
    for k in concepts:
        asked = (picture, PHRASES[:k])
        ratio = times_slower(partial(per_concept_loop, grounder, *asked), partial(grounder, *asked), rounds)
        rows.append(row(f"grounding_speedup_k{k}", ratio, "their time / ours", ">= 1", peer, note))
    before, most = grounder.counts["sam_encodings"], max(concepts)
    grounder(picture, PHRASES[:most])
    count, peer = grounder.counts["sam_encodings"] - before, f"{most} per concept loop"
    return [*rows, row("sam_encodings_per_image", count, "encodings", "<= 1", peer, f"{most} concepts")]
