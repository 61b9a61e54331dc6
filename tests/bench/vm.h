// SPDX-License-Identifier: MIT
/* What the C programs of the bench share: files, guest memory, and the rows of the guest's table. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) { perror(#what); exit(1); } } while (0)

struct row { uint8_t kind, faulted; uint16_t padding; uint32_t index, eax, edx; };

static void *load(const char *path, size_t *size)
{
	int file = open(path, O_RDONLY);
	struct stat status;
	void *data;

	CHECK(file >= 0 && !fstat(file, &status));
	data = malloc(status.st_size);
	CHECK(read(file, data, status.st_size) == status.st_size);
	close(file);
	*size = status.st_size;
	return data;
}

static void *memory(int vm, int slot, uint64_t address, size_t size)
{
	void *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = address, .memory_size = size, .userspace_addr = (uintptr_t)data,
	};

	CHECK(data != MAP_FAILED && !ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	return data;
}
