# SPDX-License-Identifier: Apache-2.0
"""Clean accuracy of the headline's networks on all test images, pair by pair.

    python bench/headline_clean.py

Each network's outcomes are kept beside it, in results/headline/NAME-clean; what lies there is not
computed again. Needs CIFAR-10 (`harprune data cifar10`).
"""

from pathlib import Path

from harprune.outcomes import Evaluation, paired
from harprune.recipe.text import make_recipe
from harprune.run.evaluate import evaluate_recipe

NETWORKS = Path("results/headline")
DENSE = "resnet18-dense"
DENSITIES = ("0.01", "0.001")


def main() -> None:
    dense = clean(DENSE, model="resnet18", weights=f"{NETWORKS}/{DENSE}.safetensors")
    for density in DENSITIES:
        names = sorted(path.stem for path in NETWORKS.glob(f"resnet18-*-{density}.hpn"))
        pruned = {name: clean(name, model=f"{NETWORKS}/{name}.hpn") for name in names}
        found = {DENSE: dense, **pruned}
        harp = found[f"resnet18-harp-{density}"]
        for name, result in found.items():
            print(f"{name}: {result.lines()[0]}")
            if result is harp:
                continue
            pair = paired(result, harp, "clean")
            low, high = (100 * end for end in pair.interval)
            print(
                f"  HARP's lead: {100 * pair.difference:+.2f} [{low:+.2f}, {high:+.2f}], "
                f"{pair.won} won, {pair.lost} lost, p = {pair.p_value:.2g}"
            )


def clean(name: str, *, model: str, **more: str) -> Evaluation:
    content = {
        "name": name,
        "data": {"name": "cifar10"},
        "model": {"name": model, **more},
        "attack": {"attacks": []},
    }
    recipe = make_recipe(content, source="bench/headline_clean.py")
    return evaluate_recipe(recipe, NETWORKS / f"{name}-clean")


if __name__ == "__main__":
    main()
