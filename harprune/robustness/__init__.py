# SPDX-License-Identifier: Apache-2.0
"""How a network is attacked and hardened: threats, attacks, training losses, evaluation."""
