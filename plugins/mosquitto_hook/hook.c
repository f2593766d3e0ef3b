/* Mosquitto's plugin interface: what it calls, and what each call means for the parts of the hook. */
#include "hook.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "log.h"

#define PLUGIN_VERSION 5
#define OWN_TOPICS "$mq2mqtt/"
#define EXPORTED __attribute__((visibility("default")))

EXPORTED int mosquitto_plugin_version(int supported_version_count, const int *supported_versions);
EXPORTED int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options,
	int option_count);
EXPORTED int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count);

/* What leaves a question to others: 2.1 knows a word for 'I only look on'. */
static int verdict(const struct hook *hook, bool allow)
{
	if (allow)
		return MOSQ_ERR_SUCCESS;
	return hook->is_2_1 ? MOSQ_ERR_PLUGIN_IGNORE : MOSQ_ERR_PLUGIN_DEFER;
}

static bool has_sidecar_id(const struct hook *hook, const struct mosquitto *client)
{
	const char *id = mosquitto_client_id(client);
	return id && strcmp(id, hook->options.sidecar_client_id) == 0;
}

/* The address alone would not do: Mosquitto uses it again for another client. */
static bool is_sidecar(const struct hook *hook, const struct mosquitto *client)
{
	return client == hook->sidecar && has_sidecar_id(hook, client);
}

static int on_basic_auth(int event, void *data, void *context)
{
	struct hook *hook = context;
	const struct mosquitto_evt_basic_auth *auth = data;
	(void)event;
	hook->will.set = false;
	/* Mosquitto asks again about those that are connected when it reads its configuration again. */
	bool again = is_sidecar(hook, auth->client);
	if (auth->client == hook->sidecar)
		hook->sidecar = NULL;
	presence_asks(hook, auth->client);
	if (!has_sidecar_id(hook, auth->client))
		return verdict(hook, hook->options.auth_allow);
	const char *address = mosquitto_client_address(auth->client);
	const char *path = broker_is_from_unix_socket(auth->client) ? address : NULL;
	if (!options_is_sidecar(&hook->options, auth->username, auth->password, path)) {
		log_error("%s wants to be the sidecar and has not its token: refused", address ? address : "somebody");
		return MOSQ_ERR_AUTH;
	}
	hook->sidecar = auth->client;
	if (!again)
		results_clear(&hook->results);
	return MOSQ_ERR_SUCCESS;
}

static bool is_own(const char *topic)
{
	return strncmp(topic, OWN_TOPICS, strlen(OWN_TOPICS)) == 0;
}

static int check_sidecar(struct hook *hook, const struct mosquitto_evt_acl_check *check)
{
	if (check->access != MOSQ_ACL_READ)
		return MOSQ_ERR_SUCCESS;
	if (strcmp(check->topic, RESULTS_TOPIC) == 0) {
		if (check->payloadlen == 0) {
			hook->will.set = false;
			return MOSQ_ERR_ACL_DENIED;
		}
		/* The message that Mosquitto is about to copy to the sidecar: it was sent with zeros for what was not known
		 * then, and nobody else can read it. */
		results_fill(&hook->results, (void *)(uintptr_t)check->payload, check->payloadlen);
		return MOSQ_ERR_SUCCESS;
	}
	/* Its subscriptions only make Mosquitto ask: everything else is in the lanes already. */
	publish_shown_to_sidecar(hook, check);
	return MOSQ_ERR_ACL_DENIED;
}

static int check_read(struct hook *hook, const struct mosquitto_evt_acl_check *check)
{
	struct bytes owner;
	presence_reached(hook, check->client);
	if (!publish_is_private(hook, check->topic, &owner)) {
		results_routed(&hook->results, check->topic);
		return verdict(hook, hook->options.acl_allow);
	}
	/* A P2P message: the hook hands it out by itself, which is not asked for, and no subscription gets it, nor is it
	 * queued for one. But what the hook handed to a session is asked for when the client comes back, and dropped if that
	 * is denied. */
	const char *id = mosquitto_client_id(check->client);
	bool returns = id && strlen(id) == owner.size && memcmp(id, owner.data, owner.size) == 0
		&& presence_is_connecting(hook, check->client);
	return returns ? MOSQ_ERR_SUCCESS : MOSQ_ERR_ACL_DENIED;
}

static int on_acl_check(int event, void *data, void *context)
{
	struct hook *hook = context;
	const struct mosquitto_evt_acl_check *check = data;
	(void)event;
	if (is_sidecar(hook, check->client))
		return check_sidecar(hook, check);
	if (has_sidecar_id(hook, check->client)) {
		/* Its session while it is away; or somebody whom Mosquitto let in by a certificate, which no plugin is asked
		 * about. */
		if (check->access == MOSQ_ACL_READ)
			publish_shown_to_sidecar(hook, check);
		else
			log_error("a client that has not proven to be the sidecar has its id: it may do nothing");
		return MOSQ_ERR_ACL_DENIED;
	}
	if (is_own(check->topic) || (check->access == MOSQ_ACL_WRITE && strcmp(check->topic, CONTROL_TOPIC) == 0))
		return MOSQ_ERR_ACL_DENIED;
	if (check->access == MOSQ_ACL_READ)
		return check_read(hook, check);
	if (check->access == MOSQ_ACL_WRITE)
		publish_sighted(hook, check);
	else if (check->access == MOSQ_ACL_SUBSCRIBE)
		presence_active(hook, check->client);
	return verdict(hook, hook->options.acl_allow);
}

static int on_message(int event, void *data, void *context)
{
	(void)event;
	return publish_arrived(context, data);
}

static int on_control(int event, void *data, void *context)
{
	struct hook *hook = context;
	const struct mosquitto_evt_control *control = data;
	(void)event;
	hook->will.set = false;
	presence_settle(hook);
	if (is_sidecar(hook, control->client))
		downlink_arrived(hook, (struct bytes){control->payload, control->payloadlen});
	else
		log_warning("a batch that is not the sidecar's is ignored");
	/* Anything else would disconnect the sidecar on some versions. */
	return MOSQ_ERR_SUCCESS;
}

static int on_connect(int event, void *data, void *context)
{
	const struct mosquitto_evt_disconnect *connect = data;
	(void)event;
	presence_connected(context, connect->client);
	return MOSQ_ERR_SUCCESS;
}

static int on_disconnect(int event, void *data, void *context)
{
	const struct mosquitto_evt_disconnect *disconnect = data;
	(void)event;
	presence_gone(context, disconnect->client, disconnect->reason);
	return MOSQ_ERR_SUCCESS;
}

static int on_tick(int event, void *data, void *context)
{
	struct hook *hook = context;
	(void)event;
	(void)data;
	hook->will.set = false;
	presence_settle(hook);
	events_catch_up(&hook->events);
	return MOSQ_ERR_SUCCESS;
}

static int on_reload(int event, void *data, void *context)
{
	struct hook *hook = context;
	(void)event;
	(void)data;
	exports_retry(&hook->exports);
	events_retry(&hook->events);
	/* 2.0 goes on to the next plugin only after DEFER; 2.1 takes anything but 0 for an error and ends. */
	return hook->is_2_1 ? MOSQ_ERR_SUCCESS : MOSQ_ERR_PLUGIN_DEFER;
}

static const struct callback {
	int event;
	MOSQ_FUNC_generic_callback function;
	const char *topic;
	bool optional; /* 2.1 */
} callbacks[] = {
	{EVENT_CONNECT, on_connect, NULL, true},
	{EVENT_CLIENT_OFFLINE, on_disconnect, NULL, true},
	{MOSQ_EVT_BASIC_AUTH, on_basic_auth, NULL, false},
	{MOSQ_EVT_ACL_CHECK, on_acl_check, NULL, false},
	{MOSQ_EVT_MESSAGE, on_message, NULL, false},
	{MOSQ_EVT_CONTROL, on_control, CONTROL_TOPIC, false},
	{MOSQ_EVT_DISCONNECT, on_disconnect, NULL, false},
	{MOSQ_EVT_TICK, on_tick, NULL, false},
	{MOSQ_EVT_RELOAD, on_reload, NULL, false},
};

#define CALLBACKS (sizeof callbacks / sizeof *callbacks)

/* Each listener with settings of its own loads the plugins anew, but a spool has one writer. */
static bool is_loaded;

static void unregister(struct hook *hook, size_t count)
{
	for (size_t i = 0; i < count; i++)
		mosquitto_callback_unregister(hook->identifier, callbacks[i].event, callbacks[i].function, callbacks[i].topic);
}

static bool register_all(struct hook *hook)
{
	for (size_t i = 0; i < CALLBACKS; i++) {
		const struct callback *callback = &callbacks[i];
		int result = mosquitto_callback_register(hook->identifier, callback->event, callback->function, callback->topic,
			hook);
		if (callback->event == EVENT_CONNECT)
			hook->is_2_1 = result == MOSQ_ERR_SUCCESS;
		if (result == MOSQ_ERR_SUCCESS || callback->optional)
			continue;
		log_error("Mosquitto takes no callback for event %d (error %d)", callback->event, result);
		unregister(hook, i);
		return false;
	}
	return true;
}

static void free_hook(struct hook *hook)
{
	exports_free(&hook->exports);
	syncer_stop(hook->exports.syncer);
	clients_free(&hook->clients);
	results_clear(&hook->results);
	buffer_free(&hook->will.client_id);
	buffer_free(&hook->will.topic);
	buffer_free(&hook->will.payload);
	buffer_free(&hook->properties);
	buffer_free(&hook->answer);
	options_free(&hook->options);
	free(hook);
}

static bool start(struct hook *hook, const struct mosquitto_opt *options, int count)
{
	char problem[OPTION_PROBLEM_BYTES];
	if (!options_read(&hook->options, options, count, problem)) {
		log_error("%s", problem);
		return false;
	}
	if (access(hook->options.spool, R_OK | W_OK | X_OK) != 0) {
		log_error("plugin_opt_spool: cannot use %s: %s; make it a directory that Mosquitto's user may write",
			hook->options.spool, strerror(errno));
		return false;
	}
	broker_init();
	hook->exports.spool = hook->options.spool;
	if (hook->options.sync_ms && !(hook->exports.syncer = syncer_start(hook->options.sync_ms))) {
		log_error("plugin_opt_sync_ms: cannot start a thread: %s", strerror(errno));
		return false;
	}
	return register_all(hook);
}

int mosquitto_plugin_version(int supported_version_count, const int *supported_versions)
{
	for (int i = 0; i < supported_version_count; i++)
		if (supported_versions[i] == PLUGIN_VERSION)
			return PLUGIN_VERSION;
	return -1;
}

int mosquitto_plugin_init(mosquitto_plugin_id_t *identifier, void **userdata, struct mosquitto_opt *options,
	int option_count)
{
	if (is_loaded) {
		log_error("Mosquitto loads the hook twice: name it once, and with per_listener_settings true below one listener");
		return MOSQ_ERR_INVAL;
	}
	struct hook *hook = calloc(1, sizeof *hook);
	if (!hook)
		return MOSQ_ERR_NOMEM;
	hook->identifier = identifier;
	if (!start(hook, options, option_count)) {
		free_hook(hook);
		return MOSQ_ERR_INVAL;
	}
	events_open(&hook->events, hook->options.spool);
	table_file_load(hook);
	if (!broker_reads_properties())
		log_warning("this build of Mosquitto lets no plugin read MQTT 5 properties: they are not exported");
	*userdata = hook;
	is_loaded = true;
	log_notice("version %d.%d, spool %s", HOOK_VERSION_MAJOR, HOOK_VERSION_MINOR, hook->options.spool);
	return MOSQ_ERR_SUCCESS;
}

int mosquitto_plugin_cleanup(void *userdata, struct mosquitto_opt *options, int option_count)
{
	struct hook *hook = userdata;
	(void)options;
	(void)option_count;
	if (!hook)
		return MOSQ_ERR_SUCCESS;
	unregister(hook, CALLBACKS);
	events_close(&hook->events);
	free_hook(hook);
	is_loaded = false;
	return MOSQ_ERR_SUCCESS;
}
