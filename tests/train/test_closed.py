"""Heads that are solved for, against a generic solver, and what must stay."""
import pytest
import torch
from torch.utils.data import DataLoader

from cft.data import backdrop
from cft.data.folders import MaskedImages, Preprocess, list_folder
from cft.data.models import base_model
from cft.train.closed import penultimate, swap_consistent, swap_differences, swapped_features, with_head


@pytest.fixture(scope="module")
def given():
    """Weights (5, 7), features of 9 pictures, and of 3 swaps."""
    rng = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    own = make(9, 7)
    return make(5, 7), own, own + 0.5 * make(3, 9, 7) + 0.3


def test_swap_consistent_is_the_least_squares_solution(given):
    weight, own, swapped = given
    n, a = 27, swapped.flatten(0, 1).square().mean(0).mean()
    rows = [swapped.flatten(0, 1) / n**0.5, (0.02 * a)**0.5 * torch.eye(7, dtype=torch.float64)]
    wanted = [own.repeat(3, 1) @ weight.T / n**0.5, (0.02 * a)**0.5 * weight.T]
    slow = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T
    assert torch.allclose(swap_consistent(weight, own, swapped, 0.02), slow, atol=1e-10)


def test_swap_differences_is_the_least_squares_solution(given):
    weight, own, swapped = given
    every = torch.stack([own, *swapped])
    mean = every.mean(0)
    deviations = torch.cat([each - mean for each in every])
    keep, change = mean.square().sum() / 9, deviations.square().sum() / 36
    strong, near = (0.3 * keep / change)**0.5, (0.02 * mean.square().mean(0).mean())**0.5
    rows = [mean / 3, strong * deviations / 6, near * torch.eye(7, dtype=torch.float64)]
    wanted = [mean @ weight.T / 3, torch.zeros(36, 5, dtype=torch.float64), near * weight.T]
    slow = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T
    assert torch.allclose(swap_differences(weight, own, swapped, 0.3, 0.02), slow, atol=1e-10)


def test_where_nothing_moves_the_weights_stay(given):
    weight, own, swapped = given
    assert torch.allclose(swap_consistent(weight, own, own.expand(3, -1, -1)), weight, atol=1e-10)
    assert torch.allclose(swap_consistent(weight, own, swapped, 1e9), weight, atol=1e-6)
    assert torch.allclose(swap_differences(weight, own, swapped, 1e-9), weight, atol=1e-6)
    with pytest.raises(ValueError, match="no swap changes"):
        swap_differences(weight, own, own.expand(3, -1, -1))
    for bad in (lambda: swap_consistent(weight, own, swapped, 0), lambda: swap_differences(weight, own, swapped, -1)):
        with pytest.raises(ValueError, match="must be above 0"):
            bad()


def test_what_is_erased_reaches_no_logit():
    own = torch.eye(4, dtype=torch.float64)[:2].repeat(2, 1)
    swapped = torch.stack([own + torch.eye(4, dtype=torch.float64)[2], own - torch.eye(4, dtype=torch.float64)[2]])
    weight = torch.ones(3, 4, dtype=torch.float64)
    found = swap_differences(weight, own, swapped, erase=1e6, ridge=1e-6)
    assert found[:, 2].abs().max() < 1e-3 and torch.allclose(found[:, :2], weight[:, :2], atol=1e-3)


def test_features_of_a_model_and_a_copy_with_another_head(tmp_path):
    world = backdrop.write(tmp_path / "w", {"val": 1}, seed=0)
    model, folder = base_model(0), list_folder(world / "images/val", list(backdrop.CLASSES))
    images = MaskedImages(folder.with_masks(object=world / "objects/val"), Preprocess.of(model))
    own, swapped = swapped_features(model, images, times=2)
    batch = next(iter(DataLoader(images, 12)))
    logits = own @ model.head.weight.T.double() + model.head.bias
    assert own.shape == (12, 96) and swapped.shape == (2, 12, 96)
    assert torch.allclose(logits.float(), model(batch["image"]), atol=1e-4)
    assert torch.equal(own, penultimate(model, batch["image"])) and not torch.allclose(swapped[0], swapped[1])
    assert torch.equal(swapped_features(model, images, times=2)[1], swapped)
    other = with_head(model, torch.zeros_like(model.head.weight))
    assert torch.equal(other.head.bias, model.head.bias) and not other.head.weight.any() and model.head.weight.any()
    rest = lambda m: {k: v for k, v in m.state_dict().items() if k != "head.weight"}
    assert all(torch.equal(value, rest(model)[name]) for name, value in rest(other).items())
    with pytest.raises(ValueError, match="at least two pictures"):
        swapped_features(model, MaskedImages(images.folder.choose(images.folder.names[:1]), images.preprocess))
