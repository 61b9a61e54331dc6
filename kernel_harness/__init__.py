# SPDX-License-Identifier: MIT
"""The probe's questions asked of kernels: KVM from outside, and whole kernels booted for the purpose."""
