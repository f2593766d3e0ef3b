#include "mqtt5.h"

#include "text.h"

static bool take(struct bytes *left, size_t size, const uint8_t **at)
{
	if (left->size < size)
		return false;
	*at = left->data;
	*left = (struct bytes){*at + size, left->size - size};
	return true;
}

/* Bytes behind their length of two bytes, big-endian as everything of MQTT. */
static bool take_binary(struct bytes *left, struct bytes *value)
{
	const uint8_t *at;
	if (!take(left, 2, &at))
		return false;
	value->size = (size_t)(at[0] << 8 | at[1]);
	if (!take(left, value->size, &at))
		return false;
	value->data = at;
	return true;
}

static bool take_text(struct bytes *left, struct bytes *value)
{
	return take_binary(left, value) && text_is_mqtt(*value);
}

static bool take_value(struct bytes *left, struct property *property)
{
	const uint8_t *at;
	switch (property->id) {
	case PROPERTY_PAYLOAD_FORMAT:
		if (!take(left, 1, &at))
			return false;
		property->number = at[0];
		return at[0] <= 1;
	case PROPERTY_EXPIRY:
		if (!take(left, 4, &at))
			return false;
		property->number = (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
		return true;
	case PROPERTY_CONTENT_TYPE:
		return take_text(left, &property->value);
	case PROPERTY_RESPONSE_TOPIC:
		return take_text(left, &property->value) && text_is_topic(property->value);
	case PROPERTY_CORRELATION_DATA:
		return take_binary(left, &property->value);
	case PROPERTY_USER:
		return take_text(left, &property->name) && take_text(left, &property->value);
	}
	return false;
}

bool property_next(struct bytes *section, struct property *property)
{
	struct bytes left = *section;
	const uint8_t *id;
	if (!take(&left, 1, &id))
		return false;
	*property = (struct property){.id = id[0]};
	if (!take_value(&left, property))
		return false;
	*section = left;
	return true;
}

bool properties_are_sound(struct bytes section)
{
	struct property property;
	unsigned seen = 0;
	while (property_next(&section, &property)) {
		/* MQTT 5, 3.3.2.3: only user properties may come more than once. */
		unsigned bit = property.id == PROPERTY_USER ? 0 : 1u << property.id;
		if (seen & bit)
			return false;
		seen |= bit;
	}
	return section.size == 0;
}
