# SPDX-License-Identifier: Apache-2.0
"""What a network costs as a differentiable function of its layers' densities.

A cost is built from the price of one weight in each layer: 1 for parameters, the number of
multiply-adds it takes part in for FLOPs. Prices are *read off one forward pass*, so they exist for
any model, without a table of feature-map sizes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from harprune.modes import eval_mode
from harprune.sparsity.layers import Layer

Cost = Callable[[Mapping[str, Tensor]], Tensor]


def parameter_prices(layers: Mapping[str, Layer]) -> dict[str, int]:
    """A weight is a weight: 1 in every layer."""
    return dict.fromkeys(layers, 1)


def multiply_add_prices(
    model: nn.Module, layers: Mapping[str, Layer], example: Tensor
) -> dict[str, int]:
    """Multiply-adds per image in which one weight of each layer takes part.

    Args:
        example: one batch `(N, ...)` as the model takes it; its size sets the feature maps.

    Raises:
        ValueError: the forward pass never uses a layer.
    """
    # Gradients on, so that attention takes its open path instead of one fused operator.
    with parametrize.cached(), torch.enable_grad():
        # Under a mask, each place of a shared weight holds a product of its own.
        storages = {
            _storage(getattr(module, tensor_name)): name
            for name, layer in layers.items()
            for module, tensor_name in layer.places
        }
        counter = _MultiplyAdds(storages)
        with eval_mode(model), counter:
            model(example)
    unused = [name for name in layers if not counter.total[name]]
    if unused:
        raise ValueError(f"{unused[0]} takes no part in the forward pass; exclude it from pruning")
    return {name: counter.total[name] // (layers[name].size * len(example)) for name in layers}


def weighted_cost(layers: Mapping[str, Layer], prices: Mapping[str, int]) -> Cost:
    """densities -> fraction of the dense cost, sum(a_l n_l p_l) / sum(n_l p_l), a scalar tensor."""
    dense = {name: layer.size * prices[name] for name, layer in layers.items()}
    total = sum(dense.values())

    def cost(densities: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([densities[name] * (dense[name] / total) for name in dense]).sum()

    return cost


def mixed_prices(
    model: nn.Module, layers: Mapping[str, Layer], example: Tensor, share: float
) -> dict[str, int]:
    """Parameters and multiply-adds as one currency, each dense network costing the same in both.

    Args:
        example: as for `multiply_add_prices`.
        share: weight of the multiply-adds in [0, 1]; the rest weighs parameters.
    """
    work = multiply_add_prices(model, layers, example)
    mean = sum(layers[n].size * work[n] for n in layers) / sum(
        layer.size for layer in layers.values()
    )
    # Prices are whole numbers; a thousandth of a mean weight's price is fine enough.
    return {n: max(1, round(1000 * (1 - share + share * work[n] / mean))) for n in layers}


class _MultiplyAdds(TorchDispatchMode):
    """Counts multiply-adds of convolutions and matrix products by the weight they use."""

    def __init__(self, storages: Mapping[int, str]):
        super().__init__()
        self.storages = storages
        self.total = dict.fromkeys(storages.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator is torch.ops.aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            # Each weight meets every output position once; transposed, every input position.
            positions = x if transposed else out
            spatial = positions.shape[2:].numel() * positions.shape[0]
            self._add(weight, weight.numel() * spatial)
        elif operator in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self._add_product(args[0], args[1], out)
        elif operator in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
            self._add_product(args[1], args[2], out)
        return out

    def _add_product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        work = out.numel() * left.shape[-1]
        self._add(right if _storage(right) in self.storages else left, work)

    def _add(self, weight: Tensor, work: int) -> None:
        name = self.storages.get(_storage(weight))
        if name is not None:
            self.total[name] += work


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
