#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static bool read_all(int file, size_t max_bytes, struct bytes *content)
{
	struct stat status;
	if (fstat(file, &status) != 0)
		return false;
	size_t size = (size_t)status.st_size < max_bytes ? (size_t)status.st_size : max_bytes, done = 0;
	uint8_t *data = malloc(size ? size : 1);
	if (!data)
		return false;
	while (done < size) {
		ssize_t got = read(file, data + done, size - done);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0) {
			free(data);
			return false;
		}
		if (got == 0)
			break;
		done += (size_t)got;
	}
	*content = (struct bytes){data, done};
	return true;
}

bool file_read(int directory, const char *name, size_t max_bytes, struct bytes *content)
{
	int file = openat(directory, name, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return false;
	bool good = read_all(file, max_bytes, content);
	int error = errno;
	close(file);
	errno = error;
	return good;
}

void file_free(struct bytes content)
{
	free((void *)(uintptr_t)content.data);
}

bool file_size(int directory, const char *name, uint64_t *size)
{
	struct stat status;
	if (fstatat(directory, name, &status, 0) != 0)
		return false;
	*size = (uint64_t)status.st_size;
	return true;
}

bool all_zeros(struct bytes content)
{
	const uint8_t *data = content.data;
	return content.size == 0 || (data[0] == 0 && memcmp(data, data + 1, content.size - 1) == 0);
}
