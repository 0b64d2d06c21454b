# SPDX-License-Identifier: Apache-2.0
"""Batches: full, repeatable, resumable, and the same for one process and for many."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from harprune.training.augmentation import CropFlip
from harprune.training.batches import Batches
from harprune.training.folders import ImageFiles
from harprune.training.splits import Split, from_arrays, to_float


def numbered(count):
    """A split whose image n is filled with n and labelled n."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return Split(images.contiguous(), torch.arange(count))


def textured(count=23):
    torch.manual_seed(0)
    return from_arrays(torch.rand(count, 3, 8, 8), torch.arange(count) % 3)


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    return all(torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one, two))


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_holds_no_image_twice_and_leaves_out_less_than_a_batch(
    count, batch_size, seed, epoch
):
    batch_size = min(batch_size, count)
    batches = Batches(numbered(count), batch_size, seed=seed)
    xs, ys = zip(*batches.epoch(epoch))
    assert len(ys) == len(batches)
    assert all(len(y) == batch_size for y in ys)
    seen = set(torch.cat(ys).tolist())
    assert seen <= set(range(count)) and count - batch_size < len(seen) == batch_size * len(ys)
    x = torch.cat(xs)
    assert x.dtype == torch.float32
    assert torch.equal(x[:, 0, 0, 0], torch.cat(ys).float() / 255)


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    def order(seed, epoch):
        batches = Batches(numbered(50), 7, seed=seed)
        return torch.cat([y for _, y in batches.epoch(epoch)]).tolist()

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    assert order(0, 0) == first
    others = [order(0, 1), order(1, 0), order(1, 1)]
    assert all(other != first for other in others)
    assert others[0] != others[1]


def test_the_global_generator_is_left_alone():
    split, state = textured(), torch.get_rng_state()
    list(Batches(split, 5, seed=0, augment=CropFlip(2)).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_a_resumed_epoch_equals_the_rest_of_a_whole_one(start):
    batches = Batches(textured(), 5, seed=4, augment=CropFlip(2))
    whole = list(batches.epoch(7))
    assert same(batches.epoch(7, start), whole[start:])
    assert not same(batches.epoch(8), whole)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_one_after_another_are_the_batch_of_one_process(world):
    options = {"seed": 4, "augment": CropFlip(2)}
    alone = Batches(textured(), 6, **options).epoch(2)
    ranks = [Batches(textured(), 6, **options, rank=r, world=world).epoch(2) for r in range(world)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for position in (0, 1):
            assert torch.equal(torch.cat([part[position] for part in parts]), whole[position])
        assert len({len(y) for _, y in parts}) == 1


def test_augmentation_differs_between_batches_and_epochs():
    same_image = textured(1).subset(torch.zeros(64, dtype=torch.int64))
    batches = Batches(same_image, 32, seed=0, augment=CropFlip(2))
    a, b = (x for x, _ in batches.epoch(0))
    c, _ = (x for x, _ in batches.epoch(1))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size 0 must be a positive multiple of the 1"),
        ({"batch_size": 5, "world": 2}, "batch_size 5 must be a positive multiple of the 2"),
        ({"batch_size": 4, "rank": 2, "world": 2}, r"rank 2 must lie in 0..1"),
        ({"batch_size": 20}, "10 images give no batch of 20"),
    ],
)
def test_what_cannot_be_cut_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Batches(numbered(10), **{"seed": 0, **arguments})


def test_seeds_and_starts_out_of_range_are_refused():
    batches = Batches(numbered(10), 4, seed=-1)
    with pytest.raises(ValueError, match="seed = -1 must be at least 0"):
        batches.epoch(0)
    with pytest.raises(ValueError, match=r"batch 3 must lie in 0..2"):
        batches.epoch(0, 3)


@pytest.fixture
def image_files(tmp_path):
    torch.manual_seed(0)
    paths = []
    for n in range(11):
        pixels = (torch.rand(8, 8, 3) * 255).to(torch.uint8)
        paths.append(tmp_path / f"{n}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return ImageFiles(paths, 8)


def test_image_files_give_the_batches_of_the_decoded_tensor(image_files):
    labels = torch.arange(len(image_files))
    lazy, resident = Split(image_files, labels), Split(image_files.decoded(), labels)
    options = {"seed": 1, "augment": CropFlip(1)}
    for start in (0, 1):
        epochs = [Batches(split, 4, **options).epoch(3, start) for split in (lazy, resident)]
        assert same(*epochs)


def test_an_epoch_of_image_files_may_be_left_early(image_files):
    split = Split(image_files, torch.arange(len(image_files)))
    epoch = Batches(split, 2, seed=0).epoch(0)
    next(epoch)
    epoch.close()
    assert next(epoch, None) is None


def test_to_float_maps_bytes_onto_the_unit_interval_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(levels), torch.arange(256) / 255)
    x = torch.rand(3)
    assert torch.equal(to_float(x), x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_sees_the_batches_of_the_cpu():
    options = {"seed": 1, "augment": CropFlip(2)}
    here, there = (
        Batches(textured(), 5, **options, device=device).epoch(1) for device in ("cpu", "cuda")
    )
    for (x, y), (x_gpu, y_gpu) in zip(here, there, strict=True):
        assert x_gpu.is_cuda
        assert y_gpu.is_cuda
        assert torch.equal(x, x_gpu.cpu())
        assert torch.equal(y, y_gpu.cpu())
