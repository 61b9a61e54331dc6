// SPDX-License-Identifier: MIT
/*
 * The path of a policy with the same ioctls as the Python VMM: the filter denies MSR 0x48, each of the guest's writes exits
 * (KVM_EXIT_X86_WRMSR), goes to the vCPU with KVM_SET_MSRS, and the guest goes on. Prints exits per second.
 *
 *     policy GUEST CPUID ENTRIES    GUEST: the interpreter's code; CPUID: one kvm_cpuid2; ENTRIES: tables of 1,000 writes
 */
#include "vm.h"

#define WRITES 1000

int main(int argc, char **argv)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { KVM_MSR_EXIT_REASON_FILTER } };
	uint8_t bitmap[8] = { 0 };
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };
	uint64_t identity = 0x40000000;
	struct timespec begin, end;
	struct kvm_run *page;
	size_t size, code_size;
	uint8_t *low, *reset, *code;
	struct row rows[WRITES + 1];
	long exits = 0;
	int kvm, vm, vcpu;

	CHECK(argc == 4);
	code = load(argv[1], &code_size);
	kvm = open("/dev/kvm", O_RDWR);
	CHECK(kvm >= 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	CHECK(vm >= 0 && !ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity) && !ioctl(vm, KVM_SET_TSS_ADDR, 0x40001000));
	low = memory(vm, 0, 0, 0x10000);
	reset = memory(vm, 1, 0xFFFFF000, 0x1000);
	memcpy(reset + 0xFF0, "\xea\x00\x10\x00\x00", 5);
	memcpy(low + 0x1000, code, code_size);
	CHECK(!ioctl(vm, KVM_ENABLE_CAP, &cap));
	filter.ranges[0] = (struct kvm_msr_filter_range){ KVM_MSR_FILTER_WRITE, 1, 0x48, bitmap };
	CHECK(!ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter));
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	CHECK(vcpu >= 0 && !ioctl(vcpu, KVM_SET_CPUID2, load(argv[2], &size)));
	page = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECK(page != MAP_FAILED);
	for (int i = 0; i < WRITES; i++)
		rows[i] = (struct row){ 1, 0, 0, 0x48, i & 1, 0 };
	rows[WRITES] = (struct row){ 0 };
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (int entry = 0; entry < atoi(argv[3]); entry++) {
		memcpy(low + 0x2000, rows, sizeof rows);
		for (;;) {
			struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = { { 1 }, { 0x48, 0, 0 } };

			CHECK(!ioctl(vcpu, KVM_RUN, 0));
			if (page->exit_reason != KVM_EXIT_X86_WRMSR)
				break;
			one.entry.data = page->msr.data;
			page->msr.error = ioctl(vcpu, KVM_SET_MSRS, &one) != 1;
			exits++;
		}
		CHECK(((struct row *)(low + 0x2000))[WRITES].faulted == 2);
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.3f\n", exits / (end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) / 1e9));
	return 0;
}
