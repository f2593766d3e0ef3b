/* The lane table: which parent topics are exported, and to the lane of which rule. docs/mosquitto-protocol.md has the
 * text that the sidecar pushes and that is kept in `spool/lanes.table`. */
#ifndef MQ2MQTT_TABLE_H
#define MQ2MQTT_TABLE_H

#include <stdbool.h>

#include "bytes.h"

#define TABLE_PROBLEM_BYTES 256u

struct table_parent {
	char *name; /* first level of topics */
	char *rule; /* whose lane takes what is published under it; NULL for none */
	uint64_t not_persistent; /* P2P messages under it that found their client away and are not kept */
};

struct table {
	uint32_t crc; /* of the text */
	uint64_t max_bytes;
	bool power;
	uint64_t topic_chars, payload_bytes; /* longest of a publish; UINT64_MAX without a limit */
	struct table_parent *parents;
	size_t count, capacity;
	size_t *slots; /* hash table of indices into `parents`, plus 1; 0 for none */
	size_t slot_count;
};

/* What a table says about a topic. */
struct table_route {
	size_t parent;      /* index into `parents` */
	struct bytes p2p;   /* client id of `{parent}/p2p/{clientId}`; size 0 for any other topic */
};

/* NULL with the reason in `problem`. */
struct table *table_parse(struct bytes text, char problem[TABLE_PROBLEM_BYTES]);

/* NULL where there is none of this name. */
struct table_parent *table_parent(const struct table *table, const char *name);

/* False where no rule is concerned. */
bool table_find(const struct table *table, const char *topic, struct table_route *route);

bool table_is_over_limit(const struct table *table, const char *topic, size_t payload_bytes);

void table_free(struct table *table);

#endif
