# SPDX-License-Identifier: Apache-2.0
"""Networks to test with, drawn at random or pruned in torch, and what torch makes of a graph."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from harprune.deploy.network import Network, made_shape, vector_names
from harprune.kernels import graph as g
from harprune.kernels import native
from harprune.kernels.graph import Graph, Shape, Window
from harprune.kernels.lists import sift
from harprune.kernels.runtime import Executable
from harprune.models.normalised import Normalised
from harprune.sparsity.allocation import erk
from harprune.sparsity.extraction import extract
from harprune.sparsity.layers import prunable_layers, weights


class Drawn:
    """A network that grows by random nodes; some filters have no weights, some numbers are 0."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        shape = Shape(int(self.random.integers(1, 5)), *map(int, self.random.integers(3, 9, 2)))
        self.graph = Graph([shape], [], [0])
        self.weights, self.vectors = {}, {}

    def add(self, kind, *sources: int, filters: int = 0, **fields) -> int:
        """The value that the new node makes."""
        node = kind(sources, len(self.graph.shapes), **fields)
        shape = made_shape(node, [self.graph.shapes[s] for s in sources], filters)
        if kind is g.Convolution:
            channels = self.graph.shapes[sources[0]].channels // node.groups
            self.weights[node.name] = self._sparse((filters, channels, *node.window.size))
        for name in vector_names(node):
            self.vectors[name] = self._vector(shape.channels)
        self.graph.nodes.append(node)
        return self.graph.value(shape)

    def convolution(self, source: int, filters: int, window: Window, groups: int = 1) -> int:
        name = f"layer_{len(self.graph.nodes)}"
        bias = bool(self.random.random() < 0.8)
        return self.add(
            g.Convolution,
            source,
            filters=filters,
            name=name,
            window=window,
            groups=groups,
            bias=bias,
        )

    def finished(self, classes: int = 3) -> Network:
        value = len(self.graph.shapes) - 1
        if self.graph.shapes[value][1:] != (1, 1):
            value = self.add(g.Flatten, value)
        self.graph.outputs = [self.convolution(value, classes, Window((1, 1)))]
        found = {name: sift(weight) for name, weight in self.weights.items()}
        return Network(
            self.graph,
            {name: pattern for name, (pattern, _) in found.items()},
            {name: values for name, (_, values) in found.items()},
            self.vectors,
            tuple(f"class {n}" for n in range(classes)),
            {"trained on": "nothing", "seed": 1.5},
        )

    def _sparse(self, shape) -> np.ndarray:
        weight = self.random.standard_normal(shape)
        weight *= self.random.random(shape) < self.random.choice([0.05, 0.3, 1.0])
        weight *= (self.random.random(shape[:1]) < 0.7).reshape(-1, 1, 1, 1)
        return weight.astype(np.float32)

    def _vector(self, channels: int) -> np.ndarray:
        vector = self.random.standard_normal(channels)
        return (vector * (self.random.random(channels) < 0.7)).astype(np.float32)


def drawn(seed: int, nodes: int = 10) -> Network:
    """A random network; the same for the same seed."""
    made = Drawn(seed)
    random, shapes = made.random, made.graph.shapes
    for _ in range(nodes):
        source = int(random.integers(max(0, len(shapes) - 4), len(shapes)))
        shape = shapes[source]
        like = [v for v, s in enumerate(shapes) if s[1:] == shape[1:]]
        match random.integers(9):
            case 0 | 1 | 2:
                size = tuple(int(min(n, random.integers(1, 4))) for n in shape[1:])
                window = Window(
                    size,
                    tuple(map(int, random.integers(1, 3, 2))),
                    tuple(int(random.integers(0, k)) for k in size),
                    extra=tuple(map(int, random.integers(0, 2, 2))),
                )
                groups = int(random.choice([n for n in (1, 2, 3, 4) if shape.channels % n == 0]))
                made.convolution(source, groups * int(random.integers(1, 4)), window, groups)
            case 3:
                made.add(g.Rectifier, source)
            case 4:
                made.add(g.Affine, source, name=f"affine_{len(shapes)}")
            case 5:
                same = [v for v in like if shapes[v] == shape]
                made.add(g.Sum, source, int(random.choice(same)))
            case 6:
                others = [int(v) for v in random.choice(like, 2)]
                made.add(g.Concatenation, source, *others)
            case 8:
                made.add(g.Swish if random.random() < 0.5 else g.Rectifier6, source)
            case 7:
                size = tuple(min(2, n) for n in shape[1:])
                window = Window(size, (1, 2), tuple(int(k // 2) for k in size))
                if random.random() < 0.5:
                    made.add(g.MaxPool, source, window=window)
                else:
                    area = bool(random.random() < 0.5)
                    made.add(g.MeanPool, source, window=window, full_area=area)
    return made.finished()


def by_torch(network: Network, images: np.ndarray) -> np.ndarray:
    """The outputs (N, channels, height, width) in float64, node by node, as the graph reads."""
    values = [torch.from_numpy(images).double()]
    for node in network.graph.nodes:
        x = [values[s] for s in node.sources]
        vectors = [torch.from_numpy(network.vectors[n].copy()) for n in vector_names(node)]
        vectors = [v.double() for v in vectors]
        match node:
            case g.Convolution(window=w):
                weight = torch.from_numpy(network.weight(node.name).copy()).double()
                bias = vectors[0] if vectors else None
                (top, left), (below, beside) = w.padding, w.extra
                wide = F.pad(x[0], (left, left + beside, top, top + below))
                y = F.conv2d(wide, weight, bias, w.stride, 0, w.dilation, node.groups)
            case g.Affine():
                y = x[0] * vectors[0].view(-1, 1, 1) + vectors[1].view(-1, 1, 1)
            case g.Rectifier():
                y = x[0].relu()
            case g.Swish():
                y = F.silu(x[0])
            case g.Rectifier6():
                y = F.relu6(x[0])
            case g.Sum():
                y = x[0] + x[1]
            case g.Concatenation():
                y = torch.cat(x, 1)
            case g.MaxPool(window=w):
                y = F.max_pool2d(x[0], w.size, w.stride, w.padding)
            case g.MeanPool(window=w):
                area = node.full_area
                y = F.avg_pool2d(x[0], w.size, w.stride, w.padding, count_include_pad=area)
            case g.Flatten():
                y = x[0].flatten(1)[:, :, None, None]
        values.append(y)
    return values[network.graph.outputs[0]].numpy()


def in_blocks(network: Network, kernels: native.Kernels | None = None) -> Executable:
    """All of `network` in blocks, as C runs it; its runner may take rows, which add otherwise."""
    executable = network.runner(kernels=kernels).whole_in_blocks
    assert isinstance(executable, Executable)
    return executable


def logits(network: Network, images: np.ndarray) -> np.ndarray:
    """What blocks make of `images`, (N, channels)."""
    return in_blocks(network).forward([images])[0][0].reshape(len(images), -1)


def identical(one: Network, other: Network) -> bool:
    """Whether two networks are the same to the bit."""
    patterns = [(n, p.shape, p.index) for n, p in one.patterns.items()]
    return (
        one.graph == other.graph
        and one.classes == other.classes
        and one.metadata == other.metadata
        and set(one.patterns) == set(other.patterns)
        and all(other.patterns[n].shape == shape for n, shape, _ in patterns)
        and all(
            (index is None) == (other.patterns[n].index is None)
            and (index is None or np.array_equal(index, other.patterns[n].index))
            for n, _, index in patterns
        )
        and _same_bytes(one.values, other.values)
        and _same_bytes(one.vectors, other.vectors)
    )


def _same_bytes(one, other) -> bool:
    return set(one) == set(other) and all(v.tobytes() == other[n].tobytes() for n, v in one.items())


@torch.no_grad()
def pruned(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """`model` in eval mode with random weights zero by ERK, and batch norms that have seen data."""
    torch.manual_seed(seed)
    layers = prunable_layers(model)
    for name, share in erk(weights(layers), density).items():
        weight = layers[name].parameter
        kept = torch.zeros(weight.numel())
        kept[torch.randperm(weight.numel())[: round(share * weight.numel())]] = 1
        weight.mul_(kept.view_as(weight))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.3, 0.3)
    return model.eval()


@torch.no_grad()
def without_filters(model: nn.Module, share: float) -> nn.Module:
    """A random `share` of the filters of each convolution set to zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight[torch.rand(len(module.weight)) < share] = 0
    return model


class Branching(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, a sum and a flatten; 20 x 20 images."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grouped = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=2, dilation=2, groups=4, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.point = nn.Conv2d(width, width, 1)
        self.down = nn.MaxPool2d(3, 2, 1)
        self.mix = nn.Conv2d(3 * width, width, 3, 2)
        self.mean = nn.AvgPool2d(2)
        self.head = nn.Linear(width * 2 * 2, 5)

    def forward(self, x):
        x = self.stem(x)
        y = torch.cat([self.grouped(x), torch.relu(self.depthwise(x) + self.point(x))], 1)
        return self.head(torch.flatten(self.mean(torch.relu(self.mix(self.down(y)))), 1))


def deployed(model: nn.Module, side: int = 32) -> Network:
    """The network that `model` is for colour images of `side` x `side`."""
    return Network(*extract(model, torch.rand(1, 3, side, side)))


def normalised(model: nn.Module) -> Normalised:
    return Normalised(model, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)).eval()
