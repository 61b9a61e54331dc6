# SPDX-License-Identifier: MIT
"""Two records, or two sets of them, compared. Pure."""
