#include "past.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "file.h"
#include "lane.h"
#include "machine.h"
#include "tail.h"

struct past {
	struct chain *chain;
	const struct chain_place *place;
	const struct cursor *stored; /* NULL for none */
	const uint8_t *crashed_boot; /* made the last segment: what other boots had made was looked at, and cut, by its
	                                opening */
};

static bool is_this_boot(const uint8_t boot_id[BOOT_ID_BYTES])
{
	return memcmp(boot_id, machine_boot_id(), BOOT_ID_BYTES) == 0 && !all_zeros((struct bytes){boot_id, BOOT_ID_BYTES});
}

__attribute__((format(printf, 3, 4))) static void remark(const struct past *past, const struct segment *segment,
	const char *format, ...)
{
	char text[128], line[LANE_TEXT_BYTES];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	snprintf(line, sizeof line, "%.300s/%020" PRIu64 ".seg: a loss of power took %s", past->place->path, segment->base,
		text);
	past->place->remark(line);
}

static bool cannot_read(const struct chain_place *place, const char *name)
{
	return chain_fail(place, "cannot read %.300s/%s: %s", place->path, name, strerror(errno));
}

static bool damage(const struct chain_place *place, const struct segment *segment, const struct tail *tail)
{
	char name[SEGMENT_NAME_BYTES], following[64] = "";
	segment_name(segment->base, name);
	if (tail->following)
		snprintf(following, sizeof following, ", with a sound frame at byte %zu", tail->following);
	errno = 0;
	return chain_fail(place, "%.300s/%s: byte %zu: %s%s; restore the file, or cut it there to give up what follows: "
		"truncate -s %zu %.300s/%s", place->path, name, tail->position, tail->problem, following, tail->position,
		place->path, name);
}

static bool lost_header(const struct chain_place *place, uint64_t base)
{
	errno = 0;
	return chain_fail(place, "%.300s/%020" PRIu64 ".seg: byte 0: no segment of a lane, or its header is lost; move the "
		"file away", place->path, base);
}

bool past_has_frames(const struct chain_place *place, uint64_t base, bool *written)
{
	char name[SEGMENT_NAME_BYTES];
	segment_name(base, name);
	struct bytes file;
	if (!file_read(place->directory, name, SIZE_MAX, &file))
		return cannot_read(place, name);
	*written = file.size > SEGMENT_HEADER_BYTES && !all_zeros((struct bytes){
		(const uint8_t *)file.data + SEGMENT_HEADER_BYTES, file.size - SEGMENT_HEADER_BYTES});
	file_free(file);
	return true;
}

/* Counts the frames in the first `size` bytes of a segment and judges what follows them. */
static bool walk(const struct past *past, struct segment *segment, uint64_t size, struct tail *tail)
{
	char name[SEGMENT_NAME_BYTES];
	segment_name(segment->base, name);
	struct bytes whole;
	if (!file_read(past->place->directory, name, SIZE_MAX, &whole))
		return cannot_read(past->place, name);
	struct bytes file = {whole.data, whole.size < size ? whole.size : (size_t)size};
	bool length_is_right = file.size == size;
	const struct cursor *stored = past->stored;
	size_t start = SEGMENT_HEADER_BYTES;
	uint64_t offset = segment->base;
	if (stored && stored->segment == segment->base && stored->position >= start && stored->position <= file.size) {
		start = (size_t)stored->position;
		offset = stored->offset;
	}
	*tail = tail_look(file, start, length_is_right);
	if (tail->count == 0 && tail->position < file.size && start != SEGMENT_HEADER_BYTES) {
		/* Nothing sound where the cursor points: trust the file rather than the hint. */
		offset = segment->base;
		*tail = tail_look(file, SEGMENT_HEADER_BYTES, length_is_right);
	}
	if (!tail->problem || tail->lost) {
		segment->end = offset + tail->count;
		segment->size = tail->position;
		segment->torn = tail->position < whole.size;
	}
	file_free(whole);
	return true;
}

/* A segment whose successor has a header, but that may have been shortened, or changed, by a loss of power. */
static bool look_closer(const struct past *past, struct segment *segment)
{
	struct tail tail;
	uint64_t end = segment->end;
	/* A problem that no loss of power explains is the reader's to report, when it comes there. */
	if (!walk(past, segment, segment->size, &tail))
		return false;
	if (segment->end < end)
		remark(past, segment, "%" PRIu64 " messages from its end", end - segment->end);
	return true;
}

static bool check_neighbours(const struct past *past, const struct segment *segment, const struct segment *successor)
{
	if (successor->header.previous_base == segment->base)
		return true;
	errno = 0;
	return chain_fail(past->place, "%.300s/%020" PRIu64 ".seg: missing, between %020" PRIu64 ".seg and %020" PRIu64
		".seg; put it back, or move the segments before the latter away too to give their messages up", past->place->path,
		successor->header.previous_base, segment->base, successor->base);
}

/* Finds where `segment`, which is not the last one, ends. */
static bool look_at(const struct past *past, struct segment *segment)
{
	const struct segment *successor = segment + 1, *later = successor;
	while (!later->whole)
		later++;
	bool restarted = !is_this_boot(later->header.boot_id);
	if (successor->whole && !check_neighbours(past, segment, successor))
		return false;
	if (!segment->whole) {
		if (!restarted)
			return lost_header(past->place, segment->base);
		remark(past, segment, "all of it");
		return true;
	}
	if (!successor->whole) {
		struct tail tail;
		if (!walk(past, segment, UINT64_MAX, &tail))
			return false;
		if (tail.problem && !tail.lost)
			return damage(past->place, segment, &tail);
		remark(past, segment, "what came after it");
		return true;
	}
	char name[SEGMENT_NAME_BYTES];
	segment_name(segment->base, name);
	uint64_t size, written = successor->header.previous_bytes;
	if (!file_size(past->place->directory, name, &size))
		return cannot_read(past->place, name);
	errno = 0;
	if (size != written && !restarted)
		return chain_fail(past->place, "%.300s/%s: byte %" PRIu64 ": %" PRIu64 " bytes, but %" PRIu64 " were written; "
			"restore it, or move it and the segments before it away to give their messages up", past->place->path, name,
			size < written ? size : written, size, written);
	segment->end = successor->header.previous_end;
	segment->size = written;
	bool settled = past->stored && past->stored->offset >= segment->end;
	bool crashed = memcmp(segment->header.boot_id, past->crashed_boot, BOOT_ID_BYTES) == 0;
	return size == written && !(restarted && crashed && !settled) ? true : look_closer(past, segment);
}

bool past_judge(struct chain *chain, const struct chain_place *place, const struct cursor *stored)
{
	struct segment *last = &chain->segments[chain->count - 1];
	chain->same_boot = is_this_boot(last->header.boot_id);
	if (chain->same_boot && chain->unborn > 0) {
		bool written;
		if (!past_has_frames(place, last[1].base, &written))
			return false;
		if (chain->unborn > 1 || written)
			return lost_header(place, last[chain->unborn].base);
	}
	struct past past = {chain, place, stored, last->header.boot_id};
	for (struct segment *segment = chain->segments; segment < last; segment++)
		if (!look_at(&past, segment))
			return false;
	struct tail tail;
	if (!walk(&past, last, UINT64_MAX, &tail))
		return false;
	return tail.problem && (chain->same_boot || !tail.lost) ? damage(place, last, &tail) : true;
}
