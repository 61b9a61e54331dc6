# SPDX-License-Identifier: MIT
"""Probe agent: what IA32_SPEC_CTRL (MSR 0x48) accepts, keeps, drops or faults on, on every CPU."""

__version__ = "0.1.0"
AGENT = ""  # SHA-256 of the one file that holds this agent on a target, if it runs from such a file
