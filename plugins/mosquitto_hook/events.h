/* Client events: what the hook tells of connections, in the lane `spool/.clients` (docs/mosquitto-protocol.md). */
#ifndef MQ2MQTT_EVENTS_H
#define MQ2MQTT_EVENTS_H

#include "buffer.h"
#include "clients.h"
#include "lane.h"

#define EVENTS_LANE ".clients"

struct events {
	const char *spool;
	struct lane *lane; /* NULL while it cannot be opened: then nothing is told */
	uint64_t tried_us; /* when opening was tried last */
	uint64_t epoch;    /* when the hook was loaded: microseconds since 1970 */
	uint64_t lost;     /* in all */
	bool overflow;     /* something was lost that no record tells of yet */
	struct buffer text;
	char problem[LANE_TEXT_BYTES];
};

/* Opens the lane and writes the boot record. */
void events_open(struct events *events, const char *spool);

void events_connected(struct events *events, const struct client *client);

/* `reason` is a word; only a DISCONNECT that the client sent makes it `clean`. */
void events_gone(struct events *events, const struct client *client, bool clean, const char *reason);

/* Writes the overflow record that is due, when there is space again, or the lane can be opened again. */
void events_catch_up(struct events *events);

/* Tries again to open the lane, if it could not be opened. */
void events_retry(struct events *events);

/* Why events are not written now; NULL if they are. */
const char *events_problem(struct events *events);

/* Writes the shutdown record and closes the lane. */
void events_close(struct events *events);

#endif
