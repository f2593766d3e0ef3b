/* The segments of a lane as a start finds them: which files, which frames, what a crash left at the end.
 * docs/spool.md ("Opening a lane") gives the rules and their reasons. */
#ifndef MQ2MQTT_CHAIN_H
#define MQ2MQTT_CHAIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cursor.h"
#include "segment.h"

struct segment {
	uint64_t base;
	uint64_t end;  /* offset after its last frame */
	uint64_t size; /* header and whole frames */
};

struct chain {
	struct segment *segments; /* oldest first */
	size_t count, capacity;
	uint64_t created_us;
	uint64_t unborn;     /* base of a last segment whose header was never written; 0 for none */
	uint64_t torn_bytes; /* after the last sound frame, to be cut off */
	bool same_boot;      /* the last segment was made since the machine started: it can have lost nothing but an
	                        unfinished write */
};

/* Lists the segments and checks their headers and lengths against each other. False with the reason in `problem`
 * (LANE_TEXT_BYTES): damage that no crash explains. */
bool chain_read(struct chain *chain, int directory, const char *path, char *problem);

/* Walks through the last segment and judges what follows its frames. `stored` is NULL without a cursor. */
bool chain_check_tail(struct chain *chain, int directory, const char *path, const struct cursor *stored, char *problem);

/* Makes sure that `chain_add` succeeds; false without memory. */
bool chain_reserve(struct chain *chain);
void chain_add(struct chain *chain, struct segment segment);

/* Bytes of frames from the cursor on; forgets segments behind it, which the reader deletes. */
uint64_t chain_unsettled(struct chain *chain, const struct cursor *stored);

void chain_free(struct chain *chain);

#endif
