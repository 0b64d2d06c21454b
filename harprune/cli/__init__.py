# SPDX-License-Identifier: Apache-2.0
"""The command line: what is typed, and in which words it is refused."""
