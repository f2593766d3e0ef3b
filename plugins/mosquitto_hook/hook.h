/* The hook: one in a broker. What Mosquitto's callbacks share. */
#ifndef MQ2MQTT_HOOK_H
#define MQ2MQTT_HOOK_H

#include "broker.h"
#include "buffer.h"
#include "clients.h"
#include "events.h"
#include "exports.h"
#include "options.h"
#include "results.h"

#define HOOK_VERSION_MAJOR 0
#define HOOK_VERSION_MINOR 2

/* A publish that was permitted and has not come to the MESSAGE event: if Mosquitto routes it all the same, it is the
 * will of a client that has died. */
struct sighting {
	bool set;
	struct buffer client_id, topic, payload;
	bool clean_session;
};

struct hook {
	mosquitto_plugin_id_t *identifier;
	struct options options;
	bool is_2_1;                /* Mosquitto tells of connects itself */
	const struct mosquitto *sidecar; /* its authenticated connection; NULL while it is away */
	const struct mosquitto *asking;  /* asks to be let in now; NULL as soon as it has its answer */
	struct exports exports;
	struct events events;
	struct clients clients;
	struct results results;
	struct sighting will;
	struct buffer properties, answer; /* reused */
};

/* Tells of those that asked to be let in and were not turned away since (2.0, which has no event for it). */
void presence_settle(struct hook *hook);

/* A client asks; on 2.0 that is the first that is seen of it. */
void presence_asks(struct hook *hook, struct mosquitto *client);

void presence_connected(struct hook *hook, struct mosquitto *client);

/* Whether a client is just being let in: only then Mosquitto asks what it may read of its own queue. */
bool presence_is_connecting(const struct hook *hook, struct mosquitto *client);

/* A subscription of a client matches. One that Mosquitto 2.0 let in by its certificate was perhaps not seen before. */
void presence_reached(struct hook *hook, struct mosquitto *client);

/* A client does something. One that Mosquitto 2.0 let in by its certificate was not seen before. */
void presence_active(struct hook *hook, struct mosquitto *client);

/* `reason` as Mosquitto gives it. */
void presence_gone(struct hook *hook, struct mosquitto *client, int reason);

/* A client publishes: takes it into its lane, hands P2P messages over. Returns what the callback returns. */
int publish_arrived(struct hook *hook, struct mosquitto_evt_message *message);

/* A publish is permitted: it may turn out to be a will. */
void publish_sighted(struct hook *hook, const struct mosquitto_evt_acl_check *check);

/* Mosquitto wants to hand a message to the sidecar's subscription: takes it if it is a will. */
void publish_shown_to_sidecar(struct hook *hook, const struct mosquitto_evt_acl_check *check);

/* Whether only the hook may hand out messages of this topic, and to whom. */
bool publish_is_private(const struct hook *hook, const char *topic, struct bytes *client_id);

/* The sidecar is no client: nothing is told of it. */
bool presence_is_sidecar(const struct hook *hook, const struct client *client);

/* The sidecar sent a batch. */
void downlink_arrived(struct hook *hook, struct bytes batch);

/* Reads `lanes.table`, as far as there is one. */
void table_file_load(struct hook *hook);

/* Writes it; false with the reason in `problem`. */
bool table_file_store(const struct hook *hook, struct bytes text, char problem[TABLE_PROBLEM_BYTES]);

#endif
