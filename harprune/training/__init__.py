# SPDX-License-Identifier: Apache-2.0
"""How a network learns: data, the one loop, schedules, checkpoints."""
