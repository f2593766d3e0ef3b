#include "events.h"

#include <inttypes.h>
#include <stdio.h>

#include "log.h"
#include "machine.h"

#define MAX_BYTES (16u * 1024 * 1024)
#define CONNECT "connect"

static void add_json_text(struct buffer *text, const char *value)
{
	buffer_u8(text, '"');
	for (; *value; value++) {
		uint8_t c = (uint8_t)*value;
		if (c < 0x20)
			buffer_print(text, "\\u%04x", c);
		else if (c == '"' || c == '\\')
			buffer_print(text, "\\%c", c);
		else
			buffer_u8(text, c);
	}
	buffer_u8(text, '"');
}

/* The lane was deleted: it is opened anew later, as one that could not be opened. */
static void let_go(struct events *events)
{
	snprintf(events->problem, sizeof events->problem, "%s", lane_problem(events->lane));
	lane_close(events->lane);
	events->lane = NULL;
	events->tried_us = machine_now_us();
}

/* `client` is NULL for what concerns the broker. */
static bool write_event(struct events *events, const char *type, const struct client *client, const char *reason)
{
	/* LIST gives the time of a connect too. */
	uint64_t now = client && strcmp(type, CONNECT) == 0 ? client->connected_us : machine_now_us();
	struct buffer *text = &events->text;
	buffer_clear(text);
	buffer_print(text, "{\"type\":\"%s\",\"channelId\":\"%016" PRIx64 "-%" PRIu64 "\",\"clientIp\":", type, events->epoch,
		client ? client->number : 0);
	add_json_text(text, client ? client->address : "");
	buffer_print(text, ",\"time\":%" PRIu64 ",\"reason\":", now / 1000);
	add_json_text(text, reason);
	bool clean = client && client->clean_session;
	buffer_print(text, ",\"cleanSession\":%s}", clean ? "true" : "false");
	struct frame frame = {FRAME_EVENT, clean ? FRAME_CLEAN_SESSION : 0, now, bytes_of(client ? client->id : ""), {NULL, 0},
		{NULL, 0}, buffer_bytes(text)};
	if (text->failed)
		return false;
	enum lane_result result = lane_append(events->lane, &frame);
	if (result == LANE_REMOVED)
		let_go(events);
	return result == LANE_WRITTEN;
}

static void open_lane(struct events *events)
{
	char path[LANE_TEXT_BYTES];
	const struct lane_options options = {.max_bytes = MAX_BYTES, .remark = log_warning};
	snprintf(path, sizeof path, "%s/" EVENTS_LANE, events->spool);
	events->tried_us = machine_now_us();
	events->lane = lane_open(path, &options, events->problem);
	if (!events->lane)
		log_error("no client events: %s", events->problem);
}

void events_catch_up(struct events *events)
{
	if (!events->lane && machine_now_us() - events->tried_us >= LANE_RETRY_US)
		open_lane(events);
	if (events->lane && events->overflow && write_event(events, "overflow", NULL, "")) {
		log_notice("client events are written again");
		events->overflow = false;
	}
}

static void tell(struct events *events, const char *type, const struct client *client, const char *reason)
{
	/* The record of the gap comes before whatever follows the gap. */
	events_catch_up(events);
	if (events->lane && !events->overflow && write_event(events, type, client, reason))
		return;
	if (!events->overflow)
		log_error("client events are lost: %s", events->lane ? lane_problem(events->lane) : events->problem);
	events->overflow = true;
	events->lost++;
}

void events_open(struct events *events, const char *spool)
{
	events->spool = spool;
	events->epoch = machine_now_us();
	open_lane(events);
	tell(events, "boot", NULL, "");
}

void events_connected(struct events *events, const struct client *client)
{
	tell(events, CONNECT, client, "");
}

void events_gone(struct events *events, const struct client *client, bool clean, const char *reason)
{
	tell(events, clean ? "disconnect" : "tcpclean", client, reason);
}

void events_retry(struct events *events)
{
	if (!events->lane)
		open_lane(events);
	events_catch_up(events);
}

const char *events_problem(struct events *events)
{
	if (events->lane && lane_is_removed(events->lane)) {
		/* With what was in it and not read yet. */
		events->overflow = true;
		let_go(events);
	}
	events_catch_up(events);
	if (!events->lane)
		return events->problem;
	return events->overflow ? lane_problem(events->lane) : NULL;
}

void events_close(struct events *events)
{
	tell(events, "shutdown", NULL, "");
	lane_close(events->lane);
	events->lane = NULL;
	buffer_free(&events->text);
}
