#include "control.h"

#include "mqtt5.h"
#include "text.h"

#define BATCH_HEADER_BYTES 8u
#define HEADER_BYTES 12u
#define MAX_QOS 2u

enum { AT_VERSION = 0, AT_RESERVED = 1, AT_COUNT = 2, AT_NUMBER = 4 };
enum { AT_CODE = 0, AT_QOS = 1, AT_CLIENT_BYTES = 2, AT_TOPIC_BYTES = 4, AT_PROPERTY_BYTES = 6, AT_PAYLOAD_BYTES = 8 };

/* Splits the operation at the beginning of `left`; its length, or 0 when `left` is too short for it. */
static size_t split(struct bytes left, struct operation *operation)
{
	if (left.size < HEADER_BYTES)
		return 0;
	const uint8_t *header = left.data;
	operation->code = header[AT_CODE];
	operation->qos = header[AT_QOS];
	struct bytes *fields[] = {&operation->client_id, &operation->topic, &operation->properties, &operation->payload};
	const size_t sizes[] = {get_u16(header + AT_CLIENT_BYTES), get_u16(header + AT_TOPIC_BYTES),
		get_u16(header + AT_PROPERTY_BYTES), get_u32(header + AT_PAYLOAD_BYTES)};
	size_t at = HEADER_BYTES;
	for (size_t field = 0; field < 4; field++) {
		if (sizes[field] > left.size - at)
			return 0;
		*fields[field] = (struct bytes){header + at, sizes[field]};
		at += sizes[field];
	}
	return at;
}

static const char *operation_problem(const struct operation *operation)
{
	bool to_client = operation->code == OP_DELIVER || operation->code == OP_KICK;
	bool message = operation->code == OP_DELIVER || operation->code == OP_PUBLISH;
	if (operation->code < OP_HELLO || operation->code > OP_STATS)
		return "unknown operation";
	if ((unsigned)operation->qos > MAX_QOS)
		return "no such QoS";
	if (to_client ? operation->client_id.size == 0 || !text_is_mqtt(operation->client_id) : operation->client_id.size > 0)
		return "wrong client id";
	if (message ? !text_is_topic(operation->topic) : operation->topic.size > 0)
		return "wrong topic";
	if (message ? !properties_are_sound(operation->properties) : operation->properties.size > 0)
		return "wrong properties";
	if (!message && operation->code != OP_TABLE && operation->payload.size > 0)
		return "payload where there is none";
	return NULL;
}

const char *control_parse(struct bytes payload, struct batch *batch, size_t *position)
{
	const uint8_t *data = payload.data;
	*position = 0;
	if (payload.size < BATCH_HEADER_BYTES)
		return "shorter than its header";
	if (data[AT_VERSION] != CONTROL_VERSION || data[AT_RESERVED] != 0)
		return "another version of the protocol";
	*batch = (struct batch){get_u16(data + AT_COUNT), get_u32(data + AT_NUMBER),
		{data + BATCH_HEADER_BYTES, payload.size - BATCH_HEADER_BYTES}};
	if (batch->count > CONTROL_MAX_OPERATIONS)
		return "too many operations";
	size_t at = BATCH_HEADER_BYTES;
	for (unsigned i = 0; i < batch->count; i++) {
		struct operation operation;
		size_t size = split((struct bytes){data + at, payload.size - at}, &operation);
		*position = at;
		if (size == 0)
			return "operation cut off";
		const char *problem = operation_problem(&operation);
		if (problem)
			return problem;
		at += size;
	}
	*position = at;
	return at == payload.size ? NULL : "bytes after the last operation";
}

bool control_next(struct batch *batch, struct operation *operation)
{
	if (batch->count == 0)
		return false;
	size_t size = split(batch->operations, operation);
	batch->count--;
	batch->operations = (struct bytes){(const uint8_t *)batch->operations.data + size, batch->operations.size - size};
	return true;
}
