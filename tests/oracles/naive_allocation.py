# SPDX-License-Identifier: Apache-2.0
"""The allocations, weight by weight."""


def naive_lamp(weights: dict[str, list[float]], count: int) -> dict[str, int]:
    """Kept weights per layer: score every weight by w^2 / (sum of the layer's w^2 not below it)."""
    scored = []
    for name, values in weights.items():
        ordered = sorted(values, key=abs)
        for i, w in enumerate(ordered):
            scored.append((w * w / sum(v * v for v in ordered[i:]), name))
    return _top(scored, weights, count)


def naive_global(weights: dict[str, list[float]], count: int) -> dict[str, int]:
    """Kept weights per layer when the largest of all are kept."""
    scored = [(abs(w), name) for name, values in weights.items() for w in values]
    return _top(scored, weights, count)


def naive_erk(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Raise the common factor by tiny steps until the total is spent; no layer above 1."""
    sizes, raw = {}, {}
    for name, shape in shapes.items():
        size = 1
        for n in shape:
            size *= n
        sizes[name], raw[name] = size, sum(shape) / size
    total = density * sum(sizes.values())
    low, high = 0.0, 1e9
    for _ in range(300):
        factor = (low + high) / 2
        spent = sum(min(1.0, factor * raw[n]) * sizes[n] for n in sizes)
        low, high = (factor, high) if spent < total else (low, factor)
    return {n: min(1.0, high * raw[n]) for n in sizes}


def naive_igq(sizes: dict[str, int], density: float) -> dict[str, float]:
    """n / (f n + 1) weights kept, f by bisection on a logarithmic scale."""
    total = density * sum(sizes.values())
    low, high = 1e-12, 1e12
    for _ in range(400):
        f = (low * high) ** 0.5
        spent = sum(n / (f * n + 1) for n in sizes.values())
        low, high = (f, high) if spent > total else (low, f)
    return {name: 1 / (high * n + 1) for name, n in sizes.items()}


def _top(scored, weights, count) -> dict[str, int]:
    kept = dict.fromkeys(weights, 0)
    for _, name in sorted(scored, key=lambda pair: -pair[0])[:count]:
        kept[name] += 1
    return kept
