/* What clients publish: into the lanes, and privately to a client. */
#include "hook.h"

#include <stdlib.h>

#include "log.h"
#include "machine.h"

static bool find(const struct hook *hook, const char *topic, struct table_route *route)
{
	return hook->exports.table && *topic != '$' && table_find(hook->exports.table, topic, route);
}

static enum export_result export(struct hook *hook, const struct table_route *route, const struct frame *frame)
{
	struct export *to = hook->exports.by_parent[route->parent];
	return to ? exports_append(&hook->exports, to, frame) : EXPORT_LEFT;
}

/* Whether a P2P message is kept for a client that is away: its sender says so by its session. */
static bool is_kept(const struct frame *frame)
{
	return (frame->flags & FRAME_QOS) > 0 && !(frame->flags & FRAME_CLEAN_SESSION);
}

/* Hands a P2P message to its client, subscribed or not, if it is there. */
static void deliver(struct hook *hook, const struct table_route *route, const struct frame *frame)
{
	char *id = strndup(route->p2p.data, route->p2p.size);
	mosquitto_property *properties = NULL;
	if (id && !clients_online(&hook->clients, id))
		exports_away(&hook->exports, route->parent);
	else if (!id || !broker_make_properties(frame->properties, &properties)
		|| !broker_send(id, frame->topic.data, frame->payload, frame->flags & FRAME_QOS, properties))
		log_warning("out of memory: a P2P message is lost");
	free(id);
}

/* Takes a publish or a will into the lanes and hands it over if it is P2P. One that is kept is the sidecar's to hand over:
 * in its lane it outlives this broker. */
static enum export_result take(struct hook *hook, const struct table_route *route, const struct frame *frame)
{
	struct export *p2p = route->p2p.size > 0 && is_kept(frame) ? exports_p2p(&hook->exports) : NULL;
	/* Either lane may be full for hours, with senders that try again and again: what one took each time would pile up. */
	if (p2p && !(frame->flags & FRAME_WILL) && exports_refuse(&hook->exports, p2p, frame))
		return EXPORT_REFUSED;
	if (export(hook, route, frame) == EXPORT_REFUSED)
		return EXPORT_REFUSED;
	if (route->p2p.size == 0)
		return EXPORT_WRITTEN;
	enum export_result kept = p2p ? exports_append(&hook->exports, p2p, frame) : EXPORT_LEFT;
	if (kept == EXPORT_LEFT)
		deliver(hook, route, frame);
	return kept;
}

int publish_arrived(struct hook *hook, struct mosquitto_evt_message *message)
{
	struct table_route route;
	/* It came to the MESSAGE event, so it is no will. */
	hook->will.set = false;
	presence_active(hook, message->client);
	if (message->client == hook->sidecar || !find(hook, message->topic, &route))
		return MOSQ_ERR_SUCCESS;
	if (table_is_over_limit(hook->exports.table, message->topic, message->payloadlen))
		return MOSQ_ERR_ACL_DENIED;
	buffer_clear(&hook->properties);
	broker_read_properties(message->properties, &hook->properties);
	/* A retained one would be shown to whoever subscribes later. */
	if (route.p2p.size > 0)
		message->retain = false;
	const char *id = mosquitto_client_id(message->client);
	bool clean = mosquitto_client_clean_session(message->client);
	struct frame frame = {FRAME_PUBLISH, (uint8_t)(message->qos | (message->retain ? FRAME_RETAIN : 0)
		| (clean ? FRAME_CLEAN_SESSION : 0)), machine_now_us(), bytes_of(id ? id : ""), bytes_of(message->topic),
		buffer_bytes(&hook->properties), {message->payload, message->payloadlen}};
	/* NOMEM: not acknowledged, the connection is closed, and the client sends it again. After ACL_DENIED one of MQTT
	 * 3.1.1 would get its acknowledgement. */
	if (hook->properties.failed || take(hook, &route, &frame) == EXPORT_REFUSED)
		return MOSQ_ERR_NOMEM;
	return MOSQ_ERR_SUCCESS;
}

static void keep(struct buffer *buffer, struct bytes content)
{
	buffer_clear(buffer);
	buffer_add(buffer, content.data, content.size);
}

void publish_sighted(struct hook *hook, const struct mosquitto_evt_acl_check *check)
{
	struct sighting *will = &hook->will;
	struct table_route route;
	const char *id = mosquitto_client_id(check->client);
	will->set = id && check->client != hook->sidecar && find(hook, check->topic, &route);
	if (!will->set)
		return;
	/* For each publish, so nothing dearer than copies. */
	keep(&will->client_id, bytes_of(id));
	keep(&will->topic, bytes_of(check->topic));
	keep(&will->payload, (struct bytes){check->payload, check->payloadlen});
	will->clean_session = mosquitto_client_clean_session(check->client);
}

static bool is_same(const struct buffer *kept, struct bytes other)
{
	return !kept->failed && kept->size == other.size && (other.size == 0 || memcmp(kept->data, other.data, other.size) == 0);
}

/* Mosquitto copies a will, so only its content tells that it is the one that was permitted. */
static bool is_sighted(const struct sighting *will, const struct mosquitto_evt_acl_check *check)
{
	return will->set && !will->client_id.failed && is_same(&will->topic, bytes_of(check->topic))
		&& is_same(&will->payload, (struct bytes){check->payload, check->payloadlen});
}

void publish_shown_to_sidecar(struct hook *hook, const struct mosquitto_evt_acl_check *check)
{
	struct sighting *will = &hook->will;
	struct table_route route;
	if (!is_sighted(will, check) || !find(hook, check->topic, &route))
		return;
	/* Once: the sidecar may hold overlapping subscriptions. */
	will->set = false;
	if (table_is_over_limit(hook->exports.table, check->topic, check->payloadlen))
		return;
	bool retain = check->retain && route.p2p.size == 0;
	struct frame frame = {FRAME_PUBLISH, (uint8_t)(check->qos | FRAME_WILL | (retain ? FRAME_RETAIN : 0)
		| (will->clean_session ? FRAME_CLEAN_SESSION : 0)), machine_now_us(), buffer_bytes(&will->client_id),
		bytes_of(check->topic), {NULL, 0}, {check->payload, check->payloadlen}};
	take(hook, &route, &frame);
}

bool publish_is_private(const struct hook *hook, const char *topic, struct bytes *client_id)
{
	struct table_route route;
	if (!find(hook, topic, &route) || route.p2p.size == 0)
		return false;
	*client_id = route.p2p;
	return true;
}
