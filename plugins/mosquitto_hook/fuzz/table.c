/* Any bytes as a lane table: refused with a line, or every lane is found by its parent topic. */
#include <stdlib.h>

#include "table.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char problem[TABLE_PROBLEM_BYTES] = "";
	struct table *table = table_parse((struct bytes){data, size}, problem);
	if (!table) {
		if (!*problem)
			abort();
		return 0;
	}
	struct table_route route;
	for (size_t i = 0; i < table->count; i++)
		if (table_parent(table, table->parents[i].name) != &table->parents[i]
			|| (table_find(table, table->parents[i].name, &route) ? route.parent != i : table->parents[i].rule != NULL))
			abort();
	/* Topics come from devices: what is no table's first line serves as one. */
	char *topic = strndup((const char *)data, size);
	if (!topic)
		abort();
	table_find(table, topic, &route);
	table_is_over_limit(table, topic, size);
	free(topic);
	table_free(table);
	return 0;
}
