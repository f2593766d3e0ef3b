/* The lanes that the lane table names: what is exported goes into them. And one beside them for P2P messages that are
 * kept for a client that is away. */
#ifndef MQ2MQTT_EXPORTS_H
#define MQ2MQTT_EXPORTS_H

#include "buffer.h"
#include "lane.h"
#include "table.h"

#define P2P_LANE ".p2p"

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
	struct export **by_parent; /* of each of the table's parents, then that of P2P_LANE; NULL where there is no lane */
};

/* Goes by `table` from now on, which it takes over. Lanes that are in it before and after stay open, and their counters
 * go on. False without memory: then nothing has changed but that `table` is freed. */
bool exports_apply(struct exports *exports, struct table *table);

/* What became of a message. */
enum export_result {
	EXPORT_WRITTEN,
	EXPORT_LEFT,    /* not written, and counted: the broker goes on with it */
	EXPORT_REFUSED, /* there is no space: it must not be acknowledged */
};

enum export_result exports_append(struct exports *exports, struct export *export, const struct frame *frame);

/* Whether a message that has a sender is refused, and counted: for one that is to go into two lanes or into none. */
bool exports_refuse(struct exports *exports, struct export *export, const struct frame *frame);

/* The lane for P2P messages that are kept. There is a table, with a parent. */
struct export *exports_p2p(const struct exports *exports);

/* Counts a P2P message that is not kept, and whose client is away. */
void exports_away(struct exports *exports, size_t parent);

/* How many there are to look at, `by_parent[0]` and on. */
size_t exports_count(const struct exports *exports);

/* Tries again to open lanes that could not be opened. */
void exports_retry(struct exports *exports);

/* Why a lane takes nothing now; NULL if it does. */
const char *exports_problem(struct exports *exports, struct export *export);

/* A line for each counter. Returns their number. */
size_t exports_counters(const struct exports *exports, struct buffer *text);

void exports_free(struct exports *exports);

#endif
