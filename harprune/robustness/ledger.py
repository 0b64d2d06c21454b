# SPDX-License-Identifier: Apache-2.0
"""An evaluation under way: what it found so far, so that it goes on where it was interrupted."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harprune.files import garbled, read_arrays, write_arrays
from harprune.outcomes import Check, Evaluation, load_evaluation, write_evaluation
from harprune.robustness.autoattack import Partway
from harprune.robustness.identity import require_same
from harprune.robustness.images import ChosenImages

_PARTWAY = "partway"
RESERVED = ("file", "progress", _PARTWAY)
"""Names that stand beside those of attacks in the files."""


@dataclass
class Ledger:
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
    def open(
        cls, folder: str | Path | None, identity: dict[str, str], data: ChosenImages
    ) -> "Ledger":
        """Take up what `folder` holds of this evaluation; start where it holds nothing."""
        outcomes = {"index": data.index.numpy(), "labels": data.labels.numpy()}
        if folder is None:
            return cls(None, identity, outcomes)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "evaluation.json").exists():
            held = load_evaluation(folder)
            require_same(folder, held.identity, identity)
            done = dict.fromkeys(["clean", *held.attacks], len(data))
            parts = {n: list(m.parts) for n, m in held.attacks.items() if m.parts}
            flags = list(held.flags)
            return cls(folder, identity, held.outcomes, done, parts, flags, held.checks)
        if (folder / "partial.npz").exists():
            begun = cls._taken_up(folder)
            require_same(folder, begun.identity, identity)
            begun.identity = identity  # an earlier version wrote less of it
            return begun
        return cls(folder, identity, outcomes)

    @classmethod
    def _taken_up(cls, folder: Path) -> "Ledger":
        """What partial.npz holds; ValueError where that is no evaluation under way."""
        path = folder / "partial.npz"
        try:
            arrays = read_arrays(path)
            note = json.loads(str(arrays.pop("progress")))
            partway = _partway(note.pop("partway", None), arrays)
            return cls(folder, outcomes=arrays, **note, partway=partway)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise garbled(path, str(error), "restore it, or delete it to start again") from None

    def put(self, row: str, rows: slice, correct: Tensor) -> None:
        """Enter which of the images `rows` are still correct."""
        size = len(self.outcomes["index"])
        self.outcomes.setdefault(row, np.zeros(size, dtype=bool))[rows] = correct.cpu().numpy()

    def save(self) -> None:
        """Write what is known into the folder, if there is one."""
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
        """Write the finished evaluation in place of what was known on the way."""
        if self.folder is None:
            return
        write_evaluation(self.folder, result)
        (self.folder / "partial.npz").unlink(missing_ok=True)


def _partway(note: list | None, arrays: dict[str, np.ndarray]) -> tuple[str, int, Partway] | None:
    """Where an attack on a batch stood, its arrays taken out of those of partial.npz."""
    if note is None:
        return None
    row, batch, parts, flags = note
    x_adv = torch.from_numpy(arrays.pop(_PARTWAY))
    survivors = {part: torch.from_numpy(arrays.pop(f"{_PARTWAY}:{part}")) for part in parts}
    return row, batch, Partway(x_adv, survivors, tuple(flags))
