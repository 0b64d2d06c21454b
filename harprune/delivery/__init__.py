# SPDX-License-Identifier: Apache-2.0
"""What leaves a run: a network as a file elsewhere, its speed there, leaderboard entries."""
