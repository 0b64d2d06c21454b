# SPDX-License-Identifier: Apache-2.0
"""What of a run folder derives from its networks, which know it all: files for readers alone.

A finished network holds, beside its tensors, the epochs of its stage, its accuracies on validation
images, what the stage warned of, the count of what is kept and what scoring cost. metrics.jsonl,
validation.json, warnings.json, audit.json and scoring.json say the same again. Of networks of an
earlier version, which knew epochs and accuracies alone, the other files are all there is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harprune.files import to_json, write
from harprune.reporting.records import STAGES

Left = Mapping[str, Mapping[str, Any]]
"""By stage, the values in the finished network that it left."""
_KNOWN_BY = {"warnings": tuple(STAGES), "audit": ("prune", "finetune"), "scoring": ("prune",)}
"""What a network may know beside its epochs, and the stages whose networks do."""


def write_derived(folder: Path, left: Left) -> None:
    """All files that derive from the networks, as these have it; one that is right is not touched.

    Raises:
        ValueError: see `require_known`.
    """
    require_known(folder, left)
    write_metrics(folder, {stage: values["history"] for stage, values in left.items()})
    accuracies = {s: {name: left[s][name] for name in ("clean", "robust")} for s in left}
    _write(folder / "validation.json", accuracies)
    path = folder / "warnings.json"
    held = {} if _knows(left, "warnings") or not path.exists() else read_record(path)
    warned = {s: left[s].get("warnings", held.get(s)) for s in STAGES if s in left}
    _write(path, {stage: warnings for stage, warnings in warned.items() if warnings} or None)
    # The last network is the one that goes on.
    counted = next((left[stage] for stage in ("finetune", "prune") if stage in left), {})
    for key, values in (("audit", counted), ("scoring", left.get("prune", {}))):
        if key in values or not values:
            _write(folder / f"{key}.json", values.get(key))


def write_metrics(folder: Path, histories: Mapping[str, list[dict]]) -> None:
    """metrics.jsonl: one line per finished epoch of each stage, in order."""
    lines = [
        json.dumps({"stage": stage, **epoch})
        for stage in STAGES
        for epoch in histories.get(stage, [])
    ]
    _hold(folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))


def require_known(folder: Path, left: Left) -> None:
    """Raises ValueError where a file is damaged that these networks are too old to know."""
    for key in _KNOWN_BY:
        path = folder / f"{key}.json"
        if path.exists() and not _knows(left, key):
            read_record(path)


def _knows(left: Left, key: str) -> bool:
    return all(key in left[stage] for stage in _KNOWN_BY[key] if stage in left)


def _write(path: Path, content: Any) -> None:
    _hold(path, "" if content is None else to_json(content))


def _hold(path: Path, text: str) -> None:
    """Let a file hold `text`; of nothing to say there is no file."""
    if not text:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.read_bytes() != text.encode():
        write(path, text)


def read_record(path: Path) -> dict:
    """A JSON object that a run wrote; ValueError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged; restore it or choose another --out")
    return content
