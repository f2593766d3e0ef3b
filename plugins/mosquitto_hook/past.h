/* What crashes have done to the segments of a lane: where each of them ends, and what is damage.
 * docs/spool.md ("Opening a lane") gives the rules and their reasons. */
#ifndef MQ2MQTT_PAST_H
#define MQ2MQTT_PAST_H

#include "chain.h"

/* Says in `place->problem` what is wrong; always false. */
__attribute__((format(printf, 2, 3))) bool chain_fail(const struct chain_place *place, const char *format, ...);

/* Finds where every segment of a chain ends whose headers are read. `stored` is NULL without a cursor. */
bool past_judge(struct chain *chain, const struct chain_place *place, const struct cursor *stored);

/* Sets `*written` if anything but zeros stands behind the header of a segment. */
bool past_has_frames(const struct chain_place *place, uint64_t base, bool *written);

#endif
