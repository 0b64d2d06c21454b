# SPDX-License-Identifier: Apache-2.0
"""A network for other runtimes: ONNX, in float32 or int8, and `torch.export`.

They multiply every weight, zeros included; what shrinking took away they are spared as well.
Files take batches of any size, and images of one.
"""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harprune.user_code import in_a_line

Runner = Callable[[np.ndarray], np.ndarray]
"""Images, float32 [n, c, h, w] -> logits [n, classes], as some runtime computes them."""


def require_onnx() -> None:
    """Raise ValueError where a package that ONNX needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"ONNX needs the package {package} ({error}): pip install 'harprune[onnx]'"
            ) from None


def save_onnx(path: Path, model: nn.Module, images: Tensor, metadata: Mapping[str, str]) -> None:
    """Write `model` in eval mode as ONNX: input `images` [n, c, h, w], output `logits`.

    Args:
        images: a few of the shape that the file is for.
        metadata: goes into the file's properties.

    Raises:
        ValueError: a package is missing, or torch cannot write this model as ONNX.
    """
    require_onnx()
    import onnx

    with _quiet():
        program = _tried(
            "ONNX",
            lambda: torch.onnx.export(
                model,
                (_two(images),),
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: torch.export.Dim("n")},),
                input_names=["images"],
                output_names=["logits"],
            ),
        )
    content = program.model_proto
    onnx.helper.set_model_props(content, dict(metadata))
    onnx.save(content, path)


def quantise(path: Path, images: np.ndarray) -> None:
    """Turn an ONNX file into one of int8 weights and activations.

    Args:
        images: float32 [n, c, h, w], from which the ranges of activations are read.
    """
    require_onnx()
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self._left = iter(images)

        def get_next(self) -> dict | None:
            image = next(self._left, None)
            return None if image is None else {"images": image[None]}

    with _quiet():
        quantization.quantize_static(path, path, Reader(), per_channel=True)


def run_onnx(path: Path, threads: int = 1) -> Runner:
    """An ONNX file on ONNX Runtime's CPU provider."""
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": images})[0])


def save_program(path: Path, model: nn.Module, images: Tensor, metadata: Mapping[str, str]) -> None:
    """Write `model` in eval mode as a program of `torch.export`, for `torch.export.load`.

    Args:
        metadata: goes into extra files of the program.

    Raises:
        ValueError: torch cannot export this model.
    """
    held = io.BytesIO()
    with _quiet():
        batch = ({0: torch.export.Dim("n")},)
        program = _tried(
            "torch.export",
            lambda: torch.export.export(model, (_two(images),), dynamic_shapes=batch),
        )
        torch.export.save(program, held, extra_files=dict(metadata))
    path.write_bytes(held.getvalue())


def run_program(path: Path) -> Runner:
    """A file of `torch.export` in torch."""
    with _quiet():
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run


def _two(images: Tensor) -> Tensor:
    """Two images: of one, torch would make the number of images a constant."""
    return images[:1].expand(2, *images.shape[1:]).contiguous()


def _tried(what: str, call: Callable):
    try:
        return call()
    except Exception as error:  # exporters wrap whatever went wrong in errors of their own
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        lines = (line for line in str(first).splitlines() if line.strip())
        reason = in_a_line(next(lines, "no reason given"))
        raise ValueError(
            f"torch cannot write the model for {what} ({type(first).__name__}: {reason}); "
            "try another format, or take out of its forward what depends on values"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves; a failure is an exception all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
