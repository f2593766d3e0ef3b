#include "buffer.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static bool reserve(struct buffer *buffer, size_t size)
{
	if (buffer->failed)
		return false;
	if (buffer->size + size <= buffer->capacity)
		return true;
	size_t capacity = buffer->capacity ? buffer->capacity : 256;
	while (capacity < buffer->size + size)
		capacity *= 2;
	uint8_t *grown = realloc(buffer->data, capacity);
	buffer->failed = !grown;
	if (!grown)
		return false;
	buffer->data = grown;
	buffer->capacity = capacity;
	return true;
}

void buffer_add(struct buffer *buffer, const void *data, size_t size)
{
	if (size == 0 || !reserve(buffer, size))
		return;
	memcpy(buffer->data + buffer->size, data, size);
	buffer->size += size;
}

void buffer_u8(struct buffer *buffer, uint8_t value)
{
	buffer_add(buffer, &value, 1);
}

void buffer_u16(struct buffer *buffer, uint16_t value)
{
	uint8_t bytes[2];
	put_u16(bytes, value);
	buffer_add(buffer, bytes, sizeof bytes);
}

void buffer_u32(struct buffer *buffer, uint32_t value)
{
	uint8_t bytes[4];
	put_u32(bytes, value);
	buffer_add(buffer, bytes, sizeof bytes);
}

void buffer_u64(struct buffer *buffer, uint64_t value)
{
	uint8_t bytes[8];
	put_u64(bytes, value);
	buffer_add(buffer, bytes, sizeof bytes);
}

void buffer_text(struct buffer *buffer, const char *text)
{
	buffer_add(buffer, text, strlen(text));
}

void buffer_line(struct buffer *buffer, const char *text)
{
	for (; *text; text++)
		buffer_u8(buffer, (uint8_t)*text < ' ' ? '?' : (uint8_t)*text);
}

void buffer_print(struct buffer *buffer, const char *format, ...)
{
	char text[2048];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	buffer_text(buffer, text);
}

void buffer_clear(struct buffer *buffer)
{
	buffer->size = 0;
	buffer->failed = false;
}

void buffer_free(struct buffer *buffer)
{
	free(buffer->data);
	*buffer = (struct buffer){0};
}
