/* What follows the last sound frame of a segment, and what explains it (docs/spool.md, "Opening a lane"). */
#ifndef MQ2MQTT_TAIL_H
#define MQ2MQTT_TAIL_H

#include <stdbool.h>

#include "bytes.h"

struct tail {
	uint64_t count;      /* sound frames from where the walk began */
	size_t position;     /* byte after the last of them */
	const char *problem; /* what is wrong there, unless it is a prefix of a frame; NULL when nothing is */
	bool lost;           /* whether a loss of power explains the problem */
	size_t following;    /* a sound frame after it, which shows that it is damage; 0 for none */
};

/* Counts the frames of `file` from `start` on and judges what follows them. `whole`: the file is as long as it was
 * written. */
struct tail tail_look(struct bytes file, size_t start, bool whole);

#endif
