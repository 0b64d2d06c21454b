# SPDX-License-Identifier: Apache-2.0
"""What a number depends on besides the recipe: versions, commit, machine, command."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harprune.recipe.schema import Execution


def environment_of(command: str, section: Execution | None = None) -> dict[str, Any]:
    """What a number depends on besides the recipe: versions, commit, machine, command.

    Threads and accelerator are those that `section` asks for, or what torch takes by itself.
    """
    import torch

    section = section or Execution()
    accelerated = section.device != "cpu" and torch.cuda.is_available()

    packages = ("harprune", "torch", "numpy", "safetensors", "lightning-fabric", "pyautoattack")
    return {
        "command": command,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": section.threads or torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if accelerated else None,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of the source tree that runs, with `+` when it has been changed since."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        show = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **show).stdout.strip()
        tracked = subprocess.run([*git, "ls-files", __file__], **show).stdout.strip()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", str(here.parent)], timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed copy may lie inside somebody else's repository: that commit says nothing.
    return (commit + ("+" if changed.returncode else "")) if tracked else None


def command_line() -> str:
    """The command in force, as a user would type it."""
    return shlex.join(["harprune", *sys.argv[1:]])
