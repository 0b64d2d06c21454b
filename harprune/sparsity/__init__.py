# SPDX-License-Identifier: Apache-2.0
"""How a network is sparse: layers, masks, densities, budgets and their exact count."""
