# SPDX-License-Identifier: Apache-2.0
"""Run the file of a network on a CPU: NumPy and the compiled kernels, no torch.

engine = harprune.deploy.load("resnet18.hpn")
logits = engine(images)  # float32 [n, c, h, w] in [0, 1] -> [n, classes]
"""

import threading
from pathlib import Path

import numpy as np

from harprune.arguments import require_whole
from harprune.deploy import artifact
from harprune.deploy.network import Network
from harprune.kernels import native
from harprune.kernels.forward import Forward
from harprune.kernels.runtime import renewed_after_fork

_TOGETHER = 256
"""Images that run in one go, and so bound the memory that an engine holds."""
_SIZES = 8
"""Sizes of image whose runners an engine keeps."""


def load(path: str | Path, threads: int = 1) -> "Engine":
    """The network of a file, ready to run.

    Args:
        threads: how many share the work; results do not depend on it. Blocks of images run side
            by side, and of few images each layer is shared out where that is faster.

    Raises:
        ValueError: no such file, or one that is damaged or wrong; or no compiled kernels.
    """
    return Engine(artifact.load(path), threads=threads)


class Engine:
    """A network that runs; a call from images to logits.

    Args:
        threads: how many share the work, as in `load`.
        kernels: the instruction set; None takes the fastest there is.

    Runners are made once for each size of image, and their memory is used again. Calls from several
    threads take turns.
    """

    def __init__(
        self, network: Network, *, threads: int = 1, kernels: native.Kernels | None = None
    ):
        if not isinstance(network, Network):
            raise ValueError(
                f"network = {network!r} is no network; harprune.deploy.load reads one from a file"
            )
        require_whole("threads", threads, 1)
        if kernels is not None and kernels.dtype != np.float32:
            raise ValueError(
                f"kernels {kernels.name} compute in {kernels.dtype}; give float32 ones"
            )
        if network.output_shape[1:] != (1, 1):
            raise ValueError(
                f"the network makes a map of {tuple(network.output_shape)}, not logits; "
                "end it with a pooling or a linear layer"
            )
        self.network, self.threads, self._kernels = network, threads, kernels
        self._runners: dict[tuple[int, int], Forward] = {}
        self.renew()
        renewed_after_fork(self)
        runner = self._runner(*network.input_shape[1:])
        runner.for_few  # noqa: B018 - made now, to raise now what stands against it

    def __reduce__(self):
        """A copy, or an engine in another process, makes runners of its own."""
        return _again, (self.network, self.threads, self._kernels and self._kernels.name)

    def renew(self) -> None:
        """It is nobody's turn, as in the child of a process that had threads at work here."""
        self._turn = threading.Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """What the logits stand for, or empty."""
        return self.network.classes

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The logits [n, classes] of `images`, float32 [n, c, h, w] in [0, 1], in any memory order.

        A network of vectors takes [n, c] as well.

        Raises:
            ValueError: images of another type, number of channels or size than it can run.
        """
        images = self._checked(images)
        with self._turn:
            runner = self._runner(*images.shape[2:])
            logits = np.empty((len(images), self.network.output_shape.channels), np.float32)
            together = max(_TOGETHER, self.threads * runner.kernels.lanes)
            for first in range(0, len(images), together):
                part = images[first : first + together]
                (maps,) = runner.forward([part])
                logits[first : first + len(part)] = maps.reshape(len(part), -1)
        return logits

    def _checked(self, images: np.ndarray) -> np.ndarray:
        channels, height, width = self.network.input_shape
        wanted = f"float32 [n, {channels}, {height}, {width}] in [0, 1]"
        if not isinstance(images, np.ndarray):
            raise ValueError(f"images of type {type(images).__name__} are no array; give {wanted}")
        if images.ndim == 2 and height == width == 1:
            images = images[:, :, None, None]
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; give {wanted} (uint8 images: "
                "divide by 255)"
            )
        return np.ascontiguousarray(images)

    def _runner(self, height: int, width: int) -> Forward:
        """The network ready for images of this size."""
        size = (height, width)
        made = self._runners.pop(size, None)
        if made is None:
            network = self.network
            if size != network.input_shape[1:]:
                network = network.resized(height, width)
                if network.output_shape[1:] != (1, 1):
                    raise ValueError(
                        f"of images of {height} x {width} the network makes a map of "
                        f"{tuple(network.output_shape)}, not logits; give "
                        f"{' x '.join(map(str, self.network.input_shape[1:]))}"
                    )
            made = network.runner(threads=self.threads, kernels=self._kernels)
        # Last used, last to go.
        self._runners[size] = made
        while len(self._runners) > _SIZES:
            del self._runners[next(iter(self._runners))]
        return made


def _again(network: Network, threads: int, kernels: str | None) -> Engine:
    chosen = None if kernels is None else native.named(kernels)
    return Engine(network, threads=threads, kernels=chosen)
