/* SPDX-License-Identifier: MIT */
/*
 * The yardstick of `make bench`: the system calls of the agent's walk over 64 bits of MSR 0x48 on one CPU, in C.
 * walk DEVICE JOURNAL: prints the seconds that the walk took. The caller has pinned it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MSR 0x48
#define TRIES 3

static int device;
static uint64_t saved;

static void undo(void)
{
	uint64_t got = ~saved;

	for (int i = 0; i < TRIES && got != saved; i++)
		if (pwrite(device, &saved, 8, MSR) != 8 || pread(device, &got, 8, MSR) != 8)
			_exit(5);
	if (got != saved)
		_exit(5);
}

static const char *const kvm_users[] = {
	"/sys/module/kvm_intel/refcnt",
	"/sys/module/kvm_amd/refcnt",
	"/sys/module/kvm_pvm/refcnt",
};

/* Returns whether the write went through. */
static int attempt(uint64_t value)
{
	uint64_t got = 0;
	cpu_set_t here;

	CPU_ZERO(&here);
	CPU_SET(0, &here);
	if (sched_setaffinity(0, sizeof here, &here) || pread(device, &got, 8, MSR) != 8 || got != saved)
		_exit(6);
	if (pwrite(device, &value, 8, MSR) != 8)
		return 0;
	if (pread(device, &got, 8, MSR) != 8)
		_exit(3);
	for (int i = 1; got != value && i < TRIES; i++)
		if (pwrite(device, &value, 8, MSR) != 8 || pread(device, &got, 8, MSR) != 8)
			_exit(3);
	undo();
	return 1;
}

static void intent(int journal, pid_t watchdog, int bit)
{
	char line[128];
	int length = snprintf(line, sizeof line, "{\"ev\": \"intent\", \"step\": \"bit %d\", \"mask\": \"0x%016llx\"}\n",
			      bit, 1ull << (bit & 63));

	for (int i = 0; i < 3; i++) {
		int file = open(kvm_users[i], O_RDONLY);

		if (file >= 0) {
			if (read(file, line + 100, 8) < 0)
				_exit(7);
			close(file);
		}
	}
	if (waitpid(watchdog, NULL, WNOHANG) != 0 || write(journal, line, length) != length || fsync(journal))
		_exit(4);
}

int main(int argc, char **argv)
{
	struct timespec begin, end;
	uint64_t accepted = 0;
	int journal, wait_end[2];
	pid_t watchdog;
	char byte;

	if (argc != 3 || (device = open(argv[1], O_RDWR)) < 0 || pread(device, &saved, 8, MSR) != 8)
		return 2;
	journal = open(argv[2], O_WRONLY | O_CREAT | O_APPEND | O_TRUNC, 0600);
	if (journal < 0 || pipe(wait_end))
		return 2;
	watchdog = fork();
	if (watchdog == 0) {
		close(wait_end[1]);
		return read(wait_end[0], &byte, 1) < 0;
	}
	clock_gettime(CLOCK_MONOTONIC, &begin);
	intent(journal, watchdog, 0);
	attempt(saved);
	for (int bit = 0; bit < 64; bit++) {
		intent(journal, watchdog, bit);
		if (attempt(saved | 1ull << bit))
			accepted |= 1ull << bit;
	}
	intent(journal, watchdog, 64);
	if (accepted)
		attempt(saved | accepted);
	clock_gettime(CLOCK_MONOTONIC, &end);
	close(wait_end[1]);
	waitpid(watchdog, NULL, 0);
	printf("%.9f\n", end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) / 1e9);
	return 0;
}
