# SPDX-License-Identifier: Apache-2.0
"""A run's dense network in half the bytes, for a repository or a slow line.

    python bench/halved.py runs/headline/resnet18-dense/dense.safetensors dense.safetensors

Weights of convolutions and linear layers are rounded to float16; biases and batch norm, which are
few and of which a variance may be too small for it, stay as they are. Loaded, it is float32 again.
"""

import argparse

from safetensors.torch import save

from harprune.files import write
from harprune.training import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a network of a run")
    parser.add_argument("target", help="the file to write, or to replace")
    arguments = parser.parse_args()
    tensors, _ = checkpoint.load(arguments.source)
    model = checkpoint.unpack("model", tensors)
    write(
        arguments.target,
        save({name: t.half() if t.dim() > 1 else t for name, t in model.items()}),
    )


if __name__ == "__main__":
    main()
