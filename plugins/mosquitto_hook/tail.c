#include "tail.h"

#include "file.h"
#include "frame.h"

/* Whether the frame at `position` reaches into a sector of zeros; whether any follows, if its size is not known. */
static bool has_unwritten_sector(struct bytes file, size_t position)
{
	const uint8_t *data = file.data;
	uint64_t size = frame_claimed_size(data + position);
	size_t end = size > FRAME_PREFIX_BYTES && size <= file.size - position ? position + (size_t)size : file.size;
	size_t first = (position + SECTOR_BYTES - 1) / SECTOR_BYTES * SECTOR_BYTES;
	for (size_t at = first; at < end; at += SECTOR_BYTES) {
		size_t left = file.size - at;
		if (all_zeros((struct bytes){data + at, left < SECTOR_BYTES ? left : SECTOR_BYTES}))
			return true;
	}
	return false;
}

/* `kill -9` and a full disk leave a prefix of one frame: nothing is wrong. A loss of power leaves anything in blocks
 * that were never written: zeros, or old content. Where it is not zeros, nothing sound follows. */
static void judge(struct tail *tail, struct bytes file, bool whole)
{
	struct frame_look look = frame_look(file, tail->position);
	if (look.state == FRAME_CUT) {
		/* A device chooses payloads, so frames found inside prove nothing; but if the CRC fits what stands before one
		 * of them, the size field is damaged and a whole frame is meant. */
		tail->problem = frame_size_is_damaged(file, tail->position) ? "damaged frame size" : NULL;
		return;
	}
	tail->problem = look.problem;
	if (has_unwritten_sector(file, tail->position)) {
		tail->lost = true;
		return;
	}
	size_t following = frame_find(file, tail->position + 1);
	if (following < file.size)
		tail->following = following;
	else
		tail->lost = !whole || ((const uint8_t *)file.data)[file.size - 1] == 0;
}

struct tail tail_look(struct bytes file, size_t start, bool whole)
{
	struct tail tail = {.position = start};
	if (start < file.size)
		tail.count = frame_walk(file, &tail.position);
	if (tail.position < file.size)
		judge(&tail, file, whole);
	return tail;
}
