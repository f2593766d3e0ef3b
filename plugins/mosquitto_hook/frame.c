#include "frame.h"

#include <sys/uio.h>
#include <unistd.h>

#include "crc32.h"

/* Up to here one copy and `write` are cheaper than `writev` with five parts. */
#define SMALL_FRAME_BYTES 2048u
#define VERSION 1u
#define FIELDS_BYTES (FRAME_HEADER_BYTES - FRAME_PREFIX_BYTES)
#define KNOWN_FLAGS 0x1Fu

/* Positions in the header. */
enum { AT_SIZE = 0, AT_CRC = 4, AT_VERSION = 8, AT_KIND = 9, AT_FLAGS = 10, AT_RESERVED = 11, AT_CLIENT_BYTES = 12,
	AT_TOPIC_BYTES = 14, AT_PROPERTY_BYTES = 16, AT_ACCEPTED = 20 };

bool frame_fits(const struct frame *frame)
{
	return frame->client_id.size <= UINT16_MAX && frame->topic.size <= UINT16_MAX
		&& frame->properties.size <= FRAME_MAX_BYTES && frame->payload.size <= FRAME_MAX_BYTES
		&& frame_size(frame) - FRAME_PREFIX_BYTES <= FRAME_MAX_BYTES;
}

size_t frame_size(const struct frame *frame)
{
	return FRAME_HEADER_BYTES + frame->client_id.size + frame->topic.size + frame->properties.size + frame->payload.size;
}

void frame_header(const struct frame *frame, uint8_t header[FRAME_HEADER_BYTES])
{
	put_u32(header + AT_SIZE, (uint32_t)(frame_size(frame) - FRAME_PREFIX_BYTES));
	header[AT_VERSION] = VERSION;
	header[AT_KIND] = (uint8_t)frame->kind;
	header[AT_FLAGS] = frame->flags;
	header[AT_RESERVED] = 0;
	put_u16(header + AT_CLIENT_BYTES, (uint16_t)frame->client_id.size);
	put_u16(header + AT_TOPIC_BYTES, (uint16_t)frame->topic.size);
	put_u32(header + AT_PROPERTY_BYTES, (uint32_t)frame->properties.size);
	put_u64(header + AT_ACCEPTED, frame->accepted_us);
	uint32_t crc = crc32_of(0, header + FRAME_PREFIX_BYTES, FIELDS_BYTES);
	crc = crc32_of(crc, frame->client_id.data, frame->client_id.size);
	crc = crc32_of(crc, frame->topic.data, frame->topic.size);
	crc = crc32_of(crc, frame->properties.data, frame->properties.size);
	crc = crc32_of(crc, frame->payload.data, frame->payload.size);
	put_u32(header + AT_CRC, crc);
}

static size_t copy(uint8_t *to, struct bytes from)
{
	if (from.size)
		memcpy(to, from.data, from.size);
	return from.size;
}

ssize_t frame_write(int file, const struct frame *frame)
{
	uint8_t small[SMALL_FRAME_BYTES];
	frame_header(frame, small);
	if (frame_size(frame) <= sizeof small) {
		size_t at = FRAME_HEADER_BYTES;
		at += copy(small + at, frame->client_id);
		at += copy(small + at, frame->topic);
		at += copy(small + at, frame->properties);
		at += copy(small + at, frame->payload);
		return write(file, small, at);
	}
	/* writev reads these; its interface is older than const. */
	const struct iovec parts[] = {
		{small, FRAME_HEADER_BYTES},
		{(void *)(uintptr_t)frame->client_id.data, frame->client_id.size},
		{(void *)(uintptr_t)frame->topic.data, frame->topic.size},
		{(void *)(uintptr_t)frame->properties.data, frame->properties.size},
		{(void *)(uintptr_t)frame->payload.data, frame->payload.size},
	};
	return writev(file, parts, sizeof parts / sizeof *parts);
}

static bool legal_flags(uint8_t flags)
{
	return (flags & ~KNOWN_FLAGS) == 0 && (flags & FRAME_QOS) != FRAME_QOS;
}

static const char *header_problem(const uint8_t *header)
{
	uint32_t size = get_u32(header + AT_SIZE);
	if (size < FIELDS_BYTES || size > FRAME_MAX_BYTES)
		return "impossible frame size";
	if (header[AT_VERSION] != VERSION)
		return "unknown frame version";
	if (header[AT_KIND] < FRAME_PUBLISH || header[AT_KIND] > FRAME_PARKED)
		return "unknown frame kind";
	if (!legal_flags(header[AT_FLAGS]) || header[AT_RESERVED] != 0)
		return "illegal frame flags";
	uint64_t fields = (uint64_t)FIELDS_BYTES + get_u16(header + AT_CLIENT_BYTES) + get_u16(header + AT_TOPIC_BYTES)
		+ get_u32(header + AT_PROPERTY_BYTES);
	return fields > size ? "fields longer than the frame size" : NULL;
}

struct frame_look frame_look(struct bytes file, size_t position)
{
	const uint8_t *data = file.data;
	size_t left = file.size - position;
	if (left < FRAME_HEADER_BYTES)
		return (struct frame_look){.state = FRAME_CUT};
	const uint8_t *header = data + position;
	const char *problem = header_problem(header);
	if (problem)
		return (struct frame_look){.state = FRAME_BROKEN, .problem = problem};
	size_t size = get_u32(header + AT_SIZE);
	if (size > left - FRAME_PREFIX_BYTES)
		return (struct frame_look){.state = FRAME_CUT};
	if (crc32_of(0, header + FRAME_PREFIX_BYTES, size) != get_u32(header + AT_CRC))
		return (struct frame_look){.state = FRAME_BROKEN, .problem = "CRC mismatch"};
	return (struct frame_look){.state = FRAME_SOUND, .end = position + FRAME_PREFIX_BYTES + size};
}

uint64_t frame_walk(struct bytes file, size_t *position)
{
	uint64_t count = 0;
	for (;;) {
		struct frame_look look = frame_look(file, *position);
		if (look.state != FRAME_SOUND)
			return count;
		*position = look.end;
		count++;
	}
}

/* Where from `start` on the bytes stand that every header has; a cheap filter. */
static size_t possible_frame(struct bytes file, size_t start)
{
	const uint8_t *data = file.data;
	for (size_t at = start; at + FRAME_PREFIX_BYTES + 4 <= file.size; at++) {
		const uint8_t *version = memchr(data + at + AT_VERSION, VERSION, file.size - at - AT_VERSION - 3);
		if (!version)
			break;
		at = (size_t)(version - data) - AT_VERSION;
		if (version[1] >= FRAME_PUBLISH && version[1] <= FRAME_PARKED && version[2] <= KNOWN_FLAGS && version[3] == 0)
			return at;
	}
	return file.size;
}

uint64_t frame_claimed_size(const uint8_t *header)
{
	return (uint64_t)get_u32(header + AT_SIZE) + FRAME_PREFIX_BYTES;
}

size_t frame_find(struct bytes file, size_t start)
{
	uint64_t left = FRAME_SEARCH_BYTES;
	for (size_t at = start; (at = possible_frame(file, at)) < file.size; at++) {
		if (frame_look(file, at).state == FRAME_SOUND)
			return at;
		uint64_t size = frame_claimed_size((const uint8_t *)file.data + at);
		if (size > file.size - at)
			continue;
		if (size > left)
			break;
		left -= size;
	}
	return file.size;
}

bool frame_size_is_damaged(struct bytes file, size_t position)
{
	const uint8_t *data = file.data;
	if (file.size - position < FRAME_HEADER_BYTES)
		return false;
	uint32_t expected = get_u32(data + position + AT_CRC), crc = 0;
	size_t checked = position + FRAME_PREFIX_BYTES, at = position + FRAME_HEADER_BYTES;
	for (; (at = possible_frame(file, at)) < file.size; at++) {
		crc = crc32_of(crc, data + checked, at - checked);
		checked = at;
		if (crc == expected && frame_look(file, at).state == FRAME_SOUND)
			return true;
	}
	return crc32_of(crc, data + checked, file.size - checked) == expected;
}
