# SPDX-License-Identifier: MIT
"""Boots distribution kernels in QEMU, so that the real msr driver can be asked without a machine at risk."""
