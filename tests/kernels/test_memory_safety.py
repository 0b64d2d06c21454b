# SPDX-License-Identifier: Apache-2.0
"""The kernel tests once more, on a build that reports every access outside what was allocated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def sanitizer() -> str | None:
    """The address sanitizer's library of the C compiler, if there is one."""
    if shutil.which("gcc") is None:
        return None
    asked = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    path = asked.stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.slow
@pytest.mark.skipif(sanitizer() is None, reason="needs gcc with its address sanitizer")
def test_no_access_out_of_bounds(tmp_path):
    for part in ("harprune", "tests"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    flags = "-fsanitize=address -fno-omit-frame-pointer -O1"
    environment = {
        **os.environ,
        "HARPRUNE_CFLAGS": flags,
        "LDFLAGS": "-fsanitize=address",
        "OMP_NUM_THREADS": "1",
    }
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True)
    assert list((tmp_path / "harprune" / "kernels").glob("_blocks*.so"))
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    ran = subprocess.run(
        [*tests, "-m", "not slow"],
        cwd=tmp_path,
        env={**environment, "LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
