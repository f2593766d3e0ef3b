/* A machine whose clock and boot id a test sets. */
#ifndef MQ2MQTT_TEST_FAKE_MACHINE_H
#define MQ2MQTT_TEST_FAKE_MACHINE_H

#include "machine.h"

void machine_set(uint64_t now_us, const uint8_t *boot_id);

#endif
