/* The cursor file, which the lane's reader writes: up to where everything is settled (docs/spool.md). */
#ifndef MQ2MQTT_CURSOR_H
#define MQ2MQTT_CURSOR_H

#include <stdbool.h>
#include <stdint.h>

#define CURSOR_NAME "cursor"

struct cursor {
	uint64_t offset;   /* of the oldest unsettled message */
	uint64_t segment;  /* base of the segment where it is or will be */
	uint64_t position; /* byte in that file */
};

/* Reads the newer slot; false when there is none of the lane created at `created_us`. */
bool cursor_read(int directory, uint64_t created_us, struct cursor *cursor);

#endif
