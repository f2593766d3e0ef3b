/* The hook's options: `plugin_opt_NAME VALUE` in mosquitto.conf. */
#ifndef MQ2MQTT_OPTIONS_H
#define MQ2MQTT_OPTIONS_H

#include <stdbool.h>

#include "broker.h"

#define OPTION_PROBLEM_BYTES 512u

struct options {
	char *spool;             /* directory of the lanes */
	char *sidecar_client_id;
	char *socket;            /* path of the Unix socket listener whose connections may be the sidecar; NULL for none */
	char *token;             /* password of the sidecar; NULL for none */
	unsigned sync_ms;        /* how often what is of durability `power` is synced; 0: before each acknowledgement */
	bool auth_allow, acl_allow; /* let in, and allow, what no other plugin decides about; else leave it to Mosquitto */
};

/* False with the reason in `problem`. */
bool options_read(struct options *options, const struct mosquitto_opt *given, int count,
	char problem[OPTION_PROBLEM_BYTES]);

/* Whether a connection with this name and password, by a listener on the Unix socket `path`, is the sidecar's. Any of
 * them may be NULL. */
bool options_is_sidecar(const struct options *options, const char *username, const char *password, const char *path);

void options_free(struct options *options);

#endif
