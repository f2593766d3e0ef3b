/* The segments of a lane as a start finds them: which files, which frames, what a crash left behind.
 * docs/spool.md ("Opening a lane") gives the rules and their reasons. Reads only. */
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
	bool torn;     /* its file goes on behind them, to be cut to `size` */
	bool whole;    /* it has a header */
	struct segment_header header;
};

struct chain {
	struct segment *segments; /* oldest first */
	size_t count, capacity;
	size_t unborn;       /* files behind the last segment whose headers were never written: `segments[count]` and on */
	uint64_t created_us; /* of the lane */
	bool same_boot;      /* the last segment was made since the machine started: it can have lost nothing but an
	                        unfinished write */
};

/* What is read where. */
struct chain_place {
	int directory;
	const char *path;               /* of it, for texts */
	void (*remark)(const char *text);
	char *problem;                  /* LANE_TEXT_BYTES, for what makes a function return false */
};

/* Reads the headers of all segments and walks through the last one, and through what a loss of power may have taken
 * from others. `*stored` is the cursor if `*found`. False for damage that no crash explains. */
bool chain_read(struct chain *chain, const struct chain_place *place, struct cursor *stored, bool *found);

/* Makes sure that `chain_add` succeeds; false without memory. */
bool chain_reserve(struct chain *chain);
void chain_add(struct chain *chain, struct segment segment);

/* Bytes of frames from the cursor (NULL for none) on; forgets segments behind it, which the reader deletes. */
uint64_t chain_unsettled(struct chain *chain, const struct cursor *stored);

void chain_free(struct chain *chain);

#endif
