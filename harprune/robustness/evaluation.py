# SPDX-License-Identifier: Apache-2.0
"""Accuracy under attacks: which images fall, how sure the numbers are, whether to believe them.

Every image's outcome is kept, so that evaluations can be paired image by image. With a folder the
work is saved after each batch, and in AutoAttack after each of its parts, and goes on, bit for bit,
where it was interrupted.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harprune.modes import eval_mode
from harprune.outcomes import WORST_CASE, Check, Evaluation, count_outcomes, with_worst_case
from harprune.randomness import seeded
from harprune.robustness import sanity
from harprune.robustness.attacks import Attack
from harprune.robustness.autoattack import SQUARE_TOLERANCE, AutoAttack, Partway, square_gain
from harprune.robustness.identity import identity_of, text_of
from harprune.robustness.images import ChosenImages
from harprune.robustness.ledger import RESERVED, Ledger
from harprune.robustness.threat import Threat

_TAKEN = ("clean", "index", "labels", WORST_CASE, *RESERVED)

Progress = Callable[[int, int, str], None]
"""(images done under this attack, images in all, attack and accuracy so far) -> None."""


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
    progress: Progress | None = None,
    checks: bool = True,
    threat: Threat | None = None,
    twin: nn.Module | None = None,
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
        threat: what every x_adv must keep to; also sets the norm of the sanity checks.
        twin: computes the same as `model` at less cost; attacks run on it, but every verdict
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
    device = device_of(model)
    data = ChosenImages(images, labels.cpu().long()[index], index, batch_size, device, num_classes)
    attacked = model if twin is None else twin
    report = progress or (lambda done, total, text: None)
    with eval_mode(model):
        identity = {}
        if folder is not None:
            identity = identity_of(model, twin, data, seed, attacks, threat)
        ledger = Ledger.open(folder, identity, data)
        for row in ("clean", *attacks):
            for batch in range(ledger.done.get(row, 0), len(data)):
                with seeded(_batch_seed(seed, batch), device):
                    _run_batch(
                        model, attacked, data, batch, row, attacks.get(row), threat, ledger, report
                    )
                ledger.done[row], ledger.partway = batch + 1, None
                ledger.save()
                report(*_so_far(ledger, data, row, batch))
        if checks and not ledger.checks:
            with seeded(_batch_seed(seed, -1), device):
                ledger.checks = _check(model, attacked, data, attacks, threat, ledger.outcomes)
    result = _summarise(ledger, attacks, threat, seed, name)
    ledger.finish(result)
    return result


def _check(
    model: nn.Module,
    attacked: nn.Module,
    data: ChosenImages,
    attacks: Mapping[str, Attack],
    threat: Threat | None,
    outcomes: Mapping[str, np.ndarray],
) -> dict[str, Check]:
    x, y = data.head(sanity.SAMPLE)
    checks = sanity.check_model(model, x, y, threat or sanity.threat_of(attacks))
    if attacked is not model:
        checks |= sanity.check_same_function(model, attacked, x, y)
    return checks | sanity.check_order(attacks, outcomes)


def _run_batch(
    model: nn.Module,
    attacked: nn.Module,
    data: ChosenImages,
    batch: int,
    row: str,
    attack: Attack | None,
    threat: Threat | None,
    ledger: Ledger,
    report: Progress,
) -> None:
    """One batch under one attack, or clean without one: outcomes and flags into `ledger`."""
    rows, (x, y) = data.rows(batch), data.batch(batch)
    if attack is None:
        ledger.put("clean", rows, _clean(model, x, y, data.num_classes))
        return
    right = torch.from_numpy(ledger.outcomes["clean"][rows]).to(x.device)
    if not right.any():
        ledger.put(row, rows, right)
        return
    x, y = x[right], y[right]
    if isinstance(attack, AutoAttack):

        def told(part: str, share: float) -> None:
            said = f"{row}, this batch after {part} {100 * share:.1f} %"
            report(rows.start, len(data.index), said)

        x_adv = _in_parts(attack, attacked, x, y, right, (row, batch, rows), ledger, told)
    else:
        x_adv = attack(attacked, x, y)
    standing = _logits(model, x_adv).argmax(1) == y
    _require_allowed(row, x_adv, x, threat)
    ledger.put(row, rows, _spread(right, standing))


def _in_parts(
    attack: AutoAttack,
    attacked: nn.Module,
    x: Tensor,
    y: Tensor,
    right: Tensor,
    place: tuple[str, int, slice],
    ledger: Ledger,
    told: Callable[[str, float], None],
) -> Tensor:
    """x_adv of AutoAttack, which goes on after the part it stood at and enters what each did."""
    row, batch, rows = place

    def after_part(partway: Partway) -> None:
        ledger.stand(row, batch, partway)
        part, standing = list(partway.survivors.items())[-1]
        told(part, float(standing.sum()) / len(right))

    begun = ledger.stood(row, batch, x.device)
    outcome = attack.attack(attacked, x, y, begun=begun, after_part=after_part)
    ledger.parts[row] = list(outcome.survivors)
    ledger.flags = list(dict.fromkeys([*ledger.flags, *(f"{row}: {f}" for f in outcome.flags)]))
    for part, survivors in outcome.survivors.items():
        ledger.put(f"{row}:{part}", rows, _spread(right, survivors))
    return outcome.x_adv


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
    wrong = [n for n in attacks if not n or n in _TAKEN or ":" in n]
    if wrong:
        raise ValueError(
            f"attack name {wrong[0]!r} is taken or has a colon; avoid {', '.join(_TAKEN)}"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a network's parameters lie; in main memory where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _batch_seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:7], "big")


def _summarise(
    ledger: Ledger, attacks: Mapping[str, Attack], threat: Threat | None, seed: int, name: str
) -> Evaluation:
    outcomes = with_worst_case(ledger.outcomes, attacks)
    measures, flags = {}, list(ledger.flags)
    for row, attack in attacks.items():
        survivors = {part: outcomes[f"{row}:{part}"] for part in ledger.parts.get(row, [])}
        after = {part: float(standing.mean()) for part, standing in survivors.items()}
        measures[row] = count_outcomes(outcomes, row, text_of(attack), after or None)
        gain = square_gain(survivors, len(outcomes["index"]))
        if gain > SQUARE_TOLERANCE:
            flags.append(
                f"{row}: Square took another {100 * gain:.2f} %, and misleading gradients may be "
                "the cause"
            )
    return Evaluation(
        model=name,
        threat=None if threat is None else repr(threat),
        seed=seed,
        size=len(outcomes["index"]),
        clean=count_outcomes(outcomes, "clean"),
        attacks=measures,
        worst_case=count_outcomes(outcomes, WORST_CASE),
        checks=ledger.checks,
        flags=tuple(dict.fromkeys(flags)),  # a finished one that is read again has them all
        identity=ledger.identity,
        outcomes=outcomes,
    )


def _so_far(ledger: Ledger, data: ChosenImages, row: str, batch: int) -> tuple[int, int, str]:
    done = data.rows(batch).stop
    accuracy = ledger.outcomes[row][:done].mean()
    return done, len(data.index), f"{row} {100 * accuracy:.1f} %"
