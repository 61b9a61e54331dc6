# SPDX-License-Identifier: MIT
"""Predictors: pure functions from CPUID to what a write of IA32_SPEC_CTRL should do."""
