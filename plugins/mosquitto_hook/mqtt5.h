/* The properties of a PUBLISH in MQTT 5's own encoding, without the leading length (MQTT 5, table 2-4). */
#ifndef MQ2MQTT_MQTT5_H
#define MQ2MQTT_MQTT5_H

#include <stdbool.h>

#include "bytes.h"

enum property_id {
	PROPERTY_PAYLOAD_FORMAT = 0x01,
	PROPERTY_EXPIRY = 0x02,
	PROPERTY_CONTENT_TYPE = 0x03,
	PROPERTY_RESPONSE_TOPIC = 0x08,
	PROPERTY_CORRELATION_DATA = 0x09,
	PROPERTY_USER = 0x26,
};

struct property {
	enum property_id id;
	uint32_t number;    /* payload format, expiry */
	struct bytes name;  /* user property */
	struct bytes value; /* all others */
};

/* Takes the first property off `section`; false at its end and where it is malformed: then bytes are left. */
bool property_next(struct bytes *section, struct property *property);

bool properties_are_sound(struct bytes section);

#endif
