# SPDX-License-Identifier: Apache-2.0
"""Many runs: what is compared, the runs that this asks for, and the table of them."""
