#include "test/fake_machine.h"

#include <string.h>

#include "segment.h"

static uint64_t now;
static uint8_t boot[BOOT_ID_BYTES];

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
