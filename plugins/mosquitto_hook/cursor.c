#include "cursor.h"

#include <fcntl.h>
#include <unistd.h>

#include "bytes.h"
#include "crc32.h"

#define VERSION 1u
#define MAGIC "mq2curs\n"
#define MAGIC_BYTES 8u
#define RECORD_BYTES 48u
#define SLOT_BYTES 512u
#define SLOTS 2u

enum { AT_VERSION = 8, AT_CREATED = 12, AT_OFFSET = 20, AT_SEGMENT = 28, AT_POSITION = 36, AT_CRC = 44 };

static bool parse(const uint8_t *record, uint64_t created_us, struct cursor *cursor)
{
	if (memcmp(record, MAGIC, MAGIC_BYTES) != 0 || get_u32(record + AT_VERSION) != VERSION
		|| get_u64(record + AT_CREATED) != created_us || get_u32(record + AT_CRC) != crc32_of(0, record, AT_CRC))
		return false;
	*cursor = (struct cursor){get_u64(record + AT_OFFSET), get_u64(record + AT_SEGMENT), get_u64(record + AT_POSITION)};
	return true;
}

bool cursor_read(int directory, uint64_t created_us, struct cursor *cursor)
{
	int file = openat(directory, CURSOR_NAME, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return false;
	bool found = false;
	for (unsigned slot = 0; slot < SLOTS; slot++) {
		uint8_t record[RECORD_BYTES];
		struct cursor stored;
		if (pread(file, record, sizeof record, slot * SLOT_BYTES) != (ssize_t)sizeof record
			|| !parse(record, created_us, &stored) || (found && stored.offset <= cursor->offset))
			continue;
		*cursor = stored;
		found = true;
	}
	close(file);
	return found;
}
