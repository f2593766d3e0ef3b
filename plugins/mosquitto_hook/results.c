#include "results.h"

#include <stdlib.h>

/* The sidecar waits for answers after some 64 batches; more would be ones that it never gets. */
#define MAX_BATCHES 256u

struct waiting {
	size_t operation;
	size_t topic_at, topic_size; /* in `topics` */
	bool routed;                 /* some subscriber was asked about */
};

struct expected {
	struct expected *next;
	struct buffer answer;  /* its bytes: header, one byte for each operation */
	struct buffer topics;
	struct waiting *waiting; /* the operations that subscribers decide about */
	size_t waiting_count, at; /* `at`: the one that was routed last */
};

static void free_expected(struct expected *expected)
{
	buffer_free(&expected->answer);
	buffer_free(&expected->topics);
	free(expected->waiting);
	free(expected);
}

struct expected *results_begin(struct results *results, uint32_t number, uint16_t count)
{
	if (results->count >= MAX_BATCHES)
		results_clear(results);
	struct expected *expected = calloc(1, sizeof *expected);
	if (!expected)
		return NULL;
	expected->waiting = calloc(count ? count : 1, sizeof *expected->waiting);
	buffer_u8(&expected->answer, CONTROL_VERSION);
	buffer_u8(&expected->answer, ANSWER_RESULTS);
	buffer_u16(&expected->answer, count);
	buffer_u32(&expected->answer, number);
	for (unsigned i = 0; i < count; i++)
		buffer_u8(&expected->answer, RESULT_REFUSED);
	if (!expected->waiting || expected->answer.failed) {
		free_expected(expected);
		return NULL;
	}
	if (results->last)
		results->last->next = expected;
	else
		results->first = expected;
	results->last = expected;
	results->count++;
	return expected;
}

void results_set(struct expected *expected, size_t operation, enum operation_result result)
{
	expected->answer.data[ANSWER_HEADER_BYTES + operation] = (uint8_t)result;
}

bool results_wait(struct expected *expected, size_t operation, struct bytes topic)
{
	struct waiting waiting = {operation, expected->topics.size, topic.size, false};
	buffer_add(&expected->topics, topic.data, topic.size);
	if (expected->topics.failed)
		return false;
	expected->waiting[expected->waiting_count++] = waiting;
	results_set(expected, operation, RESULT_NO_SUBSCRIBER);
	return true;
}

static bool is_for(const struct expected *expected, size_t i, const char *topic, size_t size)
{
	const struct waiting *waiting = &expected->waiting[i];
	return waiting->topic_size == size && memcmp(expected->topics.data + waiting->topic_at, topic, size) == 0;
}

void results_routed(struct results *results, const char *topic)
{
	struct expected *expected = results->first;
	if (!expected || expected->waiting_count == 0)
		return;
	/* Messages are routed in order, so it is mostly the one of the last time or the next one. Which of several to one
	 * topic does not matter: they have the same subscribers. */
	size_t size = strlen(topic);
	for (size_t i = 0; i < expected->waiting_count; i++) {
		size_t at = (expected->at + i) % expected->waiting_count;
		if (is_for(expected, at, topic, size)) {
			expected->at = at;
			expected->waiting[at].routed = true;
			results_set(expected, expected->waiting[at].operation, RESULT_DELIVERED);
			return;
		}
	}
}

struct bytes results_bytes(const struct expected *expected)
{
	return buffer_bytes(&expected->answer);
}

static bool is_delivered(const struct expected *expected, size_t i)
{
	return expected->answer.data[ANSWER_HEADER_BYTES + expected->waiting[i].operation] == RESULT_DELIVERED;
}

/* Gives all messages to one topic the same result. Compares only what has none yet: a batch is mostly for one topic, or
 * for as many topics as messages. */
static void spread(struct expected *expected)
{
	for (size_t i = 0; i < expected->waiting_count; i++) {
		const struct waiting *known = &expected->waiting[i];
		if (!known->routed)
			continue;
		const char *topic = (const char *)expected->topics.data + known->topic_at;
		for (size_t j = 0; j < expected->waiting_count; j++)
			if (!is_delivered(expected, j) && is_for(expected, j, topic, known->topic_size))
				results_set(expected, expected->waiting[j].operation, RESULT_DELIVERED);
	}
}

static void drop_first(struct results *results)
{
	struct expected *first = results->first;
	results->first = first->next;
	if (!results->first)
		results->last = NULL;
	results->count--;
	free_expected(first);
}

void results_fill(struct results *results, void *answer, size_t size)
{
	/* An answer that nobody was subscribed to was never handed out. */
	while (results->first) {
		struct bytes own = results_bytes(results->first);
		bool match = own.size == size && memcmp(own.data, answer, ANSWER_HEADER_BYTES) == 0;
		if (match) {
			spread(results->first);
			memcpy(answer, own.data, size);
		}
		drop_first(results);
		if (match)
			return;
	}
}

void results_forget(struct results *results, struct expected *expected)
{
	if (results->first == expected) {
		drop_first(results);
		return;
	}
	struct expected *before = results->first;
	while (before->next != expected)
		before = before->next;
	before->next = expected->next;
	if (results->last == expected)
		results->last = before;
	results->count--;
	free_expected(expected);
}

void results_clear(struct results *results)
{
	while (results->first)
		drop_first(results);
}
