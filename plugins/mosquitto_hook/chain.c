#include "chain.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "file.h"
#include "lane.h"
#include "machine.h"
#include "past.h"

#define INFO_NAME "lane.json"
#define INFO_BYTES 4096u
/* Segments that the reader deletes while they are listed: a few new looks are enough. */
#define LOOKS 5

bool chain_fail(const struct chain_place *place, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(place->problem, LANE_TEXT_BYTES, format, arguments);
	va_end(arguments);
	return false;
}

bool chain_reserve(struct chain *chain)
{
	if (chain->count < chain->capacity)
		return true;
	size_t capacity = chain->capacity ? 2 * chain->capacity : 16;
	struct segment *grown = realloc(chain->segments, capacity * sizeof *grown);
	if (!grown) {
		errno = ENOMEM;
		return false;
	}
	chain->segments = grown;
	chain->capacity = capacity;
	return true;
}

void chain_add(struct chain *chain, struct segment segment)
{
	chain->segments[chain->count++] = segment;
}

void chain_free(struct chain *chain)
{
	free(chain->segments);
	*chain = (struct chain){0};
}

static int by_base(const void *a, const void *b)
{
	const struct segment *left = a, *right = b;
	return (left->base > right->base) - (left->base < right->base);
}

static bool is_known(const char *name)
{
	static const char *const known[] = {".", "..", INFO_NAME, CURSOR_NAME, "writer.lock", "reader.lock", "parked"};
	for (size_t i = 0; i < sizeof known / sizeof *known; i++)
		if (strcmp(name, known[i]) == 0)
			return true;
	size_t length = strlen(name);
	return length >= 4 && strcmp(name + length - 4, ".tmp") == 0;
}

static bool list(struct chain *chain, const struct chain_place *place)
{
	/* The duplicate shares its position with the directory's descriptor. */
	int copy = fcntl(place->directory, F_DUPFD_CLOEXEC, 0);
	DIR *entries = copy < 0 ? NULL : fdopendir(copy);
	if (!entries) {
		if (copy >= 0)
			close(copy);
		return chain_fail(place, "cannot list %.300s: %s", place->path, strerror(errno));
	}
	rewinddir(entries);
	bool good = true;
	struct dirent *entry;
	while (good && (entry = readdir(entries))) {
		struct segment segment = {0};
		if (segment_base(entry->d_name, &segment.base))
			good = chain_reserve(chain) ? (chain_add(chain, segment), true) : chain_fail(place, "out of memory");
		else if (!is_known(entry->d_name))
			good = chain_fail(place, "%.300s/%.100s: no file of a lane; move it away", place->path, entry->d_name);
	}
	closedir(entries);
	if (chain->count > 1)
		qsort(chain->segments, chain->count, sizeof *chain->segments, by_base);
	return good;
}

/* Reads the header of a segment; `whole` stays false if it was never wholly written because a crash came first. */
static bool read_header(struct segment *segment, const struct chain_place *place)
{
	char name[SEGMENT_NAME_BYTES];
	segment_name(segment->base, name);
	struct bytes head;
	if (!file_read(place->directory, name, SECTOR_BYTES, &head))
		return chain_fail(place, "cannot read %.300s/%s: %s", place->path, name, strerror(errno));
	const char *wrong = segment_header_unpack(&segment->header, head.data, head.size);
	bool zeros = all_zeros(head), written = false;
	file_free(head);
	if (!wrong && segment->header.base != segment->base)
		wrong = "its header says another offset; give it that name back";
	segment->whole = !wrong;
	if (!wrong || zeros)
		return true;
	if (!past_has_frames(place, segment->base, &written))
		return false;
	errno = 0;
	return !written || chain_fail(place, "%.300s/%s: byte 0: %s", place->path, name, wrong);
}

/* Returns `created_us` of lane.json, which the sidecar writes; 0 without one. */
static uint64_t stated_creation(const struct chain_place *place)
{
	static const char key[] = "\"created_us\":";
	struct bytes info;
	if (!file_read(place->directory, INFO_NAME, INFO_BYTES, &info))
		return 0;
	char text[INFO_BYTES + 1];
	memcpy(text, info.data, info.size);
	text[info.size] = '\0';
	file_free(info);
	const char *at = strstr(text, key);
	return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

static bool read_headers(struct chain *chain, const struct chain_place *place)
{
	const struct segment *last = NULL;
	for (size_t i = 0; i < chain->count; i++) {
		struct segment *segment = &chain->segments[i];
		if (!read_header(segment, place))
			return false;
		segment->end = segment->base;
		segment->size = SEGMENT_HEADER_BYTES;
		if (!segment->whole)
			continue;
		last = segment;
		if (chain->created_us == 0)
			chain->created_us = segment->header.created_us;
		errno = 0;
		if (segment->header.created_us != chain->created_us)
			return chain_fail(place, "%.300s/%020" PRIu64 ".seg: byte 24: a segment of another lane; move it away",
				place->path, segment->base);
	}
	size_t born = last ? (size_t)(last - chain->segments) + 1 : 0;
	chain->unborn = chain->count - born;
	chain->count = born;
	return true;
}

static bool look(struct chain *chain, const struct chain_place *place, struct cursor *stored, bool *found)
{
	chain_free(chain);
	*found = false;
	chain->created_us = stated_creation(place);
	errno = 0;
	if (!list(chain, place) || !read_headers(chain, place))
		return false;
	if (chain->created_us == 0) {
		chain->created_us = machine_now_us();
		return true;
	}
	*found = cursor_read(place->directory, chain->created_us, stored);
	return chain->count == 0 || past_judge(chain, place, *found ? stored : NULL);
}

bool chain_read(struct chain *chain, const struct chain_place *place, struct cursor *stored, bool *found)
{
	for (int looks = 1; !look(chain, place, stored, found); looks++)
		if (errno != ENOENT || looks == LOOKS)
			return false;
	return true;
}

uint64_t chain_unsettled(struct chain *chain, const struct cursor *stored)
{
	size_t settled = 0;
	while (stored && settled + 1 < chain->count && chain->segments[settled + 1].base <= stored->offset)
		settled++;
	chain->count -= settled;
	memmove(chain->segments, chain->segments + settled, chain->count * sizeof *chain->segments);
	uint64_t bytes = 0;
	for (size_t i = 0; i < chain->count; i++)
		bytes += chain->segments[i].size - SEGMENT_HEADER_BYTES;
	const struct segment *first = chain->segments;
	if (stored && stored->offset >= first->end)
		return bytes - (first->size - SEGMENT_HEADER_BYTES);
	if (stored && stored->segment == first->base && stored->position >= SEGMENT_HEADER_BYTES
		&& stored->position <= first->size)
		return bytes - (stored->position - SEGMENT_HEADER_BYTES);
	return bytes;
}
