# SPDX-License-Identifier: Apache-2.0
"""Weights that others trained, read from their checkpoints; nothing is ever unpickled."""

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from harprune.models import scored
from harprune.models.normalised import Normalised
from harprune.models.registry import require_module
from harprune.user_code import first_line

# Where training programs put the state dict among other things.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
# Left in names by DistributedDataParallel and torch.compile.
WRAPPER_SEGMENTS = ("module", "_orig_mod")
# Names that torchvision and TRADES use, and what this package calls the same thing.
SYNONYMS = (
    ("downsample.", "shortcut."),
    ("convShortcut.", "shortcut."),
    (".layer.", "."),
    ("fc.", "linear."),
)
# TRADES' WRN-34-10 registers its first stage a second time and never uses it.
UNUSED = ("sub_block1.",)
OF_A_RUN = "model/"
# What the constants of an input normalisation are called, and what `Normalised` calls them.
NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
COUNTER = "num_batches_tracked"
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
SHOWN = 4


@dataclass(frozen=True)
class WeightsReport:
    """What a checkpoint and a model had in common, in the model's names.

    `mismatched` holds (name, shape in the file, shape in the model).
    """

    path: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Every tensor of the model came from the file, and the file held nothing else."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{name} {list(file)} vs {list(model)}" for name, file, model in self.mismatched]
        parts = [
            f"{len(names)} {kind} ({_some(names)})"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape", shapes),
            )
            if names
        ]
        return ", ".join([f"{self.path}: {len(self.loaded)} tensors fit", *parts])


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    density: float | None = None,
) -> WeightsReport:
    """Copy a checkpoint's weights into `model`, in place.

    Reads .safetensors files, those of a run among them, and PyTorch files that hold tensors only.
    The state dict may lie in a list or under a usual key; `module.` and `_orig_mod.`, a common
    prefix, and the names that torchvision and TRADES use for the same layers are understood. A
    `Normalised` model takes the weights of its network; where the file holds the constants of a
    normalisation as well, they must be the model's. Nothing is changed if an error is raised.

    Args:
        strict: refuse a checkpoint that does not match the model exactly; otherwise load what fits.
        density: in (0, 1], what a checkpoint that holds HYDRA's or HARP's scores was pruned for:
            its masks are then multiplied into the weights. For no other checkpoint.

    Raises:
        ValueError: a file that is truncated, needs unpickling or holds no state dict; values that
            are not finite; names or shapes that do not match; scores without a density, or a
            density without scores.
    """
    require_module(model)
    target = model.network if isinstance(model, Normalised) else model
    tensors = _unscored(path, read_checkpoint(path), density)
    wanted = target.state_dict()
    named = _in_names_of(wanted, tensors)
    constants = _constants({n: t for n, t in named.items() if n not in wanted})
    if isinstance(model, Normalised) and _are_of(model, constants):
        named = {name: tensor for name, tensor in named.items() if name not in constants}
    report = _compare(str(path), named, wanted)
    if strict and not report.complete:
        raise ValueError(_refusal(report, constants, _head(target)))
    if not report.loaded:
        raise ValueError(f"{report}: this checkpoint is of another network")
    fitting = {name: _as(wanted[name], named[name], f"{path}: {name}") for name in report.loaded}
    _check_finite(path, fitting)
    with torch.no_grad():
        for name, tensor in fitting.items():
            wanted[name].copy_(tensor)
    return report


def _constants(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are called as the constants of a normalisation are, and hold numbers as they."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if _kind(name) in NORMALISATION and tensor.is_floating_point() and _is_plain(tensor)
    }


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)


def _are_of(model: Normalised, constants: Mapping[str, Tensor]) -> bool:
    """Whether the constants of a checkpoint's normalisation are those of the model."""
    for name, given in constants.items():
        own = getattr(model, NORMALISATION[_kind(name)]).flatten()
        # Somebody may have typed them from a paper, to some digits.
        if given.numel() != own.numel() or not torch.allclose(given.flatten().to(own), own, 1e-5):
            return False
    return True


def _as(wanted: Tensor, given: Tensor, what: str) -> Tensor:
    """`given` in the type of `wanted`; ValueError where that is another kind of number."""
    plain = _is_plain(given)
    same_kind = given.is_floating_point() == wanted.is_floating_point()
    if not plain or not same_kind or given.is_complex():
        kind = str(given.dtype if plain else given.layout).removeprefix("torch.")
        raise ValueError(
            f"{what} is a {kind} tensor, where the model has {wanted.dtype}; save "
            "model.state_dict() of the plain network"
        )
    return given.to(wanted.dtype)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, names as they are there, on the CPU.

    Raises:
        ValueError: a file that is absent, truncated, needs unpickling or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = _unwrapped(content)
    if state is None:
        keys = _some(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path}: holds no state dict (found: {keys}); save model.state_dict() alone"
        )
    return state


def _unscored(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], density: float | None
) -> dict[str, Tensor]:
    if scored.has_scores(tensors) == (density is not None):
        return tensors if density is None else scored.masked(path, tensors, density)
    if density is None:
        raise ValueError(
            f"{path}: holds scores beside weights, as HYDRA and HARP save them; say for which "
            "density (model.weights_density), 1.0 for a network that is not pruned"
        )
    raise ValueError(
        f"{path}: holds no scores that density {density} could apply to; leave it out "
        "(model.weights_density)"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: not a complete safetensors file of {size} bytes ({first_line(error)}); get "
            "it again"
        ) from error
    # A run keeps masks and more beside its network.
    network = {n.removeprefix(OF_A_RUN): t for n, t in tensors.items() if n.startswith(OF_A_RUN)}
    return network or tensors


def _require_sound(path: Path) -> None:
    """Raises ValueError where a PyTorch archive fails its own checksums, which torch skips."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            # Torch reads nothing out of an entry that calls itself a directory (DOS flag 16).
            hollow = (i.filename for i in archive.infolist() if i.external_attr & 16)
            name = archive.testzip() or next(hollow, None)
    except Exception as error:  # a damaged archive makes zipfile raise almost anything
        raise ValueError(f"{path} is damaged ({first_line(error)}); get it again") from None
    if name is not None:
        raise ValueError(f"{path} is damaged ({name} fails its checksum); get it again")


def _read_torch(path: Path) -> object:
    start = _first_bytes(path)
    if not (start == ZIP_START or start[:1] == PICKLE_START):
        raise ValueError(
            f"{path}: not a PyTorch file (it starts with {start!r}); was a web page saved instead?"
        )
    _require_sound(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and would have to be unpickled, which can run any "
            "code; save the state dict alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged pickle makes torch raise almost anything
        size = path.stat().st_size
        raise ValueError(
            f"{path}: not a complete PyTorch file of {size} bytes ({first_line(error)}); get it "
            "again"
        ) from error


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _unwrapped(content: object, depth: int = 8) -> dict[str, Tensor] | None:
    """The state dict inside the dicts and lists that training programs save around it."""
    if depth == 0:
        return None
    if isinstance(content, list | tuple):
        return _unwrapped(content[0], depth - 1) if content else None
    if not isinstance(content, Mapping):
        return None
    for key in WRAPPERS:
        inner = _unwrapped(content.get(key), depth - 1)
        if inner is not None:
            return inner
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return tensors or None


def _in_names_of(wanted: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the model's names, as far as any way of renaming leads there."""
    wanted = set(wanted)
    plain = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    plain = {name: tensor for name, tensor in plain.items() if not name.startswith(UNUSED)}
    renamed = {_translated(name): tensor for name, tensor in plain.items()}
    candidates = [_without_prefix(dict(names), wanted) for names in (tensors, plain, renamed)]
    return max(candidates, key=lambda names: len(wanted & names.keys()))


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def _translated(name: str) -> str:
    for theirs, ours in SYNONYMS:
        name = name.replace(theirs, ours)
    return name


def _without_prefix(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Strip the prefix under which most names are the model's; none where that is as good."""
    matches = Counter({"": len(wanted & tensors.keys())})
    for name in tensors:
        pieces = name.split(".")
        for cut in range(1, len(pieces)):
            if ".".join(pieces[cut:]) in wanted:
                matches[".".join(pieces[:cut]) + "."] += 1
    prefix = matches.most_common(1)[0][0]
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _compare(path: str, named: dict[str, Tensor], wanted: dict[str, Tensor]) -> WeightsReport:
    shared = [name for name in wanted if name in named]
    fits = {name: named[name].shape == wanted[name].shape for name in shared}
    return WeightsReport(
        path=path,
        loaded=tuple(name for name in shared if fits[name]),
        # Checkpoints of old PyTorch versions lack batch norm's counters, which nothing here reads.
        missing=tuple(n for n in wanted if n not in named and not n.endswith(COUNTER)),
        unexpected=tuple(name for name in named if name not in wanted),
        mismatched=tuple(
            (name, tuple(named[name].shape), tuple(wanted[name].shape))
            for name in shared
            if not fits[name]
        ),
    )


def _head(model: nn.Module) -> str | None:
    """The name of the last linear layer, which gives the logits."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return linear[-1] if linear else None


def _refusal(report: WeightsReport, constants: Mapping[str, Tensor], head: str | None) -> str:
    wrong = {name for name, _, _ in report.mismatched}
    if wrong and not report.missing and wrong <= {f"{head}.weight", f"{head}.bias"}:
        _, theirs, ours = report.mismatched[0]
        if theirs[1:] == ours[1:]:
            return (
                f"{report.path}: checkpoint has {theirs[0]} classes, model {ours[0]}; create the "
                f"model with num_classes={theirs[0]} (a recipe: name the data set of the "
                "checkpoint), or in Python load with strict=False to keep its own head"
            )
    only_extra = not (report.missing or report.mismatched)
    if only_extra and constants.keys() >= set(report.unexpected):
        held = (f"{name} = {_values(tensor)}" for name, tensor in constants.items())
        return (
            f"{report.path}: carries its own normalisation ({', '.join(held)}); create the model "
            "with that mean= and std= (a recipe: model.mean, model.std), or in Python load with "
            "strict=False"
        )
    return (
        f"{report}; name the network, width and data set it was trained with, or in Python load "
        "what fits with strict=False"
    )


def _check_finite(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: {len(bad)} tensors hold NaN or infinity ({_some(bad)})")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _values(tensor: Tensor) -> str:
    """The numbers of a short tensor, or the shape of another."""
    if tensor.numel() > SHOWN:
        return f"a tensor of shape {list(tensor.shape)}"
    return f"[{', '.join(f'{value:.6g}' for value in tensor.flatten().tolist())}]"
