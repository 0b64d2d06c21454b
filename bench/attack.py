# SPDX-License-Identifier: Apache-2.0
"""Time attacks on pruned networks: the sparse kernels against torch, network by network and layer.

    python bench/attack.py --json results/attack.json
    python bench/attack.py --tables --autoattack 100 --data images --weights finetuned.safetensors

Table `pgd` times PGD-10 on a baked network: its twin on the kernels (sparse), its twin in torch
(dense) and the network itself (model); the variants take turns, `ratio` is to dense and
`ratio_model` to the network in the same round. Table `layers` times forward pass and gradient to
the input of each shape of convolution, and says at which density the kernels tie with torch and
with themselves when a layer counts as dense, which is what `NEARLY_DENSE` decides. `--autoattack`
runs AutoAttack on both twins and counts the images on which they end differently.

Results are compared first: a variant that computes something else ends the run.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.measuring import (
    circumstances,
    interleaved,
    kernel_calls,
    overlap,
    speed,
    summary,
    table,
    write_rows,
)
from harprune.kernels import native
from harprune.kernels.graph import Convolution, Graph, Shape, Window
from harprune.kernels.lists import NEARLY_DENSE, Pattern
from harprune.kernels.plan import Plan
from harprune.kernels.runtime import Executable
from harprune.methods.base import Budget
from harprune.methods.oneshot import Magnitude
from harprune.models import create_model
from harprune.recipe import adversarial, networks
from harprune.recipe.pruning import ALLOCATIONS
from harprune.robustness.autoattack import AutoAttack
from harprune.robustness.images import subset
from harprune.robustness.threat import Linf, parse_epsilon
from harprune.sparsity import masks
from harprune.sparsity.audit import audit
from harprune.sparsity.execution import require_backend, twin
from harprune.sparsity.layers import prunable_layers
from harprune.training.data import load_dataset
from harprune.training.splits import to_float

LEAST_OVERLAP = 0.99
"""Least overlap of a variant's logits and gradient with the network's own."""
LAYOUTS = (torch.contiguous_format, torch.channels_last)
REPEATS = 5
LAYER_DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
AUTOATTACK_DENSITY = 0.01


def network(arch: str, width: int | None, density: float, allocation: str | None) -> nn.Module:
    """A random network, pruned by magnitude and baked, in eval mode; density 1 prunes nothing."""
    torch.manual_seed(0)
    model = create_model(arch, 10, width=width)
    if density < 1.0:
        method = Magnitude()
        method.attach(model, Budget(density, allocation=ALLOCATIONS[allocation]))
        method.settle(model)
        masks.bake(model)
    return calibrated(model).eval()


@torch.no_grad()
def calibrated(model: nn.Module) -> nn.Module:
    """Batch-norm statistics of random images, without which a sparse random network is constant."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches seen, so of this one
    model.train()(torch.rand(64, 3, 32, 32))
    return model


def functions_of(model: nn.Module) -> dict[str, nn.Module]:
    """The twins of `model` on the kernels and in torch."""
    return {e: twin(model, execution=e).current() for e in ("sparse", "dense")}


def require_same(functions: dict[str, nn.Module], model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise ValueError where logits or input gradients are not those of `model`.

    So it does where the sparse function did not run on the kernels, or another one did.
    """

    def answers(function: nn.Module) -> tuple[Tensor, Tensor]:
        images = x.clone().requires_grad_()
        logits = function(images)
        return logits, torch.autograd.grad(F.cross_entropy(logits, y), images)[0]

    wanted = answers(model)
    for name, function in functions.items():
        with kernel_calls() as ran:
            found = answers(function)
        if bool(ran) != (name == "sparse"):
            raise ValueError(f"{name}: the kernels ran {ran or 'nothing'}; its times mean nothing")
        for what, a, b in zip(("logits", "input gradient"), found, wanted):
            if not overlap(a, b) >= LEAST_OVERLAP:
                raise ValueError(
                    f"{name}: its {what} overlaps the network's by {overlap(a, b):.3f}, less than "
                    f"{LEAST_OVERLAP}; the variant is wrong and its times mean nothing"
                )


# PGD on whole networks --------------------------------------------------------------------------


def pgd_rows(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each network, density, allocation, batch and variant."""
    for arch in options.arch:
        for density in options.density:
            for allocation in options.allocation if density < 1.0 else [None]:
                model = network(arch, options.width, density, allocation)
                for batch in options.batch:
                    same = {"arch": arch, "width": options.width, "batch": batch}
                    same |= {"density": density, "allocation": allocation}
                    for row in pgd_variants(model, batch, options.rounds):
                        yield same | row


PGD_COLUMNS = ("arch", "batch", "density", "allocation", "variant", "seconds", "min", "max")
PGD_COLUMNS += ("ratio", "ratio_model")


def pgd_variants(model: nn.Module, batch: int, rounds: int) -> list[dict]:
    """PGD-10 on one network: a row for each variant."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    functions = functions_of(model)
    require_same(functions, model, x, y)
    functions["model"] = model
    attack = adversarial.attack("pgd-10", Linf(8 / 255))

    def attacked(function: nn.Module) -> Callable[[], Tensor]:
        return lambda: attack(function, x, y)

    taken = interleaved({name: attacked(f) for name, f in functions.items()}, rounds)
    return [
        {
            "variant": name,
            **summary(own, taken["dense"]),
            "ratio_model": speed(own, taken["model"]),
        }
        for name, own in taken.items()
    ]


# Single layers ----------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A convolution without bias, and the map that it reads."""

    channels: int
    filters: int
    window: Window
    height: int
    width: int

    @property
    def source(self) -> Shape:
        return Shape(self.channels, self.height, self.width)

    @property
    def target(self) -> Shape:
        return Shape(self.filters, *self.window.over(self.height, self.width))

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.filters, self.channels, *self.window.size)

    def __str__(self) -> str:
        sides = "x".join(map(str, self.weight))
        return f"{sides} /{self.window.stride[0]} on {self.height}x{self.width}"


def layers_of(arch: str, width: int | None) -> list[Layer]:
    """The distinct shapes of convolution in a network for 32 x 32 images, in its order."""
    model, found = create_model(arch, 10, width=width).eval(), {}

    def see(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        window = Window(module.kernel_size, module.stride, module.padding)
        sides = inputs[0].shape[2:]
        found[Layer(module.in_channels, module.out_channels, window, *sides)] = None

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(see)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return list(found)


def layer_rows(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each shape of convolution in the first network."""
    arch, batch = options.arch[0], max(options.batch)
    for layer in layers_of(arch, options.width):
        same = {"arch": arch, "width": options.width, "batch": batch}
        same |= {"layer": str(layer), "rounds": options.rounds}
        yield same | layer_row(layer, batch, options.rounds)


LAYER_COLUMNS = ("layer", "torch_seconds", "layout", "dense_seconds", "tie_torch", "tie_dense")


def layer_row(layer: Layer, batch: int, rounds: int) -> dict:
    """Medians in seconds, without what packs images into blocks, and the densities that tie."""
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((batch, *s), np.float32) for s in (layer.source, layer.target))
    weight = rng.standard_normal(layer.weight, np.float32)
    order = rng.permutation(weight.size)
    calls: dict = {
        "source": packing(layer.source, x),
        "target": packing(layer.target, g),
        "dense": on_kernels(layer, None, weight, x, g),
    }
    for density in LAYER_DENSITIES:
        index = np.sort(order[: max(1, round(density * weight.size))])
        calls[density] = on_kernels(layer, index, weight, x, g)
    for layout in LAYOUTS:
        calls[layout] = in_torch(layer, weight, x, g, layout)
    taken = interleaved({name: repeated(call) for name, call in calls.items()}, rounds)
    # Each packs and unpacks once forwards and once backwards; the layer does half of either.
    packed = [(a + b) / 2.0 for a, b in zip(taken["source"], taken["target"])]

    def bare(name) -> float:
        return statistics.median(a - b for a, b in zip(taken[name], packed)) / REPEATS

    layout = min(LAYOUTS, key=lambda layout: statistics.median(taken[layout]))
    own = statistics.median(taken[layout]) / REPEATS
    sparse = [(density, bare(density)) for density in LAYER_DENSITIES]
    return {
        "torch_seconds": own,
        "layout": str(layout).removeprefix("torch."),
        "packing_seconds": statistics.median(packed) / REPEATS,
        "dense_seconds": bare("dense"),
        "sparse_seconds": {str(density): taken for density, taken in sparse},
        "tie_torch": tie(sparse, own),
        "tie_dense": tie(sparse, bare("dense")),
        "nearly_dense": NEARLY_DENSE,
    }


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """`REPEATS` calls in one: the smallest layers take less than a clock can tell."""

    def calls() -> None:
        for _ in range(REPEATS):
            call()

    return calls


def tie(points: Sequence[tuple[float, float]], other: float) -> float:
    """The density at which (density, seconds) first reach `other`, on a line between points.

    0 where the least density is slower already, 1 where none is.
    """
    if points[0][1] >= other:
        return 0.0
    for (a, fast), (b, slow) in pairwise(points):
        if slow >= other:
            return a + (b - a) * (other - fast) / (slow - fast)
    return 1.0


def on_kernels(
    layer: Layer, index: np.ndarray | None, weight: np.ndarray, x: np.ndarray, g: np.ndarray
) -> Callable[[], object]:
    """Forward pass and gradient to the input with the weights at `index`, all of them when None.

    Raises:
        ValueError: the result is not torch's.
    """
    graph = Graph()
    source, target = graph.value(layer.source), graph.value(layer.target)
    graph.inputs, graph.outputs = [source], [target]
    graph.nodes = [Convolution((source,), target, "layer", layer.window, bias=False)]
    call = executed(graph, {"layer": Pattern(layer.weight, index)}, x, g)
    kept = weight.ravel() if index is None else weight.ravel()[index]
    call.executable.load("layer", kept)
    full = np.zeros(weight.size, np.float32)
    full[slice(None) if index is None else index] = kept
    wanted = in_torch(layer, full.reshape(weight.shape), x, g, torch.contiguous_format)()
    for a, b in zip(call(), wanted, strict=True):
        if not overlap(torch.from_numpy(a), b) >= LEAST_OVERLAP:
            raise ValueError(
                f"layer {layer}: the kernels' result is not torch's; its times mean nothing"
            )
    return call


def packing(shape: Shape, x: np.ndarray) -> Callable[[], object]:
    """Images into blocks and back, twice: a network that does nothing, forwards and backwards."""
    graph = Graph()
    value = graph.value(shape)
    graph.inputs = graph.outputs = [value]
    call = executed(graph, {}, x, x)
    call()
    return call


class executed:
    """One forward and backward run of a graph, repeatable."""

    def __init__(self, graph: Graph, patterns: dict, x: np.ndarray, g: np.ndarray):
        plan = Plan(graph, native.best(), gradients=graph.inputs)
        threads = torch.get_num_threads()
        self.executable, self._x, self._g = Executable(plan, patterns, {}, threads=threads), x, g

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        (y,), memory = self.executable.forward([self._x])
        (gradient,) = self.executable.backward(memory, [self._g])
        self.executable.release(memory)
        return y, gradient


def in_torch(
    layer: Layer, weight: np.ndarray, x: np.ndarray, g: np.ndarray, layout: torch.memory_format
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same in torch, every weight multiplied; called once, so that it has chosen its way."""
    w, x, g = (torch.from_numpy(a).contiguous(memory_format=layout) for a in (weight, x, g))
    x.requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, w, stride=layer.window.stride, padding=layer.window.padding)
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    call()
    return call


# AutoAttack -------------------------------------------------------------------------------------


def autoattack_rows(options: argparse.Namespace) -> Iterator[dict]:
    """AutoAttack on the dense and on the sparse twin of one network, a row each."""
    if options.weights is None:
        model = network(options.network, options.width, AUTOATTACK_DENSITY, "erk")
    else:
        model = create_model(options.network, 10, width=options.width).eval()
        networks.load_network_weights(model, options.weights)
    x, y = images(options.autoattack, options.data)
    trained = options.weights is not None and y is not None
    with torch.no_grad():
        y = y if trained else model(x).argmax(1)
    functions = functions_of(model)
    require_same(functions, model, x[:32], y[:32])
    attack = AutoAttack(Linf(parse_epsilon(options.epsilon)), batch_size=max(options.batch))
    outcomes: dict[str, Tensor] = {}

    def attacked(name: str) -> Callable[[], None]:
        def call() -> None:
            x_adv = attack(functions[name], x, y)
            with torch.no_grad():
                outcomes[name] = model(x_adv).argmax(1) == y  # the verdict is the model's own

        return call

    taken = interleaved({name: attacked(name) for name in functions}, 1)
    for name, own in taken.items():
        yield {
            "network": options.network,
            "width": options.width,
            "density": audit(prunable_layers(model)).density,
            "weights": options.weights and Path(options.weights).name,
            "images": "random" if options.data is None else "cifar10 test",
            "labels": "true" if trained else "the network's own",
            "epsilon": options.epsilon,
            "variant": name,
            "number": len(x),
            **summary(own, taken["dense"]),
            "standing": int(outcomes[name].sum()),
            "differ": int((outcomes[name] != outcomes["dense"]).sum()),
        }


AUTOATTACK_COLUMNS = ("network", "density", "number", "labels", "variant", "seconds", "ratio")
AUTOATTACK_COLUMNS += ("standing", "differ")


def images(number: int, folder: Path | None) -> tuple[Tensor, Tensor | None]:
    """CIFAR-10 test images with their labels, or random ones without."""
    if folder is None:
        torch.manual_seed(1)
        return torch.rand(number, 3, 32, 32), None
    test = load_dataset("cifar10", folder).test
    index = subset(test.labels, number, 0)
    return to_float(test.images[index]), test.labels[index]


TABLES = {
    "pgd": (pgd_rows, PGD_COLUMNS),
    "layers": (layer_rows, LAYER_COLUMNS),
    "autoattack": (autoattack_rows, AUTOATTACK_COLUMNS),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tables", nargs="*", default=["pgd", "layers"], choices=["pgd", "layers"])
    add("--arch", nargs="+", default=["resnet18", "vgg16_bn"], help="networks; layers of the first")
    add("--width", type=int, help="channels of the first stage; else the usual")
    add("--density", type=float, nargs="+", default=[1.0, 0.4, 0.2, 0.1, 0.01], help="kept share")
    add("--allocation", nargs="+", default=["uniform", "erk"], choices=["uniform", "erk", "lamp"])
    add("--batch", type=int, nargs="+", default=[32, 128], help="images in a batch")
    add("--autoattack", type=int, default=0, metavar="N", help="also attack N images")
    add("--network", default="resnet18", help="network of --autoattack")
    add("--weights", help="its weights, taken as they are; else random ones, 1 %% of them kept")
    add("--data", type=Path, help="folder of CIFAR-10, whose test images it gets; else random ones")
    add("--epsilon", default="8/255", help="its radius; less for random networks, which break")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--rounds", type=int, default=3, help="interleaved rounds")
    add("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    require_backend("sparse")
    torch.set_num_threads(options.threads)
    where, rows = circumstances(), []
    wanted = [*options.tables, *(["autoattack"] if options.autoattack else [])]
    for name in wanted:
        make, columns = TABLES[name]
        made = []
        for row in make(options):
            made.append({"table": name, **row})
            write_rows(options.json, rows + [row | where for row in made])
            print(*table([row], columns)[1:], file=sys.stderr)
        rows += [row | where for row in made]
        print(*table(made, columns), sep="\n", end="\n\n")
    if "layers" in wanted:
        print(f"NEARLY_DENSE is {NEARLY_DENSE}: a layer that keeps more runs as a dense one")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"attack: {error}")
