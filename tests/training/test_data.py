# SPDX-License-Identifier: Apache-2.0
"""Data sets in their official layouts, written here small or sparse; and what is refused."""

import gzip
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from harprune.training import data, folders
from harprune.training.data import data_folder, list_datasets, load_dataset
from harprune.training.folders import ImageFiles
from harprune.training.splits import Dataset, Split, as_split, from_arrays, split_validation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ------------------------------------------------------------------------- arrays and splits


def test_bytes_and_floats_are_taken_as_they_are(rng):
    pixels = rng.integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    split = from_arrays(pixels, [0, 1, 2, 0, 1, 2])
    assert split.images.dtype == torch.uint8
    assert np.array_equal(split.images, pixels)
    assert (len(split), split.shape) == (6, (3, 4, 5))
    floats = from_arrays(pixels / 255, np.arange(6, dtype=np.int16))
    assert floats.images.dtype == torch.float32
    assert floats.labels.dtype == torch.int64
    assert from_arrays(torch.zeros(2, 8, 8), torch.zeros(2, dtype=torch.int32)).shape == (1, 8, 8)


def test_arrays_are_copied_so_that_read_only_and_reversed_ones_serve(rng):
    pixels = rng.random((4, 1, 2, 2))
    pixels.setflags(write=False)
    assert np.allclose(from_arrays(pixels[::-1], np.zeros(4, int)).images, pixels[::-1])


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.full((2, 1, 2, 2), 1.5), [0, 1], r"images run from 1.5 to 1.5; floats must lie in"),
        (np.full((2, 1, 2, 2), -0.25), [0, 1], "images run from -0.25 to -0.25"),
        (np.full((2, 1, 2, 2), np.nan), [0, 1], "images run from nan to nan"),
        (np.zeros((2, 1, 2, 2), int), [0, 1], "images are torch.int64; they must be uint8"),
        (
            np.zeros((2, 32, 32, 3)),
            [0, 1],
            r"channels last, as it seems; give images.transpose\(0, 3, 1, 2\)",
        ),
        (np.zeros((2, 4)), [0, 1], r"images have shape \(2, 4\)"),
        (np.zeros((2, 1, 2, 2)), [0.0, 1.0], "labels are torch.float64"),
        (np.zeros((2, 1, 2, 2)), [[0], [1]], r"labels are torch.int64 of shape \(2, 1\)"),
        (np.zeros((2, 1, 2, 2)), [0, 1, 2], r"expected int64 \(2,\)"),
        (np.zeros((2, 1, 2, 2)), [-1, 1], "labels run from -1 to 1"),
        (np.zeros((2, 1, 2, 2)), [0, 3], r"labels run from 0 to 3; they must lie in 0..2"),
        (np.zeros((0, 1, 2, 2)), np.zeros(0, int), "there are no images"),
        (np.zeros((2, 1, 2, 2)), ["cat", "dog"], "of type <U3 are no numbers; labels are integers"),
    ],
)
def test_arrays_that_do_not_fit_are_named(images, labels, said):
    with pytest.raises(ValueError, match=said):
        from_arrays(images, labels, num_classes=3)


def test_narrow_maps_are_not_taken_for_channels_last():
    assert from_arrays(torch.rand(4, 20, 1, 1), [0, 1, 2, 0]).shape == (20, 1, 1)


class Photographs(torch.utils.data.Dataset):
    """Two images, `change`d each time that they are read."""

    def __init__(self, change=lambda image: image, label=0):
        self.change, self.label = change, label

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return self.change(torch.full((3, 4, 4), number / 2)), self.label


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 4, 4), 0


def test_a_torch_dataset_is_read_into_memory():
    x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    read = as_split(torch.utils.data.TensorDataset(x, y))
    assert torch.equal(read.images, x) and torch.equal(read.labels, y)
    read = as_split(Photographs(lambda image: (255 * image.numpy()).astype(np.uint8)))
    assert read.images.dtype == torch.uint8 and read.images.amax() == 127
    assert as_split(read) is read
    assert torch.equal(as_split((x, y)).images, x)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (Photographs(torch.rand_like), "image 0 is another when it is read again; leave random"),
        (Photographs(lambda image: image[:, : int(4 * image[0, 0, 0]) + 1]), "bring them to one"),
        (Photographs(lambda image: 4 * image), r"images run from 0 to 2; floats must lie"),
        (Photographs(lambda image: "a path"), "image 0 is a str; make it a tensor"),
        (Photographs(label=0.5), r"labels are torch\.float64 of shape \(2,\); they must be"),
        (torch.utils.data.TensorDataset(torch.zeros(2, 1, 2, 2)), "item 0 is no pair"),
        (torch.utils.data.TensorDataset(torch.zeros(0, 1, 2, 2)), "holds no images"),
        (Stream(), "Stream has no length"),
        (torch.utils.data.DataLoader(Photographs()), "are a DataLoader; give a pair"),
    ],
)
def test_what_is_no_set_of_images_is_named(items, said):
    with pytest.raises(ValueError, match=said):
        as_split(items)


def test_a_split_and_a_dataset_refuse_to_be_wrong():
    split = from_arrays(np.zeros((2, 1, 2, 2)), [0, 1])
    other = from_arrays(np.zeros((2, 1, 3, 3)), [0, 1])
    with pytest.raises(ValueError, match=r"images are torch\.float64"):
        Split(torch.zeros(2, 1, 2, 2).double(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"training images are \(1, 2, 2\), test images"):
        Dataset("mine", split, other, ("a", "b"))
    beyond = from_arrays(np.zeros((2, 1, 2, 2)), [0, 2])
    with pytest.raises(ValueError, match=r"mine test: labels run from 0 to 2; .* 0\.\.1"):
        Dataset("mine", split, beyond, ("a", "b"))


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80),
    part=st.floats(0.02, 0.98),
    seed=st.integers(0, 2**30),
)
def test_validation_is_disjoint_complete_stratified_and_repeatable(labels, part, seed):
    count = min(max(1, round(part * len(labels))), len(labels) - 1)
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    split = from_arrays(images, labels)
    train, validation = split_validation(split, count, seed)
    ids = [part.images.flatten().tolist() for part in (train, validation)]
    assert len(ids[1]) == count
    assert sorted(ids[0] + ids[1]) == list(range(len(labels)))
    assert validation.labels.tolist() == [labels[i] for i in ids[1]]
    for label in set(labels):
        share = labels.count(label) * count / len(labels)
        assert abs(validation.labels.tolist().count(label) - share) < 1
    assert split_validation(split, count, seed)[1].images.flatten().tolist() == ids[1]


def test_validation_by_fraction_and_its_limits():
    split = from_arrays(np.zeros((100, 1, 1, 1)), np.arange(100) % 10)
    train, validation = split_validation(split, 0.1, 0)
    assert (len(train), len(validation)) == (90, 10)
    assert validation.labels.bincount().tolist() == [1] * 10
    assert split_validation(split, 50, 0)[1].labels.tolist() != list(np.arange(50) % 10)
    for size in (0, 100, 1.0, 0.001, -1):
        with pytest.raises(ValueError, match=f"validation size {size} of 100 images"):
            split_validation(split, size, 0)


# ----------------------------------------------------------------------------------- digits


def test_digits_are_scaled_to_bytes_and_split_in_a_fixed_way():
    from sklearn.datasets import load_digits

    first, second = load_dataset("digits"), load_dataset("digits")
    assert (len(first.train), len(first.test), first.shape) == (1437, 360, (1, 8, 8))
    assert torch.equal(first.test.images, second.test.images)
    counts = first.test.labels.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 37
    both = torch.cat([first.train.images, first.test.images])[:, 0].numpy()
    levels = {round(v * 255 / 16) for v in range(17)}
    assert set(np.unique(both).tolist()) == levels
    theirs = np.sort(load_digits().images.reshape(1797, -1) @ np.arange(1, 65))
    ours = np.sort(np.rint(both / 255 * 16).reshape(1797, -1) @ np.arange(1, 65))
    assert np.allclose(ours, theirs)


# ------------------------------------------------------------------------------------ CIFAR


def sparse(path: Path, size: int, start: bytes) -> None:
    """A file of `size` bytes that begins with `start` and is zero from there on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start)
    os.truncate(path, size)


def cifar_records(rng, labels):
    pixels = rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    records = [bytes(label) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]
    return pixels, b"".join(records)


def write_cifar10(folder, rng):
    """The official sizes; two images in each file, the rest black airplanes."""
    pixels = {}
    for n, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        pixels[name], start = cifar_records(rng, [(n,), (9 - n,)])
        sparse(folder / f"{name}.bin", 30_730_000, start)
    return pixels


def test_cifar10_binary(tmp_path, rng):
    pixels = write_cifar10(tmp_path / "cifar-10-batches-bin", rng)
    dataset = load_dataset("CIFAR10", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    for n in range(5):
        rows = slice(10_000 * n, 10_000 * n + 2)
        assert np.array_equal(dataset.train.images[rows], pixels[f"data_batch_{n + 1}"])
        assert dataset.train.labels[rows].tolist() == [n, 9 - n]
    assert np.array_equal(dataset.test.images[:2], pixels["test_batch"])
    assert dataset.test.labels[:2].tolist() == [5, 4]
    assert (dataset.num_classes, dataset.classes[9]) == (10, "truck")
    inside = load_dataset("cifar10", tmp_path / "cifar-10-batches-bin")
    assert torch.equal(inside.test.images[:5], dataset.test.images[:5])


def test_cifar100_binary_takes_the_fine_label(tmp_path, rng):
    pixels, start = cifar_records(rng, [(19, 11), (0, 99)])
    sparse(tmp_path / "cifar-100-binary" / "train.bin", 50_000 * 3074, start)
    sparse(tmp_path / "cifar-100-binary" / "test.bin", 10_000 * 3074, start)
    dataset = load_dataset("cifar100", tmp_path)
    assert dataset.test.labels[:3].tolist() == [11, 99, 0]
    assert np.array_equal(dataset.train.images[:2], pixels)
    assert (len(dataset.train), dataset.num_classes) == (50_000, 100)
    assert (dataset.classes[11], dataset.classes[99]) == ("boy", "worm")
    assert list(dataset.classes) == sorted(set(dataset.classes))


def test_a_truncated_cifar_file_is_named_with_both_sizes(tmp_path, rng):
    write_cifar10(tmp_path, rng)
    os.truncate(tmp_path / "data_batch_3.bin", 30_729_999)
    said = r"data_batch_3.bin holds 30729999 bytes, expected 30730000; delete it"
    with pytest.raises(ValueError, match=said):
        load_dataset("cifar10", tmp_path)


def test_a_garbled_cifar_label_is_named(tmp_path, rng):
    write_cifar10(tmp_path, rng)
    with (tmp_path / "test_batch.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"cifar10 test: labels run from 0 to 255; .* 0..9"):
        load_dataset("cifar10", tmp_path)


def test_garbled_matlab_files_are_named(tmp_path):
    (tmp_path / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b"\x01" * 300)
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8)})
    with pytest.raises(ValueError, match=r"train_32x32.mat .* is not a readable Matlab file"):
        load_dataset("svhn", tmp_path)
    (tmp_path / "train_32x32.mat").write_bytes((tmp_path / "test_32x32.mat").read_bytes())
    with pytest.raises(ValueError, match=r"train_32x32.mat holds no array called y"):
        load_dataset("svhn", tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")]
)
def test_the_pickled_version_is_refused_with_advice(name, folder, tmp_path):
    (tmp_path / folder).mkdir()
    for place in (tmp_path, tmp_path / folder):
        with pytest.raises(ValueError, match=f"never unpickled; .*`harprune data {name}`"):
            load_dataset(name, place)


# --------------------------------------------------------------------------- SVHN and MNIST


def test_svhn_maps_ten_to_zero_and_moves_the_channels(tmp_path, rng):
    (tmp_path / "svhn").mkdir()
    pixels = rng.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    labels = np.array([[1], [10], [9], [10]], np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / "svhn" / f"{part}_32x32.mat", {"X": pixels, "y": labels})
    dataset = load_dataset("svhn", tmp_path)
    assert dataset.train.labels.tolist() == [1, 0, 9, 0]
    assert np.array_equal(dataset.test.images[2, 1], pixels[:, :, 1, 2])


def write_idx(folder, suffix, rng, count=5):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for part, extra in (("train", 2), ("t10k", 0)):
        n = count + extra
        pixels[part] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        contents = {
            "images-idx3": struct.pack(">IIII", 2051, n, 28, 28) + pixels[part].tobytes(),
            "labels-idx1": struct.pack(">II", 2049, n) + bytes(k % 10 for k in range(n)),
        }
        for what, content in contents.items():
            content = gzip.compress(content) if suffix else content
            (folder / f"{part}-{what}-ubyte{suffix}").write_bytes(content)
    return pixels


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("mnist", ""), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_idx_files_raw_and_gzipped(name, folder, suffix, tmp_path, rng):
    pixels = write_idx(tmp_path / folder, suffix, rng)
    dataset = load_dataset(name, tmp_path)
    assert np.array_equal(dataset.train.images[:, 0], pixels["train"])
    assert np.array_equal(dataset.test.images[:, 0], pixels["t10k"])
    assert dataset.test.labels.tolist() == [0, 1, 2, 3, 4]
    assert dataset.name == name.replace("-", "_")


def test_mnist_and_fashion_mnist_side_by_side_are_not_confused(tmp_path, rng):
    digits = write_idx(tmp_path / "MNIST" / "raw", "", rng)
    clothes = write_idx(tmp_path / "FashionMNIST" / "raw", ".gz", rng)
    loaded = {name: load_dataset(name, tmp_path) for name in ("mnist", "fashion_mnist")}
    assert np.array_equal(loaded["mnist"].test.images[:, 0], digits["t10k"])
    assert np.array_equal(loaded["fashion_mnist"].test.images[:, 0], clothes["t10k"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda b: b[:-1], r"holds 3935 bytes, expected 3936 for shape \(5, 28, 28\)"),
        (lambda b: b"<htm" + b[4:], "does not start like an idx file of 3 dimensions"),
        (lambda b: b[:9], "does not start like an idx file"),
        (lambda b: b"", "does not start like an idx file"),
        (lambda b: b[:7] + b"\x04" + b[8:-784], r"t10k-images.* 4 images but .* 5 labels"),
    ],
)
def test_damaged_idx_files_are_named(damage, said, tmp_path, rng):
    write_idx(tmp_path, "", rng)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=said) as caught:
        load_dataset("mnist", tmp_path)
    assert "t10k-images-idx3-ubyte" in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"PK" + b[2:]])
def test_damaged_gzip_files_are_named(damage, tmp_path, rng):
    write_idx(tmp_path, ".gz", rng)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz .* not a complete gzip file"):
        load_dataset("mnist", tmp_path)


# ---------------------------------------------------------------------------------- folders


def write_images(folder, names, rng, size=(12, 10), mode="RGB", suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{name}{suffix}")


@pytest.fixture
def photographs(tmp_path, rng):
    for part in ("train", "test"):
        write_images(tmp_path / part / "cat", "abc", rng)
        write_images(tmp_path / part / "dog" / "deeper", "ab", rng, mode="L", suffix=".JPEG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    write_images(tmp_path / "train" / "cat" / ".thumbnails", "a", rng)
    return tmp_path


def test_a_folder_is_decoded_centre_cropped_and_labelled(photographs):
    dataset = load_dataset("folder", photographs)
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    # 12 x 10 pixels keep their short side: columns 1 to 10 are the centre.
    path = photographs / "test" / "cat" / "b.png"
    expected = np.asarray(Image.open(path))[:, 1:11].transpose(2, 0, 1)
    assert np.array_equal(dataset.test.images[1], expected)
    grey = dataset.train.images[3]
    assert torch.equal(grey[0], grey[1])


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(photographs):
    ramp = np.linspace(0, 65535, 100).reshape(10, 10)
    path = photographs / "train" / "cat" / "a.png"
    Image.fromarray(ramp.astype(np.uint16)).save(path)
    decoded = load_dataset("folder", photographs).train.images[0]
    assert np.abs(decoded[0].numpy() - ramp / 257).max() <= 1
    path.unlink()
    Image.fromarray((ramp / 65535).astype(np.float32)).save(path.with_suffix(".tiff"))
    with pytest.raises(ValueError, match="pixels of mode F have no known range"):
        load_dataset("folder", photographs)


def test_a_folder_is_scaled_to_the_size_asked_for(photographs):
    dataset = load_dataset("folder", photographs, image_size=5)
    assert dataset.shape == (3, 5, 5)
    image = Image.open(photographs / "train" / "cat" / "a.png").resize((6, 5), Image.BILINEAR)
    assert np.array_equal(dataset.train.images[0], np.asarray(image)[:, :5].transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"image_size = 0 must lie in 1\.\.1024"):
        load_dataset("folder", photographs, image_size=0)


def test_large_folders_stay_on_disk_and_give_the_same_images(photographs, monkeypatch):
    resident = load_dataset("folder", photographs)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 10 * 3 * 10 * 10 - 1)
    lazy = load_dataset("folder", photographs)
    assert isinstance(lazy.train.images, ImageFiles)
    assert isinstance(resident.train.images, torch.Tensor)
    index = torch.tensor([4, 0, 4])
    assert torch.equal(lazy.train.images[index], resident.train.images[index])
    train, validation = split_validation(lazy.train, 2, 0)
    assert (len(train), len(validation)) == (3, 2)
    expected = split_validation(resident.train, 2, 0)[1]
    assert torch.equal(validation.images.decoded(), expected.images)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 10 * 3 * 10 * 10)
    assert isinstance(load_dataset("folder", photographs).train.images, torch.Tensor)


def test_val_stands_in_for_test(photographs):
    expected = load_dataset("folder", photographs).test.images
    (photographs / "test").rename(photographs / "val")
    assert torch.equal(load_dataset("folder", photographs).test.images, expected)


def test_a_broken_image_is_named(photographs):
    path = photographs / "train" / "cat" / "b.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cat/b.png \(60 bytes\) cannot be decoded"):
        load_dataset("folder", photographs)


def test_folders_that_do_not_match_are_named(photographs, rng):
    write_images(photographs / "test" / "bird", "a", rng)
    with pytest.raises(ValueError, match="holds classes that were not trained on: bird; remove th"):
        load_dataset("folder", photographs)
    for path in (photographs / "train" / "cat").glob("?.*"):
        path.unlink()
    with pytest.raises(ValueError, match="train holds no images of: cat; every class needs some"):
        load_dataset("folder", photographs)
    wanted = r"\(expected train/<class>/ and test/<class>/ or val/<class>/\); name the folder that"
    with pytest.raises(ValueError, match=wanted):
        load_dataset("folder", photographs / "train")
    shutil.rmtree(photographs / "train" / "dog")
    with pytest.raises(ValueError, match="train holds 1 class folders; it must hold at least 2, e"):
        load_dataset("folder", photographs)


def test_images_are_scaled_to_a_size_that_memory_holds(photographs, monkeypatch):
    with pytest.raises(ValueError, match=r"image_size = 9999 must lie in 1\.\.1024; give a s"):
        load_dataset("folder", photographs, image_size=9999)
    monkeypatch.setattr(folders, "LARGEST", 8)  # less than the short side of the first
    with pytest.raises(ValueError, match=r"image_size = \d+ must lie in 1\.\.8; give a size to wh"):
        load_dataset("folder", photographs)


def test_a_first_image_without_a_size_is_named(photographs):
    (photographs / "train" / "cat" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"is not a readable image .*; remove or replace it"):
        load_dataset("folder", photographs)


def test_tiny_imagenet_as_published(tmp_path, rng):
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        write_images(root / "train" / wnid / "images", [f"{wnid}_0"], rng, (64, 64), suffix=".JPEG")
    write_images(root / "val" / "images", ["val_0", "val_1"], rng, (64, 64), suffix=".JPEG")
    write_images(root / "test" / "images", ["test_0"], rng, (64, 64), suffix=".JPEG")
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("val_1.JPEG\tn01\t0\t0\t62\t57\nval_0.JPEG\tn02\t0\t0\t1\t1\n")
    dataset = load_dataset("tiny-imagenet", tmp_path)
    assert dataset.shape == (3, 64, 64)
    assert dataset.classes == ("n01", "n02")
    assert dataset.test.labels.tolist() == [0, 1]
    first = np.asarray(Image.open(root / "val" / "images" / "val_1.JPEG")).transpose(2, 0, 1)
    assert np.array_equal(dataset.test.images[0], first)
    annotations.write_text("val_7.JPEG\tn01\t0\t0\t62\t57\n")
    with pytest.raises(ValueError, match=r"lacks 1 of the 1 annotated images \(val_7\.JPEG\); get"):
        load_dataset("tiny_imagenet", tmp_path)
    annotations.write_text("val_1.JPEG\tn09\t0\t0\t62\t57\n")
    with pytest.raises(ValueError, match="names class 'n09', which has no training folder; g"):
        load_dataset("tiny_imagenet", tmp_path)


# -------------------------------------------------------------------- names, places, errors


@pytest.mark.parametrize("name", [n for n in list_datasets() if n not in ("digits", "folder")])
def test_missing_data_names_folder_files_and_command(name, tmp_path):
    with pytest.raises(ValueError, match=f"`harprune data {name}`") as caught:
        load_dataset(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_incomplete_data_names_what_is_not_there(tmp_path, rng):
    write_idx(tmp_path / "MNIST" / "raw", "", rng)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="incomplete: t10k-labels-idx1-ubyte not there"):
        load_dataset("mnist", tmp_path)


def test_unknown_names_and_sizes_that_do_not_apply():
    with pytest.raises(ValueError, match="unknown data set 'cifar11'; there are cifar10, cifar100"):
        load_dataset("cifar11")
    with pytest.raises(ValueError, match="image_size = 16 applies to image folders; digits is"):
        load_dataset("digits", image_size=16)
    assert load_dataset("digits", image_size=8).shape == (1, 8, 8)


def test_the_environment_names_the_folder(tmp_path, monkeypatch, rng):
    write_idx(tmp_path / "MNIST" / "raw", "", rng)
    monkeypatch.setenv("HARPRUNE_DATA", str(tmp_path))
    assert len(load_dataset("mnist").test) == 5
    monkeypatch.delenv("HARPRUNE_DATA")
    assert data_folder().name == "harprune"


MODULE = """
import torch
from harprune.training.splits import Dataset, from_arrays

def stripes(folder=None, image_size=4):
    split = from_arrays(torch.zeros(2, 1, image_size, image_size), [0, 1])
    return Dataset(f"stripes of {folder}", split, split, ("a", "b"))

def pairs():
    images = torch.zeros(4, 1, 2, 2)
    test = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 2, 1]))
    return (images.numpy(), [0, 1, 0, 1]), test

def wrong():
    return 3

def half():
    return pairs()[0]
"""


def test_functions_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_images.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    dataset = load_dataset("my_images:stripes", "there", image_size=6)
    assert (dataset.name, dataset.shape) == ("stripes of there", (1, 6, 6))
    dataset = load_dataset("my_images:pairs")
    assert (dataset.name, dataset.classes) == ("my_images:pairs", ("0", "1", "2"))
    assert len(dataset.train) == len(dataset.test) == 4
    for name, said in (
        ("my_images:wrong", r"returned int; it must return \(train, test\)"),
        (
            "my_images:half",
            r"half must return \(train, test\), but of train images are a ndarray; give a pair",
        ),
        ("my_images:absent", "defines no function 'absent'"),
        ("my_images_absent:f", "cannot import 'my_images_absent'"),
        ("my_images:", "is not of the form module:function"),
    ):
        with pytest.raises(ValueError, match=said):
            load_dataset(name)
    sys.modules.pop("my_images")
    assert sys.path == path


# -------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def real():
    if not os.environ.get("HARPRUNE_TEST_DATA"):
        pytest.skip("HARPRUNE_TEST_DATA not set")
    return Path(os.environ["HARPRUNE_TEST_DATA"])


def test_the_real_cifar10_and_mnist(real):
    cifar, mnist = load_dataset("cifar10", real), load_dataset("mnist", real)
    assert cifar.train.labels.bincount().tolist() == [5000] * 10
    assert cifar.test.labels.bincount().tolist() == [1000] * 10
    # The channel means and deviations that the field uses for CIFAR-10 and MNIST.
    pixels = cifar.train.images[::10].double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-3)
    digits = mnist.train.images.double() / 255
    assert float(digits.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(digits.std()) == pytest.approx(0.3081, abs=1e-4)
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
