#include "lane.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "chain.h"
#include "cursor.h"
#include "machine.h"

#define WRITER_LOCK "writer.lock"
#define LOOK_US 1000u
#define MAX_SEGMENT_BYTES (64u * 1024 * 1024)
#define SEGMENTS_PER_LANE 8u
#define FILE_MODE 0600
#define DIRECTORY_MODE 0700
/* Where the spool directory is open to its group, the sidecar runs as another user of that group. */
#define SHARED_FILE_MODE 0660
#define SHARED_DIRECTORY_MODE 02770

/* After a loss of power, messages that were sent may be missing at the end of the lane; their offsets are never given
 * out again. The clock is normally far ahead of them; this is for one that restarts in the past. */
#define SKIP_AFTER_BOOT (1u << 24)

struct lane {
	char *path;
	struct lane_options options;
	int directory, lock, file; /* `file` is what is appended to; -1 until it can be opened */
	struct chain chain;
	uint64_t unsent;    /* bytes of frames from the cursor on, as of the last look at it */
	uint64_t next_base; /* a segment that has to begin there before anything is appended; 0 for none */
	uint64_t looked_us; /* when the file was looked for last */
	bool shared;        /* with the group of the spool directory */
	struct synced synced; /* `file`, as the syncer knows it */
	bool failed;        /* after a failed fdatasync nobody knows what is on the disk */
	size_t refused;     /* bytes of the frame that was refused last, while none was taken since; else 0 */
	char problem[LANE_TEXT_BYTES];
};

static struct segment *last_of(struct lane *lane)
{
	return &lane->chain.segments[lane->chain.count - 1];
}

static void remark(struct lane *lane, const char *text)
{
	char line[LANE_TEXT_BYTES];
	snprintf(line, sizeof line, "lane %.200s: %.250s", lane->path, text);
	lane->options.remark(line);
}

static bool no_space(int error)
{
	/* Time mends these: somebody frees space, raises a quota or a limit, or the device recovers. */
	return error == ENOSPC || error == EDQUOT || error == EIO || error == EFBIG;
}

/* Makes a file as `open` does, open to the group if the spool is, whatever the umask says. */
static int make_file(struct lane *lane, const char *name, int flags)
{
	int file = openat(lane->directory, name, flags | O_CREAT | O_CLOEXEC, FILE_MODE);
	if (file >= 0 && lane->shared)
		/* Not ours to change if the sidecar made it; then it has the right mode already. */
		(void)!fchmod(file, SHARED_FILE_MODE);
	return file;
}

static bool has_syncer(const struct lane *lane)
{
	return lane->options.power && lane->options.syncer;
}

static void forget_file(struct lane *lane)
{
	if (lane->file < 0)
		return;
	if (has_syncer(lane))
		syncer_remove(lane->options.syncer, &lane->synced);
	close(lane->file);
	lane->file = -1;
}

/* Appends to `file` from now on. */
static void take_file(struct lane *lane, int file)
{
	forget_file(lane);
	lane->file = file;
	if (has_syncer(lane))
		syncer_add(lane->options.syncer, &lane->synced, file);
}

/* Begins the segment `base` and appends to it from now on. On failure nothing has changed and errno says why. */
static bool roll(struct lane *lane, uint64_t base)
{
	struct segment_header header = {.base = base, .created_us = lane->chain.created_us};
	if (lane->chain.count > 0) {
		struct segment *previous = last_of(lane);
		header.previous_base = previous->base;
		header.previous_end = previous->end;
		header.previous_bytes = previous->size;
	}
	memcpy(header.boot_id, machine_boot_id(), BOOT_ID_BYTES);
	uint8_t bytes[SEGMENT_HEADER_BYTES];
	char name[SEGMENT_NAME_BYTES];
	segment_header_pack(&header, bytes);
	segment_name(base, name);
	if (!chain_reserve(&lane->chain))
		return false;
	int file = make_file(lane, name, O_WRONLY | O_EXCL | O_APPEND);
	if (file < 0)
		return false;
	errno = ENOSPC;
	bool whole = write(file, bytes, sizeof bytes) == (ssize_t)sizeof bytes;
	if (whole && (lane->options.power || base != header.previous_end))
		/* Were a segment lost whose first offset was chosen, the same offsets would be chosen again where the clock
		 * restarts in the past. */
		whole = machine_sync(file) == 0 && fsync(lane->directory) == 0;
	if (!whole) {
		int error = errno;
		close(file);
		unlinkat(lane->directory, name, 0);
		errno = error;
		return false;
	}
	take_file(lane, file);
	lane->next_base = 0;
	chain_add(&lane->chain, (struct segment){.base = base, .end = base, .size = SEGMENT_HEADER_BYTES});
	return true;
}

/* Opens the last segment to append to it, without whatever a failed write has left behind its frames. */
static bool reopen(struct lane *lane)
{
	char name[SEGMENT_NAME_BYTES];
	segment_name(last_of(lane)->base, name);
	int file = openat(lane->directory, name, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (file < 0)
		return false;
	if (ftruncate(file, (off_t)last_of(lane)->size) != 0) {
		int error = errno;
		close(file);
		errno = error;
		return false;
	}
	take_file(lane, file);
	return true;
}

static uint64_t greatest(uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t greater = a > b ? a : b;
	return greater > c ? greater : c;
}

/* Deletes the files behind the last segment whose headers were never written. */
static bool remove_unborn(struct lane *lane, uint64_t *floor)
{
	struct chain *chain = &lane->chain;
	for (size_t i = chain->count; i < chain->count + chain->unborn; i++) {
		char name[SEGMENT_NAME_BYTES];
		segment_name(chain->segments[i].base, name);
		if (chain->segments[i].base > *floor)
			*floor = chain->segments[i].base;
		remark(lane, "removed a segment without a header: a crash came before it");
		if (unlinkat(lane->directory, name, 0) != 0)
			return false;
	}
	chain->unborn = 0;
	return true;
}

/* Cuts off what a crash left after the last frame, for good: a later segment's header tells of the length. */
static bool cut(struct lane *lane, const struct segment *segment)
{
	char name[SEGMENT_NAME_BYTES];
	segment_name(segment->base, name);
	remark(lane, "cut off an unfinished write after the last frame of a segment");
	int file = openat(lane->directory, name, O_WRONLY | O_CLOEXEC);
	if (file < 0)
		return false;
	bool good = ftruncate(file, (off_t)segment->size) == 0 && fsync(file) == 0;
	int error = errno;
	close(file);
	errno = error;
	return good;
}

/* Begins a segment whose base is not the last one's end; later, if the disk is full: the lane must drain. */
static bool begin_segment(struct lane *lane, uint64_t base)
{
	if (roll(lane, base))
		return true;
	lane->next_base = base;
	if (!no_space(errno))
		return false;
	remark(lane, "takes no messages until there is space");
	return true;
}

/* Goes on at the end of what was found, or in a new segment where offsets must not be reused. */
static bool adopt(struct lane *lane, const struct cursor *stored)
{
	struct chain *chain = &lane->chain;
	uint64_t floor = stored ? stored->offset : 0;
	if (!remove_unborn(lane, &floor))
		return false;
	for (size_t i = 0; i < chain->count; i++)
		if (chain->segments[i].torn && !cut(lane, &chain->segments[i]))
			return false;
	if (chain->count == 0) {
		if (stored)
			remark(lane, "all its segments were removed, and with them what was not sent yet");
		if (floor)
			floor += SKIP_AFTER_BOOT;
		return roll(lane, greatest(floor, machine_now_us(), chain->created_us));
	}
	uint64_t end = last_of(lane)->end;
	if (stored && stored->offset > end)
		remark(lane, "the cursor lies behind the last message: all of them are settled");
	if (floor <= end && chain->same_boot)
		return reopen(lane);
	return begin_segment(lane, greatest(floor, machine_now_us(), end + (chain->same_boot ? 0 : SKIP_AFTER_BOOT)));
}

static bool take_lock(struct lane *lane, char problem[LANE_TEXT_BYTES])
{
	lane->lock = make_file(lane, WRITER_LOCK, O_RDWR);
	if (lane->lock < 0) {
		snprintf(problem, LANE_TEXT_BYTES, "cannot open %.300s/" WRITER_LOCK ": %s", lane->path, strerror(errno));
		return false;
	}
	char holder[32] = "";
	if (flock(lane->lock, LOCK_EX | LOCK_NB) != 0) {
		ssize_t size = pread(lane->lock, holder, sizeof holder - 1, 0);
		holder[size > 0 ? strcspn(holder, "\n") : 0] = '\0';
		snprintf(problem, LANE_TEXT_BYTES, "lane %.300s: process %s is already its writer; stop it", lane->path, holder);
		return false;
	}
	/* Only for the text above: the lock itself is the kernel's. */
	int size = snprintf(holder, sizeof holder, "%ld\n", (long)getpid());
	if (ftruncate(lane->lock, 0) != 0 || pwrite(lane->lock, holder, (size_t)size, 0) != size)
		remark(lane, "cannot write the process id into " WRITER_LOCK);
	return true;
}

static bool open_directory(struct lane *lane)
{
	bool made = mkdir(lane->path, DIRECTORY_MODE) == 0;
	if (!made && errno != EEXIST)
		return false;
	lane->directory = open(lane->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int spool = lane->directory < 0 ? -1 : openat(lane->directory, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (spool < 0)
		return lane->directory >= 0;
	struct stat status;
	lane->shared = fstat(spool, &status) == 0 && (status.st_mode & S_IWGRP) != 0;
	/* Whoever made it may have been killed before it came to the fsync. */
	bool good = (!made || !lane->shared || fchmod(lane->directory, SHARED_DIRECTORY_MODE) == 0) && fsync(spool) == 0;
	int error = errno;
	close(spool);
	errno = error;
	return good;
}

static bool recover(struct lane *lane, char problem[LANE_TEXT_BYTES])
{
	const struct chain_place place = {lane->directory, lane->path, lane->options.remark, problem};
	struct cursor cursor;
	bool found;
	if (!chain_read(&lane->chain, &place, &cursor, &found))
		return false;
	if (!adopt(lane, found ? &cursor : NULL)) {
		snprintf(problem, LANE_TEXT_BYTES, "cannot write lane %.300s: %s", lane->path, strerror(errno));
		return false;
	}
	lane->unsent = chain_unsettled(&lane->chain, found ? &cursor : NULL);
	return true;
}

struct lane *lane_open(const char *path, const struct lane_options *options, char problem[LANE_TEXT_BYTES])
{
	struct lane *lane = calloc(1, sizeof *lane);
	if (!lane || !(lane->path = strdup(path))) {
		snprintf(problem, LANE_TEXT_BYTES, "lane %.300s: out of memory", path);
		free(lane);
		return NULL;
	}
	lane->options = *options;
	lane->directory = lane->lock = lane->file = -1;
	if (!open_directory(lane)) {
		snprintf(problem, LANE_TEXT_BYTES, "cannot open %.300s: %s", path, strerror(errno));
	} else if (take_lock(lane, problem) && recover(lane, problem)) {
		return lane;
	}
	lane_close(lane);
	return NULL;
}

static enum lane_result refuse(struct lane *lane, int error)
{
	snprintf(lane->problem, sizeof lane->problem, "cannot write lane %.300s: %s", lane->path, strerror(error));
	return no_space(error) ? LANE_FULL : LANE_FAILED;
}

/* Looks at what the reader has settled meanwhile. Returns why it cannot; 0 also where nothing is settled yet. */
static int refresh(struct lane *lane)
{
	struct cursor cursor;
	errno = 0;
	if (cursor_read(lane->directory, lane->chain.created_us, &cursor)) {
		lane->unsent = chain_unsettled(&lane->chain, &cursor);
		return 0;
	}
	return errno == ENOENT ? 0 : errno;
}

/* Does what a plain append cannot: refuse, mend the tail, begin the next segment. */
static enum lane_result make_room(struct lane *lane, size_t size)
{
	int error = lane->unsent + size > lane->options.max_bytes ? refresh(lane) : 0;
	if (lane->unsent + size > lane->options.max_bytes) {
		snprintf(lane->problem, sizeof lane->problem, "lane %.300s: %" PRIu64 " bytes are unsent, max_bytes is %" PRIu64
			"%s%s", lane->path, lane->unsent, lane->options.max_bytes,
			error ? "; what is sent cannot be known, cursor: " : "", error ? strerror(error) : "");
		return LANE_FULL;
	}
	if (lane->next_base != 0 && !roll(lane, lane->next_base))
		return refuse(lane, errno);
	if (lane->file < 0 && !reopen(lane))
		return refuse(lane, errno);
	uint64_t limit = lane->options.max_bytes / SEGMENTS_PER_LANE;
	if (limit > MAX_SEGMENT_BYTES)
		limit = MAX_SEGMENT_BYTES;
	/* A frame longer than a segment gets one of its own. */
	struct segment *last = last_of(lane);
	if (last->size + size > limit && last->end > last->base && !roll(lane, last->end))
		return refuse(lane, errno);
	return LANE_WRITTEN;
}

/* Whether a sync failed: the kernel reports that once and may say yes the next time, so never try again. */
static bool sync_failed(struct lane *lane, int error)
{
	if (error && !lane->failed) {
		lane->failed = true;
		snprintf(lane->problem, sizeof lane->problem, "lane %.300s: fdatasync failed, restart the broker: %s", lane->path,
			strerror(error));
	}
	return lane->failed;
}

/* Whether the file that is appended to was deleted: its reader leaves the last one alone. What goes there is lost.
 * Looking costs as much as appending, so what comes within a millisecond is believed. */
static bool is_removed(struct lane *lane, uint64_t now_us)
{
	struct stat status;
	if (now_us - lane->looked_us < LOOK_US)
		return false;
	lane->looked_us = now_us;
	if (lane->file < 0 || fstat(lane->file, &status) != 0 || status.st_nlink > 0)
		return false;
	snprintf(lane->problem, sizeof lane->problem, "lane %.300s: its last file was deleted while messages were written to it",
		lane->path);
	return true;
}

bool lane_is_removed(struct lane *lane)
{
	return is_removed(lane, machine_now_us());
}

static enum lane_result append(struct lane *lane, const struct frame *frame, size_t size)
{
	if (is_removed(lane, frame->accepted_us))
		return LANE_REMOVED;
	enum lane_result room = make_room(lane, size);
	if (sync_failed(lane, atomic_load(&lane->synced.error)))
		return LANE_FAILED;
	if (room != LANE_WRITTEN)
		return room;
	ssize_t written = frame_write(lane->file, frame);
	if (written != (ssize_t)size) {
		int error = written < 0 ? errno : ENOSPC;
		struct segment *last = last_of(lane);
		/* The next frame must follow a whole one: where this fails too, the next append opens the file anew. */
		if (written > 0 && ftruncate(lane->file, (off_t)last->size) != 0)
			forget_file(lane);
		return refuse(lane, error);
	}
	if (has_syncer(lane))
		atomic_store(&lane->synced.dirty, true);
	else if (lane->options.power && machine_sync(lane->file) != 0 && sync_failed(lane, errno))
		return LANE_FAILED;
	last_of(lane)->end++;
	last_of(lane)->size += size;
	lane->unsent += size;
	return LANE_WRITTEN;
}

enum lane_result lane_append(struct lane *lane, const struct frame *frame)
{
	if (lane->failed)
		return LANE_FAILED;
	size_t size = frame_size(frame);
	if (!frame_fits(frame) || size > lane->options.max_bytes) {
		snprintf(lane->problem, sizeof lane->problem, "lane %.300s: a message of %zu bytes is longer than the lane",
			lane->path, size);
		return LANE_TOO_LARGE;
	}
	enum lane_result result = append(lane, frame, size);
	lane->refused = result == LANE_WRITTEN ? 0 : size;
	return result;
}

bool lane_is_full(struct lane *lane, const struct frame *frame)
{
	size_t size = frame_size(frame);
	if (!lane->failed && (size > lane->options.max_bytes || make_room(lane, size) == LANE_WRITTEN))
		return false;
	lane->refused = size;
	return true;
}

const char *lane_trouble(struct lane *lane)
{
	if (sync_failed(lane, atomic_load(&lane->synced.error)))
		return lane->problem;
	if (lane->refused == 0 || make_room(lane, lane->refused) != LANE_WRITTEN)
		return lane->refused ? lane->problem : NULL;
	/* Blocks behind the end, which the next append uses: no file grows. Where the file system cannot do it, the next
	 * message tells. */
	if (fallocate(lane->file, FALLOC_FL_KEEP_SIZE, (off_t)last_of(lane)->size, (off_t)lane->refused) != 0
		&& errno != EOPNOTSUPP) {
		refuse(lane, errno);
		return lane->problem;
	}
	return NULL;
}

uint64_t lane_next_offset(const struct lane *lane)
{
	return lane->chain.segments[lane->chain.count - 1].end;
}

uint64_t lane_unsent_bytes(const struct lane *lane)
{
	return lane->unsent;
}

const char *lane_problem(const struct lane *lane)
{
	return lane->problem;
}

bool lane_has_failed(const struct lane *lane)
{
	return lane->failed;
}

void lane_close(struct lane *lane)
{
	if (!lane)
		return;
	forget_file(lane);
	if (lane->lock >= 0)
		close(lane->lock);
	if (lane->directory >= 0)
		close(lane->directory);
	chain_free(&lane->chain);
	free(lane->path);
	free(lane);
}
