# SPDX-License-Identifier: Apache-2.0
"""The command line: `harprune`, or `python -m harprune`."""

import sys


def main() -> None:
    """Run the command line; where only networks run, say what it needs and exit with 2."""
    try:
        from harprune.cli.main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("harprune"):
            raise  # a fault of this package, which no installation mends
        print(
            f"harprune: {error.name} is not installed, and the command line needs it; install "
            "harprune with its dependencies (pip install .), or use harprune.deploy from Python",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
