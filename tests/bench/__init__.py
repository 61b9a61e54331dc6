# SPDX-License-Identifier: MIT
"""The speed figures of the project; run with make bench."""
