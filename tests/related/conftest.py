"""A few drawn pictures, what finds segments in them, and their bags."""
import pytest

from cft.concepts.filters import demo_concepts
from cft.data import backdrop
from cft.data.folders import Preprocess
from cft.data.models import base_model
from cft.data.testsets import folder_set
from cft.demo.toy_grounder import toy_grounder
from cft.related.segments import Bags, ToyPairs, ground, mean_colour, retrieve, similarities
from cft.related.segmil import Standard

NAMES = list(backdrop.CLASSES)

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return backdrop.write(tmp_path_factory.mktemp("world") / "w", {"train": 3, "val": 2, "adversarial": 2}, seed=9)

@pytest.fixture(scope="session")
def tools():
    find = toy_grounder()
    return find, ToyPairs(find), tuple(sorted({text for _, text in demo_concepts().pairs()}))

@pytest.fixture(scope="session")
def bags(world, tools, tmp_path_factory):
    find, encoder, vocabulary = tools
    source = folder_set(world / "images/train", NAMES)
    similarity = similarities(encoder, (image for image, _ in source), vocabulary)
    phrases = retrieve(similarity, vocabulary)
    store = ground(source, phrases, find, tmp_path_factory.mktemp("store") / "s", progress=False)
    preprocess = Preprocess.of(base_model(0))
    return Bags(source, preprocess, store, phrases, fill=mean_colour(source),
                extra={"target": Standard.of(similarity).targets(similarity)})
