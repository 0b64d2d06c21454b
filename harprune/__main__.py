# SPDX-License-Identifier: Apache-2.0
"""`python -m harprune` is the command line."""

from harprune.cli import main

main()
