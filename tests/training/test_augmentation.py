# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips against the loop over images that they replace."""

import pytest
import torch

from harprune.training.augmentation import (
    Crop,
    crop_flip,
    default_augmentation,
)


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
    augment = crop_flip(padding)
    draws = augment.draw(len(x), seeded())
    out = augment(x, seeded())
    assert out.dtype == dtype
    assert torch.equal(out, one_by_one(x, draws, padding))


def test_crop_never_flips_and_equals_the_loop():
    torch.manual_seed(0)
    x = torch.rand(50, 1, 8, 8)
    draws = Crop(2).draw(50, seeded())
    assert not draws[:, 2].any()
    assert torch.equal(Crop(2)(x, seeded()), one_by_one(x, draws, 2))


def test_draws_are_uniform():
    draws = crop_flip(2).draw(50_000, seeded())
    for column, values in ((0, 5), (1, 5), (2, 2)):
        shares = draws[:, column].bincount(minlength=values) / len(draws)
        # Five standard deviations of a share of 1/5 or 1/2.
        assert (shares - 1 / values).abs().max() < 5 * 0.5 / 50_000**0.5


def test_the_input_and_the_global_generator_are_left_alone():
    torch.manual_seed(3)
    x = torch.rand(4, 3, 8, 8)
    before, state = x.clone(), torch.get_rng_state()
    crop_flip()(x, seeded())
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_defaults():
    with pytest.raises(ValueError, match="padding is -1"):
        Crop(-1)
    assert default_augmentation("cifar10", 32) == crop_flip(4)
    assert default_augmentation("folder", 224) == crop_flip(28)
    assert default_augmentation("svhn", 32) is None
    assert default_augmentation("digits", 8) is None
