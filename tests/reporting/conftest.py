# SPDX-License-Identifier: Apache-2.0
"""Run folders made up for the tests, complete or not, in the format that a run writes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

STAGES = ("pretrain", "prune", "finetune")
NETWORKS = ("dense", "pruned", "finetuned")
LAYERS = {"stem": (8, 1, 3, 3), "block.0.conv": (16, 8, 3, 3), "fc": (10, 64)}
THREAT = {"norm": "linf", "epsilon": "8/255"}


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """`make_run(name, method=..., seed=..., until=...)` writes a run folder and returns it."""

    def make(name: str = "run", **choices) -> Path:
        return write_run(tmp_path / name, **choices)

    return make


def write_run(
    folder: Path,
    *,
    method: str = "harp",
    allocation: str | None = "erk",
    density: float = 0.05,
    seed: int = 0,
    until: str = "attack",
    size: int = 200,
    attacks: tuple[str, ...] = ("pgd-20", "autoattack"),
    layers: dict[str, tuple[int, ...]] = LAYERS,
    options: dict | None = None,
    failing: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    quality: float = 0.5,
    epochs: int = 4,
) -> Path:
    """A run that stopped after the stage `until`; `quality` is its robust accuracy, about."""
    folder.mkdir(parents=True)
    recipe = {
        "name": folder.name,
        "seed": seed,
        "data": {"name": "digits"},
        "model": {"name": "small_cnn"},
        "threat": THREAT,
        "budget": {"density": density, **({"allocation": allocation} if allocation else {})},
        "method": {"name": method, **(options or {})},
    }
    write_json(folder / "recipe.json", recipe)
    environment = {
        "command": f"harprune run recipes/{folder.name}.toml --out runs/{folder.name}",
        "commit": "0123456789ab",
        "python": "3.11.7",
        "versions": {"harprune": "0.1.0", "torch": "2.13.0"},
        "machine": {"system": "Linux x86_64", "cores": 2, "accelerator": None},
    }
    write_json(folder / "environment.json", environment)
    done = STAGES if until == "attack" else STAGES[: STAGES.index(until) + 1]
    lines = [
        json.dumps(epoch) for stage in done for epoch in metrics(stage, layers, density, epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for network in NETWORKS[: len(done)]:
        (folder / f"{network}.safetensors").write_bytes(b"tensors")
    if "prune" in done:
        write_json(folder / "audit.json", audit(layers, density))
    if until == "attack":
        for model in ("dense", "finetuned"):
            robust = 0.6 if model == "dense" else quality
            noise = np.random.default_rng([seed, int(1000 * robust)])
            attack(folder / "attack" / model, noise, robust, size, attacks, failing, flags)
    return folder


def metrics(stage: str, layers: dict, density: float, epochs: int) -> Iterator[dict]:
    """Lines of metrics.jsonl that rise with the epochs; density falls while pruning."""
    for epoch in range(epochs):
        progress = (epoch + 1) / epochs
        line = {
            "stage": stage,
            "epoch": epoch,
            "loss": 2.0 - progress,
            "clean": 0.4 + 0.5 * progress,
        }
        line |= {"robust": 0.2 + 0.3 * progress, "learning_rate": 0.1 * (1 - progress)}
        line |= {"passes": 1000 * (epoch + 1)}
        if stage == "prune":
            now = max(density, 0.9 ** (8 * epoch) * 10 * density)
            line |= {"density": now, "gamma": 0.01 * (epoch + 1), "penalty": now / density - 1}
            line |= {"densities": dict.fromkeys(layers, now), "budget_met": now == density}
        yield line


def audit(layers: dict, density: float) -> dict:
    """Small layers keep more than large ones."""
    totals = {name: int(np.prod(shape)) for name, shape in layers.items()}
    scale = density * sum(totals.values()) / sum(total**0.5 for total in totals.values())
    kept = {name: min(total, int(scale * total**0.5)) for name, total in totals.items()}
    total = sum(totals.values())
    return {
        "denominator": "prunable weights",
        "total": total,
        "kept": sum(kept.values()),
        "budget": int(density * total),
        "density": sum(kept.values()) / total,
        "layers": {
            name: {"shape": list(shape), "total": totals[name], "kept": kept[name]}
            for name, shape in layers.items()
        },
        "allocations": {
            "uniform": dict.fromkeys(layers, density),
            "erk": {n: min(1.0, density * 30 * t**-0.5 * 3) for n, t in totals.items()},
            "lamp": {n: min(1.0, density * 8 * t**-0.25) for n, t in totals.items()},
        },
    }


def attack(
    folder: Path,
    noise: np.random.Generator,
    robust: float,
    size: int,
    attacks: tuple[str, ...],
    failing: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
) -> None:
    """evaluation.json and outcomes.npz that agree with each other."""
    ease = noise.random(size)
    outcomes = {"clean": ease < robust + 0.3}
    for number, name in enumerate(attacks):
        outcomes[name] = ease < robust + (0.05 if name != "autoattack" else 0.0) - 0.01 * number
    attacked = {name: measure(outcomes[name]) | {"attack": f"{name}()"} for name in attacks}
    if "autoattack" in attacked:
        attacked["autoattack"]["parts"] = {"apgd-ce": 0.75, "square": outcomes["autoattack"].mean()}
    evaluation = {
        "model": folder.name,
        "threat": "Linf(epsilon=0.0314)",
        "seed": 0,
        "size": size,
        "clean": measure(outcomes["clean"]),
        "attacks": attacked,
        "worst_case": measure(np.logical_and.reduce(list(outcomes.values()))),
        "checks": {
            name: {"passed": name not in failing, "detail": f"measured {name}"}
            for name in ("gradients", "monotone in epsilon", "in the box")
        },
        "flags": list(flags),
    }
    folder.mkdir(parents=True)
    write_json(folder / "evaluation.json", evaluation)
    arrays = {"index": np.arange(size), "labels": np.arange(size) % 10, **outcomes}
    np.savez(folder / "outcomes.npz", **arrays)


def measure(outcome: np.ndarray) -> dict:
    accuracy = float(outcome.mean())
    half = 1.96 * (accuracy * (1 - accuracy) / len(outcome)) ** 0.5
    interval = [max(0.0, accuracy - half), min(1.0, accuracy + half)]
    counts = {"correct": int(outcome.sum()), "size": len(outcome)}
    return {"accuracy": accuracy, "interval": interval, "balanced": accuracy - 0.001, **counts}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1))
