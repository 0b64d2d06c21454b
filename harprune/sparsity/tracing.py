# SPDX-License-Identifier: Apache-2.0
"""A model's trace, where it says all that the model does; else the reason why it does not.

torch.fx calls `forward` once, on stand-ins for tensors, and writes down what happens to them. What
the call does besides is lost, or is fixed as it was that once, without a word: a backward of the
user's own, hooks, buffers that change, what is drawn at random or counted in Python. `traced` looks
for these and refuses, so that whoever runs a trace need not ask.
"""

import contextlib
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partialmethod
from inspect import signature
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from harprune.randomness import python_generators_kept
from harprune.user_code import in_a_line, place_of

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_ACTIVATIONS = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu_, "relu_"), torch.relu),
    **dict.fromkeys((nn.SiLU, F.silu), F.silu),
    **dict.fromkeys((nn.ReLU6, F.relu6), F.relu6),
}
"""What may work in place, and the function that never does."""
_RESHAPES = {"view": "reshape", "view_as": "reshape_as"}
_VIEWS = {
    *("getitem", "getattr", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "transpose", "permute", "movedim", "swapaxes", "t", "expand"),
    *("expand_as", "narrow", "select", "diagonal", "chunk", "split", "unbind", "detach"),
    *("contiguous", "to", "type_as", "float", "double"),
}
"""Names of functions and methods that may give (a view of) their first argument."""
_VIEWING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONSTANT = "_tensor_constant"
"""How the names of tensors begin that a trace holds and the model does not."""
_NOT_THE_USERS = (str(Path(torch.__file__).parent), __file__, contextlib.__file__)


class Untraceable(ValueError):
    """Why a model has no trace to trust: torch has to run the model itself."""


class _Unwritten(TraceError):
    """The model does what a trace does not say: (what it does, what to do about it)."""


_USUAL_ADVICE = "take control flow that depends on values out of its forward"
_OF_A_BATCH_NORM = "leave running statistics to a module of torch.nn"
_DRAWING = "draw for a tensor, as torch.rand_like or nn.Dropout do"


def traced(model: nn.Module) -> fx.GraphModule:
    """A trace of `model`, in its present mode, without changes in place.

    A trace says of `y = relu_(x)` only that y comes from x, not that x is y from then on. What
    runs its nodes in another order, or makes a new tensor of y, would compute something else; so
    each change makes a tensor, which later readers get. Views become reshapes, which do not ask in
    which order their tensor lies in memory; modules get by position what they were given by name.

    The model, and all generators of random numbers, are left as they were.

    Raises:
        Untraceable: torch.fx cannot trace it, or the trace would not be all that it does.
    """
    _require_plain_calls(model)
    network = _recorded(model)
    constants = _constants(network)
    # Numbers may come from a generator of the model's own, whose state nobody knows.
    again = _constants(_recorded(model)) if constants else {}
    same = (torch.equal(tensor, again[name]) for name, tensor in constants.items())
    if constants.keys() != again.keys() or not all(same):
        raise _untraceable("it makes another constant each time", _DRAWING)
    _make_functional(network)
    network.recompile()
    return network


def wrapped(module: nn.Module) -> str | None:
    """Where torch.compile's and data-parallel wrappers hold what they wrap; None for no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if hasattr(module, "_orig_mod") else None


def _untraceable(what: str, advice: str) -> Untraceable:
    return Untraceable(f"the model cannot be traced by torch.fx: {what}; {advice}")


def _require_plain_calls(model: nn.Module) -> None:
    """Raise Untraceable where calling a module is more than its class's `forward`."""
    for name, module in model.named_modules():
        what = f"{name or 'the model itself'} ({type(module).__name__})"
        if (inner := wrapped(module)) is not None:
            raise _untraceable(f"{what} is a wrapper", f"give what it wraps, its .{inner}")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise _untraceable(f"{what} has hooks, which a trace loses", "take them away")
        if any(method in vars(module) for method in ("forward", "_conv_forward")):
            raise _untraceable(f"{what} has a forward of its own", "write it into its class")


def _recorded(model: nn.Module) -> fx.GraphModule:
    """What fx writes down of one call; nothing of it is left in the model."""
    tracer = _Tracer()
    try:
        with _unmoved_generators(), _unchanged_attributes(model), _refused_functions():
            network = fx.GraphModule(model, tracer.trace(model))
    except Exception as error:  # whatever the model's own control flow raises on fx's proxies
        what, advice = f"it raises {type(error).__name__} ({in_a_line(error)})", _USUAL_ADVICE
        if isinstance(error, _Unwritten):
            what, advice = error.args
        part, _ = next(reversed(tracer.module_stack.values()), ("", None))
        place = place_of(error, beyond=_NOT_THE_USERS) + (f", in its part {part}" if part else "")
        raise _untraceable(what + place, advice) from error
    if any(tensor.requires_grad for tensor in _constants(network).values()):
        raise _untraceable(
            "it reads a masked weight, computed already, outside the weight's layer",
            "call the layer instead",
        )
    return network


def _constants(network: fx.GraphModule) -> dict[str, Tensor]:
    """Tensors that the call made of nothing that fx follows, by name."""
    found = {str(n.target) for n in network.graph.nodes if n.op == "get_attr"}
    return {name: getattr(network, name) for name in found if name.startswith(CONSTANT)}


class _Proxy(fx.Proxy):
    """Tells `x += y` from `x = x + y`."""

    def _changed(self, call: Callable, other) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", call, (self, other), {})

    __iadd__ = partialmethod(_changed, operator.iadd)
    __isub__ = partialmethod(_changed, operator.isub)
    __imul__ = partialmethod(_changed, operator.imul)
    __itruediv__ = partialmethod(_changed, operator.itruediv)


class _Tracer(fx.Tracer):
    """Follows buffers as it does parameters: they change, and so does what is computed of them."""

    proxy_buffer_attributes = True

    def __init__(self):
        super().__init__()
        self._contexts = _contexts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _contexts() != self._contexts:
            raise _Unwritten(
                "it switches gradients or autocast, which a trace loses",
                "write detach() for no_grad, and leave autocast to the caller",
            )
        return super().create_node(*args, **kwargs)


def _contexts() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), *autocast


# What the call may not do besides -------------------------------------------------------------


@contextmanager
def _unmoved_generators() -> Iterator[None]:
    """Raise where random numbers are drawn during the call: a trace would repeat them for ever."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()

    def states() -> list[Any]:
        numpy = [np.asarray(part).tolist() for part in np.random.get_state()]
        cuda = [torch.cuda.get_rng_state(device).tolist() for device in devices]
        return [random.getstate(), numpy, torch.get_rng_state().tolist(), cuda]

    before = states()
    with torch.random.fork_rng(devices), python_generators_kept():
        yield
        if states() != before:
            raise _Unwritten("it draws random numbers while it is traced", _DRAWING)


@contextmanager
def _unchanged_attributes(model: nn.Module) -> Iterator[None]:
    """Raise where the call leaves anything in a module; put back what was there."""

    def marks(module: nn.Module) -> dict[str, tuple[int, int]]:
        held = {k: v for k, v in vars(module).items() if not k.startswith(CONSTANT)}
        return {k: (id(v), v._version if isinstance(v, Tensor) else 0) for k, v in held.items()}

    before = [(module, dict(vars(module)), marks(module)) for module in model.modules()]
    try:
        yield
        for module, _, known in before:
            for key, mark in marks(module).items():
                if known.get(key) != mark:
                    what = f"it changes {key!r} of {type(module).__name__}, which a trace loses"
                    raise _Unwritten(what, "leave nothing behind in forward")
    finally:
        for module, held, _ in before:
            for key in vars(module).keys() - held.keys():
                del vars(module)[key]
            vars(module).update(held)


_ONE_AT_A_TIME = RLock()


@contextmanager
def _refused_functions() -> Iterator[None]:
    """Raise where the call meets a `torch.autograd.Function`: fx follows its forward alone.

    A model may hold on to a bound `apply`, so the guard stands in what that hands on to.
    """
    above: Any = torch.autograd.Function.__base__

    def apply(cls, *args, **kwargs):
        if any(isinstance(argument, fx.Proxy) for argument in args):
            raise _Unwritten(
                f"it calls {cls.__name__}, whose backward a trace loses",
                "use torch's own operations, as nn.SiLU for a swish; to pass gradients straight "
                "through, write x + (f(x) - x).detach()",
            )
        return super(above, cls).apply(*args, **kwargs)

    with _ONE_AT_A_TIME:
        above.apply = classmethod(apply)
        try:
            yield
        finally:
            del above.apply


# Changes in place -----------------------------------------------------------------------------


def _make_functional(network: fx.GraphModule) -> None:
    modules, seen = dict(network.named_modules()), set()
    for node in list(network.graph.nodes):
        seen.add(node)
        if node.op == "call_module" and node.kwargs:
            bound = signature(modules[str(node.target)].forward).bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
        if _moves_statistics(node):
            raise _untraceable("it moves running statistics by F.batch_norm", _OF_A_BATCH_NORM)
        if (changed := _changed(node, modules)) is not None:
            _require_own(changed, modules, seen)
            changed.replace_all_uses_with(node, delete_user_cb=lambda user: user not in seen)
            _make_pure(node, changed, modules)
        elif node.op == "call_method" and node.target in _RESHAPES and not _is_cast(node):
            node.target = _RESHAPES[node.target]


def _moves_statistics(node: fx.Node) -> bool:
    if node.target is not F.batch_norm:
        return False
    given = signature(F.batch_norm).bind(*node.args, **node.kwargs).arguments
    return bool(given.get("training")) and given["running_mean"] is not None


def _changed(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The tensor that `node` changes in place."""
    changed = node.kwargs.get("out")
    if changed is None and node.args and _is_in_place(node, modules):
        changed = node.args[0]
    return changed if isinstance(changed, fx.Node) else None


def _require_own(changed: fx.Node, modules: Mapping[str, nn.Module], seen: set[fx.Node]) -> None:
    """Raise Untraceable where a change in place is seen by others than readers of `changed`.

    They are the model, whose tensor it may be, and later readers of what it is a view of.
    """
    node = changed
    while node.args and isinstance(node.args[0], fx.Node) and _is_view(node, modules):
        node = node.args[0]
        if any(user not in seen for user in node.users):
            what = "it changes a part of a tensor in place and reads the whole"
            raise _untraceable(what, "make a new tensor")
    if node.op == "get_attr":
        what = f"it changes its {node.target} in place, which a trace loses"
        raise _untraceable(what, _OF_A_BATCH_NORM)


def _is_view(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _VIEWING)
    return getattr(node.target, "__name__", node.target) in _VIEWS


def _is_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.op == "call_method":
        return _says_in_place(str(node.target))
    if node.op != "call_function":
        return False
    said = node.target in (F.relu, F.relu6, F.silu) and True in node.args[1:]
    asked = node.kwargs.get("inplace", said) is True
    named = _says_in_place(getattr(node.target, "__name__", ""))
    return asked or named or node.target in _IN_PLACE


def _says_in_place(name: str) -> bool:
    """Whether it is torch's name of what changes its argument."""
    return name.endswith("_") and not name.endswith("__")


def _is_cast(node: fx.Node) -> bool:
    """Whether a view is of the same bytes under another type."""
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def _make_pure(node: fx.Node, changed: fx.Node, modules: Mapping[str, nn.Module]) -> None:
    """What the kernels know under another name gets it; anything else works on a copy."""
    what = type(modules[str(node.target)]) if node.op == "call_module" else node.target
    if what in _ACTIVATIONS:
        node.op, node.target = "call_function", _ACTIVATIONS[what]
        node.args, node.kwargs = (changed,), {}
    elif node.target is operator.iadd:
        node.target = operator.add
    elif node.target == "add_":
        node.target = "add"
    else:
        with node.graph.inserting_before(node):
            copy = node.graph.call_method("clone", (changed,))
        node.replace_input_with(changed, copy)
