# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is read is what was written, or the file is refused; never half a file."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from harprune.files import to_json, write
from harprune.training import checkpoint


def tensors():
    """One of everything: types, shapes, and two tensors that share their memory."""
    torch.manual_seed(0)
    shared = torch.randn(4, 3)
    return {
        "float": torch.randn(2, 3),
        "double": torch.randn(5, dtype=torch.float64),
        "bfloat": torch.randn(3, 2).bfloat16(),
        "half": torch.randn(3).half(),
        "bool": torch.tensor([True, False, True]),
        "int": torch.tensor([-1, 2**40]),
        "byte": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "whole": shared,
        "rows": shared[1:3],
        "transposed": shared.T,
        "expanded": torch.ones(1).expand(6),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "parameter": nn.Parameter(torch.randn(2)),
    }


VALUES = {"b": [1, None, "ü"], "a": {"z": 0.1, "y": True}, "n": 2**60, "tiny": 5e-324}


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, tensors(), VALUES)
    return path


def test_round_trip_keeps_every_bit_type_and_shape(saved):
    back, values = checkpoint.load(saved)
    assert back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor), name
    assert values == VALUES
    assert list(values) == list(VALUES) and list(values["a"]) == list(VALUES["a"])


def test_what_is_read_does_not_hang_on_the_file(saved):
    back, _ = checkpoint.load(saved)
    back["whole"].zero_()
    saved.write_bytes(b"")
    assert bits(back["rows"]) == bits(tensors()["rows"])


def test_no_tensors_and_no_values(tmp_path):
    checkpoint.save(tmp_path / "none", {}, {})
    assert checkpoint.load(tmp_path / "none") == ({}, {})


def test_every_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "small"
    checkpoint.save(path, {"w": torch.randn(3), "kept": torch.tensor([True])}, {"step": 7})
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="small"):
                checkpoint.load(path)


def test_every_truncation_and_any_appendix_is_refused(tmp_path):
    path = tmp_path / "small"
    checkpoint.save(path, {"w": torch.randn(3)}, {"step": 7})
    content = path.read_bytes()
    for part in [*(content[:size] for size in range(len(content))), content + b"\0"]:
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"damaged.*delete it"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "tensor"), [("v", torch.ones(2)), ("w", torch.zeros(2)), ("w", torch.ones(2, 1))]
)
def test_other_tensors_under_the_old_checksum_are_refused(tmp_path, name, tensor):
    path = tmp_path / "state"
    checkpoint.save(path, {"w": torch.ones(2)}, {})
    with checkpoint.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor}, path, metadata=metadata)
    with pytest.raises(ValueError, match="checksum"):
        checkpoint.load(path)


def test_other_peoples_files_are_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    torch.save({"w": torch.ones(2)}, tmp_path / "pickled")
    (tmp_path / "text").write_text("weights")
    for name, reason in (("plain", "give it as weights"), ("pickled", "damaged or no checkpoint")):
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            checkpoint.load(tmp_path / name)
    with pytest.raises(ValueError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "absent")
    files = ("plain", "pickled", "text", "absent")
    assert not any(checkpoint.is_checkpoint(tmp_path / name) for name in files)


def test_is_checkpoint_of_ones_own(saved):
    assert checkpoint.is_checkpoint(saved)


class Interrupted(BaseException):
    """Stands for whatever may come between two instructions."""


@pytest.mark.parametrize(
    "where", ["training.checkpoint.save_file", "files.os.fsync", "files.os.replace"]
)
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), Interrupted()])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch, where, fault):
    before = saved.read_bytes()

    def fail(*arguments, **options):
        raise fault

    monkeypatch.setattr(f"harprune.{where}", fail)
    with pytest.raises(type(fault)):
        checkpoint.save(saved, {"w": torch.ones(2)}, {})
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_full_disk_is_said_in_one_line(saved, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harprune.files.os.fsync", full)
    with pytest.raises(OSError, match=r"could not be written.*No space.*is intact") as caught:
        write(saved.parent / "a.json", "{}")
    assert "\n" not in str(caught.value)


def test_values_that_are_not_json_are_refused_before_anything_is_written(saved):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save(saved, {}, {"method": object()})
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_text_and_json_make_their_folder_and_can_be_read_by_others(tmp_path):
    path = tmp_path / "new" / "a.json"
    write(path, to_json({"b": 1, "a": [2.5]}))
    assert json.loads(path.read_text()) == {"b": 1, "a": [2.5]}
    assert path.stat().st_mode & 0o777 == 0o644


def test_pack_and_unpack_are_inverse():
    packed = checkpoint.pack("model", {"a/b": torch.ones(1), "c": torch.zeros(1)})
    assert list(packed) == ["model/a/b", "model/c"]
    both = packed | checkpoint.pack("model2", {"c": torch.ones(2)})
    assert list(checkpoint.unpack("model", both)) == ["a/b", "c"]


OPTIMISERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "plain sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
}


def network_and_optimiser(kind):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    # In the other order than the model's, with one parameter that never gets a gradient.
    groups = [{"params": list(model[1].parameters()), "weight_decay": 0.0}]
    groups += [{"params": [*model[0].parameters(), nn.Parameter(torch.ones(2))], "lr": 0.02}]
    return model, OPTIMISERS[kind](groups)


def step(model, optimiser, number):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
    model(x).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_an_optimiser_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    model, optimiser = network_and_optimiser(kind)
    for number in range(3):
        step(model, optimiser, number)
    packed, plain = checkpoint.pack_optimiser(optimiser)
    path = tmp_path / "state"
    checkpoint.save(
        path, checkpoint.pack("o", packed) | checkpoint.pack("m", model.state_dict()), plain
    )

    other, resumed = network_and_optimiser(kind)
    stored, values = checkpoint.load(path)
    other.load_state_dict(checkpoint.unpack("m", stored))
    checkpoint.unpack_optimiser(resumed, checkpoint.unpack("o", stored), values)
    for number in range(3, 6):
        step(model, optimiser, number)
        step(other, resumed, number)
    for a, b in zip(model.parameters(), other.parameters()):
        assert bits(a) == bits(b)


def test_the_learning_rate_is_not_part_of_an_optimisers_state():
    model, optimiser = network_and_optimiser("sgd")
    step(model, optimiser, 0)
    for group in optimiser.param_groups:
        group["lr"] *= 0.001  # a schedule near its end
    packed = checkpoint.pack_optimiser(optimiser)
    _, resumed = network_and_optimiser("sgd")
    checkpoint.unpack_optimiser(resumed, *packed)
    assert [group["lr"] for group in resumed.param_groups] == [0.1, 0.02]
