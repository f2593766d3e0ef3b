/* The writing end of a lane: append-only segment files under `spool/<rule id>/` (docs/spool.md).
 *
 * A write into the page cache before PUBACK survives `kill -9` of the broker; with `power` an fdatasync follows each, or
 * a thread does it every so often. */
#ifndef MQ2MQTT_LANE_H
#define MQ2MQTT_LANE_H

#include "frame.h"
#include "syncer.h"

#define LANE_TEXT_BYTES 1024u

/* How long to wait before a lane is opened that could not be opened: it is damaged or somebody else's, and a look at each
 * message would stall the broker. */
#define LANE_RETRY_US 5000000u

struct lane;

struct lane_options {
	uint64_t max_bytes; /* of frames that are not settled */
	bool power;
	struct syncer *syncer; /* of `power`; NULL: `lane_append` returns when the message is on the disk */
	void (*remark)(const char *text); /* told what a crash has left and what was done about it */
};

enum lane_result {
	LANE_WRITTEN,
	LANE_FULL,      /* no space now, nothing was written */
	LANE_TOO_LARGE, /* never fits */
	LANE_REMOVED,   /* somebody has deleted it: to be opened anew; `lane_problem` says so */
	LANE_FAILED,    /* `lane_problem` says why */
};

/* Locks and recovers the lane in the directory `path`, made if missing. NULL with the reason in `problem`. */
struct lane *lane_open(const char *path, const struct lane_options *options, char problem[LANE_TEXT_BYTES]);

enum lane_result lane_append(struct lane *lane, const struct frame *frame);

/* Whether the message would be refused now, as far as can be told without writing; then it counts as refused. */
bool lane_is_full(struct lane *lane, const struct frame *frame);

/* Whether somebody has deleted it, `lane_problem` says so; it is to be opened anew. Looks once in a millisecond. */
bool lane_is_removed(struct lane *lane);

/* Offset that the next message gets. */
uint64_t lane_next_offset(const struct lane *lane);

/* Bytes of frames that are not settled, as of the last look at the cursor. */
uint64_t lane_unsent_bytes(const struct lane *lane);

/* Why the last append was refused, if the same message would be refused again; NULL otherwise. Looks at the cursor and
 * the disk. */
const char *lane_trouble(struct lane *lane);

/* Why the last append was refused. */
const char *lane_problem(const struct lane *lane);

/* Whether it takes nothing any more, whatever is tried. */
bool lane_has_failed(const struct lane *lane);

void lane_close(struct lane *lane);

#endif
