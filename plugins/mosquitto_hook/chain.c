#include "chain.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "frame.h"
#include "lane.h"
#include "machine.h"

#define INFO_NAME "lane.json"
/* Segments that the reader deletes while they are listed: a few new looks are enough. */
#define LOOKS 5

__attribute__((format(printf, 2, 3))) static bool fail(char *problem, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(problem, LANE_TEXT_BYTES, format, arguments);
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
	return length > 4 && strcmp(name + length - 4, ".tmp") == 0;
}

static bool list(struct chain *chain, int directory, const char *path, char *problem)
{
	/* The duplicate shares its position with `directory`. */
	int copy = dup(directory);
	DIR *entries = copy < 0 ? NULL : fdopendir(copy);
	if (!entries) {
		if (copy >= 0)
			close(copy);
		return fail(problem, "cannot list %.300s: %s", path, strerror(errno));
	}
	rewinddir(entries);
	chain->count = 0;
	bool good = true;
	struct dirent *entry;
	while (good && (entry = readdir(entries))) {
		struct segment segment = {0};
		if (segment_base(entry->d_name, &segment.base))
			good = chain_reserve(chain) ? (chain_add(chain, segment), true) : fail(problem, "out of memory");
		else if (!is_known(entry->d_name))
			good = fail(problem, "%.300s/%.100s: no file of a lane; move it away", path, entry->d_name);
	}
	closedir(entries);
	if (chain->count > 1)
		qsort(chain->segments, chain->count, sizeof *chain->segments, by_base);
	return good;
}

/* A whole file, mapped. `data` is NULL for an empty one. */
static bool map_segment(int directory, uint64_t base, struct bytes *file)
{
	char name[SEGMENT_NAME_BYTES];
	segment_name(base, name);
	int descriptor = openat(directory, name, O_RDONLY | O_CLOEXEC);
	struct stat status;
	bool good = descriptor >= 0 && fstat(descriptor, &status) == 0;
	*file = (struct bytes){NULL, good ? (size_t)status.st_size : 0};
	if (good && file->size > 0) {
		void *mapped = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, descriptor, 0);
		good = mapped != MAP_FAILED;
		file->data = good ? mapped : NULL;
	}
	int error = errno;
	if (descriptor >= 0)
		close(descriptor);
	errno = error;
	return good;
}

static void unmap(struct bytes file)
{
	if (file.data)
		munmap((void *)(uintptr_t)file.data, file.size);
}

static bool all_zeros(struct bytes file)
{
	const uint8_t *data = file.data;
	return file.size == 0 || (data[0] == 0 && memcmp(data, data + 1, file.size - 1) == 0);
}

/* Reads the headers, newest last, and checks that nothing is missing between them. */
static bool check_headers(struct chain *chain, int directory, const char *path, char *problem)
{
	uint64_t previous_size = 0;
	for (size_t i = 0; i < chain->count; i++) {
		struct segment *segment = &chain->segments[i];
		char name[SEGMENT_NAME_BYTES];
		segment_name(segment->base, name);
		struct bytes file;
		if (!map_segment(directory, segment->base, &file))
			return fail(problem, "cannot read %.300s/%s: %s", path, name, strerror(errno));
		if (i + 1 == chain->count && (file.size < SEGMENT_HEADER_BYTES || all_zeros(file))) {
			/* A crash came before its header. */
			unmap(file);
			chain->unborn = segment->base;
			chain->count--;
			return true;
		}
		struct segment_header header;
		const char *wrong = segment_header_unpack(&header, file.data, file.size);
		unmap(file);
		segment->size = file.size;
		segment->end = segment->base;
		if (wrong)
			return fail(problem, "%.300s/%s: %s", path, name, wrong);
		if (header.base != segment->base)
			return fail(problem, "%.300s/%s: its header says offset %" PRIu64 "; give it that name back", path, name,
				header.base);
		if (chain->created_us == 0)
			chain->created_us = header.created_us;
		if (header.created_us != chain->created_us)
			return fail(problem, "%.300s/%s: a segment of another lane; move it away", path, name);
		if (i > 0) {
			if (header.previous_base != segment[-1].base)
				return fail(problem, "%.300s: the segment before %s is missing; put it back", path, name);
			if (header.previous_bytes != previous_size)
				return fail(problem, "%.300s: the segment before %s has %" PRIu64 " bytes, but %" PRIu64
					" were written; restore it", path, name, previous_size, header.previous_bytes);
			segment[-1].end = header.previous_end;
		}
		previous_size = file.size;
		chain->same_boot = memcmp(header.boot_id, machine_boot_id(), BOOT_ID_BYTES) == 0
			&& !all_zeros((struct bytes){header.boot_id, BOOT_ID_BYTES});
	}
	return true;
}

/* Returns `created_us` of lane.json, which the sidecar writes; 0 without one. */
static uint64_t stated_creation(int directory)
{
	char text[4096];
	int file = openat(directory, INFO_NAME, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return 0;
	ssize_t size = read(file, text, sizeof text - 1);
	close(file);
	if (size <= 0)
		return 0;
	text[size] = '\0';
	const char *key = "\"created_us\":";
	const char *at = strstr(text, key);
	return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

bool chain_read(struct chain *chain, int directory, const char *path, char *problem)
{
	for (int look = 1;; look++) {
		chain_free(chain);
		chain->created_us = stated_creation(directory);
		if (!list(chain, directory, path, problem))
			return false;
		errno = 0;
		if (check_headers(chain, directory, path, problem))
			break;
		if (errno != ENOENT || look == LOOKS)
			return false;
	}
	if (chain->created_us == 0)
		chain->created_us = machine_now_us();
	return true;
}

static bool damage(char *problem, const char *path, uint64_t base, size_t position, const char *what)
{
	char name[SEGMENT_NAME_BYTES];
	segment_name(base, name);
	return fail(problem, "%.150s/%s: byte %zu: %s; restore the file, or cut it there to give up what follows: "
		"truncate -s %zu %.150s/%s", path, name, position, what, position, path, name);
}

/* `kill -9` and a full disk leave a prefix of one frame. A loss of power leaves anything in blocks that were never
 * written: zeros, or old content; but then nothing sound follows. */
static bool judge_tail(struct bytes file, size_t position, bool same_boot, const char *path, uint64_t base, char *problem)
{
	struct frame_look look = frame_look(file, position);
	if (look.state == FRAME_CUT) {
		/* A device chooses payloads, so frames found inside prove nothing; but if the CRC fits what stands before one
		 * of them, the size field is damaged and a whole frame is meant. */
		return frame_size_is_damaged(file, position) ? damage(problem, path, base, position, "damaged frame size") : true;
	}
	if (same_boot)
		return damage(problem, path, base, position, look.problem);
	if (frame_find(file, position + 1) < file.size)
		return damage(problem, path, base, position, "damaged, with a sound frame after it");
	return true;
}

bool chain_check_tail(struct chain *chain, int directory, const char *path, const struct cursor *stored, char *problem)
{
	if (chain->count == 0)
		return true;
	struct segment *last = &chain->segments[chain->count - 1];
	struct bytes file;
	if (!map_segment(directory, last->base, &file))
		return fail(problem, "cannot read the last segment of %.300s: %s", path, strerror(errno));
	size_t position = SEGMENT_HEADER_BYTES;
	uint64_t offset = last->base;
	if (stored && stored->segment == last->base && stored->position >= position && stored->position <= file.size) {
		position = (size_t)stored->position;
		offset = stored->offset;
	}
	size_t start = position;
	uint64_t count = frame_walk(file, &position);
	if (count == 0 && position < file.size && start != SEGMENT_HEADER_BYTES) {
		/* Nothing sound where the cursor points: trust the file rather than the hint. */
		offset = last->base;
		position = SEGMENT_HEADER_BYTES;
		count = frame_walk(file, &position);
	}
	bool good = position == file.size || judge_tail(file, position, chain->same_boot, path, last->base, problem);
	last->end = offset + count;
	last->size = position;
	chain->torn_bytes = file.size - position;
	unmap(file);
	return good;
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
