# SPDX-License-Identifier: Apache-2.0
"""Builds the sparse kernels; everything else stands in pyproject.toml.

The kernels are plain C and loaded through their C interface, so one build serves every version of
torch. Without a compiler the installation goes on and `harprune doctor` says what is slower.
"""

import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernels(build_ext):
    """An extension that exports a C interface and no Python module."""

    def get_export_symbols(self, extension):
        return []


EXTRA = os.environ.get("HARPRUNE_CFLAGS", "").split()
FOLDER = "harprune/kernels/native"
setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "harprune.kernels._blocks",
            sources=sorted(glob(f"{FOLDER}/*.c")),
            depends=sorted(glob(f"{FOLDER}/*.h") + glob(f"{FOLDER}/*.inc")),
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-g0",
                *EXTRA,
            ],
            optional=True,
        )
    ],
)
