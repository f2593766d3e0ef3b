#include "text.h"

#define MAX_TEXT_BYTES 65535u

static bool is_continuation(uint8_t byte)
{
	return (byte & 0xC0) == 0x80;
}

/* Bytes of the UTF-8 sequence at `at`, of which `left` follow; 0 if it is none that MQTT allows. */
static size_t sequence(const uint8_t *at, size_t left)
{
	uint8_t first = at[0];
	if (first < 0x80)
		return first == 0 ? 0 : 1;
	if (first >= 0xC2 && first <= 0xDF)
		return left >= 2 && is_continuation(at[1]) ? 2 : 0;
	if (first >= 0xE0 && first <= 0xEF) {
		if (left < 3 || !is_continuation(at[1]) || !is_continuation(at[2]))
			return 0;
		bool overlong = first == 0xE0 && at[1] < 0xA0, surrogate = first == 0xED && at[1] >= 0xA0;
		return overlong || surrogate ? 0 : 3;
	}
	if (first >= 0xF0 && first <= 0xF4) {
		if (left < 4 || !is_continuation(at[1]) || !is_continuation(at[2]) || !is_continuation(at[3]))
			return 0;
		bool overlong = first == 0xF0 && at[1] < 0x90, beyond = first == 0xF4 && at[1] >= 0x90;
		return overlong || beyond ? 0 : 4;
	}
	return 0;
}

bool text_is_mqtt(struct bytes text)
{
	const uint8_t *data = text.data;
	if (text.size > MAX_TEXT_BYTES)
		return false;
	for (size_t at = 0, bytes; at < text.size; at += bytes)
		if ((bytes = sequence(data + at, text.size - at)) == 0)
			return false;
	return true;
}

bool text_is_topic(struct bytes text)
{
	return text.size > 0 && !memchr(text.data, '+', text.size) && !memchr(text.data, '#', text.size)
		&& text_is_mqtt(text);
}
