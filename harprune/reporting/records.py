# SPDX-License-Identifier: Apache-2.0
"""A run folder as checked, frozen records; what a stage has not written yet is None or empty."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from harprune.files import parsed
from harprune.outcomes import Count, Evaluation, Fraction, read_evaluation

Stage = Literal["pretrain", "prune", "finetune"]

STAGES = {"pretrain": "dense", "prune": "pruned", "finetune": "finetuned"}
"""Training stages in order, each with the network whose file says it is finished."""

ATTACKED = ("dense", "finetuned")
"""The models whose robustness a run measures."""

GIVEN_IN_PYTHON = "given in python"
"""The name of the data of a run that `harprune.prune` made: there are no test images to attack."""

_FROM_NETWORKS = (
    "metrics.jsonl",
    "validation.json",
    "warnings.json",
    "audit.json",
    "scoring.json",
)
_DERIVED = "restore it, or repeat the command of its run, which makes it anew from the networks"

_STRICT = ConfigDict(extra="ignore", strict=True)


@checked(frozen=True, config=_STRICT)
class Epoch:
    """One finished epoch: mean training loss, validation accuracies, and what pruning adds.

    `selected` is the one whose network goes on; none in an unfinished stage, or one of an earlier
    version.
    """

    stage: Stage
    epoch: Count
    loss: float
    clean: Fraction
    robust: Fraction
    learning_rate: float
    passes: Count
    density: float | None = None
    gamma: float | None = None
    penalty: float | None = None
    densities: dict[str, float] | None = None
    budget_met: bool | None = None
    selected: bool = False


@checked(frozen=True, config=_STRICT)
class Validated:
    """Accuracies of a network on the validation images."""

    clean: Fraction
    robust: Fraction


@checked(frozen=True, config=_STRICT)
class Layer:
    """Kept weights of one layer, counted in the final tensor."""

    shape: tuple[int, ...]
    total: Annotated[int, Field(ge=1)]
    kept: Count

    @property
    def density(self) -> float:
        return self.kept / self.total


@checked(frozen=True, config=_STRICT)
class Audit:
    """What the pruned network keeps, and what named allocations would have kept of each layer.

    `budget` is what `spent`, the kept weights times their layers' prices, may come to; None where
    an earlier version did not write it. `multiply_adds` of one image are those of the "kept"
    weights and of the "dense" network.
    """

    denominator: str
    total: Count
    kept: Count
    budget: Count
    density: Fraction
    layers: dict[str, Layer]
    allocations: dict[str, dict[str, float]] = Field(default_factory=dict)
    multiply_adds: dict[str, float] | None = None
    spent: Count | None = None

    def __post_init__(self) -> None:
        for count in ("total", "kept"):
            summed = sum(getattr(layer, count) for layer in self.layers.values())
            if summed != getattr(self, count):
                raise ValueError(f"{count} {getattr(self, count)} but its layers sum to {summed}")


@dataclass(frozen=True)
class RunRecord:
    """All that a run folder says.

    `began_with` is the digest of the dense network that the run was given, None of its own one;
    `warnings` are what each stage warned of; `left` are the accuracies of the network that a
    finished stage left, where its version kept them; `scoring` are the forward + backward passes of
    single images that the method spent before it trained, 0 where an earlier version did not count
    them.
    """

    folder: Path
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    finished: frozenset[str]
    epochs: tuple[Epoch, ...]
    audit: Audit | None
    attacked: Mapping[str, Evaluation]
    began_with: str | None
    warnings: Mapping[str, tuple[str, ...]]
    left: Mapping[str, Validated]
    scoring: int

    @property
    def missing(self) -> tuple[str, ...]:
        """Stages that have not left their network, in order; attacks only if asked for."""
        stages = [stage for stage in STAGES if stage not in self.finished]
        wanted = ATTACKED if self.section("attack").get("dense", True) else ATTACKED[1:]
        if self.section("data").get("name") == GIVEN_IN_PYTHON:
            wanted = ()
        return (*stages, *(f"attack/{m}" for m in wanted if m not in self.attacked))

    @property
    def method(self) -> str:
        """The method's name, with its plug-ins."""
        return str(self.section("method").get("name", "unknown"))

    @property
    def seed(self) -> int:
        """0 where the recipe names none."""
        return self.recipe.get("seed", 0)

    def of_stage(self, stage: str) -> tuple[Epoch, ...]:
        return tuple(epoch for epoch in self.epochs if epoch.stage == stage)

    def passes(self, stage: str) -> int:
        """Forward + backward passes of single images, scoring counted to pruning."""
        trained = max((epoch.passes for epoch in self.of_stage(stage)), default=0)
        return trained + (self.scoring if stage == "prune" else 0)

    @property
    def threat(self) -> Any:
        """What the attacks kept to, by their own record; the recipe's where none has run."""
        for attacked in (self.attacked[m] for m in reversed(ATTACKED) if m in self.attacked):
            if attacked.threat is not None:
                return _threat_section(attacked.threat)
        held = self.recipe.get("threat")
        if self.section("parity").get("epsilon") and isinstance(held, Mapping):
            return {**held, "epsilon": "of parity.epsilon"}
        return held

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the recipe, empty when the recipe has none."""
        value = self.recipe.get(name)
        return value if isinstance(value, Mapping) else {}


def read_run(folder: str | Path) -> RunRecord:
    """The records of a run folder, finished or not.

    Raises:
        ValueError: the folder is no run folder, or a file in it is garbled; the file is named.
    """
    folder = Path(folder)
    if not (folder / "recipe.json").is_file():
        held = len(list(folder.glob("*/recipe.json")))
        if held:
            raise ValueError(
                f"{folder} is no run folder but holds {held} of them; name those: {folder}/*"
            )
        raise ValueError(f"{folder} is no run folder: it holds no recipe.json; see `harprune run`")
    finished = frozenset(s for s, a in STAGES.items() if (folder / f"{a}.safetensors").exists())
    warned = _read(dict[Stage, tuple[str, ...]], folder / "warnings.json", {})
    left = _read(dict[Stage, Validated], folder / "validation.json", {})
    scoring = _read(dict[Literal["passes"], Count], folder / "scoring.json", {})
    return RunRecord(
        folder=folder,
        recipe=_read(dict[str, Any], folder / "recipe.json", {}),
        environment=_read(dict[str, Any], folder / "environment.json", {}),
        finished=finished,
        epochs=_read_epochs(folder / "metrics.jsonl"),
        audit=_read(Audit, folder / "audit.json", None),
        attacked={
            model: read_evaluation(folder / "attack" / model)
            for model in ATTACKED
            if (folder / "attack" / model / "evaluation.json").exists()
        },
        began_with=_read(dict[str, Any], folder / "inputs.json", {}).get("dense network"),
        warnings={stage: warned[stage] for stage in STAGES if stage in warned},
        # Where a stage is made again, what it left before is of no network.
        left={stage: validated for stage, validated in left.items() if stage in finished},
        scoring=scoring.get("passes", 0),
    )


def _read_epochs(path: Path) -> tuple[Epoch, ...]:
    if not path.exists():
        return ()
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return tuple(parsed(Epoch, line, f"{path} line {number}", _DERIVED) for number, line in lines)


def _threat_section(record: str) -> Any:
    """`Linf(epsilon=0.0313...)` as a recipe writes it; another record as it is."""
    found = re.fullmatch(r"(Linf|L2)\(epsilon=([0-9.e+-]+)\)", record)
    if found is None:
        return record
    epsilon = float(found[2])
    levels = round(255 * epsilon)
    whole = 0 < levels < 255 and abs(255 * epsilon - levels) < 1e-9
    return {"norm": found[1].lower(), "epsilon": f"{levels}/255" if whole else epsilon}


def _read(kind: Any, path: Path, absent: Any) -> Any:
    """What a file says as a `kind`, or `absent` where there is none."""
    if not path.exists():
        return absent
    return parsed(
        kind, path.read_bytes(), path, _DERIVED if path.name in _FROM_NETWORKS else "restore it"
    )
