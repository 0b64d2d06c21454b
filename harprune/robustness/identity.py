# SPDX-License-Identifier: Apache-2.0
"""What an evaluation's outcomes depend on, as digests: it goes on only where none differs."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from harprune.robustness import sanity
from harprune.robustness.attacks import Attack
from harprune.robustness.images import ChosenImages
from harprune.robustness.threat import Threat

_ATTACKED, _IMAGES, _THREAT = "attacked function", "images", "threat"


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def identity_of(
    model: nn.Module,
    twin: nn.Module | None,
    data: ChosenImages,
    seed: int,
    attacks: Mapping[str, Attack],
    threat: Threat | None,
) -> dict[str, str]:
    """Model, attacked function, images, their choice and labels, seed, batches, attacks, threat."""
    chosen, images = hashlib.sha256(), hashlib.sha256()
    for tensor in (data.index, data.labels, data.head(sanity.SAMPLE)[0]):
        chosen.update(_bytes(tensor))
    for batch in range(len(data)):
        images.update(_bytes(data.batch(batch)[0]))
    return {
        "model": model_digest(model),
        _ATTACKED: "the model" if twin is None else "its twin",
        "data": chosen.hexdigest(),
        _IMAGES: images.hexdigest(),
        "seed": str(seed),
        "batch_size": str(data.batch_size),
        "attacks": "; ".join(f"{name} = {text_of(attack)}" for name, attack in attacks.items()),
        _THREAT: repr(threat),
    }


def text_of(attack: Attack) -> str:
    """An attack's repr without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(attack))


def require_same(folder: Path, held: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises ValueError where `folder` holds an evaluation of something else than is wanted."""
    for key, value in wanted.items():
        # Earlier versions wrote none of these.
        missing = value if key in (_ATTACKED, _IMAGES, _THREAT) else None
        if held.get(key, missing) != value:
            raise ValueError(
                f"{folder} holds an evaluation whose {key} differs ({_short(held.get(key))} there, "
                f"{_short(value)} here); choose another folder or delete this one"
            )


def _short(value: str | None) -> str:
    return f"{value[:12]}..." if value and re.fullmatch("[0-9a-f]{64}", value) else str(value)
