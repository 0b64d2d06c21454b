# SPDX-License-Identifier: Apache-2.0
"""The same network in each runtime that there is for it, and in a process of its own."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harprune.deploy import artifact, interchange
from harprune.deploy.interchange import Runner
from harprune.deploy.module import Module
from harprune.deploy.network import Network
from harprune.deploy.runtime import Engine
from harprune.kernels import native
from harprune.run.console import Console
from harprune.user_code import first_line

OWN, OWN_AVX2 = "harprune", "harprune avx2"


@dataclass(frozen=True)
class Candidate:
    """A runtime with the network in it, the file it read, and its kernels where they are ours."""

    run: Runner
    file: Path
    kernels: str | None = None


class _Files:
    """The network in each format, written when first asked for."""

    def __init__(self, network: Network, folder: Path):
        self.network, self._folder = network, folder
        self.example = torch.zeros(1, *network.input_shape)

    @property
    def module(self) -> nn.Module:
        return Module(self.network).eval()

    def artifact(self) -> Path:
        return self._written("network.hpn", lambda path: artifact.save(path, self.network))

    def onnx(self) -> Path:
        return self._written(
            "network.onnx",
            lambda path: interchange.save_onnx(path, self.module, self.example, {}),
        )

    def program(self) -> Path:
        return self._written(
            "network.pt2",
            lambda path: interchange.save_program(path, self.module, self.example, {}),
        )

    def _written(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self._folder / name
        if not path.exists():
            write(path)
        return path


def _own(files: _Files, threads: int) -> Candidate:
    kernels = native.best()
    engine = Engine(files.network, threads=threads, kernels=kernels)
    return Candidate(engine, files.artifact(), kernels and kernels.name)


def _own_avx2(files: _Files, threads: int) -> Candidate:
    kernels = native.named("avx2")
    if kernels is None:
        raise ValueError("this processor or installation has no AVX2 kernels")
    engine = Engine(files.network, threads=threads, kernels=kernels)
    return Candidate(engine, files.artifact(), kernels.name)


def _onnxruntime(files: _Files, threads: int) -> Candidate:
    return Candidate(interchange.run_onnx(files.onnx(), threads), files.onnx())


def _openvino(files: _Files, threads: int) -> Candidate:
    import openvino  # pyright: ignore[reportMissingImports]

    # Without the first it computes in bf16 on processors that can.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(str(files.onnx()), "CPU", options)
    return Candidate(lambda images: compiled(images)[0], files.onnx())


def _torch(files: _Files, threads: int) -> Candidate:
    return Candidate(_in_torch(files.module), files.program())


def _torch_compiled(files: _Files, threads: int) -> Candidate:
    return Candidate(_in_torch(torch.compile(files.module)), files.program())


def _in_torch(module) -> Runner:
    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run


RUNTIMES: dict[str, Callable[[_Files, int], Candidate]] = {
    OWN: _own,
    OWN_AVX2: _own_avx2,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
    "torch compiled": _torch_compiled,
}


def candidates(
    network: Network,
    folder: Path,
    runtimes: Sequence[str] | None,
    threads: int,
    console: Console,
) -> Iterator[tuple[str, Candidate]]:
    """Each runtime with the network in it, by name.

    Of those that were not asked for some may be missing; `console` says which and why.

    Args:
        folder: an empty one for the files that they read.
        runtimes: some of `RUNTIMES`; when absent, all but AVX2 alone.

    Raises:
        ValueError: one that was asked for, or this package's own, cannot run here.
    """
    files = _Files(network, folder)
    for name in runtimes or [name for name in RUNTIMES if name != OWN_AVX2]:
        console.say(f"{name} reads the network")  # compilers take a minute
        try:
            made = RUNTIMES[name](files, threads)
            made.run(files.example.numpy())
        except Exception as error:  # a package that is missing, a compiler that is
            if runtimes is not None or name == OWN:
                raise ValueError(f"runtime {name} cannot run here ({first_line(error)})") from None
            console.say(f"{name} is left out ({first_line(error)})")
            continue
        yield name, made


_PROGRAM = """
import sys, time
import numpy as np
path, threads, shape = sys.argv[1], int(sys.argv[2]), tuple(map(int, sys.argv[3:]))
images = np.zeros(shape, np.float32)
started = time.perf_counter()
{load}
run(images)
print(time.perf_counter() - started)
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""
_LOADS = {
    OWN: "import harprune.deploy\nrun = harprune.deploy.load(path, threads)",
    "onnxruntime": (
        "import onnxruntime\n"
        "options = onnxruntime.SessionOptions()\n"
        "options.intra_op_num_threads = threads\n"
        "session = onnxruntime.InferenceSession(path, options)\n"
        "run = lambda images: session.run(None, {'images': images})"
    ),
    "openvino": (
        "import openvino\n"
        "options = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads}\n"
        "run = openvino.Core().compile_model(path, 'CPU', options)"
    ),
    "torch": (
        "import torch\n"
        "torch.set_num_threads(threads)\n"
        "module = torch.export.load(path).module()\n"
        "run = lambda images: module(torch.from_numpy(images))"
    ),
}
"""How a process that does nothing else loads a file."""


def started(
    name: str, file: Path, shape: Sequence[int], threads: int, console: Console
) -> tuple[float | None, int | None]:
    """Seconds from importing a runtime to its first answer, in a process that does nothing else.

    And the peak memory of that process; None where unknown or, as the console says, it failed.
    """
    if name not in _LOADS or not Path("/proc/self/status").exists():
        return None, None
    program = _PROGRAM.format(load=_LOADS[name])
    arguments = [str(file), str(threads), *map(str, shape)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],  # where this package is found, installed or not
    )
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        console.say(f"{name}: a process of its own ended without an answer ({why})")
        return None, None
    seconds_, peak = done.stdout.split()[-2:]
    return float(seconds_), int(peak)
