# SPDX-License-Identifier: Apache-2.0
"""One run: its folder, its stages from a dense network to a report, and how networks are judged."""
