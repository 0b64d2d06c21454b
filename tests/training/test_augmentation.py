# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips against the loop over images that they replace."""

import pytest
import torch

from harprune.training.augmentation import CropFlip, augmentation


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_by_one(x, draws, padding):
    """Crop and flip with a loop: the definition."""
    out = torch.empty_like(x)
    height, width = x.shape[-2:]
    for n, (row, column, flipped) in enumerate(draws.tolist()):
        padded = torch.zeros(x.shape[1], height + 2 * padding, width + 2 * padding, dtype=x.dtype)
        padded[:, padding : padding + height, padding : padding + width] = x[n]
        image = padded[:, row : row + height, column : column + width]
        out[n] = image.flip(-1) if flipped else image
    return out


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_flip_equals_the_loop(padding, dtype):
    torch.manual_seed(0)
    x = (torch.rand(50, 3, 9, 12) * 255).to(dtype)
    augment = CropFlip(padding)
    draws = augment.draw(len(x), seeded())
    out = augment.apply(x, draws)
    assert out.dtype == dtype
    assert torch.equal(out, one_by_one(x, draws, padding))


def test_draws_are_uniform():
    draws = CropFlip(2).draw(50_000, seeded())
    for column, values in ((0, 5), (1, 5), (2, 2)):
        shares = draws[:, column].bincount(minlength=values) / len(draws)
        # Five standard deviations of a share of 1/5 or 1/2.
        assert (shares - 1 / values).abs().max() < 5 * 0.5 / 50_000**0.5


def test_the_input_and_the_global_generator_are_left_alone():
    torch.manual_seed(3)
    x = torch.rand(4, 3, 8, 8)
    before, state = x.clone(), torch.get_rng_state()
    augment = CropFlip(2)
    augment.apply(x, augment.draw(len(x), seeded()))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "dataset", "side", "expected"),
    [
        ("default", "cifar10", 32, CropFlip(4)),
        ("default", "folder", 224, CropFlip(28)),
        ("default", "svhn", 32, None),
        ("default", "digits", 8, None),
        ("crop_flip", "digits", 7, CropFlip(1)),
        ("none", "cifar10", 32, None),
    ],
)
def test_a_recipe_names_what_its_images_get(name, dataset, side, expected):
    assert augmentation(name, dataset, side) == expected
