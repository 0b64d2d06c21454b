# SPDX-License-Identifier: Apache-2.0
"""AutoAttack (Croce & Hein 2020), run by its reference implementation, pyautoattack.

The four parts of the standard version run one after the other on the images still standing, with
the reference's own objects, seeds and order, so the result is the reference's bit for bit; here
one also learns which part broke which image, and the reference's warnings become flags.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from harprune.arguments import require_whole
from harprune.modes import eval_mode
from harprune.randomness import seed_generators, seeded
from harprune.robustness.threat import Linf, Threat, require_threat

if TYPE_CHECKING:
    from pyautoattack import AutoAttack as Reference
    from pyautoattack.autoattack import AttackName

FLAGS = {
    "randomized defense": "randomised output",
    "probability distribution": "probabilities instead of logits",
    "zero gradient": "zero gradients",
    "dynamic defense": "optimisation at inference",
}
"""The reference's warnings, by a part of their text, and what they are called here."""

SQUARE_QUERIES = 5000
"""Forward passes that Square spends on an image that survives."""

SQUARE_TOLERANCE = 0.002
"""The accuracy that Square may take from the gradient attacks before the reference warns."""


@dataclass(frozen=True)
class Outcome:
    """What AutoAttack did to a batch of N images.

    Attributes:
        x_adv: images that broke the model, and the clean image where none was found.
        clean: (N,) bool, classified correctly before.
        survivors: part -> (N,) bool, classified correctly after it and the parts before it.
        flags: what the reference warned of.
    """

    x_adv: Tensor
    clean: Tensor
    survivors: dict[str, Tensor]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Partway:
    """Where AutoAttack stands with a batch, some of its parts done: enough to go on.

    Attributes:
        x_adv: float32, as in `Outcome`.
        survivors, flags: as in `Outcome`, of the parts that are done.
    """

    x_adv: Tensor
    survivors: dict[str, Tensor]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack on images (N, C, H, W), float32.

    Args:
        threat: what the attacker may do.
        batch_size: images at a time inside the reference.
        version: "standard" (four parts) or "plus" (six, with more restarts).
        seed: starts every part; the result does not depend on torch's global generator.

    With 4 to 9 classes the targeted parts aim at every other class; with 2 or 3 the DLR losses do
    not exist, and the outcome is flagged "not standard AutoAttack".

    Raises:
        ValueError: no threat, unknown version, a batch size below 1; no images (N, C, H, W), fewer
            than two classes, or logits that are not finite.
    """

    threat: Threat
    batch_size: int = 250
    version: Literal["standard", "plus"] = "standard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.version not in ("standard", "plus"):
            raise ValueError(f"version {self.version!r} is unknown; choose standard or plus")
        require_threat(self.threat)
        require_whole("batch_size", self.batch_size, 1)
        require_whole("seed", self.seed)

    @property
    def passes(self) -> int:
        """Forward + backward passes per image that survives, at most, with 10 classes or more.

        Square's `SQUARE_QUERIES` forward passes come on top.
        """
        one_run, targets = 101, 9
        standard = one_run + targets * one_run + targets * 100
        plus = 2 * 5 * one_run + 5 * 100 * 10 + targets * one_run + targets * 100
        return standard if self.version == "standard" else plus

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """(model, x (N, C, H, W) in [0, 1], y (N,)) -> x_adv."""
        return self.attack(model, x, y).x_adv

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        begun: Partway | None = None,
        after_part: Callable[[Partway], None] = lambda partway: None,
    ) -> Outcome:
        """As the call, with which part broke which image and what the reference warned of.

        Args:
            begun: what `after_part` was given before an interruption; every part begins with the
                same seed, also for a forward that draws, so what follows is the same.
            after_part: called when a part is done.
        """
        _require_images(x, self.threat)
        with (
            eval_mode(model),
            _frozen(model),
            seeded(self.seed, x.device),
            torch.no_grad(),
            _warnings() as messages,
        ):
            net = _Front(model, x.dtype).eval()
            classes = _check_model(net, x[: self.batch_size], y[: self.batch_size])
            reference, extra = self._reference(net, classes, x.device)
            # The reference takes float32; another layout in memory breaks its views.
            images = x.detach().float().contiguous()
            before = () if begun is None else begun.flags

            def part_done(x_adv: Tensor, survivors: dict[str, Tensor]) -> None:
                flags = dict.fromkeys((*before, *extra, *_flags(messages)))
                after_part(Partway(x_adv, survivors, tuple(flags)))

            x_adv, clean, survivors = self._run(reference, net, images, y, begun, part_done)
        flags = dict.fromkeys((*before, *extra, *_flags(messages)))
        return Outcome(x_adv.to(x.dtype), clean, survivors, tuple(flags))

    def _reference(
        self, net: nn.Module, classes: int, device: torch.device
    ) -> tuple["Reference", tuple[str, ...]]:
        """The reference's object, fitted to the number of classes, and a flag if it had to be."""
        from pyautoattack import AutoAttack as Reference

        norm = "Linf" if isinstance(self.threat, Linf) else "L2"
        options = {"norm": norm, "eps": self.threat.epsilon, "seed": self.seed, "device": device}
        if classes >= 4:
            reference, extra = Reference(net, version=self.version, **options), ()
        else:
            parts: list[AttackName] = ["apgd-ce", "apgd-dlr", "fab-t", "square"]
            if classes < 3:
                parts.remove("apgd-dlr")
            reference = Reference(net, version="custom", attacks=parts, **options)
            reference.apgd.n_restarts = 1
            extra = (f"not standard AutoAttack: {classes} classes allow only {', '.join(parts)}",)
        targets = min(9, classes - 1)
        reference.apgd_targeted.n_target_classes = reference.fab.n_target_classes = targets
        return reference, extra

    def _run(
        self,
        reference: "Reference",
        net: nn.Module,
        x: Tensor,
        y: Tensor,
        begun: Partway | None,
        part_done: Callable[[Tensor, dict[str, Tensor]], None],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        clean = torch.cat(
            [net(a).argmax(1) == b for a, b in zip(self._split(x), self._split(y), strict=True)]
        )
        x_adv = x.clone() if begun is None else begun.x_adv.clone()
        survivors = {} if begun is None else dict(begun.survivors)
        standing = list(survivors.values())[-1].clone() if survivors else clean.clone()
        for part in cast("list[AttackName]", reference.attacks_to_run):
            if part in survivors:
                continue
            # The reference seeds torch alone, and not before a part's first forward pass.
            seed_generators(self.seed)
            for rows in self._split(standing.nonzero().flatten()):
                attacked = _perturb(reference, part, self.seed, x[rows], y[rows])
                broken = net(attacked).argmax(1) != y[rows]
                x_adv[rows[broken]] = attacked[broken]
                standing[rows[broken]] = False
            survivors[part] = standing.clone()
            part_done(x_adv, survivors)
        return x_adv, clean, survivors

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.batch_size) if len(rows) else ()


def square_gain(survivors: Mapping[str, Tensor | np.ndarray], size: int) -> float:
    """The accuracy that Square took from what the gradient attacks had left, of `size` images.

    More than `SQUARE_TOLERANCE` says that the gradients misled the other parts.
    """
    parts = list(survivors)
    if "square" not in parts or parts.index("square") == 0:
        return 0.0
    before = survivors[parts[parts.index("square") - 1]]
    return (int(before.sum()) - int(survivors["square"].sum())) / max(size, 1)


def _perturb(reference: "Reference", part: str, seed: int, x: Tensor, y: Tensor) -> Tensor:
    """One part on one batch, set up as the reference's own loop does."""
    match part:
        case "apgd-ce" | "apgd-dlr":
            attack = reference.apgd
            attack.loss = part.removeprefix("apgd-")
        case "apgd-t":
            attack = reference.apgd_targeted
        case "fab" | "fab-t":
            attack = reference.fab
            attack.targeted = part == "fab-t"
            attack.n_restarts = 1 if attack.targeted else attack.n_restarts
        case "square":
            attack = reference.square
    attack.seed = seed
    return attack.perturb(x.clone(), y.clone())


class _Front(nn.Module):
    """The model as the reference expects it: float32 in and out, gradients laid out densely."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)
        logits = self.model(x.to(self.dtype)).float()
        if not torch.isfinite(logits).all():
            raise ValueError("the model's logits are not all finite; AutoAttack cannot rank them")
        # Square writes into the logits; the model may still hold them.
        return logits.clone()


def _require_images(x: Tensor, threat: Threat) -> None:
    if x.dim() != 4:
        raise ValueError(
            f"AutoAttack needs images (N, C, H, W), got {tuple(x.shape)}; use APGD for other shapes"
        )
    if not isinstance(threat, Linf) and min(x.shape[2:]) < 5:
        raise ValueError(
            f"AutoAttack in L2 needs images of 5 x 5 pixels or more, got {tuple(x.shape)}; use APGD"
        )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: backward passes cost half, none accumulates."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the reference's logger warns of inside; nothing reaches the console."""
    logger, collector = logging.getLogger("auto-attack"), _Collector()
    before = logger.handlers, logger.propagate, logger.level, logger.disabled
    logger.handlers, logger.propagate, logger.disabled = [collector], False, False
    logger.setLevel(logging.WARNING)
    try:
        yield collector.messages
    finally:
        logger.handlers, logger.propagate, level, logger.disabled = before
        logger.setLevel(level)


def _flags(messages: list[str]) -> tuple[str, ...]:
    """The reference's warnings in our words, each once; an unknown one as it is."""
    named = [next((f for text, f in FLAGS.items() if text in m), m) for m in messages]
    return tuple(dict.fromkeys(named))


def _check_model(net: nn.Module, x: Tensor, y: Tensor) -> int:
    """Run the reference's checks of the model, which warn through its logger; the class count."""
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    classes = checks.check_range_output(net, x, logger=logger)
    if classes < 2:
        raise ValueError(f"AutoAttack needs 2 classes or more, the model has {classes} output")
    checks.check_randomized(net, x, y, bs=len(x), logger=logger)
    # This check counts calls in a module global and ends whatever tracer is running.
    tracer = sys.gettrace()
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    try:
        checks.check_dynamic(net, x, False, logger=logger)
    finally:
        sys.settrace(tracer)
    return classes
