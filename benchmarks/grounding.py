"""Grounding all concepts of a picture together, against one pass and one encoding for each, as the released script."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image
from table import Row, place, row

from cft.concepts.grounding import GroundingConfig, per_concept_loop, small_grounded_sam
from cft.evaluate.passes import times_slower

PHRASES = [f"a {colour} {part}" for colour in ("red", "blue") for part in ("beak", "wing", "tail", "leg", "eye")]


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
