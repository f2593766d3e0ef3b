#include "table.h"

#include <stdio.h>
#include <stdlib.h>

#include "crc32.h"
#include "text.h"

#define NAME "mq2mqtt-table"
#define VERSION "1"
#define FIELDS 6u
#define MAX_RULE_BYTES 64u
#define P2P "p2p/"

static size_t hash_of(struct bytes name)
{
	/* FNV-1a: names of some bytes, looked up for every publish. */
	uint64_t hash = 14695981039346656037u;
	const uint8_t *at = name.data;
	for (size_t i = 0; i < name.size; i++)
		hash = (hash ^ at[i]) * 1099511628211u;
	return (size_t)(hash ^ hash >> 32);
}

static bool same(const char *text, struct bytes other)
{
	return strlen(text) == other.size && memcmp(text, other.data, other.size) == 0;
}

/* Where `name` is or would be. */
static size_t slot_of(const struct table *table, struct bytes name)
{
	size_t slot = hash_of(name) & (table->slot_count - 1);
	while (table->slots[slot] && !same(table->parents[table->slots[slot] - 1].name, name))
		slot = (slot + 1) & (table->slot_count - 1);
	return slot;
}

static bool grow(struct table *table)
{
	if (table->count < table->capacity)
		return true;
	size_t capacity = table->capacity ? 2 * table->capacity : 16;
	struct table_parent *parents = realloc(table->parents, capacity * sizeof *parents);
	if (!parents)
		return false;
	table->parents = parents;
	table->capacity = capacity;
	/* At most half full: a search ends soon. */
	size_t *slots = calloc(2 * capacity, sizeof *slots);
	if (!slots)
		return false;
	free(table->slots);
	table->slots = slots;
	table->slot_count = 2 * capacity;
	for (size_t i = 0; i < table->count; i++)
		table->slots[slot_of(table, bytes_of(parents[i].name))] = i + 1;
	return true;
}

static struct table_parent *parent_named(struct table *table, struct bytes name)
{
	if (!grow(table))
		return NULL;
	size_t slot = slot_of(table, name);
	if (table->slots[slot])
		return &table->parents[table->slots[slot] - 1];
	char *copy = strndup(name.data, name.size);
	if (!copy)
		return NULL;
	table->parents[table->count++] = (struct table_parent){copy, NULL, 0};
	table->slots[slot] = table->count;
	return &table->parents[table->count - 1];
}

static bool is_rule(struct bytes id)
{
	const char *text = id.data;
	for (size_t i = 0; i < id.size; i++) {
		char c = text[i];
		if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_'))
			return false;
	}
	return id.size > 0 && id.size <= MAX_RULE_BYTES;
}

static bool is_parent(struct bytes name)
{
	return text_is_topic(name) && !memchr(name.data, '/', name.size) && *(const char *)name.data != '$';
}

/* A decimal number, or UINT64_MAX for `-` where that is allowed. */
static bool number(struct bytes field, bool optional, uint64_t *value)
{
	const char *text = field.data;
	if (optional && field.size == 1 && text[0] == '-') {
		*value = UINT64_MAX;
		return true;
	}
	*value = 0;
	for (size_t i = 0; i < field.size; i++) {
		if (text[i] < '0' || text[i] > '9')
			return false;
		*value = *value * 10 + (uint64_t)(text[i] - '0');
	}
	return field.size > 0 && field.size <= 18;
}

static const char *parse_first(struct table *table, const struct bytes *fields, size_t count)
{
	if (count != 6 || !same(NAME, fields[0]))
		return "no lane table";
	if (!same(VERSION, fields[1]))
		return "another version of the lane table: hook and sidecar must be of one version";
	table->power = same("power", fields[3]);
	if (!table->power && !same("process", fields[3]))
		return "durability is neither process nor power";
	if (!number(fields[2], false, &table->max_bytes) || table->max_bytes == 0
		|| !number(fields[4], true, &table->topic_chars) || !number(fields[5], true, &table->payload_bytes))
		return "no number";
	return NULL;
}

static const char *parse_other(struct table *table, const struct bytes *fields, size_t count)
{
	bool lane = count == 3 && same("lane", fields[0]);
	if (!lane && !(count == 2 && same("parent", fields[0])))
		return "neither a lane nor a parent topic";
	struct bytes name = fields[count - 1];
	if (!is_parent(name))
		return "no parent topic";
	if (lane && !is_rule(fields[1]))
		return "no rule id";
	struct table_parent *parent = parent_named(table, name);
	if (!parent)
		return "out of memory";
	if (!lane)
		return NULL;
	if (parent->rule)
		return "a second lane for this parent topic";
	for (size_t i = 0; i < table->count; i++)
		if (table->parents[i].rule && same(table->parents[i].rule, fields[1]))
			return "a second lane of this rule";
	parent->rule = strndup(fields[1].data, fields[1].size);
	return parent->rule ? NULL : "out of memory";
}

static size_t split(struct bytes line, struct bytes fields[FIELDS + 1])
{
	const char *at = line.data, *end = at + line.size;
	size_t count = 0;
	while (count <= FIELDS) {
		const char *tab = memchr(at, '\t', (size_t)(end - at));
		fields[count++] = (struct bytes){at, (size_t)((tab ? tab : end) - at)};
		if (!tab)
			break;
		at = tab + 1;
	}
	return count;
}

static const char *parse(struct table *table, struct bytes text, size_t *line_number)
{
	const char *at = text.data, *end = at + text.size;
	*line_number = 1;
	if (text.size == 0 || end[-1] != '\n')
		return "cut off";
	for (; at < end; ++*line_number) {
		const char *feed = memchr(at, '\n', (size_t)(end - at));
		struct bytes fields[FIELDS + 1];
		size_t count = split((struct bytes){at, (size_t)(feed - at)}, fields);
		const char *problem = *line_number == 1 ? parse_first(table, fields, count) : parse_other(table, fields, count);
		if (problem)
			return problem;
		at = feed + 1;
	}
	return NULL;
}

struct table *table_parse(struct bytes text, char problem[TABLE_PROBLEM_BYTES])
{
	struct table *table = calloc(1, sizeof *table);
	size_t line = 0;
	const char *wrong = table && grow(table) ? parse(table, text, &line) : "out of memory";
	if (wrong) {
		snprintf(problem, TABLE_PROBLEM_BYTES, "lane table, line %zu: %s", line, wrong);
		table_free(table);
		return NULL;
	}
	table->crc = crc32_of(0, text.data, text.size);
	return table;
}

struct table_parent *table_parent(const struct table *table, const char *name)
{
	size_t found = table->slots[slot_of(table, bytes_of(name))];
	return found ? &table->parents[found - 1] : NULL;
}

bool table_find(const struct table *table, const char *topic, struct table_route *route)
{
	const char *slash = strchrnul(topic, '/');
	size_t found = table->slots[slot_of(table, (struct bytes){topic, (size_t)(slash - topic)})];
	if (!found)
		return false;
	route->parent = found - 1;
	route->p2p = (struct bytes){0};
	if (*slash && strncmp(slash + 1, P2P, strlen(P2P)) == 0) {
		const char *id = slash + 1 + strlen(P2P);
		/* A client id may hold slashes in MQTT, so with one more level it could be two clients: an ordinary topic. */
		if (*id && !strchr(id, '/'))
			route->p2p = bytes_of(id);
	}
	return table->parents[route->parent].rule || route->p2p.size > 0;
}

bool table_is_over_limit(const struct table *table, const char *topic, size_t payload_bytes)
{
	if (payload_bytes > table->payload_bytes)
		return true;
	if (table->topic_chars == UINT64_MAX)
		return false;
	uint64_t chars = 0;
	for (const char *at = topic; *at; at++)
		chars += ((uint8_t)*at & 0xC0) != 0x80;
	return chars > table->topic_chars;
}

void table_free(struct table *table)
{
	if (!table)
		return;
	for (size_t i = 0; i < table->count; i++) {
		free(table->parents[i].name);
		free(table->parents[i].rule);
	}
	free(table->parents);
	free(table->slots);
	free(table);
}
