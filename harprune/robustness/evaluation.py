# SPDX-License-Identifier: Apache-2.0
"""Accuracy under attacks: which images fall, how sure the numbers are, whether to believe them.

Every image's outcome is kept, so that evaluations can be paired image by image. With a folder the
work is saved after each batch, and in AutoAttack after each of its parts, and goes on, bit for bit,
where it was interrupted.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harprune.files import read_arrays, to_json, write, write_arrays
from harprune.intervals import wilson
from harprune.modes import eval_mode
from harprune.pairing import PairedDifference, paired_difference
from harprune.robustness import sanity
from harprune.robustness.attacks import Attack, seeded
from harprune.robustness.autoattack import SQUARE_TOLERANCE, AutoAttack, Partway, square_gain
from harprune.robustness.sanity import Check
from harprune.robustness.threat import Threat

WORST_CASE = "worst case"
_PARTWAY = "partway"
_RESERVED = ("clean", "index", "labels", "file", "progress", _PARTWAY, WORST_CASE)

REPEATED = 0.01
"""Fraction of images that may differ where an evaluation is repeated on another machine."""

Progress = Callable[[int, int, str], None]
"""(images done under this attack, images in all, attack and accuracy so far) -> None."""


@dataclass(frozen=True)
class Measure:
    """Accuracy on `size` images, in [0, 1].

    Attributes:
        interval: 95 % Wilson interval of the accuracy.
        balanced: mean over the classes of each class's accuracy.
        attack: what was run, as text; None for clean images.
        parts: for AutoAttack, the accuracy after each part.
    """

    accuracy: float
    interval: tuple[float, float]
    balanced: float
    correct: int
    size: int
    attack: str | None = None
    parts: dict[str, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """One model under attacks.

    Attributes:
        outcomes: "clean", each attack, and "attack:part" of AutoAttack -> bool (n,), still correct;
            "index" and "labels" -> int (n,).
        identity: what the outcomes depend on: model, attacked function, images, their choice and
            labels, seed, batch size and attacks.
    """

    model: str
    threat: str | None
    seed: int
    size: int
    clean: Measure
    attacks: dict[str, Measure]
    worst_case: Measure
    checks: dict[str, Check]
    flags: tuple[str, ...]
    identity: dict[str, str] = field(repr=False)
    outcomes: dict[str, np.ndarray] = field(repr=False, compare=False)

    def lines(self) -> list[str]:
        """The result as lines of text: accuracies, then flags and failed checks."""
        rows = {"clean": self.clean, **self.attacks}
        if len(self.attacks) > 1:
            rows[WORST_CASE] = self.worst_case
        failed = [f"check failed: {n}: {c.detail}" for n, c in self.checks.items() if not c.passed]
        return [
            *(_line(name, measure) for name, measure in rows.items()),
            *(f"flag: {flag}" for flag in self.flags),
            *failed,
        ]

    def outcome(self, name: str) -> np.ndarray:
        """The images still correct, bool (n,): clean, under an attack, or in the worst case."""
        rows = {**self.outcomes, WORST_CASE: _worst_case(self.outcomes, self.attacks)}
        if name not in ("clean", WORST_CASE, *self.attacks):
            known = ", ".join(["clean", *self.attacks, WORST_CASE])
            raise ValueError(f"{name!r} was not evaluated; choose among {known}")
        return rows[name]


def evaluate(
    model: nn.Module,
    images: Tensor | Any,
    labels: Tensor,
    attacks: Mapping[str, Attack],
    *,
    seed: int = 0,
    batch_size: int = 250,
    index: Tensor | Sequence[int] | None = None,
    folder: str | Path | None = None,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checks: bool = True,
    threat: Threat | None = None,
    function: nn.Module | None = None,
    name: str = "model",
) -> Evaluation:
    """Clean accuracy of `model`, then accuracy under each attack, in eval mode.

    An image that is wrong when clean counts as wrong under every attack and is not attacked.
    Random numbers are a function of seed and batch, so each attack's outcome depends neither on
    the other attacks nor on interruptions; torch's generators are left as they were.

    Args:
        images: floats (n, ...) in [0, 1], or anything where `images[LongTensor]` gives them.
        labels: (n,) integers.
        batch_size: images at a time; part of what is reproduced.
        index: which images; all when None.
        folder: outcomes are kept here after each batch and each part of AutoAttack, and an
            interrupted evaluation goes on.
        num_classes: checked against labels and logits.
        device: where batches go; the model's when None.
        threat: what every x_adv must keep to; also sets the norm of the sanity checks.
        function: computes the same as `model` at less cost; attacks run on it, but every verdict
            is the model's own, and a check compares the two.
        name: the model's name in the record.

    Raises:
        ValueError: images outside [0, 1], labels that do not fit the logits, logits that are not
            finite, an x_adv outside the threat, or a folder that holds another evaluation.
    """
    _require_names(attacks)
    index = torch.arange(len(labels)) if index is None else torch.as_tensor(index).long().cpu()
    if not len(index) or batch_size < 1:
        raise ValueError(f"{len(index)} images in batches of {batch_size}: both must be at least 1")
    device = torch.device(device) if device is not None else device_of(model)
    data = _Data(images, labels.cpu().long()[index], index, batch_size, device, num_classes)
    attacked = model if function is None else function
    report = progress or (lambda done, total, text: None)
    with eval_mode(model):
        identity = {} if folder is None else _identity(model, function, data, seed, attacks)
        state = _State.open(folder, identity, data)
        for row in ("clean", *attacks):
            for batch in range(state.done.get(row, 0), len(data)):
                with seeded(_batch_seed(seed, batch), device):
                    _run_batch(
                        model, attacked, data, batch, row, attacks.get(row), threat, state, report
                    )
                state.done[row], state.partway = batch + 1, None
                state.save()
                report(*_so_far(state, data, row, batch))
        if checks and not state.checks:
            with seeded(_batch_seed(seed, -1), device):
                state.checks = _check(model, attacked, data, attacks, threat, state.outcomes)
    result = _summarise(state, attacks, threat, seed, name)
    state.finish(result)
    return result


def _check(
    model: nn.Module,
    attacked: nn.Module,
    data: "_Data",
    attacks: Mapping[str, Attack],
    threat: Threat | None,
    outcomes: Mapping[str, np.ndarray],
) -> dict[str, Check]:
    x, y = data.head(sanity.SAMPLE)
    checks = sanity.check_model(model, x, y, threat or sanity.threat_of(attacks))
    if attacked is not model:
        checks |= sanity.check_same_function(_logits(model, x), _logits(attacked, x))
    return checks | sanity.check_order(attacks, outcomes)


@dataclass(frozen=True)
class _Data:
    """The chosen images, a batch at a time."""

    images: Any
    labels: Tensor
    index: Tensor
    batch_size: int
    device: torch.device
    num_classes: int | None

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def rows(self, batch: int) -> slice:
        start = batch * self.batch_size
        return slice(start, min(start + self.batch_size, len(self.index)))

    def batch(self, batch: int) -> tuple[Tensor, Tensor]:
        return self._load(self.rows(batch))

    def head(self, size: int) -> tuple[Tensor, Tensor]:
        return self._load(slice(0, min(size, len(self.index))))

    def _load(self, rows: slice) -> tuple[Tensor, Tensor]:
        x = torch.as_tensor(self.images[self.index[rows]])
        if not x.is_floating_point() or not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"images must be floats in [0, 1], got {x.dtype} from {x.min()} to {x.max()}; "
                "divide bytes by 255, and normalise inside the model"
            )
        return x.to(self.device), self.labels[rows].to(self.device)


def _run_batch(
    model: nn.Module,
    attacked: nn.Module,
    data: _Data,
    batch: int,
    row: str,
    attack: Attack | None,
    threat: Threat | None,
    state: "_State",
    report: Progress,
) -> None:
    """One batch under one attack, or clean without one: outcomes and flags into `state`."""
    rows, (x, y) = data.rows(batch), data.batch(batch)
    if attack is None:
        state.put("clean", rows, _clean(model, x, y, data.num_classes))
        return
    right = torch.from_numpy(state.outcomes["clean"][rows]).to(x.device)
    if not right.any():
        state.put(row, rows, right)
        return
    x, y = x[right], y[right]
    if isinstance(attack, AutoAttack):

        def after_part(partway: Partway) -> None:
            state.stand(row, batch, partway)
            part, standing = list(partway.survivors.items())[-1]
            share = float(standing.sum()) / (rows.stop - rows.start)
            report(rows.start, len(data.index), f"{row}, this batch after {part} {share:.1%}")

        begun = state.stood(row, batch, x.device)
        outcome = attack.attack(attacked, x, y, begun=begun, after_part=after_part)
        x_adv = outcome.x_adv
        state.parts[row] = list(outcome.survivors)
        state.flags = list(dict.fromkeys([*state.flags, *(f"{row}: {f}" for f in outcome.flags)]))
        for part, survivors in outcome.survivors.items():
            state.put(f"{row}:{part}", rows, _spread(right, survivors))
    else:
        x_adv = attack(attacked, x, y)
    standing = _logits(model, x_adv).argmax(1) == y
    _require_allowed(row, x_adv, x, threat)
    state.put(row, rows, _spread(right, standing))


def _spread(right: Tensor, standing: Tensor) -> Tensor:
    """Outcomes of the attacked images among all: those wrong when clean stay wrong."""
    return torch.zeros_like(right).masked_scatter(right, standing)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    broken = int((~torch.isfinite(logits)).any(1).sum())
    if broken:
        raise ValueError(
            f"the model's logits are not finite on {broken} of {len(x)} images; its weights have "
            "diverged or its precision is too low"
        )
    return logits


def _clean(model: nn.Module, x: Tensor, y: Tensor, num_classes: int | None) -> Tensor:
    logits = _logits(model, x)
    outputs, low, high = logits.shape[1], int(y.min()), int(y.max())
    if low < 0 or high >= min(outputs, num_classes or outputs):
        raise ValueError(
            f"labels run from {low} to {high} but there are {num_classes or outputs} classes and "
            f"the model has {outputs} outputs; check num_classes"
        )
    if num_classes is not None and outputs < num_classes:
        raise ValueError(f"the model has {outputs} outputs for {num_classes} classes")
    return logits.argmax(1) == y


def _require_allowed(name: str, x_adv: Tensor, x: Tensor, threat: Threat | None) -> None:
    """An attack must keep to images, and to the threat where one is given; rounding is forgiven."""
    if x_adv.shape != x.shape or not (x_adv.min() >= 0 and x_adv.max() <= 1):
        raise ValueError(
            f"attack {name} gave {tuple(x_adv.shape)} from {x_adv.min()} to {x_adv.max()} for "
            f"images {tuple(x.shape)} in [0, 1]; clamp what it returns"
        )
    if threat is not None:
        furthest = float(threat.distance(x_adv, x).max())
        if not furthest <= threat.epsilon * (1 + 1e-4) + 1e-6:
            raise ValueError(
                f"attack {name} moved an image by {furthest:.6g}, outside {threat}; give it the "
                "same threat"
            )


def _require_names(attacks: Mapping[str, Attack]) -> None:
    wrong = [n for n in attacks if not n or n in _RESERVED or ":" in n]
    if wrong:
        raise ValueError(
            f"attack name {wrong[0]!r} is taken or has a colon; avoid {', '.join(_RESERVED)}"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a network's parameters lie; in main memory where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _batch_seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:7], "big")


# --- what an evaluation is of ------------------------------------------------------------------


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


_ATTACKED, _IMAGES = "attacked function", "images"


def _identity(
    model: nn.Module,
    function: nn.Module | None,
    data: _Data,
    seed: int,
    attacks: Mapping[str, Attack],
) -> dict[str, str]:
    chosen, images = hashlib.sha256(), hashlib.sha256()
    for tensor in (data.index, data.labels, data.head(sanity.SAMPLE)[0]):
        chosen.update(_bytes(tensor))
    for batch in range(len(data)):
        images.update(_bytes(data.batch(batch)[0]))
    return {
        "model": model_digest(model),
        _ATTACKED: "the model" if function is None else "its twin",
        "data": chosen.hexdigest(),
        _IMAGES: images.hexdigest(),
        "seed": str(seed),
        "batch_size": str(data.batch_size),
        "attacks": "; ".join(f"{name} = {_text(attack)}" for name, attack in attacks.items()),
    }


def _text(attack: Attack) -> str:
    """An attack's repr without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(attack))


# --- what is kept between batches ---------------------------------------------------------------


@dataclass
class _State:
    """Outcomes so far. In a folder: partial.npz while running, then outcomes.npz and the JSON."""

    folder: Path | None
    identity: dict[str, str]
    outcomes: dict[str, np.ndarray]
    done: dict[str, int] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    checks: dict[str, Check] = field(default_factory=dict)
    partway: tuple[str, int, Partway] | None = None

    @classmethod
    def open(cls, folder: str | Path | None, identity: dict[str, str], data: _Data) -> "_State":
        """Take up what `folder` holds of this evaluation; start where it holds nothing."""
        outcomes = {"index": data.index.numpy(), "labels": data.labels.numpy()}
        if folder is None:
            return cls(None, identity, outcomes)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "evaluation.json").exists():
            held = load_evaluation(folder)
            _require_same(folder, held.identity, identity)
            done = dict.fromkeys(["clean", *held.attacks], len(data))
            parts = {n: list(m.parts) for n, m in held.attacks.items() if m.parts}
            flags = [f for f in held.flags if not f.endswith(_SQUARE)]
            return cls(folder, identity, held.outcomes, done, parts, flags, held.checks)
        if (folder / "partial.npz").exists():
            arrays = _arrays(folder / "partial.npz")
            note = json.loads(str(arrays.pop("progress")))
            _require_same(folder, note.pop("identity"), identity)
            partway = _taken_up(note.pop("partway", None), arrays)
            return cls(folder, identity, arrays, **note, partway=partway)
        return cls(folder, identity, outcomes)

    def put(self, row: str, rows: slice, correct: Tensor) -> None:
        size = len(self.outcomes["index"])
        self.outcomes.setdefault(row, np.zeros(size, dtype=bool))[rows] = correct.cpu().numpy()

    def save(self) -> None:
        if self.folder is None:
            return
        note = {key: getattr(self, key) for key in ("identity", "done", "parts", "flags")}
        arrays = dict(self.outcomes)
        if self.partway is not None:
            row, batch, partway = self.partway
            held = {f"{_PARTWAY}:{name}": s for name, s in partway.survivors.items()}
            held[_PARTWAY] = partway.x_adv
            arrays |= {name: tensor.cpu().numpy() for name, tensor in held.items()}
            note["partway"] = [row, batch, list(partway.survivors), list(partway.flags)]
        write_arrays(self.folder / "partial.npz", arrays | {"progress": np.array(json.dumps(note))})

    def stand(self, row: str, batch: int, partway: Partway) -> None:
        """Keep where an attack on a batch stands."""
        self.partway = row, batch, partway
        self.save()

    def stood(self, row: str, batch: int, device: torch.device) -> Partway | None:
        """Where the attack on this batch stood, if it is this one that was interrupted."""
        if self.partway is None or self.partway[:2] != (row, batch):
            return None
        held = self.partway[2]
        survivors = {name: s.to(device) for name, s in held.survivors.items()}
        return Partway(held.x_adv.to(device), survivors, held.flags)

    def finish(self, result: Evaluation) -> None:
        if self.folder is None:
            return
        record = asdict(result)
        del record["outcomes"]
        write_arrays(self.folder / "outcomes.npz", self.outcomes)
        write(self.folder / "evaluation.json", to_json(record))
        (self.folder / "partial.npz").unlink(missing_ok=True)


def _taken_up(note: list | None, arrays: dict[str, np.ndarray]) -> tuple[str, int, Partway] | None:
    """Where an attack on a batch stood, its arrays taken out of those of partial.npz."""
    if note is None:
        return None
    row, batch, parts, flags = note
    x_adv = torch.from_numpy(arrays.pop(_PARTWAY))
    survivors = {part: torch.from_numpy(arrays.pop(f"{_PARTWAY}:{part}")) for part in parts}
    return row, batch, Partway(x_adv, survivors, tuple(flags))


def _require_same(folder: Path, held: dict[str, str], wanted: dict[str, str]) -> None:
    for key, value in wanted.items():
        # Earlier versions wrote neither of the two.
        missing = value if key in (_ATTACKED, _IMAGES) else None
        if held.get(key, missing) != value:
            raise ValueError(
                f"{folder} holds an evaluation whose {key} differs ({_short(held.get(key))} there, "
                f"{_short(value)} here); choose another folder or delete this one"
            )


def _short(value: str | None) -> str:
    return f"{value[:12]}..." if value and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to start again") from None


def load_evaluation(folder: str | Path) -> Evaluation:
    """A finished evaluation from its folder.

    Raises:
        ValueError: the folder holds none, or a file in it is garbled.
    """
    folder = Path(folder)
    path = folder / "evaluation.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no finished evaluation; run it to the end first")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["checks"] = {name: Check(**check) for name, check in record["checks"].items()}
        record["attacks"] = {name: _measure(m) for name, m in record["attacks"].items()}
        record |= {name: _measure(record[name]) for name in ("clean", "worst_case")}
        record["flags"] = tuple(record["flags"])
        return Evaluation(**record, outcomes=_arrays(folder / "outcomes.npz"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is garbled ({error}); delete it to start again") from None


def _measure(record: dict[str, Any]) -> Measure:
    return Measure(**{**record, "interval": tuple(record["interval"])})


# --- numbers out of outcomes ----------------------------------------------------------------------

_SQUARE = "and misleading gradients may be the cause"


def _summarise(
    state: _State, attacks: Mapping[str, Attack], threat: Threat | None, seed: int, name: str
) -> Evaluation:
    outcomes = state.outcomes
    measures, flags = {}, list(state.flags)
    for row, attack in attacks.items():
        survivors = {part: outcomes[f"{row}:{part}"] for part in state.parts.get(row, [])}
        after = {part: float(standing.mean()) for part, standing in survivors.items()}
        measures[row] = _count(outcomes, row, _text(attack), after or None)
        gain = square_gain(survivors, len(outcomes["index"]))
        if gain > SQUARE_TOLERANCE:
            flags.append(f"{row}: Square took another {gain:.2%}, {_SQUARE}")
    worst = {**outcomes, WORST_CASE: _worst_case(outcomes, attacks)}
    return Evaluation(
        model=name,
        threat=None if threat is None else repr(threat),
        seed=seed,
        size=len(outcomes["index"]),
        clean=_count(outcomes, "clean"),
        attacks=measures,
        worst_case=_count(worst, WORST_CASE),
        checks=state.checks,
        flags=tuple(flags),
        identity=state.identity,
        outcomes=outcomes,
    )


def _worst_case(outcomes: Mapping[str, np.ndarray], attacks: Mapping[str, Any]) -> np.ndarray:
    return np.logical_and.reduce([outcomes["clean"], *(outcomes[name] for name in attacks)])


def _count(
    outcomes: Mapping[str, np.ndarray],
    row: str,
    attack: str | None = None,
    parts: dict[str, float] | None = None,
) -> Measure:
    correct, labels = outcomes[row], outcomes["labels"]
    balanced = np.mean([correct[labels == label].mean() for label in np.unique(labels)])
    total, size = int(correct.sum()), len(correct)
    return Measure(total / size, wilson(total, size), float(balanced), total, size, attack, parts)


def _line(name: str, measure: Measure) -> str:
    low, high = (100 * end for end in measure.interval)
    text = f"{name} {100 * measure.accuracy:.2f} % [{low:.2f}, {high:.2f}] of {measure.size}"
    if measure.parts:
        text += " (" + ", ".join(f"{p} {100 * a:.2f}" for p, a in measure.parts.items()) + ")"
    return text


def _so_far(state: _State, data: _Data, row: str, batch: int) -> tuple[int, int, str]:
    done = data.rows(batch).stop
    accuracy = state.outcomes[row][:done].mean()
    return done, len(data.index), f"{row} {100 * accuracy:.1f} %"


def subset(labels: Tensor, size: int | None, seed: int | None) -> Tensor:
    """Sorted positions (m,) of at most `size` images: drawn by `seed`, or the first ones for None.

    All images when `size` is None. Raises ValueError for a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"size = {size} must be at least 1, or None for all images")
    if size is None or size >= len(labels):
        return torch.arange(len(labels))
    if seed is None:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(labels), generator=generator)[:size].sort().values


def paired(a: Evaluation, b: Evaluation, name: str = WORST_CASE) -> PairedDifference:
    """How `b` differs from `a` under `name`: "clean", an attack, or "worst case".

    Raises:
        ValueError: the two are not of the same images, or one lacks the attack.
    """
    for key in ("index", "labels"):
        if not np.array_equal(a.outcomes[key], b.outcomes[key]):
            raise ValueError(
                f"{a.model} ({a.size} images) and {b.model} ({b.size} images) differ in {key}; "
                "evaluate both on the same subset"
            )
    first, second = ({**each.outcomes, name: each.outcome(name)} for each in (a, b))
    return paired_difference(first, second, name)


def differing(a: Evaluation, b: Evaluation) -> dict[str, int]:
    """Images that are right in one evaluation alone: clean, and under each attack of the first.

    Raises:
        ValueError: the two are not of the same images, or the second lacks an attack.
    """
    pairs = {name: paired(a, b, name) for name in ("clean", *a.attacks)}
    return {name: pair.lost + pair.won for name, pair in pairs.items()}
