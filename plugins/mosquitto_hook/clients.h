/* Who is connected. A connection is known by Mosquitto's context pointer, not by its client id: at a take-over the new
 * one comes before the old one goes. */
#ifndef MQ2MQTT_CLIENTS_H
#define MQ2MQTT_CLIENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct client {
	const void *context;
	char *id;
	char *address; /* IP address, or the path of a Unix socket; empty if unknown */
	uint64_t number; /* of the connection, never given out twice in one life of the broker */
	uint64_t connected_us; /* when it was let in: microseconds since 1970 */
	bool clean_session;
	bool online; /* let in; before that it is only known to have asked */
	bool kicked;
	struct client *next_by_context, *next_by_id, *next_asking;
};

struct clients {
	struct client **by_context, **by_id; /* hash tables of `slots` chains each */
	size_t slots, count;
	uint64_t last_number;
	struct client *asking; /* those that are not online yet, oldest first: a few */
};

/* Notes that a context asks to be let in. NULL without memory. */
struct client *clients_add(struct clients *clients, const void *context, const char *id, const char *address,
	bool clean_session);

struct client *clients_find(const struct clients *clients, const void *context);

/* Notes that a client is let in. */
void clients_let_in(struct clients *clients, struct client *client);

/* The connection of `id` that is online. */
struct client *clients_online(const struct clients *clients, const char *id);

void clients_remove(struct clients *clients, struct client *client);

/* Goes over all: NULL begins, NULL ends. */
const struct client *clients_next(const struct clients *clients, const struct client *client);

void clients_free(struct clients *clients);

#endif
