#include "options.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "file.h"

#define SIDECAR_CLIENT_ID "mq2mqtt-sidecar"
#define SIDECAR_USERNAME "mq2mqtt"
#define MIN_TOKEN_BYTES 16u
#define MAX_TOKEN_BYTES 1024u
#define MAX_SYNC_MS 1000u
#define MAX_PATH_BYTES 300u

static bool set(char **field, const char *value)
{
	free(*field);
	*field = strdup(value);
	return *field != NULL;
}

/* Mosquitto changes its directory when it runs in the background; longer paths leave lanes no room for their names. */
static bool read_spool(struct options *options, const char *path, char problem[OPTION_PROBLEM_BYTES])
{
	if (*path != '/' || strlen(path) > MAX_PATH_BYTES) {
		snprintf(problem, OPTION_PROBLEM_BYTES, "plugin_opt_spool is %.100s: use an absolute path of at most %u characters",
			path, MAX_PATH_BYTES);
		return false;
	}
	return set(&options->spool, path);
}

static bool read_token(struct options *options, const char *path, char problem[OPTION_PROBLEM_BYTES])
{
	struct bytes file;
	if (!file_read(AT_FDCWD, path, MAX_TOKEN_BYTES + 2, &file)) {
		snprintf(problem, OPTION_PROBLEM_BYTES, "plugin_opt_token_file: cannot read %.300s: %s", path, strerror(errno));
		return false;
	}
	const char *text = file.data;
	size_t size = file.size;
	while (size > 0 && (text[size - 1] == '\n' || text[size - 1] == '\r'))
		size--;
	bool good = size >= MIN_TOKEN_BYTES && size <= MAX_TOKEN_BYTES && !memchr(text, '\0', size);
	if (good) {
		free(options->token);
		options->token = strndup(text, size);
	} else {
		snprintf(problem, OPTION_PROBLEM_BYTES, "plugin_opt_token_file: %.300s must hold one line of 16 to 1024 characters", path);
	}
	file_free(file);
	return good && options->token;
}

static bool choose(const char *name, const char *value, bool *allow, char problem[OPTION_PROBLEM_BYTES])
{
	*allow = strcmp(value, "allow") == 0;
	if (*allow || strcmp(value, "defer") == 0)
		return true;
	snprintf(problem, OPTION_PROBLEM_BYTES, "plugin_opt_%s is %.100s: use defer or allow", name, value);
	return false;
}

static bool read_period(unsigned *period_ms, const char *value, char problem[OPTION_PROBLEM_BYTES])
{
	char *end;
	unsigned long number = strtoul(value, &end, 10);
	if (*value >= '0' && *value <= '9' && *end == '\0' && number >= 1 && number <= MAX_SYNC_MS) {
		*period_ms = (unsigned)number;
		return true;
	}
	snprintf(problem, OPTION_PROBLEM_BYTES, "plugin_opt_sync_ms is %.100s: use 1 to %u milliseconds, or leave it out",
		value, MAX_SYNC_MS);
	return false;
}

static bool read_option(struct options *options, const char *name, const char *value, bool *auth, bool *acl,
	char problem[OPTION_PROBLEM_BYTES])
{
	snprintf(problem, OPTION_PROBLEM_BYTES, "out of memory");
	if (strcmp(name, "spool") == 0)
		return read_spool(options, value, problem);
	if (strcmp(name, "sidecar_client_id") == 0)
		return set(&options->sidecar_client_id, value);
	if (strcmp(name, "socket") == 0)
		return set(&options->socket, value);
	if (strcmp(name, "token_file") == 0)
		return read_token(options, value, problem);
	if (strcmp(name, "sync_ms") == 0)
		return read_period(&options->sync_ms, value, problem);
	if (strcmp(name, "auth") == 0)
		return *auth = choose(name, value, &options->auth_allow, problem);
	if (strcmp(name, "acl") == 0)
		return *acl = choose(name, value, &options->acl_allow, problem);
	snprintf(problem, OPTION_PROBLEM_BYTES, "unknown option plugin_opt_%.100s: use spool, auth, acl, token_file, socket, "
		"sidecar_client_id or sync_ms", name);
	return false;
}

/* Mosquitto 2.0 refuses what every plugin defers: a wrong guess would lock devices out or let everybody in. */
static const char *missing(const struct options *options, bool auth, bool acl)
{
	if (!options->spool)
		return "plugin_opt_spool is missing: the directory of the sidecar's `spool.path`";
	if (!auth)
		return "plugin_opt_auth is missing: `defer` where a password_file or another plugin decides who may connect, "
			"`allow` where everybody may (allow_anonymous true)";
	if (!acl)
		return "plugin_opt_acl is missing: `defer` where an acl_file or another plugin decides who may publish and "
			"subscribe, `allow` where everybody may";
	if (!options->token && !options->socket)
		return "plugin_opt_token_file or plugin_opt_socket is missing: without one nobody can be known as the sidecar";
	return NULL;
}

bool options_read(struct options *options, const struct mosquitto_opt *given, int count,
	char problem[OPTION_PROBLEM_BYTES])
{
	bool auth = false, acl = false;
	if (!set(&options->sidecar_client_id, SIDECAR_CLIENT_ID))
		return false;
	for (int i = 0; i < count; i++)
		if (!read_option(options, given[i].key, given[i].value, &auth, &acl, problem))
			return false;
	const char *wrong = missing(options, auth, acl);
	if (wrong)
		snprintf(problem, OPTION_PROBLEM_BYTES, "%s", wrong);
	return !wrong;
}

/* Takes the same time wherever the first difference is. */
static bool same_secret(const char *a, const char *b)
{
	size_t size = strlen(a);
	if (strlen(b) != size)
		return false;
	volatile unsigned char difference = 0;
	for (size_t i = 0; i < size; i++)
		difference |= (unsigned char)(a[i] ^ b[i]);
	return difference == 0;
}

bool options_is_sidecar(const struct options *options, const char *username, const char *password, const char *path)
{
	if (options->socket && path && strcmp(path, options->socket) == 0)
		return true;
	return options->token && username && password && strcmp(username, SIDECAR_USERNAME) == 0
		&& same_secret(options->token, password);
}

void options_free(struct options *options)
{
	if (options->token)
		explicit_bzero(options->token, strlen(options->token));
	free(options->token);
	free(options->spool);
	free(options->sidecar_client_id);
	free(options->socket);
	*options = (struct options){0};
}
