/* Any bytes as the files of a lane. What opens takes a message, and opens again with all that there was.
 *
 * The input: one byte for which boot opens it, then up to three segments and the cursor, each behind a length of two
 * bytes. CRCs are mended, or nothing would be looked at. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "crc32.h"
#include "frame.h"
#include "lane.h"
#include "segment.h"
#include "test/fake_machine.h"

#define CREATED 1000u
#define MAX_SEGMENTS 3u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char lane_path[64];

static void remove_directory(void)
{
	rmdir(lane_path);
}

static void quiet(const char *text)
{
	(void)text;
}

static void empty_directory(void)
{
	DIR *entries = opendir(lane_path);
	struct dirent *entry;
	while (entries && (entry = readdir(entries)))
		if (entry->d_name[0] != '.')
			unlinkat(dirfd(entries), entry->d_name, 0);
	if (entries)
		closedir(entries);
}

static void write_file(const char *name, const uint8_t *data, size_t size)
{
	char path[128];
	snprintf(path, sizeof path, "%s/%s", lane_path, name);
	int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (file < 0 || write(file, data, size) != (ssize_t)size)
		abort();
	close(file);
}

/* Mends the CRCs of frames whose flag byte's top bit asks for it, and clears that bit. */
static void mend_frames(uint8_t *file, size_t size)
{
	for (size_t at = SEGMENT_HEADER_BYTES; at + FRAME_HEADER_BYTES <= size;) {
		uint64_t end = at + frame_claimed_size(file + at);
		if (end > size || end < at + FRAME_HEADER_BYTES)
			return;
		if (file[at + 10] & 0x80) {
			file[at + 10] &= 0x1F;
			put_u32(file + at + 4, crc32_of(0, file + at + 8, (size_t)end - at - 8));
		}
		at = (size_t)end;
	}
}

/* Makes the header sound, with the links that its bytes give. Returns the segment's base. */
static uint64_t mend_header(uint8_t *file, size_t size, uint64_t previous)
{
	uint64_t base = previous + 1 + file[16] % 8u;
	struct segment_header header = {base, CREATED, previous > CREATED ? previous : 0, previous + file[40] % 8u,
		80u + get_u16(file + 48), {file[56] % 3u}};
	if (size >= SEGMENT_HEADER_BYTES && !(file[8] & 0x80)) {
		segment_header_pack(&header, file);
		mend_frames(file, size);
	}
	return base;
}

static size_t take(const uint8_t **data, size_t *left, uint8_t part[8192])
{
	if (*left < 2)
		return 0;
	size_t size = get_u16(*data);
	*data += 2;
	*left -= 2;
	size = size < *left ? size : *left;
	size = size < 8192 ? size : 8192;
	memcpy(part, *data, size);
	*data += size;
	*left -= size;
	return size;
}

static void lay_out(const uint8_t *data, size_t left)
{
	static uint8_t part[8192];
	uint64_t base = CREATED;
	for (unsigned i = 0; i < MAX_SEGMENTS; i++) {
		memset(part, 0, SEGMENT_HEADER_BYTES);
		size_t size = take(&data, &left, part);
		char name[SEGMENT_NAME_BYTES];
		if (size == 0)
			break;
		base = mend_header(part, size, base);
		segment_name(base, name);
		write_file(name, part, size);
	}
	memset(part, 0, 48);
	size_t size = take(&data, &left, part);
	if (size >= 28) {
		memcpy(part, "mq2curs\n\1\0\0", 12);
		put_u64(part + 12, CREATED);
		put_u64(part + 20, CREATED + part[20]);
		put_u64(part + 28, CREATED + part[28]);
		put_u64(part + 36, get_u16(part + 36));
		put_u32(part + 44, crc32_of(0, part, 44));
		write_file("cursor", part, 48);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size < 1)
		return 0;
	if (!*lane_path) {
		snprintf(lane_path, sizeof lane_path, "/dev/shm/mq2mqtt-fuzz-%d", (int)getpid());
		mkdir(lane_path, 0700);
		atexit(remove_directory);
	}
	lay_out(data + 1, size - 1);
	const uint8_t boot[BOOT_ID_BYTES] = {data[0] % 3u};
	machine_set(5000, boot);
	struct lane_options options = {.max_bytes = 65536, .remark = quiet};
	char problem[LANE_TEXT_BYTES];
	struct lane *lane = lane_open(lane_path, &options, problem);
	if (!lane) {
		empty_directory();
		return 0;
	}
	uint64_t offset = lane_next_offset(lane);
	struct frame frame = {FRAME_PUBLISH, 1, 1, bytes_of("dev"), bytes_of("t"), {NULL, 0}, bytes_of("x")};
	if (lane_append(lane, &frame) == LANE_WRITTEN)
		offset++;
	uint64_t unsent = lane_unsent_bytes(lane);
	lane_close(lane);
	lane = lane_open(lane_path, &options, problem);
	/* Of an unknown boot (zeros) every opening begins a new segment. A tail in a segment of an older boot is not looked
	 * at the first time: its own boot's opening would have cut it off. */
	if (!lane || (boot[0] != 0 && lane_next_offset(lane) != offset) || lane_unsent_bytes(lane) > unsent)
		abort();
	lane_close(lane);
	empty_directory();
	return 0;
}
