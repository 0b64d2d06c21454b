# SPDX-License-Identifier: Apache-2.0
"""What is installed, what is missing, what will be used."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from harprune.kernels import native
from harprune.models.registry import list_models
from harprune.recipe.pruning import METHODS, PLUG_INS
from harprune.reporting.tables import counted
from harprune.training.data import data_folder, list_datasets

_REQUIRED = ("numpy", "safetensors", "lightning-fabric", "pyautoattack", "scikit-learn")
_OPTIONAL = {
    "torchvision": "networks by torchvision:NAME",
    "timm": "networks by timm:NAME",
    "tensorboard": "harprune report --tensorboard",
    "onnx": "harprune export --format onnx",
    "onnxruntime": "harprune export --format onnx",
}

_EXTRA = {"onnxruntime": "onnx"}


def diagnose() -> dict[str, str]:
    """Findings by subject, for people and, as JSON, for machines."""
    findings = {
        "harprune": _installed("harprune") or "run from its source, not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{counted(os.cpu_count() or 1, 'core')}, "
        f"{counted(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "kernels": _kernels(),
        "gpu": _gpu(),
        "data": _data(),
    }
    for package in _REQUIRED:
        findings[package] = _installed(package) or f"missing; pip install {package}"
    for package, use in _OPTIONAL.items():
        findings[package] = (
            _installed(package)
            or f"missing; needed for {use}: pip install 'harprune[{_EXTRA.get(package, package)}]'"
        )
    findings["methods"] = ", ".join((*METHODS, *(f"+{name}" for name in PLUG_INS)))
    findings["models"] = ", ".join(list_models())
    findings["data sets"] = ", ".join(list_datasets())
    return findings


def _kernels() -> str:
    try:
        kernels = native.best()
        reason = "not built"
    except (ValueError, OSError) as error:
        kernels, reason = None, f"cannot be loaded ({error})"
    if kernels is None:
        return (
            f"{reason}; on a CPU attacks on pruned networks and their finetuning take as long as "
            "dense ones; install a C compiler (gcc or clang) and reinstall harprune"
        )
    bf16 = ", bf16 in weight gradients where asked" if kernels.has_bf16 else ""
    return f"{kernels.name}{bf16}; pruned networks run on them on a CPU"


def _gpu() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, used by default"
    built = torch.version.cuda or torch.version.hip
    reason = "torch sees none" if built else "this build of torch is for the CPU"
    return f"none ({reason}); everything runs on the CPU"


def _data() -> str:
    folder = data_folder()
    state = "" if folder.is_dir() else "not there yet; "
    return f"{folder} ({state}set HARPRUNE_DATA to change)"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
