#include "machine.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "segment.h"

uint64_t machine_now_us(void)
{
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

static void read_boot_id(uint8_t id[BOOT_ID_BYTES])
{
	FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
	if (!file)
		return;
	unsigned read = 0, byte;
	while (read < BOOT_ID_BYTES && (fscanf(file, "-") == 0) && fscanf(file, "%2x", &byte) == 1)
		id[read++] = (uint8_t)byte;
	if (read < BOOT_ID_BYTES)
		memset(id, 0, BOOT_ID_BYTES);
	fclose(file);
}

const uint8_t *machine_boot_id(void)
{
	static uint8_t id[BOOT_ID_BYTES];
	static bool known;
	if (!known) {
		read_boot_id(id);
		known = true;
	}
	return id;
}

int machine_sync(int file)
{
	return fdatasync(file);
}
