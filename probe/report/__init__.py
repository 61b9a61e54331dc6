# SPDX-License-Identifier: MIT
"""From a record to what people and tools read; everything here is pure."""
