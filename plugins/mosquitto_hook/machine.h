/* What a lane asks of the machine it runs on. */
#ifndef MQ2MQTT_MACHINE_H
#define MQ2MQTT_MACHINE_H

#include <stdint.h>

/* Microseconds since 1970. */
uint64_t machine_now_us(void);

/* 16 bytes that change when the machine starts; zeros if unknown, which never equals anything. */
const uint8_t *machine_boot_id(void);

/* fdatasync. */
int machine_sync(int file);

#endif
