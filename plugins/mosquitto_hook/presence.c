/* Who is connected, and the events that tell of it. */
#include "hook.h"

#include "log.h"

bool presence_is_sidecar(const struct hook *hook, const struct client *client)
{
	/* By its id: at a takeover there are two connections of it. */
	return strcmp(client->id, hook->options.sidecar_client_id) == 0;
}

static void let_in(struct hook *hook, struct client *client)
{
	clients_let_in(&hook->clients, client);
	if (!presence_is_sidecar(hook, client))
		events_connected(&hook->events, client);
}

void presence_settle(struct hook *hook)
{
	hook->asking = NULL;
	if (hook->is_2_1)
		return;
	while (hook->clients.asking)
		let_in(hook, hook->clients.asking);
}

static struct client *note(struct hook *hook, struct mosquitto *context)
{
	const char *id = mosquitto_client_id(context);
	struct client *client = id ? clients_add(&hook->clients, context, id, mosquitto_client_address(context),
		mosquitto_client_clean_session(context)) : NULL;
	if (id && !client)
		log_error("out of memory: client %s is not seen", id);
	return client;
}

/* Why a client goes, in a word. */
static const char *reason_text(const struct client *client, int reason)
{
	if (client->kicked)
		return "kick";
	switch (reason) {
	case GONE_CLEAN:
		return "disconnect";
	case GONE_KEEPALIVE:
		return "keepalive";
	case GONE_TAKEN_OVER:
		return "takeover";
	case GONE_KICKED:
		return "kick";
	case GONE_PROTOCOL_ERROR:
	case GONE_MALFORMED_UTF8:
	case GONE_MALFORMED_PACKET:
	case GONE_OVERSIZE_PACKET:
		return "invalid";
	case -1:
		return "unknown";
	default:
		return "close";
	}
}

static void forget(struct hook *hook, struct client *client, int reason)
{
	if (client->online && !presence_is_sidecar(hook, client))
		events_gone(&hook->events, client, reason == GONE_CLEAN && !client->kicked, reason_text(client, reason));
	clients_remove(&hook->clients, client);
}

/* When Mosquitto reads its configuration again it asks about those that are connected too. */
static bool is_asked_again(const struct client *client, struct mosquitto *context)
{
	const char *id = mosquitto_client_id(context);
	return client->online && id && strcmp(client->id, id) == 0 && broker_stage_of(context) != STAGE_CONNECTING;
}

void presence_asks(struct hook *hook, struct mosquitto *context)
{
	/* Whoever asked before has its answer by now: Mosquitto takes packets one by one. */
	presence_settle(hook);
	struct client *client = clients_find(&hook->clients, context);
	if (client && is_asked_again(client, context))
		return;
	hook->asking = context;
	if (client)
		forget(hook, client, -1);
	/* 2.1 tells of those that are let in, and not of all that are turned away: after a delayed verdict it says nothing. */
	if (!hook->is_2_1)
		note(hook, context);
}

void presence_connected(struct hook *hook, struct mosquitto *context)
{
	struct client *client = clients_find(&hook->clients, context);
	if (client)
		forget(hook, client, -1);
	client = note(hook, context);
	if (client)
		let_in(hook, client);
	if (context == hook->asking)
		hook->asking = NULL;
}

void presence_active(struct hook *hook, struct mosquitto *context)
{
	presence_settle(hook);
	/* A bridge that this broker has opened has no address; it is no client. */
	if (!hook->is_2_1 && !clients_find(&hook->clients, context) && mosquitto_client_address(context))
		presence_connected(hook, context);
}

bool presence_is_connecting(const struct hook *hook, struct mosquitto *context)
{
	enum broker_stage stage = broker_stage_of(context);
	return stage == STAGE_UNKNOWN ? context == hook->asking : stage == STAGE_CONNECTING;
}

void presence_reached(struct hook *hook, struct mosquitto *context)
{
	/* Nobody else is settled here: Mosquitto may be about to say whom somebody that asks takes over from. */
	if (!hook->is_2_1 && !clients_find(&hook->clients, context) && broker_stage_of(context) == STAGE_CONNECTED
		&& mosquitto_client_address(context))
		presence_connected(hook, context);
}

/* Mosquitto 2.0 ends the old connection of a client while it answers the new one. */
static bool is_taken_over(const struct hook *hook, const struct client *client)
{
	for (const struct client *asking = hook->clients.asking; asking; asking = asking->next_asking)
		if (asking != client && strcmp(asking->id, client->id) == 0)
			return true;
	return false;
}

void presence_gone(struct hook *hook, struct mosquitto *context, int reason)
{
	struct client *client = clients_find(&hook->clients, context);
	if (client && !hook->is_2_1)
		reason = is_taken_over(hook, client) ? GONE_TAKEN_OVER : broker_gone_2_0(context);
	if (client)
		/* One that only asked was turned away. */
		forget(hook, client, reason);
	if (context == hook->asking)
		hook->asking = NULL;
	if (context == hook->sidecar) {
		hook->sidecar = NULL;
		results_clear(&hook->results);
	}
}
