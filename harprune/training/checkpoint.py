# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: named tensors and plain values in one safetensors file, atomic and checksummed.

Nothing is unpickled. The JSON part and a SHA-256 over it and every tensor stand in the header's
metadata, so a truncated or altered file is refused instead of half believed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from harprune.files import replacing

FORMAT = "harprune-checkpoint-1"


def save(path: str | Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `tensors` and JSON-able `values` to `path`: the old file or the new one, never half."""
    # Own memory for each: safetensors refuses tensors that share storage.
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(values)
    metadata = {"format": FORMAT, "values": text, "sha256": digest(own, text)}
    with replacing(path) as temporary:
        try:
            save_file(own, temporary, metadata=metadata)
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise OSError(str(error)) from None


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back.

    Raises:
        ValueError: no such file, not a checkpoint of this program, truncated or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = digest(mapped, metadata.get("values", ""))
            # What safetensors gives lies in the mapped file, which others may truncate.
            tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint ({error}); restore it or delete it "
            "and run the command again"
        ) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file but not a {FORMAT}; give it as weights")
    if metadata.get("sha256") != found:
        raise ValueError(
            f"{path} is damaged: its checksum does not match; restore it or delete it "
            "and run the command again"
        )
    return tensors, json.loads(metadata["values"])


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` says of itself that it is a checkpoint of this program."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text and over names, types, shapes and bytes of tensors."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` put under `prefix/`."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def pack_optimiser(optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors `index/name`, and its plain values.

    Learning rate and the like are not state: the recipe has them, and a schedule has bent them.
    """
    state = optimiser.state_dict()
    tensors, values = {}, {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            target = tensors if isinstance(value, Tensor) else values
            target[f"{index}/{name}"] = value
    return tensors, {"state": values}


def unpack_optimiser(
    optimiser: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Load into `optimiser` what `pack_optimiser` took from one of the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values["state"]}.items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
