# SPDX-License-Identifier: MIT
"""KVM from outside: a small VMM over /dev/kvm, programs for one vCPU, and what kernel and models make of them."""
