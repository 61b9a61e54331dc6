# SPDX-License-Identifier: MIT
"""What <linux/kvm.h> declares and this VMM uses: structures under their C names, ioctl numbers computed from them.

A test compares every number, size and offset with the output of a C program built from the header.
Source: linux v6.18 include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h, include/uapi/asm-generic/ioctl.h.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, Union, c_char, c_uint8, c_uint16, c_uint32, c_uint64

KVMIO = 0xAE
_NONE, _WRITE, _READ = 0, 1, 2  # as the caller sees it: _IOC_WRITE hands data to the kernel


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | KVMIO << 8 | number


def _io(number: int) -> int:
    return _ioc(_NONE, number, 0)


def _iow(number: int, kind: type[ctypes._CData]) -> int:
    return _ioc(_WRITE, number, ctypes.sizeof(kind))


def _ior(number: int, kind: type[ctypes._CData]) -> int:
    return _ioc(_READ, number, ctypes.sizeof(kind))


def _iowr(number: int, kind: type[ctypes._CData]) -> int:
    return _ioc(_READ | _WRITE, number, ctypes.sizeof(kind))


class kvm_userspace_memory_region(Structure):
    """One slot of guest memory."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class kvm_regs(Structure):
    """General registers."""

    _fields_ = [
        *((name, c_uint64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *((f"r{number}", c_uint64) for number in range(8, 16)),
        ("rip", c_uint64),
        ("rflags", c_uint64),
    ]


class kvm_segment(Structure):
    """One segment register with its hidden part."""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class kvm_dtable(Structure):
    """GDTR or IDTR."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(Structure):
    """Segment and control registers."""

    _fields_ = [
        *((name, kvm_segment) for name in ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"]),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class kvm_msr_entry(Structure):
    """One MSR and its value."""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class kvm_msrs(Structure):
    """KVM_GET_MSRS and KVM_SET_MSRS; entries[] follow."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class kvm_msr_list(Structure):
    """KVM_GET_MSR_INDEX_LIST; indices[] follow."""

    _fields_ = [("nmsrs", c_uint32)]


class kvm_cpuid_entry2(Structure):
    """One CPUID leaf."""

    _fields_ = [
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    ]


class kvm_cpuid2(Structure):
    """KVM_SET_CPUID2 and KVM_GET_SUPPORTED_CPUID; entries[] follow."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


class kvm_enable_cap(Structure):
    """KVM_ENABLE_CAP."""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class kvm_msr_filter_range(Structure):
    """A range of MSRs with a bitmap: a bit that is 0 denies."""

    _fields_ = [("flags", c_uint32), ("nmsrs", c_uint32), ("base", c_uint32), ("bitmap", c_uint64)]


class kvm_msr_filter(Structure):
    """KVM_X86_SET_MSR_FILTER."""

    _fields_ = [("flags", c_uint32), ("ranges", kvm_msr_filter_range * 16)]


class kvm_msi(Structure):
    """KVM_SIGNAL_MSI."""

    _fields_ = [
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    ]


class _exit_io(Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _exit_msr(Structure):
    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class _exit_fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _exit_internal(Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _exit_system_event(Structure):
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _exits(Union):
    _fields_ = [
        ("io", _exit_io),
        ("msr", _exit_msr),
        ("fail_entry", _exit_fail_entry),
        ("internal", _exit_internal),
        ("system_event", _exit_system_event),
        ("padding", c_char * 256),
    ]


class kvm_run(Structure):
    """The page that a vCPU shares with us, as far as this VMM reads it."""

    _anonymous_ = ("exits",)
    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exits", _exits),
    ]


KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, kvm_msr_list)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, kvm_cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, kvm_msr_list)
KVM_CREATE_VCPU = _io(0x41)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, c_uint64)
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, kvm_regs)
KVM_SET_REGS = _iow(0x82, kvm_regs)
KVM_GET_SREGS = _ior(0x83, kvm_sregs)
KVM_SET_SREGS = _iow(0x84, kvm_sregs)
KVM_GET_MSRS = _iowr(0x88, kvm_msrs)
KVM_SET_MSRS = _iow(0x89, kvm_msrs)
KVM_SET_CPUID2 = _iow(0x90, kvm_cpuid2)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_ENABLE_CAP = _iow(0xA3, kvm_enable_cap)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_SIGNAL_MSI = _iow(0xA5, kvm_msi)
KVM_X86_SET_MSR_FILTER = _iow(0xC6, kvm_msr_filter)

KVM_API_VERSION = 12
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_MAX_VCPU_ID = 128
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_GET_MSR_FEATURES = 153
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_X86_MSR_FILTER = 189

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1  # the header's spelling
KVM_MSR_EXIT_REASON_INVAL = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
KVM_MSR_EXIT_REASON_FILTER = 1 << 2
KVM_MSR_FILTER_DEFAULT_ALLOW = 0
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
