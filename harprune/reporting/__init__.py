# SPDX-License-Identifier: Apache-2.0
"""What a person looks at: tables, plots and one HTML page, read from run folders alone."""
