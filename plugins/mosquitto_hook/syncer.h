/* A thread that brings files to the disk every so often, so that the broker does not wait for it. It touches nothing but
 * descriptors. */
#ifndef MQ2MQTT_SYNCER_H
#define MQ2MQTT_SYNCER_H

#include <stdatomic.h>
#include <stdbool.h>

struct syncer;

/* A file that is appended to. */
struct synced {
	int file;
	atomic_bool dirty; /* written since the last sync began */
	atomic_int error;  /* errno of a sync that failed; stays */
	struct synced *next;
};

/* Starts the thread; NULL with errno set. */
struct syncer *syncer_start(unsigned period_ms);

/* Ends it. Every file has been removed. */
void syncer_stop(struct syncer *syncer);

void syncer_add(struct syncer *syncer, struct synced *synced, int file);

/* Lets the file go, after a last sync of it. Waits for a sync that goes on. */
void syncer_remove(struct syncer *syncer, struct synced *synced);

#endif
