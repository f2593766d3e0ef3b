#include "exports.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

#include "log.h"
#include "machine.h"

#define FILES_PER_LANE 3u

static size_t lanes_of(const struct table *table)
{
	return table ? table->count + 1 : 0;
}

/* Name of the directory of a lane; NULL for none. P2P under no parent at all is nobody's. */
static const char *lane_name(const struct table *table, size_t i)
{
	if (i < table->count)
		return table->parents[i].rule;
	return table->count > 0 ? P2P_LANE : NULL;
}

size_t exports_count(const struct exports *exports)
{
	return lanes_of(exports->table);
}

struct export *exports_p2p(const struct exports *exports)
{
	return exports->by_parent[exports->table->count];
}

void exports_away(struct exports *exports, size_t parent)
{
	exports->table->parents[parent].not_persistent++;
}

/* Whether Mosquitto keeps a quarter of its descriptors for clients: without one nobody can connect, the sidecar with a
 * smaller table neither. */
static bool leaves_room(const struct exports *exports)
{
	struct rlimit files;
	size_t lanes = 1;
	for (size_t i = 0; i < exports_count(exports); i++)
		lanes += exports->by_parent[i] && exports->by_parent[i]->lane;
	return getrlimit(RLIMIT_NOFILE, &files) != 0 || lanes * FILES_PER_LANE <= files.rlim_cur - files.rlim_cur / 4;
}

static void open_lane(struct exports *exports, struct export *export)
{
	char path[LANE_TEXT_BYTES];
	const struct lane_options options = {exports->table->max_bytes, exports->table->power, exports->syncer, log_warning};
	snprintf(path, sizeof path, "%s/%s", exports->spool, export->rule);
	export->tried_us = machine_now_us();
	if (leaves_room(exports))
		export->lane = lane_open(path, &options, export->problem);
	else
		snprintf(export->problem, sizeof export->problem, "cannot open %.300s: no descriptors left for more lanes; raise "
			"Mosquitto's limit (LimitNOFILE, ulimit -n): three for each rule, and a quarter is for clients", path);
	if (!export->lane)
		log_error("%s", export->problem);
}

static void free_export(struct export *export)
{
	if (!export)
		return;
	lane_close(export->lane);
	free(export->rule);
	free(export);
}

static struct export *make_export(const char *rule)
{
	struct export *export = calloc(1, sizeof *export);
	if (export && !(export->rule = strdup(rule))) {
		free(export);
		return NULL;
	}
	return export;
}

/* Takes the export of `rule` out of the old ones. */
static struct export *take(struct exports *exports, const char *rule)
{
	for (size_t i = 0; i < exports_count(exports); i++) {
		struct export *export = exports->by_parent[i];
		if (export && strcmp(export->rule, rule) == 0) {
			exports->by_parent[i] = NULL;
			return export;
		}
	}
	return NULL;
}

static bool same_lanes(const struct table *a, const struct table *b)
{
	return a && a->max_bytes == b->max_bytes && a->power == b->power;
}

static void say_what_is_exported(const struct exports *exports)
{
	struct buffer text = {0};
	for (size_t i = 0; i < exports->table->count; i++)
		if (exports->by_parent[i])
			buffer_print(&text, "%s%s (%s)", text.size ? ", " : "", exports->by_parent[i]->rule,
				exports->table->parents[i].name);
	buffer_u8(&text, '\0');
	if (!text.failed)
		log_notice("exported: %s", text.size > 1 ? (const char *)text.data : "nothing");
	buffer_free(&text);
}

static void keep_counting(const struct exports *exports, struct table *table)
{
	for (size_t i = 0; exports->table && i < table->count; i++) {
		const struct table_parent *before = table_parent(exports->table, table->parents[i].name);
		table->parents[i].not_persistent = before ? before->not_persistent : 0;
	}
}

bool exports_apply(struct exports *exports, struct table *table)
{
	size_t count = lanes_of(table);
	struct exports next = {exports->spool, exports->syncer, table, calloc(count, sizeof *next.by_parent)};
	/* First what may fail, so that a failure changes nothing. */
	for (size_t i = 0; next.by_parent && i < count; i++)
		if (lane_name(table, i) && !(next.by_parent[i] = make_export(lane_name(table, i)))) {
			exports_free(&next);
			return false;
		}
	if (!next.by_parent) {
		table_free(table);
		return false;
	}
	keep_counting(exports, table);
	for (size_t i = 0; i < count; i++) {
		struct export *old = next.by_parent[i] ? take(exports, lane_name(table, i)) : NULL;
		if (old) {
			free_export(next.by_parent[i]);
			next.by_parent[i] = old;
		}
		if (old && old->lane && !lane_has_failed(old->lane) && !same_lanes(exports->table, table)) {
			lane_close(old->lane);
			old->lane = NULL;
		}
	}
	/* Lanes of rules that are gone are let go before any is opened: a rule may come back under another parent. */
	exports_free(exports);
	*exports = next;
	say_what_is_exported(exports);
	for (size_t i = 0; i < count; i++)
		if (exports->by_parent[i] && !exports->by_parent[i]->lane)
			open_lane(exports, exports->by_parent[i]);
	return true;
}

/* Counts what is not taken; says it in the log when it begins. */
static enum export_result refuse(struct export *export, const char *problem, bool drop)
{
	if (!export->refusing)
		log_error("lane %s takes no messages: %s", export->rule, problem);
	export->refusing = true;
	*(drop ? &export->dropped_lane_full : &export->refused) += 1;
	return drop ? EXPORT_LEFT : EXPORT_REFUSED;
}

/* Opens a lane that could not be opened, if it is time to look again. */
static void retry(struct exports *exports, struct export *export)
{
	if (!export->lane && machine_now_us() - export->tried_us >= LANE_RETRY_US)
		open_lane(exports, export);
}

enum export_result exports_append(struct exports *exports, struct export *export, const struct frame *frame)
{
	/* Nobody waits for a QoS 0 message, and a will has no sender left. */
	bool drop = (frame->flags & FRAME_QOS) == 0 || (frame->flags & FRAME_WILL);
	retry(exports, export);
	if (!export->lane)
		return refuse(export, export->problem, drop);
	switch (lane_append(export->lane, frame)) {
	case LANE_WRITTEN:
		break;
	case LANE_TOO_LARGE:
		/* The sender would repeat it for ever. */
		export->dropped_too_large++;
		return EXPORT_LEFT;
	case LANE_REMOVED:
		snprintf(export->problem, sizeof export->problem, "%s", lane_problem(export->lane));
		lane_close(export->lane);
		export->lane = NULL;
		export->tried_us = machine_now_us();
		return refuse(export, export->problem, drop);
	default:
		return refuse(export, lane_problem(export->lane), drop);
	}
	if (frame->flags & FRAME_WILL)
		export->wills++;
	if (export->refusing)
		log_notice("lane %s takes messages again", export->rule);
	export->refusing = false;
	return EXPORT_WRITTEN;
}

bool exports_refuse(struct exports *exports, struct export *export, const struct frame *frame)
{
	retry(exports, export);
	if (export->lane && !lane_is_full(export->lane, frame))
		return false;
	refuse(export, export->lane ? lane_problem(export->lane) : export->problem, false);
	return true;
}

void exports_retry(struct exports *exports)
{
	for (size_t i = 0; i < exports_count(exports); i++)
		if (exports->by_parent[i] && !exports->by_parent[i]->lane)
			open_lane(exports, exports->by_parent[i]);
}

const char *exports_problem(struct exports *exports, struct export *export)
{
	retry(exports, export);
	return export->lane ? lane_trouble(export->lane) : export->problem;
}

size_t exports_counters(const struct exports *exports, struct buffer *text)
{
	size_t lines = 0;
	for (size_t i = 0; exports->table && i < exports->table->count; i++, lines++)
		buffer_print(text, "dropped_not_persistent\t%s\t%" PRIu64 "\n", exports->table->parents[i].name,
			exports->table->parents[i].not_persistent);
	for (size_t i = 0; i < exports_count(exports); i++) {
		const struct export *export = exports->by_parent[i];
		if (!export)
			continue;
		const struct {
			const char *name;
			uint64_t value;
		} counters[] = {{"dropped_lane_full", export->dropped_lane_full},
			{"dropped_too_large", export->dropped_too_large}, {"refused", export->refused}, {"wills", export->wills}};
		for (size_t j = 0; j < sizeof counters / sizeof *counters; j++, lines++)
			buffer_print(text, "%s\t%s\t%" PRIu64 "\n", counters[j].name, export->rule, counters[j].value);
	}
	return lines;
}

void exports_free(struct exports *exports)
{
	for (size_t i = 0; exports->by_parent && i < exports_count(exports); i++)
		free_export(exports->by_parent[i]);
	free(exports->by_parent);
	table_free(exports->table);
	exports->table = NULL;
	exports->by_parent = NULL;
}
