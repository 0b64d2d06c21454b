# SPDX-License-Identifier: Apache-2.0
"""Regions of a model as torch modules: tensors in, tensors out, the kernels between.

`FunctionRegion` is a fixed function, with a gradient to its inputs where one is wanted.
`TrainingRegion` runs in training mode, batch norm included, and also gives the gradients to all
weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from harprune.kernels import graph as g
from harprune.kernels import native
from harprune.kernels.forward import Forward
from harprune.kernels.gradient import Gradient
from harprune.kernels.graph import Graph, Shape
from harprune.kernels.lists import NEARLY_DENSE, Pattern, shape_of
from harprune.kernels.plan import Plan
from harprune.kernels.runtime import Executable, Memory
from harprune.sparsity.frozen import FrozenLayer, FrozenNorm
from harprune.sparsity.kinds import RunningNorm, Trained, Weighted
from harprune.sparsity.masks import Held
from harprune.sparsity.regions import Role, output_axes, translate


def kernels_for(dtype: torch.dtype) -> native.Kernels | None:
    """The kernels that compute in `dtype`, or None."""
    if dtype == torch.float32:
        return native.best()
    return native.named("float64") if dtype == torch.float64 else None


def pattern_of(weight: np.ndarray) -> Pattern:
    """Where the weights of a layer, or its mask, are not zero."""
    index = np.flatnonzero(weight)
    return Pattern(shape_of(weight), None if len(index) > NEARLY_DENSE * weight.size else index)


def kept_values(weight: np.ndarray, pattern: Pattern) -> np.ndarray:
    """The weights that `pattern` keeps, in ascending position."""
    flat = weight.reshape(-1)
    return flat if pattern.index is None else flat[pattern.index]


def array(tensor: Tensor) -> np.ndarray:
    """A tensor's values as a contiguous array, shared where that can be."""
    return tensor.detach().contiguous().numpy()


class _Region(nn.Module, ABC):
    """A part of a traced network, with the layers that it holds."""

    def __init__(self, region: fx.GraphModule, role: Role):
        super().__init__()
        # In a tuple, so that the model's layers do not become submodules.
        self._region, self._role = (region,), role
        self._axes = output_axes(region)

    def forward(self, *inputs: Tensor):
        """As the region in torch: one output, or a tuple of several."""
        if len({len(x) for x in inputs}) > 1:
            # One of them is no batch of images, but something for torch to broadcast.
            return self._region[0](*inputs)
        outputs = self.outputs(_computable(inputs))
        return outputs[0] if len(outputs) == 1 else outputs

    @abstractmethod
    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the kernels make of batches of as many images each, in a type of theirs."""

    def translated(self, inputs: tuple[Tensor, ...]) -> tuple[Graph, dict[str, nn.Module]]:
        """The region's graph for inputs of this shape, and its layers by name."""
        (region,) = self._region
        shapes = [Shape(*x.shape[1:]) for x in inputs]
        return translate(region, dict(region.named_modules()), self._role, shapes)

    @staticmethod
    def kernels(inputs: tuple[Tensor, ...]) -> native.Kernels:
        """What computes in the type of `inputs`; whoever makes a region has asked for it."""
        return cast(native.Kernels, kernels_for(inputs[0].dtype))

    def shaped(self, outputs: list[np.ndarray]) -> tuple[Tensor, ...]:
        """Outputs as tensors: maps, or vectors without their unit axes."""
        tensors = [torch.from_numpy(y) for y in outputs]
        return tuple(
            y.flatten(1) if n == 2 else y for y, n in zip(tensors, self._axes, strict=True)
        )


def _computable(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs in a type that kernels compute in; what torch runs may have rounded some."""
    double = any(x.dtype == torch.float64 for x in inputs)
    return tuple(x.to(torch.float64 if double else torch.float32) for x in inputs)


Runs = TypeVar("Runs", Forward, Gradient)


class FunctionRegion(_Region):
    """Part of a frozen network; `version` tells when its layers have been read anew."""

    def __init__(self, region: fx.GraphModule, role: Role, version: Callable[[], int]):
        super().__init__(region, role)
        self.version = version
        self._readings: dict[tuple, _Reading] = {}

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return cast(tuple[Tensor, ...], _Function.apply(self, *inputs))
        executable = self.executable(inputs, Forward)
        return self.shaped(executable.forward([array(x) for x in inputs]))

    def executable(self, inputs: tuple[Tensor, ...], kind: type[Runs]) -> Runs:
        """What runs inputs of this shape, with the weights of now."""
        threads, shapes = torch.get_num_threads(), (tuple(x.shape[1:]) for x in inputs)
        key = (kind, inputs[0].dtype, threads, *shapes)
        if key not in self._readings:
            graph, layers = self.translated(inputs)
            make = partial(kind, graph, self.kernels(inputs), threads=threads)
            self._readings[key] = _Reading(make, layers)
        return self._readings[key].at(self.version())


@dataclass(eq=False)
class _Reading(Generic[Runs]):
    """What runs a region for inputs of one shape, with the weights that were read last.

    Attributes:
        make: (patterns, vectors) -> it, without values of weights.
        layers: the frozen layers that these are read from, among other modules.
    """

    make: Callable[..., Runs]
    layers: Mapping[str, nn.Module]
    version: int = -1
    executable: Runs | None = None

    def at(self, version: int) -> Runs:
        """The executable with the weights of `version`, which are those of now."""
        if self.executable is None or self.version != version:
            self.executable, self.version = self._read(self.executable), version
        return self.executable

    def _read(self, before: Runs | None) -> Runs:
        """The weights of now, in `before` where all masks are still the same."""
        known = before.patterns if before is not None else {}
        patterns, values, vectors = {}, {}, {}
        for name, layer in self.layers.items():
            if isinstance(layer, FrozenLayer):
                patterns[name] = _pattern(Held(layer.weight, layer.kept), known.get(name))
                values[name] = kept_values(array(layer.weight), patterns[name])
                if layer.bias is not None:
                    vectors[f"{name}/bias"] = array(layer.bias)
            elif isinstance(layer, FrozenNorm):
                vectors[f"{name}/scale"] = array(layer.scale)
                vectors[f"{name}/shift"] = array(layer.shift)
        if before is None or any(known[n] is not p for n, p in patterns.items()):
            executable = self.make(patterns, vectors)
        else:
            executable = before
            for name, vector in vectors.items():
                executable.vectors[name][...] = vector
        for name, kept in values.items():
            executable.load(name, kept)
        return executable


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, region: FunctionRegion, *inputs: Tensor):
        ctx.executable, ctx.region = region.executable(inputs, Gradient), region
        ctx.version = region.version()
        outputs, ctx.memory = ctx.executable.forward([array(x) for x in inputs])
        ctx.shapes = [x.shape for x in inputs]
        return region.shaped(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        memory, ctx.memory = _taken(ctx), None
        if ctx.version != ctx.region.version():
            raise RuntimeError("the twin has read new weights since this forward pass")
        results = ctx.executable.backward(memory, [array(x) for x in gradients])
        ctx.executable.release(memory)
        return None, *(torch.from_numpy(x).view(s) for x, s in zip(results, ctx.shapes))


def _taken(ctx) -> Any:
    """What the pass forwards has left in `ctx.memory`."""
    if ctx.memory is None:
        raise RuntimeError("a region on the kernels can be differentiated only once")
    return ctx.memory


class TrainingRegion(_Region):
    """Part of a model in training mode.

    Args:
        region: its nodes, with the model's own layers.
        role: what they are to the kernels.
    """

    def __init__(self, region: fx.GraphModule, role: Role):
        super().__init__(region, role)
        self._plans: dict[tuple, tuple[Plan, dict[str, Trained]]] = {}
        self._executables: dict[Plan, Executable] = {}

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        plan, layers = self._plan(inputs)
        held = {name: Held.of(cast(Weighted, layers[name])) for name in _convolutions(plan)}
        weights = [held[n].tensor if n in held else layer.weight for n, layer in layers.items()]
        biases = [layer.bias for layer in layers.values()]
        outputs = _Training.apply(self, plan, layers, held, *inputs, *weights, *biases)
        return cast(tuple[Tensor, ...], outputs)

    def _plan(self, inputs: tuple[Tensor, ...]) -> tuple[Plan, dict[str, Trained]]:
        wanted = tuple(x.requires_grad for x in inputs)
        key = (inputs[0].dtype, wanted, *(tuple(x.shape[1:]) for x in inputs))
        if key not in self._plans:
            graph, nodes = self.translated(inputs)
            named = [n.name for n in graph.nodes if isinstance(n, g.Named)]
            layers = {name: cast(Trained, nodes[name]) for name in named}
            gradients = [v for v, want in zip(graph.inputs, wanted) if want]
            plan = Plan(graph, self.kernels(inputs), training=True, gradients=gradients)
            self._plans[key] = (plan, layers)
        return self._plans[key]

    def executable(
        self, plan: Plan, layers: Mapping[str, Trained], held: Mapping[str, Held]
    ) -> Executable:
        """`plan` with the weights of now; lists are made anew only where masks changed."""
        executable = self._executables.get(plan)
        known = executable.patterns if executable is not None else {}
        patterns = {name: _pattern(weights, known.get(name)) for name, weights in held.items()}
        if executable is None or any(known[n] is not p for n, p in patterns.items()):
            vectors = _vectors(plan, layers)
            executable = Executable(plan, patterns, vectors)
            self._executables[plan] = executable
        executable.threads = torch.get_num_threads()
        for name, weights in held.items():
            executable.load(name, _values(weights, patterns[name]))
            bias = layers[name].bias
            if bias is not None:
                executable.vectors[f"{name}/bias"][...] = array(bias)
        return executable


def _pattern(held: Held, known: Pattern | None) -> Pattern:
    """Where the weights are kept; `known` if it was made from the same fixed mask."""
    if held.kept is None:
        return pattern_of(array(held.tensor))
    if known is not None and known.source is held.kept and known.version == held.kept._version:
        return known
    pattern = pattern_of(array(held.kept))
    # The version, because a state dict may be loaded into the mask.
    pattern.source, pattern.version = held.kept, held.kept._version
    return pattern


def _values(held: Held, pattern: Pattern) -> np.ndarray:
    """The weights that `pattern` keeps, in ascending position."""
    if held.kept is None or not held.compact:
        return kept_values(array(held.tensor), pattern)
    if pattern.index is not None:
        return array(held.tensor)
    return _scattered(array(held.tensor), np.flatnonzero(array(held.kept)), held.kept.numel())


def _scattered(values: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    full = np.zeros(size, values.dtype)
    full[index] = values
    return full


def _convolutions(plan: Plan) -> list[str]:
    return [n.name for n in plan.graph.nodes if isinstance(n, g.Convolution)]


def _vectors(plan: Plan, layers: Mapping[str, Trained]) -> dict[str, np.ndarray]:
    """Room for the vectors that are computed in each step, and for the biases."""
    vectors, dtype = {}, plan.kernels.dtype
    for node in plan.graph.nodes:
        if not isinstance(node, g.Named):
            continue
        names = ()
        if isinstance(node, g.Normalisation):
            names = ("scale", "shift", "back_scale", "back_shift", "back_slope")
        elif layers[node.name].bias is not None:
            names = ("bias",)
        for name in names:
            channels = plan.graph.shapes[node.out].channels
            vectors[f"{node.name}/{name}"] = np.zeros(channels, dtype)
    return vectors


class _Training(torch.autograd.Function):
    """Its tensors are the inputs, then what learns of each layer's weight, then each one's bias."""

    @staticmethod
    def forward(ctx, region: TrainingRegion, plan: Plan, layers, held, *tensors):
        ctx.layers, ctx.held = layers, held
        ctx.executable = executable = region.executable(plan, layers, held)
        ctx.low = torch.is_autocast_enabled("cpu") and plan.kernels.has_bf16
        ctx.statistics = statistics = {}

        def normalise(name: str, sums: np.ndarray, many: int) -> None:
            statistics[name] = _normalise(layers[name], executable.vectors, name, sums, many)

        inputs = tensors[: len(plan.graph.inputs)]
        outputs, ctx.memory = executable.forward([array(x) for x in inputs], normalise)
        ctx.shapes = [x.shape for x in inputs]
        return region.shaped(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        memory, ctx.memory = _taken(ctx), None
        to_inputs, to_scale, to_bias = _run_back(ctx, memory, gradients)

        def to_weight(name: str) -> np.ndarray:
            return _weight_gradient(ctx, name, memory) if name in ctx.held else to_scale[name]

        def tensor(gradient: np.ndarray) -> Tensor:
            # Sums over a batch are float64.
            return torch.from_numpy(gradient.astype(ctx.executable.plan.kernels.dtype, copy=False))

        needed = ctx.needs_input_grad[4:]  # after region, plan, layers and held
        first, last = len(ctx.shapes), len(ctx.shapes) + len(ctx.layers)
        found = iter(to_inputs)  # of those that want one
        results: list[Tensor | None] = [
            tensor(next(found)).view(shape) if want else None
            for want, shape in zip(needed, ctx.shapes)
        ]
        results += [
            tensor(to_weight(name)) if want else None
            for want, name in zip(needed[first:last], ctx.layers)
        ]
        results += [
            tensor(to_bias[name]) if want else None for want, name in zip(needed[last:], ctx.layers)
        ]
        ctx.executable.release(memory)
        return None, None, None, None, *results


def _run_back(ctx, memory: Memory, gradients: tuple[Tensor, ...]):
    """The gradients to inputs, to the scales of batch norms, and to their shifts and all biases.

    The last two by layer; those to kept weights can be taken from `memory` afterwards.
    """
    vectors, to_scale, to_bias = ctx.executable.vectors, {}, {}

    def normalise(name: str, sums: np.ndarray, many: int) -> None:
        layer = name.removesuffix("/gradient")
        if layer in ctx.statistics:
            found = _denormalise(vectors, layer, ctx.statistics[layer], sums, many)
            to_scale[layer], to_bias[layer] = found
        else:
            to_bias[layer] = sums[:, 0]

    to_inputs = ctx.executable.backward(memory, [array(x) for x in gradients], normalise)
    return to_inputs, to_scale, to_bias


def _weight_gradient(ctx, name: str, memory: Memory) -> np.ndarray:
    """In the shape of what learns; zero at pruned weights where the mask is fixed."""
    executable, held = ctx.executable, ctx.held[name]
    pattern = executable.patterns[name]
    if held.kept is not None and pattern.index is not None:
        kept = executable.weight_gradient(name, memory, native.KEPT)
        if held.compact:
            return kept
        return _scattered(kept, pattern.index, held.kept.numel()).reshape(held.kept.shape)
    which = native.ALL_BF16 if ctx.low else native.ALL
    full = executable.weight_gradient(name, memory, which)
    if held.kept is not None and held.compact:
        return full[np.flatnonzero(array(held.kept))]
    return full.reshape(held.tensor.shape)


class _Statistics(NamedTuple):
    """Of one batch, a number a channel: mean, 1 / deviation, and the factor of the batch norm."""

    mean: np.ndarray
    inverse: np.ndarray
    gamma: np.ndarray | float


def _normalise(
    norm: RunningNorm, vectors: Mapping[str, np.ndarray], name: str, sums: np.ndarray, many: int
) -> _Statistics:
    """Set scale and shift from the batch's sums, and move the running statistics as torch does.

    `sums` are of x and of x squared, over `many` values of each channel.
    """
    if many < 2:
        raise ValueError(
            f"batch norm {name} sees one value per channel; train with at least two images a batch"
        )
    mean = sums[:, 0] / many
    variance = np.maximum(sums[:, 1] / many - mean**2, 0.0)
    inverse = 1.0 / np.sqrt(variance + norm.eps)
    gamma = 1.0 if norm.weight is None else array(norm.weight)
    scale = gamma * inverse
    shift = -mean * scale + (0.0 if norm.bias is None else array(norm.bias))
    vectors[f"{name}/scale"][...], vectors[f"{name}/shift"][...] = scale, shift
    with torch.no_grad():
        norm.num_batches_tracked += 1
        rate = norm.momentum
        if rate is None:
            rate = 1.0 / float(norm.num_batches_tracked)
        unbiased = variance * (many / (many - 1))
        for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.lerp_(torch.as_tensor(now, dtype=running.dtype), rate)
    return _Statistics(mean, inverse, gamma)


def _denormalise(
    vectors: Mapping[str, np.ndarray],
    name: str,
    statistics: _Statistics,
    sums: np.ndarray,
    many: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Set the backward vectors; returns the gradients to scale and shift.

    `sums` are of g and of g x, over `many` values of each channel.

    With x' = (x - mean) inverse and g the gradient of gamma x' + beta, the gradient to x is
    gamma inverse (g - mean(g) - x' mean(g x')): a multiple of g, one of x, and a constant.
    """
    mean, inverse, gamma = statistics
    to_shift = sums[:, 0]
    to_scale = inverse * (sums[:, 1] - mean * to_shift)
    scale = gamma * inverse
    slope = -scale * inverse * to_scale / many
    vectors[f"{name}/back_scale"][...] = scale
    vectors[f"{name}/back_slope"][...] = slope
    vectors[f"{name}/back_shift"][...] = -scale * to_shift / many - slope * mean
    return to_scale, to_shift
