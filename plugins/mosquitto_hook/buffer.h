/* Bytes that grow, little-endian integers appended to them. Without memory `failed` is set and the rest ignored. */
#ifndef MQ2MQTT_BUFFER_H
#define MQ2MQTT_BUFFER_H

#include <stdbool.h>

#include "bytes.h"

struct buffer {
	uint8_t *data;
	size_t size, capacity;
	bool failed;
};

void buffer_add(struct buffer *buffer, const void *data, size_t size);
void buffer_u8(struct buffer *buffer, uint8_t value);
void buffer_u16(struct buffer *buffer, uint16_t value);
void buffer_u32(struct buffer *buffer, uint32_t value);
void buffer_u64(struct buffer *buffer, uint64_t value);
void buffer_text(struct buffer *buffer, const char *text);
__attribute__((format(printf, 2, 3))) void buffer_print(struct buffer *buffer, const char *format, ...);

/* A text without what would end a line or a field: one of a file's name may hold anything. */
void buffer_line(struct buffer *buffer, const char *text);

/* Empties it and keeps its memory. */
void buffer_clear(struct buffer *buffer);
void buffer_free(struct buffer *buffer);

static inline struct bytes buffer_bytes(const struct buffer *buffer)
{
	return (struct bytes){buffer->data, buffer->size};
}

#endif
