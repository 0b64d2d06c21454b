# SPDX-License-Identifier: Apache-2.0
"""The command line on an accelerator that is none: `python -m ...pretended_accelerator run ...`.

Its tensors say that they live on a device of their own, refuse company from the host, as those of a
GPU do, and are computed on the CPU. The last line printed is JSON: for each training step how often
the host waited for a value, from its start to the start of the next step of its stage.

It changes torch for the whole process, so it runs in one of its own.
"""

import json
import sys
from itertools import pairwise

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import Accelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from harprune.cli import main as entry
from harprune.recipe import training
from harprune.training import loop

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended:0")
# `Module.double` would give a parameter another type and leave its numbers on the host behind.
torch.__future__.set_overwrite_module_params_on_conversion(True)
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default}
"""What may take tensors of two devices."""
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
"""Takes indices from the host, at the cost of a copy."""
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}

waits: list[str] = []


class Pretended(torch.Tensor):
    """A tensor of the pretended device, around the one on the host that holds its numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    # What torch asks of a tensor's memory without asking for an operation.

    def untyped_storage(self):
        return self.host.untyped_storage()

    def tolist(self):
        waits.append("tolist")
        return self.host.tolist()

    def __format__(self, how):
        waits.append("format")
        return format(self.host, how)

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of the pretended device cannot be converted to numpy")

    __array__ = numpy


class Everywhere(TorchDispatchMode):
    """Also sees what makes tensors out of nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """One operation, on the host; its result lives where that of a GPU would."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, Pretended)]
    wanted = kwargs.get("device")
    goes_there = bool(there) if wanted is None else torch.device(wanted).type == DEVICE.type
    if not there and not goes_there:
        return function(*args, **kwargs)
    strangers = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if there and strangers and function not in ACROSS | INDEXING:
        raise RuntimeError(f"{function} was given tensors of two devices")
    to_host = function is aten.copy_.default and not isinstance(args[0], Pretended)
    if function in WAITING or to_host or not goes_there:
        waits.append(str(function))
    inner, options = pytree.tree_map_only(Pretended, lambda t: t.host, (args, kwargs))
    if wanted is not None:
        options = options | {"device": torch.device("cpu")}
    if "pin_memory" in options:
        options = options | {"pin_memory": False}
    result = function(*inner, **options)
    if function._schema.is_mutable and tensors and result is inner[0]:
        return args[0]
    if not goes_there or to_host:
        return result
    return pytree.tree_map_only(torch.Tensor, Pretended, result)


class Pretence(Accelerator):
    """The device as Fabric wants to know it."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "pretended"


def fabric(section):
    """In the place of `training.fabric`."""
    engine = Fabric(strategy=SingleDeviceStrategy(DEVICE, accelerator=Pretence()))
    engine.launch()
    return engine


def counted(step, counts):
    """`loop._step`, which first appends to counts whose step it is, and the waits so far."""

    def call(engine, objective, *args):
        counts.append((objective, len(waits)))
        return step(engine, objective, *args)

    return call


def main() -> int:
    counts: list[tuple[object, int]] = []
    training.fabric, loop._step = fabric, counted(loop._step, counts)
    with Everywhere():
        code = entry.guarded()
    steps = [b[1] - a[1] for a, b in pairwise(counts) if a[0] is b[0]]
    print(json.dumps(steps))
    return code


if __name__ == "__main__":
    sys.exit(main())
