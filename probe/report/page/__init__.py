# SPDX-License-Identifier: MIT
"""Records as one self-contained page."""
