// SPDX-License-Identifier: MIT
/*
 * The first-write matrix with the same ioctls as the Python VMM: for each profile a VM with its memory, for each bit two
 * fresh vCPUs (host write, read back, guest read; guest write, guest read, host read). Prints seconds.
 *
 *     matrix GUEST CPUIDS    GUEST: the interpreter's code; CPUIDS: kvm_cpuid2 structures one after the other
 */
#include "vm.h"

static int kvm, vm, next;
static uint8_t *low, *reset, guest[4096];
static size_t guest_size;

static int vcpu_with(struct kvm_cpuid2 *cpuid)
{
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, next++);

	CHECK(vcpu >= 0 && !ioctl(vcpu, KVM_SET_CPUID2, cpuid));
	return vcpu;
}

static int set_msr(int vcpu, uint64_t value)
{
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = { { 1 }, { 0x48, 0, value } };

	return ioctl(vcpu, KVM_SET_MSRS, &one) == 1;
}

static uint64_t get_msr(int vcpu)
{
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = { { 1 }, { 0x48, 0, 0 } };

	CHECK(ioctl(vcpu, KVM_GET_MSRS, &one) == 1);
	return one.entry.data;
}

static void run(int vcpu, const struct row *rows, int count, struct row *results)
{
	memcpy(low + 0x2000, rows, count * sizeof *rows);
	CHECK(!ioctl(vcpu, KVM_RUN, 0));
	memcpy(results, low + 0x2000, count * sizeof *rows);
	CHECK(results[count - 1].faulted == 2);
}

int main(int argc, char **argv)
{
	static uint64_t sum;
	struct timespec begin, end;
	size_t size, at = 0;
	uint8_t *all, *code;

	CHECK(argc == 3);
	code = load(argv[1], &guest_size);
	memcpy(guest, code, guest_size);
	all = load(argv[2], &size);
	kvm = open("/dev/kvm", O_RDWR);
	CHECK(kvm >= 0);
	clock_gettime(CLOCK_MONOTONIC, &begin);
	while (at < size) {
		struct kvm_cpuid2 *cpuid = (void *)(all + at);

		at += sizeof *cpuid + cpuid->nent * sizeof cpuid->entries[0];
		int fds[128], used = 0;
		uint64_t identity = 0x40000000;

		next = 0;
		vm = ioctl(kvm, KVM_CREATE_VM, 0);
		CHECK(vm >= 0 && !ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity));
		CHECK(!ioctl(vm, KVM_SET_TSS_ADDR, 0x40001000));
		low = memory(vm, 0, 0, 0x10000);
		reset = memory(vm, 1, 0xFFFFF000, 0x1000);
		memcpy(reset + 0xFF0, "\xea\x00\x10\x00\x00", 5);
		memcpy(low + 0x1000, guest, guest_size);
		for (int bit = 0; bit < 64; bit++) {
			uint64_t value = 1ull << bit;
			struct row reads[2] = { { 2, 0, 0, 0x48, 0, 0 }, { 0 } }, results[3];
			int vcpu = fds[used++] = vcpu_with(cpuid);

			if (set_msr(vcpu, value)) {
				sum += get_msr(vcpu);
				run(vcpu, reads, 2, results);
			}
		}
		for (int bit = 0; bit < 64; bit++) {
			uint64_t value = 1ull << bit;
			struct row rows[3] = { { 1, 0, 0, 0x48, value, value >> 32 }, { 2, 0, 0, 0x48, 0, 0 }, { 0 } }, results[3];
			int vcpu = fds[used++] = vcpu_with(cpuid);

			run(vcpu, rows, 3, results);
			if (!results[0].faulted)
				sum += get_msr(vcpu);
		}
		for (int i = 0; i < used; i++)
			close(fds[i]);
		close(vm);
		munmap(low, 0x10000);
		munmap(reset, 0x1000);
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	fprintf(stderr, "%llu\n", (unsigned long long)sum);
	printf("%.6f\n", end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) / 1e9);
	return 0;
}
