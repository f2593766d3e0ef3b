/* Does what tests/unit/hook tells it to: one command a line on standard input, one line of answer each.
 *
 *   machine NOW_US BOOT_HEX             clock and boot id from now on
 *   frame KIND FLAGS US CLIENT TOPIC PROPERTIES PAYLOAD    the frame's bytes (fields in hex, `-` for none)
 *   look HEX POSITION                   sound END | cut | broken PROBLEM
 *   header BASE CREATED BASE END BYTES BOOT_HEX            a segment's header
 *   cursor DIRECTORY CREATED            OFFSET SEGMENT POSITION | none
 *   open DIRECTORY MAX_BYTES process|power|MILLISECONDS    opened NEXT UNSENT | refused PROBLEM
 *   append KIND FLAGS US CLIENT TOPIC PROPERTIES PAYLOAD   written NEXT UNSENT | full|large|failed PROBLEM
 *   many COUNT BYTES                    that many messages: written NEXT UNSENT | full|... PROBLEM
 *   trouble                             PROBLEM | none
 *   syncs                               how often files were synced
 *   break                               no sync succeeds from now on: broken
 *   close
 *   control HEX                         sound COUNT NUMBER, then each operation's fields | refused POSITION PROBLEM
 *   text HEX                            topic | mqtt | none
 */
#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <fcntl.h>

#include "control.h"
#include "cursor.h"
#include "lane.h"
#include "segment.h"
#include "test/fake_machine.h"
#include "text.h"

#define MAX_FIELDS 8

static struct lane *lane;
static struct syncer *syncer;

static void note(const char *text)
{
	fprintf(stderr, "%s\n", text);
}

/* Bytes of a hex text, in memory of exactly that size, so that a sanitizer sees every step beyond. */
static struct bytes unhex(const char *hex)
{
	size_t size = strcmp(hex, "-") == 0 ? 0 : strlen(hex) / 2;
	uint8_t *data = malloc(size ? size : 1);
	if (!data)
		abort();
	for (size_t i = 0; i < size; i++) {
		const char pair[3] = {hex[2 * i], hex[2 * i + 1], '\0'};
		data[i] = (uint8_t)strtoul(pair, NULL, 16);
	}
	return (struct bytes){data, size};
}

static void release(struct bytes bytes)
{
	free((void *)(uintptr_t)bytes.data);
}

static void print_hex(struct bytes bytes)
{
	const uint8_t *data = bytes.data;
	if (bytes.size == 0)
		putchar('-');
	for (size_t i = 0; i < bytes.size; i++)
		printf("%02x", data[i]);
}

static struct frame frame_of(char **fields)
{
	return (struct frame){(enum frame_kind)atoi(fields[0]), (uint8_t)atoi(fields[1]), strtoull(fields[2], NULL, 10),
		unhex(fields[3]), unhex(fields[4]), unhex(fields[5]), unhex(fields[6])};
}

static void release_frame(const struct frame *frame)
{
	release(frame->client_id);
	release(frame->topic);
	release(frame->properties);
	release(frame->payload);
}

static void do_machine(char **fields)
{
	struct bytes boot = unhex(fields[1]);
	machine_set(strtoull(fields[0], NULL, 10), boot.data);
	release(boot);
	puts("set");
}

static void do_frame(char **fields)
{
	struct frame frame = frame_of(fields);
	uint8_t header[FRAME_HEADER_BYTES];
	frame_header(&frame, header);
	print_hex((struct bytes){header, sizeof header});
	const struct bytes parts[] = {frame.client_id, frame.topic, frame.properties, frame.payload};
	for (size_t i = 0; i < 4; i++)
		if (parts[i].size)
			print_hex(parts[i]);
	puts("");
	release_frame(&frame);
}

static void do_look(char **fields)
{
	struct bytes file = unhex(fields[0]);
	struct frame_look look = frame_look(file, strtoul(fields[1], NULL, 10));
	if (look.state == FRAME_SOUND)
		printf("sound %zu\n", look.end);
	else
		puts(look.state == FRAME_CUT ? "cut" : look.problem);
	release(file);
}

static void do_header(char **fields)
{
	struct bytes boot = unhex(fields[5]);
	struct segment_header header = {strtoull(fields[0], NULL, 10), strtoull(fields[1], NULL, 10),
		strtoull(fields[2], NULL, 10), strtoull(fields[3], NULL, 10), strtoull(fields[4], NULL, 10), {0}};
	memcpy(header.boot_id, boot.data, BOOT_ID_BYTES);
	release(boot);
	uint8_t file[SEGMENT_HEADER_BYTES];
	segment_header_pack(&header, file);
	struct segment_header again;
	const char *wrong = segment_header_unpack(&again, file, sizeof file);
	if (wrong || memcmp(&header, &again, sizeof header) != 0)
		puts("not read back");
	else
		print_hex((struct bytes){file, sizeof file}), puts("");
}

static void do_cursor(char **fields)
{
	int directory = open(fields[0], O_RDONLY | O_DIRECTORY);
	struct cursor cursor;
	if (cursor_read(directory, strtoull(fields[1], NULL, 10), &cursor))
		printf("%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", cursor.offset, cursor.segment, cursor.position);
	else
		puts("none");
	close(directory);
}

static void do_open(char **fields)
{
	char problem[LANE_TEXT_BYTES];
	unsigned period_ms = (unsigned)strtoul(fields[2], NULL, 10);
	if (period_ms && !(syncer = syncer_start(period_ms)))
		abort();
	struct lane_options options = {.max_bytes = strtoull(fields[1], NULL, 10),
		.power = period_ms || strcmp(fields[2], "power") == 0, .syncer = syncer, .remark = note};
	lane = lane_open(fields[0], &options, problem);
	if (lane)
		printf("opened %" PRIu64 " %" PRIu64 "\n", lane_next_offset(lane), lane_unsent_bytes(lane));
	else
		printf("refused %s\n", problem);
}

static void print_result(enum lane_result result)
{
	static const char *const names[] = {"written", "full", "large", "removed", "failed"};
	if (result == LANE_WRITTEN)
		printf("written %" PRIu64 " %" PRIu64 "\n", lane_next_offset(lane), lane_unsent_bytes(lane));
	else
		printf("%s %s\n", names[result], lane_problem(lane));
}

static void do_append(char **fields)
{
	struct frame frame = frame_of(fields);
	print_result(lane_append(lane, &frame));
	release_frame(&frame);
}

static void do_many(char **fields)
{
	size_t count = strtoul(fields[0], NULL, 10), size = strtoul(fields[1], NULL, 10);
	char *payload = malloc(size + 32);
	if (!payload)
		abort();
	enum lane_result result = LANE_WRITTEN;
	for (size_t i = 0; i < count && result == LANE_WRITTEN; i++) {
		memset(payload, '.', size + 32);
		int digits = snprintf(payload, 32, "%zu ", i);
		payload[digits] = '.';
		struct frame frame = {FRAME_PUBLISH, 1, i, bytes_of("dev"), bytes_of("sensors/a"), {NULL, 0},
			{payload, size > (size_t)digits ? size : (size_t)digits}};
		result = lane_append(lane, &frame);
	}
	free(payload);
	print_result(result);
}

static void do_trouble(char **fields)
{
	(void)fields;
	const char *trouble = lane_trouble(lane);
	puts(trouble ? trouble : "none");
}

static void do_syncs(char **fields)
{
	(void)fields;
	printf("%u\n", machine_syncs());
}

static void do_break(char **fields)
{
	(void)fields;
	machine_break_disk();
	puts("broken");
}

static void end(void)
{
	lane_close(lane);
	syncer_stop(syncer);
	lane = NULL;
	syncer = NULL;
}

static void do_close(char **fields)
{
	(void)fields;
	end();
	puts("closed");
}

static void do_control(char **fields)
{
	struct bytes payload = unhex(fields[0]);
	struct batch batch;
	size_t position;
	const char *problem = control_parse(payload, &batch, &position);
	if (problem) {
		printf("refused %zu %s\n", position, problem);
	} else {
		printf("sound %u %" PRIu32, batch.count, batch.number);
		struct operation operation;
		while (control_next(&batch, &operation)) {
			printf(" %d %d", operation.code, operation.qos);
			const struct bytes parts[] = {operation.client_id, operation.topic, operation.properties, operation.payload};
			for (size_t i = 0; i < 4; i++)
				putchar(' '), print_hex(parts[i]);
		}
		puts("");
	}
	release(payload);
}

static void do_text(char **fields)
{
	struct bytes text = unhex(fields[0]);
	puts(text_is_topic(text) ? "topic" : text_is_mqtt(text) ? "mqtt" : "none");
	release(text);
}

static const struct command {
	const char *name;
	size_t fields;
	void (*run)(char **fields);
} commands[] = {
	{"machine", 2, do_machine}, {"frame", 7, do_frame}, {"look", 2, do_look}, {"header", 6, do_header},
	{"cursor", 2, do_cursor}, {"open", 3, do_open}, {"append", 7, do_append}, {"many", 2, do_many},
	{"trouble", 0, do_trouble}, {"syncs", 0, do_syncs}, {"break", 0, do_break}, {"close", 0, do_close}, {"control", 1, do_control}, {"text", 1, do_text},
};

static void run(char *line)
{
	char *fields[MAX_FIELDS + 1] = {0}, *rest = NULL;
	size_t count = 0;
	for (char *field = strtok_r(line, " \n", &rest); field && count <= MAX_FIELDS; field = strtok_r(NULL, " \n", &rest))
		fields[count++] = field;
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
		if (count == commands[i].fields + 1 && strcmp(fields[0], commands[i].name) == 0) {
			commands[i].run(fields + 1);
			return;
		}
	puts("unknown command");
}

int main(void)
{
	char *line = NULL;
	size_t capacity = 0;
	while (getline(&line, &capacity, stdin) > 0) {
		run(line);
		fflush(stdout);
	}
	free(line);
	end();
	return 0;
}
