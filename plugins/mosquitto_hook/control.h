/* What the sidecar sends to `$CONTROL/mq2mqtt/v1`, and what the hook answers: the bytes. docs/mosquitto-protocol.md is
 * the specification. No call keeps or copies what it is given. */
#ifndef MQ2MQTT_CONTROL_H
#define MQ2MQTT_CONTROL_H

#include <stdbool.h>

#include "bytes.h"

#define CONTROL_TOPIC "$CONTROL/mq2mqtt/v1"
#define ANSWER_TOPIC "$mq2mqtt/v1"
#define RESULTS_TOPIC "$mq2mqtt/v1/results"
#define CONTROL_VERSION 1u
#define CONTROL_MAX_OPERATIONS 256u /* of a batch */

enum operation_code { OP_HELLO = 1, OP_TABLE, OP_DELIVER, OP_PUBLISH, OP_KICK, OP_LIST, OP_STATS };

enum answer_kind { ANSWER_WELCOME = 1, ANSWER_RESULTS, ANSWER_TABLE, ANSWER_CLIENTS, ANSWER_REFUSED, ANSWER_STATS };

/* What became of one operation. */
enum operation_result { RESULT_DELIVERED, RESULT_NO_SUBSCRIBER, RESULT_OFFLINE, RESULT_REFUSED };

#define ANSWER_HEADER_BYTES 8u

struct operation {
	enum operation_code code;
	int qos;
	struct bytes client_id, topic, properties, payload;
};

struct batch {
	uint16_t count;
	uint32_t number; /* the sidecar's own, repeated in the answer */
	struct bytes operations;
};

/* Checks a whole batch. NULL when every operation in it is sound, else why not; `*position` is the byte. */
const char *control_parse(struct bytes payload, struct batch *batch, size_t *position);

/* The next operation of a batch that `control_parse` found sound; false at its end. */
bool control_next(struct batch *batch, struct operation *operation);

#endif
