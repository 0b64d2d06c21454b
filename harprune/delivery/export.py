# SPDX-License-Identifier: Apache-2.0
"""A pruned network as a file that runs elsewhere, compared with the network before it counts.

What is written is the function of the network in eval mode: masks multiplied out, batch norm
folded, what cannot matter removed. A file that computes anything else never reaches its place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from harprune.deploy import artifact, interchange
from harprune.deploy.artifact import Values
from harprune.deploy.interchange import Runner
from harprune.deploy.module import Module
from harprune.deploy.network import Network, require_words
from harprune.deploy.runtime import load
from harprune.deploy.shrink import Shrinkage, shrink
from harprune.files import replacing, require_writable
from harprune.models.registry import require_module
from harprune.recipe import networks
from harprune.recipe.materials import load_data
from harprune.recipe.rehearsal import require_batch, require_logits
from harprune.recipe.schema import Recipe
from harprune.sparsity import masks
from harprune.sparsity.audit import Audit, audit
from harprune.sparsity.extraction import extract
from harprune.sparsity.layers import prunable_layers
from harprune.sparsity.tracing import wrapped
from harprune.training.splits import split_validation, to_float

TOLERANCES = {Values.FLOAT32: 1e-4, Values.FLOAT16: 1e-2, Values.INT8: 0.25}
"""Largest difference of a logit, as a share of the largest: float error, or what rounding does."""
_RANDOM, _GIVEN = 17, 47
"""Images that a file is compared on: more than one block of the kernels, and some left over."""
_CALIBRATION = 256
"""Training images that int8 ranges of ONNX are read from."""


class Format(Enum):
    """What a network is written as: this package's file, ONNX, or a program of torch.export."""

    ARTIFACT = "artifact"
    ONNX = "onnx"
    TORCH = "torch"

    @classmethod
    def _missing_(cls, value: object) -> "Format":
        known = ", ".join(format.value for format in cls)
        raise ValueError(f"format = {value!r} is unknown; choose one of {known}")


_SUFFIXES = {".hpn": Format.ARTIFACT, ".onnx": Format.ONNX, ".pt2": Format.TORCH}
"""What the usual names of files promise."""


@dataclass(frozen=True, repr=False)
class Exported:
    """What was written, and how it compares with the network.

    Attributes:
        bytes, dense_bytes: of the file, and of the dense network's tensors in float32.
        audit: kept weights of the network that was given.
        shrinkage: what shrinking took away, or None where it was not possible.
        note: why not.
        difference: largest of a logit, as a share of the largest logit.
        same, images: on how many images the class is the same, and of how many.
    """

    path: Path
    bytes: int
    dense_bytes: int
    audit: Audit
    shrinkage: Shrinkage | None
    note: str
    difference: float
    same: int
    images: int

    def __repr__(self) -> str:
        return f"Exported({self.path}: {self.bytes:,} bytes, {self.audit})"

    @property
    def ratio(self) -> float:
        """How many times smaller than the dense float32 tensors the file is."""
        return self.dense_bytes / self.bytes

    def lines(self) -> list[str]:
        """A few lines for people."""
        shrunk = self.shrinkage
        if shrunk is None:
            about = [self.note]
        elif shrunk.weights_removed or shrunk.channels_removed:
            about = [
                f"removed, for they have no effect: {shrunk.weights_removed:,} of them, and whole "
                f"channels: {shrunk.channels_removed:,}"
            ]
        else:
            about = []
        than = (
            f"{self.ratio:.1f} times smaller than"
            if self.ratio > 1
            else f"{1 / self.ratio:.1f} times as large as"
        )
        return [
            f"{self.path}: {self.bytes:,} bytes, {than} the dense network in float32 "
            f"({self.dense_bytes:,} bytes)",
            str(self.audit),
            *about,
            f"largest difference from the network: {self.difference:.1e} of the largest logit; "
            f"the same class on {self.same} of {self.images} images",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        shrunk = self.shrinkage
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "ratio": self.ratio,
            "kept": self.audit.kept,
            "total": self.audit.total,
            "density": self.audit.density,
            "weights_removed": None if shrunk is None else shrunk.weights_removed,
            "channels_removed": None if shrunk is None else shrunk.channels_removed,
            "note": self.note,
            "difference": self.difference,
            "same": self.same,
            "images": self.images,
        }


def export(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    format: Format | str = Format.ARTIFACT,
    values: Values | str = Values.FLOAT32,
    classes: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write `model` to `path`: the old file or the new one, never half, and only if it is right.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits; masked or baked. It is not changed.
        images: some to compare on, float32 in [0, 1]; random ones are compared too. int8 ONNX
            reads the ranges of activations from them.
        format: one of them, or its name: "artifact", "onnx" or "torch".
        values: how an artifact stores weights, or its name: "float32", "float16" or "int8". ONNX
            takes float32 or int8, then of activations too; torch takes float32.
        classes: what the logits stand for, in their order.
        metadata: whatever should travel with the network, as JSON has it.
            ONNX has both as JSON in its properties "classes" and "harprune", torch in extra files
            of these names.

    Raises:
        ValueError: the format does not take the network or the values, or what the file computes
            is not what the network does.
    """
    path, format, values = Path(path), Format(format), Values(values)
    require_module(model)
    if (inner := wrapped(model)) is not None:
        kind = type(model).__name__
        raise ValueError(f"the model is a {kind}, which no format takes; give model.{inner}")
    images = require_batch(images)
    _require_possible(path, format, values)
    plain = networks.plain_copy(model).eval()
    require_words(classes, metadata or {}, require_logits(plain, images[:1], None))
    x = _to_compare(images)
    with torch.no_grad():
        expected = plain(x).numpy()
    masks.bake(plain)
    counts = audit(prunable_layers(plain))
    network, shrinkage, note = _network(plain, images, format)
    facts = {
        "harprune": version("harprune"),
        "kept": counts.kept,
        "prunable": counts.total,
        "density": counts.density,
        **(metadata or {}),
    }
    with replacing(path) as temporary:
        if format is Format.ARTIFACT and network is not None:
            named = replace(network, classes=tuple(classes), metadata=facts)
            artifact.save(temporary, named, values=values)
            runner = load(temporary)
        else:
            module = plain if network is None else Module(network).eval()
            runner = _write_other(temporary, module, images, format, values, facts, classes)
        difference = _compared(runner, x.numpy(), expected, TOLERANCES[values])
        same = int((runner(x.numpy()).argmax(1) == expected.argmax(1)).sum())
        size = temporary.stat().st_size
    dense = 4 * sum(t.numel() for t in plain.state_dict().values() if t.is_floating_point())
    return Exported(path, size, dense, counts, shrinkage, note, difference, same, len(x))


def _require_possible(path: Path, format: Format, values: Values) -> None:
    require_writable(path)
    named = _SUFFIXES.get(path.suffix.lower(), format)
    if named is not format:
        raise ValueError(
            f"{path} would be of format {format.value}, as its name does not say; take --format "
            f"{named.value}, or another name"
        )
    possible = {
        Format.ARTIFACT: tuple(Values),
        Format.ONNX: (Values.FLOAT32, Values.INT8),
        Format.TORCH: (Values.FLOAT32,),
    }[format]
    if values not in possible:
        raise ValueError(
            f"format {format.value} does not take values in {values.value}; it takes "
            f"{' or '.join(v.value for v in possible)}"
        )
    if format is Format.ONNX:
        interchange.require_onnx()


def _network(
    plain: nn.Module, images: Tensor, format: Format
) -> tuple[Network | None, Shrinkage | None, str]:
    """The shrunk network; other runtimes can do without one, a note then says why."""
    try:
        smaller, shrinkage = shrink(Network(*extract(plain, images[:1])))
    except ValueError as error:
        if format is Format.ARTIFACT:
            raise ValueError(f"{error}; or take --format onnx, whose runtimes know more") from None
        return None, None, f"written as it is, not shrunk: {error}"
    return smaller, shrinkage, ""


def _write_other(
    path: Path,
    module: nn.Module,
    images: Tensor,
    format: Format,
    values: Values,
    facts: Mapping[str, Any],
    classes: Sequence[str],
) -> Runner:
    words = {"harprune": json.dumps(dict(facts)), "classes": json.dumps(list(classes))}
    if format is Format.TORCH:
        interchange.save_program(path, module, images, words)
        return interchange.run_program(path)
    interchange.save_onnx(path, module, images, words)
    if values is Values.INT8:
        interchange.quantise(path, images[:_CALIBRATION].numpy())
    return interchange.run_onnx(path)


def _to_compare(images: Tensor) -> Tensor:
    shape = (_RANDOM, *images.shape[1:])
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([images[:_GIVEN], random])


def _compared(runner: Runner, x: np.ndarray, expected: np.ndarray, tolerance: float) -> float:
    """The largest difference; one image alone must give what it gives among others.

    Raises:
        ValueError: it is larger than `tolerance`, or there are logits that are not finite.
    """
    if not np.isfinite(expected).all():
        raise ValueError(
            "the network's logits are not finite; its weights have diverged, train it again"
        )
    found = np.concatenate([runner(x[:1]), runner(x[1:])])
    if found.shape != expected.shape:
        raise ValueError(
            f"the written network gives {found.shape} where the given one gives {expected.shape}; "
            "nothing was kept: choose another format"
        )
    scale = float(np.abs(expected).max()) or 1.0
    difference = float(np.abs(found - expected).max() / scale)
    if not difference <= tolerance:
        raise ValueError(
            f"the written network differs from the given one by {difference:.1e} of the largest "
            f"logit, more than {tolerance:g}; nothing was kept: choose other values or format"
        )
    return difference


def export_recipe(
    recipe: Recipe,
    path: str | Path,
    *,
    format: Format = Format.ARTIFACT,
    values: Values = Values.FLOAT32,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Export the network of `recipe` with the weights that it names; see `export`.

    It is compared on images of the recipe's training split, and on random ones.

    Raises:
        ValueError: `path` is one of the files read, the weights do not fit the network, the network
            does not fit the images, and whatever `export` refuses.
    """
    path, weights = Path(path), Path(cast(str, recipe.model.weights))
    in_run = (path.parent / "recipe.json").exists() and path.suffix in (".safetensors", ".json")
    if path.resolve() == weights.resolve() or in_run:
        raise ValueError(f"--out {path} would destroy what it is made from; name another file")
    dataset = load_data(recipe.data)
    model = networks.build(recipe.model, dataset, recipe.seed)
    train, _ = split_validation(dataset.train, recipe.data.validation, recipe.seed)
    # From all over the split: the images of a folder stand in the order of their classes.
    some = torch.linspace(0, len(train) - 1, min(_CALIBRATION, len(train))).long()
    images = to_float(train.images[some])
    outputs = require_logits(model, images[:1], dataset.num_classes)
    return export(
        model,
        path,
        images,
        format=format,
        values=values,
        # A network may have more outputs than there are classes: none of them is named then.
        classes=dataset.classes if outputs == dataset.num_classes else (),
        metadata=metadata,
    )
