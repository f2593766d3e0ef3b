/* `spool/lanes.table`: the lane table as the sidecar pushed it last, so that the hook goes on without the sidecar. */
#include "hook.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"
#include "log.h"

#define NAME "lanes.table"
#define TEMPORARY NAME ".tmp"
#define MAX_BYTES (16u * 1024 * 1024)

static int open_spool(const struct hook *hook)
{
	return open(hook->options.spool, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

void table_file_load(struct hook *hook)
{
	int spool = open_spool(hook);
	struct bytes text;
	char problem[TABLE_PROBLEM_BYTES] = "out of memory";
	bool there = spool >= 0 && file_read(spool, NAME, MAX_BYTES, &text);
	if (!there && errno != ENOENT)
		log_error("cannot read %s/" NAME ": %s", hook->options.spool, strerror(errno));
	if (spool >= 0)
		close(spool);
	if (!there) {
		log_notice("no lane table yet: nothing is exported until the sidecar has connected once");
		return;
	}
	struct table *table = table_parse(text, problem);
	file_free(text);
	if (!table || !exports_apply(&hook->exports, table))
		log_error("%s/" NAME ": %s: nothing is exported until the sidecar connects", hook->options.spool, problem);
}

static bool write_all(int file, struct bytes text)
{
	const uint8_t *at = text.data;
	for (size_t left = text.size; left > 0;) {
		ssize_t written = write(file, at, left);
		if (written < 0)
			return false;
		at += written;
		left -= (size_t)written;
	}
	return true;
}

static bool replace(int spool, struct bytes text)
{
	struct stat status;
	int file = openat(spool, TEMPORARY, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (file < 0)
		return false;
	bool shared = fstat(spool, &status) == 0 && (status.st_mode & S_IWGRP);
	bool good = (!shared || fchmod(file, 0660) == 0) && write_all(file, text) && fsync(file) == 0;
	int error = errno;
	close(file);
	errno = error;
	return good && renameat(spool, TEMPORARY, spool, NAME) == 0 && fsync(spool) == 0;
}

bool table_file_store(const struct hook *hook, struct bytes text, char problem[TABLE_PROBLEM_BYTES])
{
	int spool = open_spool(hook);
	bool good = spool >= 0 && replace(spool, text);
	if (!good)
		snprintf(problem, TABLE_PROBLEM_BYTES, "cannot write %.150s/" NAME ": %s", hook->options.spool, strerror(errno));
	if (spool >= 0)
		close(spool);
	return good;
}
