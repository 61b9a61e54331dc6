# SPDX-License-Identifier: MIT
"""The edge to /dev/kvm: Kvm, Vm and Vcpu, one method per ioctl. Everything that is opened is closed.

KVM refusing userspace is data (False, None) where the refusal is the answer that was asked for; any other failure is
a KvmError with the ioctl, the errno and what it means.
Source: linux v6.18 Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType, TracebackType

from kernel_harness.kvm import uapi
from probe.errors import GuestLost, KvmError, RequirementMissing

DEVICE = "/dev/kvm"
RUN_SECONDS = 20.0  # how long one KVM_RUN may take before the guest counts as hung
_TICK = 0.25
_LARGEST_CPUID = 1024

_MSR_STRUCT = struct.Struct("<IIIIQ")  # kvm_msrs with one kvm_msr_entry: packed by hand on the hot path
_ONE_MSR = bytes(_MSR_STRUCT.size)

_EXIT_NAMES = {getattr(uapi, name): name for name in vars(uapi) if name.startswith("KVM_EXIT_")}


def exit_name(reason: int) -> str:
    """Return KVM's name of an exit reason."""
    return _EXIT_NAMES.get(reason, f"exit reason {reason}")


def _ioctl(fd: int, number: int, name: str, argument: int | ctypes.Array[ctypes.c_char] | ctypes._CData = 0) -> int:
    while True:
        try:
            return fcntl.ioctl(fd, number, argument)
        except InterruptedError:  # by ticking(); KVM does nothing then
            continue
        except OSError as error:
            raise KvmError(name, error) from error


_limit = 0.0  # the time, by time.monotonic(), at which a tick raises TimeoutError; 0: never


def _tick(number: int, frame: FrameType | None) -> None:
    if _limit and time.monotonic() > _limit:
        raise TimeoutError


class hurry:
    """Raise TimeoutError in Python code that runs for longer than that many seconds; needs ticking() around it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        global _limit
        _limit = time.monotonic() + self._seconds

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _limit
        _limit = 0.0


@contextlib.contextmanager
def ticking() -> Iterator[None]:
    """Interrupt KVM_RUN a few times a second while the block runs, so that a guest that never exits is noticed.

    The timer repeats: a signal that comes just before KVM_RUN enters the kernel is lost, the next one is not. Only for
    a process's main thread.
    """
    before = signal.signal(signal.SIGALRM, _tick)
    timer = signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)  # one within another leaves the outer one ticking
        signal.signal(signal.SIGALRM, before)


class Kvm:
    """/dev/kvm.

    Raise RequirementMissing if it is not there, may not be opened, or is of another API.
    """

    def __init__(self, device: str = DEVICE) -> None:
        try:
            self.fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            text = f"cannot open {device}: {error.strerror}"
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                cure = "modprobe kvm_intel || modprobe kvm_amd; in a guest, its hypervisor must offer nesting"
            elif error.errno in (errno.EACCES, errno.EPERM):
                cure = "run it as root, or as a member of the device's group (usually kvm)"
            else:
                cure = "see: spec-ctrl-probe doctor"
            raise RequirementMissing(text, cure) from error
        try:
            version = fcntl.ioctl(self.fd, uapi.KVM_GET_API_VERSION, 0)
            if version != uapi.KVM_API_VERSION:
                raise RequirementMissing(f"{device} has KVM API version {version}, not {uapi.KVM_API_VERSION}")
            self.run_size = _ioctl(self.fd, uapi.KVM_GET_VCPU_MMAP_SIZE, "KVM_GET_VCPU_MMAP_SIZE")
        except OSError as error:
            os.close(self.fd)
            raise RequirementMissing(f"{device} is no KVM: {error.strerror}") from error
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Kvm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.fd)

    def check_extension(self, cap: int) -> int:
        """Return what KVM_CHECK_EXTENSION says: 0 if KVM does not have it."""
        return _ioctl(self.fd, uapi.KVM_CHECK_EXTENSION, "KVM_CHECK_EXTENSION", cap)

    def get_supported_cpuid(self) -> list[uapi.kvm_cpuid_entry2]:
        """Return the CPUID that KVM would give a guest."""
        buffer = _cpuid_buffer([uapi.kvm_cpuid_entry2() for _ in range(_LARGEST_CPUID)])
        # KVM wants room for what it has and says E2BIG otherwise; 1,024 entries are more than it ever takes.
        _large_ioctl(self.fd, uapi.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID", buffer)
        return _cpuid_entries(buffer)

    def get_msr_index_list(self) -> list[int]:
        """Return the MSRs that KVM_GET_MSRS and KVM_SET_MSRS save and restore."""
        return self._index_list(uapi.KVM_GET_MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST")

    def _index_list(self, number: int, name: str) -> list[int]:
        room = 4096
        buffer = (ctypes.c_uint32 * (1 + room))(room)
        _large_ioctl(self.fd, number, name, buffer)
        return list(buffer[1 : 1 + buffer[0]])

    def create_vm(self) -> Vm:
        """Create a VM without memory or vCPUs."""
        return Vm(self, _ioctl(self.fd, uapi.KVM_CREATE_VM, "KVM_CREATE_VM", 0))


def _large_ioctl(
    fd: int, number: int, name: str, buffer: ctypes.Array[ctypes.c_uint32] | ctypes.Array[ctypes.c_char]
) -> None:
    """Do an ioctl whose buffer is larger than what its number says (an array follows the structure)."""
    _ioctl(fd, number, name, buffer)


def _cpuid_buffer(entries: Sequence[uapi.kvm_cpuid_entry2]) -> ctypes.Array[ctypes.c_char]:
    head = uapi.kvm_cpuid2(nent=len(entries))
    raw = bytes(head) + b"".join(bytes(entry) for entry in entries)
    return ctypes.create_string_buffer(raw, len(raw))


def _cpuid_entries(buffer: ctypes.Array[ctypes.c_char]) -> list[uapi.kvm_cpuid_entry2]:
    count = uapi.kvm_cpuid2.from_buffer(buffer).nent
    size = ctypes.sizeof(uapi.kvm_cpuid_entry2)
    start = ctypes.sizeof(uapi.kvm_cpuid2)
    return [uapi.kvm_cpuid_entry2.from_buffer_copy(buffer, start + size * i) for i in range(count)]


class Vm:
    """A VM: memory, vCPUs, and the MSR filter that they share."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        self.kvm = kvm
        self.fd = fd
        self.vcpus: list[Vcpu] = []
        self._memory: list[mmap.mmap] = []

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close vCPUs, VM and memory."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus.clear()
        os.close(self.fd)
        for memory in self._memory:
            memory.close()
        self._memory.clear()

    def set_user_memory_region(self, slot: int, address: int, size: int) -> mmap.mmap:
        """Give the guest zeroed memory; address and size in bytes, multiples of 4096. Return our view of it."""
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = ctypes.c_char.from_buffer(memory)
        where = ctypes.addressof(view)
        del view  # a mapping with an exported pointer cannot be closed
        region = uapi.kvm_userspace_memory_region(slot, 0, address, size, where)
        try:
            _ioctl(self.fd, uapi.KVM_SET_USER_MEMORY_REGION, "KVM_SET_USER_MEMORY_REGION", region)
        except KvmError:
            memory.close()
            raise
        self._memory.append(memory)
        return memory

    def set_tss_addr(self, address: int) -> None:
        """Give KVM three pages below 4 GiB for itself: VMX without unrestricted guest needs them for real mode."""
        _ioctl(self.fd, uapi.KVM_SET_TSS_ADDR, "KVM_SET_TSS_ADDR", address)

    def set_identity_map_addr(self, address: int) -> None:
        """Give KVM one more page below 4 GiB, for the same."""
        _ioctl(self.fd, uapi.KVM_SET_IDENTITY_MAP_ADDR, "KVM_SET_IDENTITY_MAP_ADDR", ctypes.c_uint64(address))

    def create_irqchip(self) -> None:
        """Put the interrupt controllers into the kernel; before the first vCPU."""
        _ioctl(self.fd, uapi.KVM_CREATE_IRQCHIP, "KVM_CREATE_IRQCHIP")

    def signal_msi(self, address: int, data: int) -> None:
        """Send a message-signalled interrupt; with delivery mode INIT in data it resets the vCPU that is addressed."""
        if _ioctl(self.fd, uapi.KVM_SIGNAL_MSI, "KVM_SIGNAL_MSI", uapi.kvm_msi(address_lo=address, data=data)) <= 0:
            raise GuestLost(f"no vCPU took the interrupt {data:#x} sent to {address:#x}")

    def enable_cap(self, cap: int, argument: int) -> None:
        """Switch a capability of this VM on."""
        request = uapi.kvm_enable_cap(cap=cap)
        request.args[0] = argument
        _ioctl(self.fd, uapi.KVM_ENABLE_CAP, "KVM_ENABLE_CAP", request)

    def set_msr_filter(self, denied: Iterable[tuple[int, int]]) -> None:
        """Deny guests MSRs: pairs of (index, KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE). None denied: no filter."""
        request = uapi.kvm_msr_filter(flags=uapi.KVM_MSR_FILTER_DEFAULT_ALLOW)
        bitmap = ctypes.create_string_buffer(b"\0", 8)  # one bit, 0: denied
        for slot, (index, flags) in enumerate(denied):
            request.ranges[slot] = uapi.kvm_msr_filter_range(flags, 1, index, ctypes.addressof(bitmap))
        _ioctl(self.fd, uapi.KVM_X86_SET_MSR_FILTER, "KVM_X86_SET_MSR_FILTER", request)

    def create_vcpu(self, number: int) -> Vcpu:
        """Create a vCPU; number is below KVM_CAP_MAX_VCPU_ID, and at most KVM_CAP_MAX_VCPUS live in one VM."""
        fd = _ioctl(self.fd, uapi.KVM_CREATE_VCPU, "KVM_CREATE_VCPU", number)
        vcpu = Vcpu(fd, number, self.kvm.run_size)
        self.vcpus.append(vcpu)
        return vcpu


class Vcpu:
    """A vCPU, in the state that a reset leaves: real mode, at F000:FFF0."""

    def __init__(self, fd: int, number: int, run_size: int) -> None:
        self.fd = fd
        self.number = number
        self._run_size = run_size
        self._page: mmap.mmap | None = None
        self._run: uapi.kvm_run | None = None
        self._one = ctypes.create_string_buffer(_ONE_MSR, len(_ONE_MSR))

    def close(self) -> None:
        """Close the vCPU; KVM frees it with its VM."""
        if self.fd >= 0:
            self._run = None
            try:
                if self._page is not None:
                    self._page.close()
            finally:
                self._page = None
                os.close(self.fd)
                self.fd = -1

    @property
    def run_page(self) -> uapi.kvm_run:
        """The page that KVM shares with us."""
        if self._run is None:
            self._page = mmap.mmap(self.fd, self._run_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._run = uapi.kvm_run.from_buffer(self._page)
        return self._run

    def set_cpuid2(self, entries: CpuidTable) -> None:
        """Give the guest a CPUID; before its first run only."""
        _ioctl(self.fd, uapi.KVM_SET_CPUID2, "KVM_SET_CPUID2", entries.buffer)

    def get_msr(self, index: int) -> int | None:
        """Read one MSR, host-initiated; None if KVM refuses (a short count)."""
        buffer = self._one
        _MSR_STRUCT.pack_into(buffer, 0, 1, 0, index, 0, 0)
        if _ioctl(self.fd, uapi.KVM_GET_MSRS, "KVM_GET_MSRS", buffer) != 1:
            return None
        return int(_MSR_STRUCT.unpack_from(buffer)[4])

    def set_msr(self, index: int, value: int) -> bool:
        """Write one MSR, host-initiated; False if KVM refuses (a short count)."""
        buffer = self._one
        _MSR_STRUCT.pack_into(buffer, 0, 1, 0, index, 0, value)
        return _ioctl(self.fd, uapi.KVM_SET_MSRS, "KVM_SET_MSRS", buffer) == 1

    def get_tsc_khz(self) -> int:
        """Return the frequency of the guest's TSC in kHz."""
        return _ioctl(self.fd, uapi.KVM_GET_TSC_KHZ, "KVM_GET_TSC_KHZ")

    def get_regs(self) -> uapi.kvm_regs:
        """Return the general registers."""
        regs = uapi.kvm_regs()
        _ioctl(self.fd, uapi.KVM_GET_REGS, "KVM_GET_REGS", regs)
        return regs

    def set_regs(self, regs: uapi.kvm_regs) -> None:
        """Set the general registers."""
        _ioctl(self.fd, uapi.KVM_SET_REGS, "KVM_SET_REGS", regs)

    @property
    def exit_reason(self) -> int:
        """Why the guest exited last."""
        return int(self.run_page.exit_reason)

    def run(self, seconds: float = RUN_SECONDS) -> None:
        """Enter the guest until it exits.

        Raise GuestLost if it does not within the time; that needs ticking() around it, else it may never return.
        """
        limit = 0.0
        while True:
            try:
                fcntl.ioctl(self.fd, uapi.KVM_RUN, 0)
                return
            except InterruptedError:
                limit = limit or time.monotonic() + seconds
                if time.monotonic() > limit:
                    raise GuestLost(f"the guest did not exit within {seconds:g} s") from None
            except OSError as error:
                raise KvmError("KVM_RUN", error) from error


class CpuidTable:
    """A guest CPUID in the form that KVM_SET_CPUID2 takes; made once, given to many vCPUs."""

    def __init__(self, entries: Sequence[uapi.kvm_cpuid_entry2]) -> None:
        self.buffer = _cpuid_buffer(entries)
