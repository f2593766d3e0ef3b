#include "test/fake_machine.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "segment.h"

static uint64_t now;
static uint8_t boot[BOOT_ID_BYTES];
static atomic_uint syncs;
static atomic_bool broken;

void machine_set(uint64_t now_us, const uint8_t *boot_id)
{
	now = now_us;
	memcpy(boot, boot_id, sizeof boot);
}

uint64_t machine_now_us(void)
{
	return now;
}

const uint8_t *machine_boot_id(void)
{
	return boot;
}

int machine_sync(int file)
{
	syncs++;
	errno = EIO;
	return broken ? -1 : fdatasync(file);
}

unsigned machine_syncs(void)
{
	return syncs;
}

void machine_break_disk(void)
{
	broken = true;
}
