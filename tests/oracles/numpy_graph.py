# SPDX-License-Identifier: Apache-2.0
"""A slow NumPy twin of the kernels: a graph's forward pass, written as its nodes are defined."""

import numpy as np

from harprune.kernels import graph as g


def evaluate(graph: g.Graph, inputs: list, weights: dict, vectors: dict) -> list[np.ndarray]:
    """Outputs for `inputs` [n, c, h, w]; weights dense, vectors as "NAME/bias" and so on."""
    values = dict(zip(graph.inputs, inputs))
    for node in graph.nodes:
        sources = [values[s] for s in node.sources]
        values[node.out] = _node(node, sources, graph.shapes[node.out], weights, vectors)
    return [values[v] for v in graph.outputs]


def _node(node, sources, shape, weights, vectors):
    x = sources[0]
    match node:
        case g.Convolution():
            return _convolve(node, x, shape, weights[node.name], vectors.get(f"{node.name}/bias"))
        case g.Affine():
            scale, shift = (vectors[f"{node.name}/{n}"] for n in ("scale", "shift"))
            return x * scale[:, None, None] + shift[:, None, None]
        case g.Rectifier():
            return np.where(x > 0, x, 0.0)
        case g.Swish():
            return x / (1 + np.exp(-x))
        case g.Rectifier6():
            return np.clip(x, 0.0, 6.0)
        case g.Sum():
            return x + sources[1]
        case g.Concatenation():
            return np.concatenate(sources, axis=1)
        case g.Flatten():
            return x.reshape(len(x), -1, 1, 1)
        case g.MaxPool():
            return _pool(node.window, x, shape, lambda seen, area: seen.max(axis=(2, 3)))
        case g.MeanPool(full_area=True):
            return _pool(node.window, x, shape, lambda seen, area: seen.sum(axis=(2, 3)) / area)
        case g.MeanPool():
            return _pool(node.window, x, shape, lambda seen, area: seen.mean(axis=(2, 3)))
    raise TypeError(node)


def _convolve(node, x, shape, weight, bias):
    w, per_group = node.window, len(weight) // node.groups
    channels = weight.shape[1]
    (py, px), (sy, sx), (dy, dx) = w.padding, w.stride, w.dilation
    after_y, after_x = py + w.extra[0], px + w.extra[1]
    wide = np.pad(x, ((0, 0), (0, 0), (py, after_y), (px, after_x)))
    out = np.zeros((len(x), *shape))
    for o, i, j in np.ndindex(*shape):
        first = o // per_group * channels
        rows, columns = i * sy + dy * np.arange(w.size[0]), j * sx + dx * np.arange(w.size[1])
        seen = wide[:, first : first + channels][:, :, rows][:, :, :, columns]
        out[:, o, i, j] = (seen * weight[o]).sum(axis=(1, 2, 3))
    return out if bias is None else out + bias[:, None, None]


def _pool(window, x, shape, reduce):
    (ky, kx), (sy, sx), (py, px) = window.size, window.stride, window.padding
    out = np.zeros((len(x), *shape))
    for i, j in np.ndindex(*shape[1:]):
        top, left = i * sy - py, j * sx - px
        rows = slice(max(top, 0), min(top + ky, x.shape[2]))
        columns = slice(max(left, 0), min(left + kx, x.shape[3]))
        out[:, :, i, j] = reduce(x[:, :, rows, columns], ky * kx)
    return out
