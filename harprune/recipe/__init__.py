# SPDX-License-Identifier: Apache-2.0
"""What to do: a recipe, its checks at the door, and what each of its parts stands for."""
