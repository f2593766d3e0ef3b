/* What the sidecar asks for by `$CONTROL/mq2mqtt/v1`, and the answers. docs/mosquitto-protocol.md has the bytes. */
#include "hook.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "log.h"

#define CLIENTS_PER_ANSWER 500u

enum { FLAG_EVENTS_2_1 = 1, FLAG_ACL_ALLOW = 2, FLAG_AUTH_ALLOW = 4, FLAG_PROBLEMS = 8 };

static struct buffer *begin(struct hook *hook, enum answer_kind kind, uint32_t number)
{
	struct buffer *answer = &hook->answer;
	buffer_clear(answer);
	buffer_u8(answer, CONTROL_VERSION);
	buffer_u8(answer, (uint8_t)kind);
	buffer_u16(answer, 0);
	buffer_u32(answer, number);
	return answer;
}

static void set_count(struct buffer *answer, size_t count)
{
	if (!answer->failed)
		put_u16(answer->data + 2, (uint16_t)count);
}

static void send(struct hook *hook)
{
	if (hook->answer.failed
		|| !broker_send(hook->options.sidecar_client_id, ANSWER_TOPIC, buffer_bytes(&hook->answer), 0, NULL))
		log_warning("out of memory: an answer to the sidecar is lost");
}

/* Begins a text behind its length, which `end_text` puts there. */
static size_t begin_text(struct buffer *answer)
{
	buffer_u32(answer, 0);
	return answer->size;
}

static void end_text(struct buffer *answer, size_t start)
{
	if (!answer->failed)
		put_u32(answer->data + start - 4, (uint32_t)(answer->size - start));
}

/* How a line about a lane that takes nothing now begins, and what comes between its name and the reason. */
struct manner {
	const char *start, *between;
};

static const struct manner for_people = {"", ": "}, for_stats = {"problem\t", "\t"};

static size_t add_problem(struct buffer *text, const struct manner *manner, const char *lane, const char *problem)
{
	if (!problem)
		return 0;
	buffer_print(text, "%s%s%s", manner->start, lane, manner->between);
	buffer_line(text, problem);
	buffer_u8(text, '\n');
	return 1;
}

/* Returns the number of lines. */
static size_t add_problems(struct hook *hook, struct buffer *text, const struct manner *manner)
{
	struct exports *exports = &hook->exports;
	size_t count = 0;
	for (size_t i = 0; i < exports_count(exports); i++) {
		struct export *export = exports->by_parent[i];
		if (export)
			count += add_problem(text, manner, export->rule, exports_problem(exports, export));
	}
	return count + add_problem(text, manner, EVENTS_LANE, events_problem(&hook->events));
}

static void answer_stats(struct hook *hook, uint32_t number)
{
	struct buffer *answer = begin(hook, ANSWER_STATS, number);
	size_t start = begin_text(answer);
	size_t lines = exports_counters(&hook->exports, answer);
	buffer_print(answer, "events_lost\t\t%" PRIu64 "\n", hook->events.lost);
	lines += 1 + add_problems(hook, answer, &for_stats);
	end_text(answer, start);
	set_count(answer, lines);
	send(hook);
}

static void answer_hello(struct hook *hook, uint32_t number)
{
	results_clear(&hook->results);
	struct buffer *answer = begin(hook, ANSWER_WELCOME, number);
	buffer_u16(answer, HOOK_VERSION_MAJOR);
	buffer_u16(answer, HOOK_VERSION_MINOR);
	buffer_u64(answer, hook->events.epoch);
	buffer_u32(answer, hook->exports.table ? hook->exports.table->crc : 0);
	uint8_t flags = (uint8_t)((hook->is_2_1 ? FLAG_EVENTS_2_1 : 0) | (hook->options.acl_allow ? FLAG_ACL_ALLOW : 0)
		| (hook->options.auth_allow ? FLAG_AUTH_ALLOW : 0));
	buffer_u8(answer, flags);
	size_t start = begin_text(answer);
	buffer_print(answer, "%s\n%s\n", broker_version(hook->is_2_1), hook->options.spool);
	if (add_problems(hook, answer, &for_people) > 0 && !answer->failed)
		answer->data[start - 5] = flags | FLAG_PROBLEMS;
	end_text(answer, start);
	send(hook);
	answer_stats(hook, number);
}

static void answer_table(struct hook *hook, uint32_t number, struct bytes text)
{
	char problem[TABLE_PROBLEM_BYTES] = "out of memory";
	struct table *table = table_parse(text, problem);
	/* The file first: a table that is in force must be there after a restart too. */
	bool good = table && table_file_store(hook, text, problem);
	if (good)
		good = exports_apply(&hook->exports, table);
	else
		table_free(table);
	struct buffer *answer = begin(hook, ANSWER_TABLE, number);
	buffer_u8(answer, good);
	size_t start = begin_text(answer);
	if (good)
		add_problems(hook, answer, &for_people);
	else
		buffer_text(answer, problem);
	end_text(answer, start);
	send(hook);
}

static struct buffer *begin_clients(struct hook *hook, uint32_t number, uint64_t offset)
{
	struct buffer *answer = begin(hook, ANSWER_CLIENTS, number);
	buffer_u8(answer, 0);
	buffer_u64(answer, offset);
	return answer;
}

static void add_text(struct buffer *answer, const char *text)
{
	buffer_u16(answer, (uint16_t)strlen(text));
	buffer_text(answer, text);
}

static void add_client(struct hook *hook, struct buffer *answer, const struct client *client)
{
	add_text(answer, client->id);
	size_t start = answer->size + 2;
	buffer_u16(answer, 0);
	buffer_print(answer, "%016" PRIx64 "-%" PRIu64, hook->events.epoch, client->number);
	if (!answer->failed)
		put_u16(answer->data + start - 2, (uint16_t)(answer->size - start));
	add_text(answer, client->address);
	buffer_u64(answer, client->connected_us / 1000);
	buffer_u8(answer, client->clean_session);
}

static void answer_list(struct hook *hook, uint32_t number)
{
	presence_settle(hook);
	uint64_t offset = hook->events.lane ? lane_next_offset(hook->events.lane) : 0;
	struct buffer *answer = begin_clients(hook, number, offset);
	size_t count = 0;
	for (const struct client *client = NULL; (client = clients_next(&hook->clients, client));) {
		if (!client->online || presence_is_sidecar(hook, client))
			continue;
		if (count == CLIENTS_PER_ANSWER) {
			set_count(answer, count);
			send(hook);
			answer = begin_clients(hook, number, offset);
			count = 0;
		}
		add_client(hook, answer, client);
		count++;
	}
	set_count(answer, count);
	if (!answer->failed)
		answer->data[ANSWER_HEADER_BYTES] = 1;
	send(hook);
	answer_stats(hook, number);
}

static void refuse(struct hook *hook, uint32_t number, size_t position, const char *problem)
{
	struct buffer *answer = begin(hook, ANSWER_REFUSED, number);
	buffer_u32(answer, (uint32_t)position);
	buffer_text(answer, problem);
	send(hook);
	char line[160];
	snprintf(line, sizeof line, "a batch of the sidecar is refused at byte %zu: %s", position, problem);
	log_warning(line);
}

/* A field of a batch as C wants it; NULL without memory. */
static char *text_of(struct bytes field)
{
	return strndup(field.data, field.size);
}

static bool inject(const char *client_id, const struct operation *operation)
{
	char *topic = text_of(operation->topic);
	mosquitto_property *properties;
	bool good = topic && broker_make_properties(operation->properties, &properties)
		&& broker_send(client_id, topic, operation->payload, operation->qos, properties);
	free(topic);
	return good;
}

static enum operation_result do_deliver(struct hook *hook, const struct operation *operation)
{
	char *id = text_of(operation->client_id);
	enum operation_result result = RESULT_REFUSED;
	if (id && !clients_online(&hook->clients, id))
		result = RESULT_OFFLINE;
	else if (id && inject(id, operation))
		result = RESULT_DELIVERED;
	free(id);
	return result;
}

static enum operation_result do_kick(struct hook *hook, const struct operation *operation)
{
	char *id = text_of(operation->client_id);
	struct client *client = id ? clients_online(&hook->clients, id) : NULL;
	enum operation_result result = id ? RESULT_OFFLINE : RESULT_REFUSED;
	if (client && presence_is_sidecar(hook, client)) {
		/* Its own packet is being worked on. */
		result = RESULT_REFUSED;
	} else if (client) {
		client->kicked = true;
		result = mosquitto_kick_client_by_clientid(id, true) == MOSQ_ERR_SUCCESS ? RESULT_DELIVERED : RESULT_REFUSED;
	}
	free(id);
	return result;
}

/* Does what has a result; true if subscribers decide about one of them. */
static bool do_all(struct hook *hook, struct batch batch, struct expected *expected)
{
	struct operation operation;
	bool waits = false;
	for (size_t i = 0; control_next(&batch, &operation); i++) {
		if (operation.code == OP_DELIVER) {
			results_set(expected, i, do_deliver(hook, &operation));
		} else if (operation.code == OP_KICK) {
			results_set(expected, i, do_kick(hook, &operation));
		} else if (operation.code == OP_PUBLISH && results_wait(expected, i, operation.topic)) {
			/* Routed first; nothing that a client was denied before it is taken for a will among what follows. */
			if (!waits && !broker_send(NULL, RESULTS_TOPIC, (struct bytes){NULL, 0}, 0, NULL))
				log_warning("out of memory: what the sidecar publishes may be exported");
			waits = true;
			if (!inject(NULL, &operation))
				results_set(expected, i, RESULT_REFUSED);
		}
	}
	return waits;
}

static void deliver(struct hook *hook, const struct batch *batch)
{
	struct expected *expected = results_begin(&hook->results, batch->number, batch->count);
	if (!expected) {
		refuse(hook, batch->number, 0, "out of memory");
		return;
	}
	bool waits = do_all(hook, *batch, expected);
	const char *client_id = waits ? NULL : hook->options.sidecar_client_id;
	const char *topic = waits ? RESULTS_TOPIC : ANSWER_TOPIC;
	if (!broker_send(client_id, topic, results_bytes(expected), 0, NULL))
		log_warning("out of memory: an answer to the sidecar is lost");
	if (!waits)
		results_forget(&hook->results, expected);
}

void downlink_arrived(struct hook *hook, struct bytes payload)
{
	struct batch batch = {0};
	size_t position;
	const char *problem = control_parse(payload, &batch, &position);
	if (problem) {
		refuse(hook, batch.number, position, problem);
		return;
	}
	struct batch rest = batch;
	struct operation first;
	if (!control_next(&rest, &first))
		return;
	switch (first.code) {
	case OP_HELLO:
		answer_hello(hook, batch.number);
		break;
	case OP_TABLE:
		answer_table(hook, batch.number, first.payload);
		break;
	case OP_LIST:
		answer_list(hook, batch.number);
		break;
	case OP_STATS:
		answer_stats(hook, batch.number);
		break;
	case OP_DELIVER:
	case OP_PUBLISH:
	case OP_KICK:
		deliver(hook, &batch);
		break;
	}
}
