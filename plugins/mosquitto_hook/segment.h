/* Segment files: their header and their names (docs/spool.md). */
#ifndef MQ2MQTT_SEGMENT_H
#define MQ2MQTT_SEGMENT_H

#include <stdbool.h>

#include "bytes.h"

#define SEGMENT_HEADER_BYTES 80u
#define SEGMENT_NAME_BYTES 25u /* 20 digits, ".seg", NUL */
#define BOOT_ID_BYTES 16u

struct segment_header {
	uint64_t base;           /* offset of the first frame */
	uint64_t created_us;     /* the lane's creation */
	uint64_t previous_base;  /* 0 for none */
	uint64_t previous_end;   /* offset after the last frame of the segment before */
	uint64_t previous_bytes; /* its length */
	uint8_t boot_id[BOOT_ID_BYTES];
};

void segment_header_pack(const struct segment_header *header, uint8_t file[SEGMENT_HEADER_BYTES]);

/* Returns why the first `size` bytes of a file are no header, or NULL. */
const char *segment_header_unpack(struct segment_header *header, const uint8_t *file, size_t size);

void segment_name(uint64_t base, char name[SEGMENT_NAME_BYTES]);

/* Whether `name` is the name of a segment; if so, `*base` is its first offset. */
bool segment_base(const char *name, uint64_t *base);

#endif
