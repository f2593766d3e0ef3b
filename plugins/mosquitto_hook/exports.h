/* The lanes that the lane table names: what is exported goes into them. */
#ifndef MQ2MQTT_EXPORTS_H
#define MQ2MQTT_EXPORTS_H

#include "buffer.h"
#include "lane.h"
#include "table.h"

struct export {
	char *rule;
	struct lane *lane;   /* NULL while it cannot be opened */
	bool refusing;       /* the last append failed: said once in the log */
	uint64_t tried_us;   /* when opening was tried last */
	char problem[LANE_TEXT_BYTES];
	uint64_t dropped_lane_full, dropped_too_large, refused, wills;
};

struct exports {
	const char *spool;
	struct syncer *syncer;   /* NULL: a message of durability `power` is on the disk when it is acknowledged */
	struct table *table;     /* NULL: nothing is exported */
	struct export **by_parent; /* of each of the table's parents; NULL where there is no lane */
};

/* Goes by `table` from now on, which it takes over. Lanes that are in it before and after stay open, and their counters
 * go on. False without memory: then nothing has changed but that `table` is freed. */
bool exports_apply(struct exports *exports, struct table *table);

/* What became of a message. */
enum export_result {
	EXPORT_TAKEN,   /* written, or dropped and counted: the broker goes on with it */
	EXPORT_REFUSED, /* there is no space: it must not be acknowledged */
};

enum export_result exports_append(struct exports *exports, struct export *export, const struct frame *frame);

/* Tries again to open lanes that could not be opened. */
void exports_retry(struct exports *exports);

/* Why a lane takes nothing now; NULL if it does. */
const char *exports_problem(struct exports *exports, struct export *export);

/* A line for each counter. Returns their number. */
size_t exports_counters(const struct exports *exports, struct buffer *text);

void exports_free(struct exports *exports);

#endif
