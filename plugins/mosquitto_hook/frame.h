/* Frame v1: the bytes of one message on disk. docs/spool.md is the specification. */
#ifndef MQ2MQTT_FRAME_H
#define MQ2MQTT_FRAME_H

#include <stdbool.h>
#include <sys/types.h>

#include "bytes.h"

#define FRAME_PREFIX_BYTES 8u /* size and CRC: what the CRC does not cover */
#define FRAME_HEADER_BYTES 28u
#define FRAME_MAX_BYTES (1u << 29)
#define FRAME_SEARCH_BYTES (1u << 30)

enum frame_kind { FRAME_PUBLISH = 1, FRAME_EVENT = 2, FRAME_ROCKETMQ = 3, FRAME_PARKED = 4 };

enum frame_flag { FRAME_QOS = 0x03, FRAME_RETAIN = 0x04, FRAME_CLEAN_SESSION = 0x08, FRAME_WILL = 0x10 };

struct frame {
	enum frame_kind kind;
	uint8_t flags;
	uint64_t accepted_us; /* since 1970 */
	struct bytes client_id, topic, properties, payload;
};

/* Whether every field of `frame` fits its place. */
bool frame_fits(const struct frame *frame);

/* Bytes of the whole frame. */
size_t frame_size(const struct frame *frame);

/* Writes the header; the four fields follow it on disk in the order of the struct. */
void frame_header(const struct frame *frame, uint8_t header[FRAME_HEADER_BYTES]);

/* One `write` of the whole frame. Returns what that returns: fewer bytes than `frame_size` where it was cut short. */
ssize_t frame_write(int file, const struct frame *frame);

/* What stands at a position of a file. */
enum frame_state {
	FRAME_SOUND,
	FRAME_CUT,      /* its header is sound, or not whole; the rest is cut off by the end */
	FRAME_BROKEN,
};

struct frame_look {
	enum frame_state state;
	size_t end;          /* of a sound frame */
	const char *problem; /* of a broken one */
};

struct frame_look frame_look(struct bytes file, size_t position);

/* Walks over the sound frames from `*position` on, leaves it after the last of them, and returns their number. */
uint64_t frame_walk(struct bytes file, size_t *position);

/* Length of a whole frame as its first four bytes claim it. */
uint64_t frame_claimed_size(const uint8_t *header);

/* The first sound frame at or after `start`, at whatever byte; `file.size` for none. A payload may be made of headers
 * that announce long frames, and reading each of them would take hours: ends when it has read FRAME_SEARCH_BYTES. */
size_t frame_find(struct bytes file, size_t start);

/* Whether the cut frame at `position` is a whole one with a damaged size: its CRC fits the bytes up to the next
 * sound frame, or up to the end. */
bool frame_size_is_damaged(struct bytes file, size_t position);

#endif
