/* Mosquitto's plugin interface as far as the hook uses it, over the versions 2.0.11 to 2.1.
 *
 * The hook is built with the headers of 2.0; what only later versions have is named here by its number. */
#ifndef MQ2MQTT_BROKER_H
#define MQ2MQTT_BROKER_H

#include <stdbool.h>
#include <stdint.h>

#include <mosquitto_broker.h>
#include <mosquitto_plugin.h>

#include "buffer.h"

/* From mosquitto.h, which belongs to the client library. */
enum {
	MOSQ_LOG_NOTICE = 1 << 1,
	MOSQ_LOG_WARNING = 1 << 2,
	MOSQ_LOG_ERR = 1 << 3,
	MOSQ_ERR_SUCCESS = 0,
	MOSQ_ERR_NOMEM = 1,
	MOSQ_ERR_INVAL = 3,
	MOSQ_ERR_AUTH = 11,
	MOSQ_ERR_ACL_DENIED = 12,
	MOSQ_ERR_UNKNOWN = 13,
	MOSQ_ERR_PLUGIN_DEFER = 17,
	/* 2.1 */
	MOSQ_ERR_PLUGIN_IGNORE = 32,
	EVENT_CONNECT = 11,
	EVENT_CLIENT_OFFLINE = 28,
};

/* Why a client went; 2.1 gives a number, 2.0 a hint at most. */
enum {
	GONE_CLEAN = 0,
	GONE_PROTOCOL_ERROR = 2,
	GONE_CONNECTION_LOST = 7,
	GONE_MALFORMED_UTF8 = 18,
	GONE_KEEPALIVE = 19,
	GONE_MALFORMED_PACKET = 21,
	GONE_OVERSIZE_PACKET = 25,
	GONE_TAKEN_OVER = 142,
	GONE_KICKED = 152,
};

/* Looks for what only some builds have. */
void broker_init(void);

/* Whether the properties of publishes can be read: Mosquitto's own builds of 2.0 do not export what that needs. */
bool broker_reads_properties(void);

/* Appends those that a frame carries to `section`. */
void broker_read_properties(const mosquitto_property *properties, struct buffer *section);

/* Makes Mosquitto's list of a sound section; false without memory. */
bool broker_make_properties(struct bytes section, mosquitto_property **properties);

/* Why a client of 2.0 goes, by its state: one of GONE_*, or -1 if this build does not say it. */
int broker_gone_2_0(struct mosquitto *client);

/* Whether a client is there, by its state. */
enum broker_stage {
	STAGE_UNKNOWN, /* this build does not say it */
	STAGE_CONNECTING, /* it has sent CONNECT and waits for the answer */
	STAGE_CONNECTED,
	STAGE_AWAY,
};

enum broker_stage broker_stage_of(struct mosquitto *client);

/* Whether a client may have come by a listener on a Unix socket. Its address alone does not tell: a WebSocket client says
 * by X-Forwarded-For what it is, and a PROXY header (2.1) may hold any path. */
bool broker_is_from_unix_socket(const struct mosquitto *client);

/* Text that tells the version. */
const char *broker_version(bool is_2_1);

/* Queues a message: to a client (`client_id`), or to the subscribers of `topic` (NULL). Takes `properties` over in
 * any case. False if Mosquitto refuses it. */
bool broker_send(const char *client_id, const char *topic, struct bytes payload, int qos, mosquitto_property *properties);

#endif
