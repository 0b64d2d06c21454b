# SPDX-License-Identifier: Apache-2.0
"""Run a masked model at the cost of its density: the twin, and the training twin.

Inside an attack, and in evaluation, a model is a fixed function in eval mode: weights and masks do
not change and nobody asks for their gradients. `twin` builds that function once from any traceable
model, with masks multiplied out and batch norm folded into the convolution before it.
`Twin.current()` reads the weights anew, once per optimiser step. On a CPU it runs on the sparse
kernels, elsewhere in torch with channels innermost. The result equals the model's to float
tolerance, and gradients to the input flow through it.

`training_twin` is a model in training mode on the kernels, with gradients to its parameters.
"""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, fx, nn

from harprune.kernels import Backend, native
from harprune.kernels import graph as g
from harprune.modes import eval_mode
from harprune.sparsity.bridge import FunctionRegion, TrainingRegion, kernels_for
from harprune.sparsity.frozen import Frozen, frozen, role_of_frozen
from harprune.sparsity.kinds import is_running_norm, role_of_layer
from harprune.sparsity.regions import split
from harprune.sparsity.tracing import Untraceable, traced


def require_backend(execution: Backend) -> None:
    """Raise ValueError for what is no `Backend`, and for "sparse" without compiled kernels."""
    if execution not in get_args(Backend):
        known = ", ".join(get_args(Backend))
        raise ValueError(f"execution = {execution!r} is unknown; choose one of {known}")
    if execution == "sparse" and native.best() is None:
        raise ValueError(
            "execution 'sparse' needs the compiled kernels, which this installation lacks; install "
            "a C compiler and reinstall harprune, or choose 'auto' or 'dense'"
        )


class Twin:
    """The eval-mode function of a model, rebuilt from its weights on demand; see `twin`."""

    def __init__(self, network: fx.GraphModule, dtype: torch.dtype | None, sparse: bool):
        self._frozen = [m for m in network.modules() if isinstance(m, Frozen)]
        self._version = 0
        dense = _Cast(network, dtype)
        self._function = _OnKernels(dense, lambda: self._version) if sparse else dense
        self._dtype = dtype
        self._layout = torch.contiguous_format if sparse else torch.channels_last

    @torch.no_grad()
    def current(self) -> nn.Module:
        """The function at the model's present weights, masks and batch-norm statistics.

        The same module each time, without parameters of its own; logits in the dtype of x.
        """
        self._version += 1
        for module in self._frozen:
            module.read(self._dtype, self._layout)
        return self._function


def twin(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    execution: Backend = "auto",
    told: Callable[[str], None] = lambda reason: None,
) -> Twin | None:
    """The `Twin` of `model`, or None where its own forward has to serve.

    Args:
        dtype: precision of the whole function, such as torch.bfloat16; None keeps the model's.
            A lower one makes a different, cheaper attack, run by torch: a choice to record.
        execution: what runs it on a CPU, see `Backend`.
        told: called with the reason where there is no twin.

    Raises:
        ValueError: as `require_backend`.
    """
    require_backend(execution)
    try:
        network = frozen(model)
    except Untraceable as reason:
        told(str(reason))
        return None
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    sparse = on_cpu and dtype is None and execution != "dense"
    return Twin(network, dtype, sparse and native.best() is not None)


class _Cast(nn.Module):
    """Images in the layout and precision of the twin; logits back in the precision of x."""

    def __init__(self, network: fx.GraphModule, dtype: torch.dtype | None):
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.dtype is None else x.to(self.dtype)
        if x.dim() == 4:
            inner = inner.contiguous(memory_format=torch.channels_last)
        return self.network(inner).to(x.dtype)


class _OnKernels(nn.Module):
    """A frozen network whose regions run on the kernels, split anew for each shape of images."""

    def __init__(self, dense: _Cast, version: Callable[[], int]):
        super().__init__()
        self.dense, self._version_read = dense, version
        self._networks: dict[tuple, fx.GraphModule | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = (x.dtype, *x.shape[1:])
        if key not in self._networks:
            self._networks[key] = self._split(x)
        network = self._networks[key]
        return self.dense(x) if network is None else network(x)

    def _split(self, x: Tensor) -> fx.GraphModule | None:
        if x.device.type != "cpu" or kernels_for(x.dtype) is None:
            return None
        whole = self.dense.network
        network = fx.GraphModule(whole, _copy(whole.graph))
        found = split(network, x[:1].detach(), role_of_frozen, self._region)
        return network if found else None

    def _region(self, region: fx.GraphModule) -> FunctionRegion:
        return FunctionRegion(region, role_of_frozen, self._version_read)


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


class TrainingTwin(nn.Module):
    """A model that runs on the kernels while it trains, and as itself in eval mode."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._networks: dict[tuple, fx.GraphModule | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        """As the model's own forward; parameters get their gradients as usual."""
        if not self.model.training or x.device.type != "cpu" or kernels_for(x.dtype) is None:
            return self.model(x)
        key = (x.dtype, *x.shape[1:], _modes(self.model))
        if key not in self._networks:
            self._networks[key] = self._split(x)
        network = self._networks[key]
        return self.model(x) if network is None else network(x)

    def _split(self, x: Tensor) -> fx.GraphModule | None:
        try:
            network = traced(self.model)
        except Untraceable:
            return None
        # A batch norm in eval mode keeps its statistics: torch runs it, between regions.
        asleep = {m for m in self.model.modules() if not m.training and is_running_norm(m)}

        def role(module: nn.Module) -> type[g.Node] | None:
            return None if module in asleep else role_of_layer(module)

        def make(region: fx.GraphModule) -> TrainingRegion:
            return TrainingRegion(region, role)

        # Shapes come from a run in eval mode: one image must not move batch-norm statistics.
        with eval_mode(self.model, network):
            found = split(network, x[:1].detach(), role, make)
        return network if found else None


def training_twin(model: nn.Module, *, execution: Backend = "auto") -> TrainingTwin | None:
    """The `TrainingTwin` of `model`, or None where torch runs it.

    Raises:
        ValueError: as `require_backend`.
    """
    require_backend(execution)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if execution == "dense" or native.best() is None or not on_cpu:
        return None
    try:
        traced(model)
    except Untraceable:
        return None
    return TrainingTwin(model)


def _modes(model: nn.Module) -> tuple[bool, ...]:
    return tuple(m.training for m in model.modules())
