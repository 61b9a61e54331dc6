// SPDX-License-Identifier: MIT
// A register of our design for /dev/cpu/N/msr that is a file: a write of bits that $REGISTER (a file with a mask in
// hexadecimal) does not have fails with EIO, as the msr driver's does if WRMSR takes #GP. Loaded with LD_PRELOAD.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define IA32_SPEC_CTRL 0x48

static int refuses(int fd, const void *buffer, size_t size, off64_t offset)
{
	char link[64], path[256];
	uint64_t value, valid = ~0ULL;
	FILE *file;
	ssize_t length;

	if (offset != IA32_SPEC_CTRL || size != sizeof(value) || !getenv("REGISTER"))
		return 0;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	length = readlink(link, path, sizeof(path) - 1);
	if (length < 0)
		return 0;
	path[length] = 0;
	if (!strstr(path, "/msr"))
		return 0;
	file = fopen(getenv("REGISTER"), "re");
	if (!file)
		return 0;
	if (fscanf(file, "%lx", &valid) != 1)
		valid = ~0ULL;
	fclose(file);
	memcpy(&value, buffer, sizeof(value));
	return (value & ~valid) != 0;
}

ssize_t pwrite64(int fd, const void *buffer, size_t size, off64_t offset)
{
	static ssize_t (*next)(int, const void *, size_t, off64_t);

	if (!next)
		next = dlsym(RTLD_NEXT, "pwrite64");
	if (refuses(fd, buffer, size, offset)) {
		errno = EIO;
		return -1;
	}
	return next(fd, buffer, size, offset);
}

ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset)
{
	return pwrite64(fd, buffer, size, offset);
}
