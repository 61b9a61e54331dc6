# SPDX-License-Identifier: MIT
"""Many machines."""
