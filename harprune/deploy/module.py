# SPDX-License-Identifier: Apache-2.0
"""A network back in torch, zeros and all: for runtimes that read ONNX or `torch.export`."""

import torch
from torch import Tensor, nn

from harprune.deploy.network import Network, vector_names
from harprune.kernels import graph as g
from harprune.kernels.graph import Node, Shape


class Module(nn.Module):
    """A plain module that computes what `network` does: images [n, c, h, w] -> logits [n, classes].

    Its convolutions are smaller than the model's where the network was shrunk, and dense.
    """

    def __init__(self, network: Network):
        super().__init__()
        shapes = network.graph.shapes
        self._nodes, self._output = network.graph.nodes, network.graph.outputs[0]
        self.steps = nn.ModuleList(
            _module(node, network, shapes[node.sources[0]]) for node in self._nodes
        )

    def forward(self, images: Tensor) -> Tensor:
        values = [images]
        for node, step in zip(self._nodes, self.steps):
            values.append(step(*(values[s] for s in node.sources)))
        return values[self._output].flatten(1)


def _module(node: Node, network: Network, source: Shape) -> nn.Module:
    vectors = [torch.from_numpy(network.vectors[name].copy()) for name in vector_names(node)]
    match node:
        case g.Convolution(window=w):
            weight = torch.from_numpy(network.weight(node.name).copy())
            uneven = any(w.extra)
            made = nn.utils.skip_init(
                nn.Conv2d,
                source.channels,
                len(weight),
                w.size,
                w.stride,
                0 if uneven else w.padding,
                w.dilation,
                node.groups,
                bias=node.bias,
            )
            made.weight = nn.Parameter(weight)
            if node.bias:
                made.bias = nn.Parameter(vectors[0])
            if not uneven:
                return made
            (top, left), (bottom, right) = w.padding, (p + e for p, e in zip(w.padding, w.extra))
            return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), made)
        case g.Affine():
            return _Affine(*vectors)
        case g.Rectifier():
            return nn.ReLU()
        case g.Swish():
            return nn.SiLU()
        case g.Rectifier6():
            return nn.ReLU6()
        case g.MaxPool(window=w):
            return nn.MaxPool2d(w.size, w.stride, w.padding)
        case g.MeanPool(window=w, adaptive=True):
            return nn.AdaptiveAvgPool2d(tuple(n // k for n, k in zip(source[1:], w.size)))
        case g.MeanPool(window=w):
            return nn.AvgPool2d(w.size, w.stride, w.padding, count_include_pad=node.full_area)
        case g.Flatten():
            return _Flatten()
        case g.Sum():
            return _Sum()
    return _Concatenation()


class _Affine(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("shift", shift.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, 1, 1)


class _Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class _Concatenation(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)
