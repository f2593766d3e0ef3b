/* A machine whose clock and boot id a test sets. */
#ifndef MQ2MQTT_TEST_FAKE_MACHINE_H
#define MQ2MQTT_TEST_FAKE_MACHINE_H

#include "machine.h"

void machine_set(uint64_t now_us, const uint8_t *boot_id);

/* How often files were synced. */
unsigned machine_syncs(void);

/* No sync succeeds from now on. */
void machine_break_disk(void);

#endif
