/* zlib's CRC-32, so that the hook needs no library. */
#ifndef MQ2MQTT_CRC32_H
#define MQ2MQTT_CRC32_H

#include <stddef.h>
#include <stdint.h>

/* Continues `crc` (0 to begin) over `size` bytes. */
uint32_t crc32_of(uint32_t crc, const void *data, size_t size);

#endif
