# SPDX-License-Identifier: MIT
"""CPUID: a pure snapshot, the live reader, and readers of dump files."""
