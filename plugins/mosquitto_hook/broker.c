#include "broker.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "log.h"
#include "mqtt5.h"
#include "text.h"

/* The client library's header declares these; every Mosquitto exports them to plugins. */
extern int mosquitto_property_add_byte(mosquitto_property **list, int id, uint8_t value);
extern int mosquitto_property_add_int32(mosquitto_property **list, int id, uint32_t value);
extern int mosquitto_property_add_binary(mosquitto_property **list, int id, const void *value, uint16_t size);
extern int mosquitto_property_add_string(mosquitto_property **list, int id, const char *value);
extern int mosquitto_property_add_string_pair(mosquitto_property **list, int id, const char *name, const char *value);
extern void mosquitto_property_free_all(mosquitto_property **list);

/* Internal numbers of Mosquitto (mosquitto_internal.h, enum mosquitto_client_state), the same in all releases of 2.0 and 2.1
 * but for the last, which is of 2.1. */
enum {
	STATE_NEW = 0,
	STATE_DISCONNECTING = 2,
	STATE_ACTIVE = 3,
	STATE_TAKEN_OVER = 17,
	STATE_DISCONNECT_WITH_WILL = 18,
	STATE_AUTHENTICATING = 20,
	STATE_REAUTHENTICATING = 21,
	STATE_DELAYED_AUTH = 22,
};

/* What the dynamic linker finds in this broker, or NULL. */
static struct {
	int (*identifier)(const mosquitto_property *list);
	const mosquitto_property *(*next)(const mosquitto_property *list);
	const mosquitto_property *(*read_string)(const mosquitto_property *list, int id, char **value, bool skip_first);
	const mosquitto_property *(*read_pair)(const mosquitto_property *list, int id, char **name, char **value, bool skip);
	const mosquitto_property *(*read_byte)(const mosquitto_property *list, int id, uint8_t *value, bool skip_first);
	const mosquitto_property *(*read_int32)(const mosquitto_property *list, int id, uint32_t *value, bool skip_first);
	const mosquitto_property *(*read_binary)(const mosquitto_property *list, int id, void **value, uint16_t *size,
		bool skip_first);
	int (*state)(struct mosquitto *client);
	int (*version)(int *major, int *minor, int *revision);
	int (*port)(const struct mosquitto *client);
} found;

/* POSIX lets dlsym's pointer be a function's; C has no cast for it. */
static void look_up(const char *name, void *function)
{
	void *symbol = dlsym(RTLD_DEFAULT, name);
	memcpy(function, &symbol, sizeof symbol);
}

void broker_init(void)
{
	look_up("mosquitto_property_identifier", &found.identifier);
	look_up("mosquitto_property_next", &found.next);
	look_up("mosquitto_property_read_string", &found.read_string);
	look_up("mosquitto_property_read_string_pair", &found.read_pair);
	look_up("mosquitto_property_read_byte", &found.read_byte);
	look_up("mosquitto_property_read_int32", &found.read_int32);
	look_up("mosquitto_property_read_binary", &found.read_binary);
	look_up("mosquitto__get_state", &found.state);
	look_up("mosquitto_lib_version", &found.version);
	look_up("mosquitto_client_port", &found.port);
}

bool broker_reads_properties(void)
{
	return found.identifier && found.next && found.read_string && found.read_pair && found.read_byte && found.read_int32
		&& found.read_binary;
}

static void add_value(struct buffer *section, const void *value, size_t size)
{
	const uint8_t prefix[] = {(uint8_t)(size >> 8), (uint8_t)size};
	buffer_add(section, prefix, sizeof prefix);
	buffer_add(section, value, size);
}

/* 2.1 gives no text for an empty one. */
static void add_text(struct buffer *section, const char *text)
{
	add_value(section, text ? text : "", text ? strlen(text) : 0);
}

static void read_user(const mosquitto_property *property, struct buffer *section)
{
	char *name = NULL, *value = NULL;
	if (found.read_pair(property, PROPERTY_USER, &name, &value, false)) {
		buffer_u8(section, PROPERTY_USER);
		add_text(section, name);
		add_text(section, value);
	}
	free(name);
	free(value);
}

static void read_text(const mosquitto_property *property, enum property_id id, struct buffer *section)
{
	char *value = NULL;
	/* Mosquitto 2.0 does not look whether a response topic has wildcards, which make a section unsound. */
	if (found.read_string(property, (int)id, &value, false)
		&& (id != PROPERTY_RESPONSE_TOPIC || (value && text_is_topic(bytes_of(value))))) {
		buffer_u8(section, (uint8_t)id);
		add_text(section, value);
	}
	free(value);
}

static void read_correlation(const mosquitto_property *property, struct buffer *section)
{
	void *value = NULL;
	uint16_t size = 0;
	if (found.read_binary(property, PROPERTY_CORRELATION_DATA, &value, &size, false)) {
		buffer_u8(section, PROPERTY_CORRELATION_DATA);
		add_value(section, value ? value : "", value ? size : 0);
	}
	free(value);
}

static void read_one(const mosquitto_property *property, struct buffer *section)
{
	int id = found.identifier(property);
	uint32_t number;
	uint8_t byte;
	switch (id) {
	case PROPERTY_USER:
		read_user(property, section);
		break;
	case PROPERTY_CONTENT_TYPE:
	case PROPERTY_RESPONSE_TOPIC:
		read_text(property, (enum property_id)id, section);
		break;
	case PROPERTY_CORRELATION_DATA:
		read_correlation(property, section);
		break;
	case PROPERTY_PAYLOAD_FORMAT:
		if (found.read_byte(property, id, &byte, false)) {
			buffer_u8(section, PROPERTY_PAYLOAD_FORMAT);
			buffer_u8(section, byte);
		}
		break;
	case PROPERTY_EXPIRY:
		if (found.read_int32(property, id, &number, false)) {
			const uint8_t bytes[] = {PROPERTY_EXPIRY, (uint8_t)(number >> 24), (uint8_t)(number >> 16),
				(uint8_t)(number >> 8), (uint8_t)number};
			buffer_add(section, bytes, sizeof bytes);
		}
		break;
	default:
		break;
	}
}

void broker_read_properties(const mosquitto_property *properties, struct buffer *section)
{
	if (!broker_reads_properties())
		return;
	for (const mosquitto_property *at = properties; at; at = found.next(at))
		read_one(at, section);
}

static int add_text_property(const struct property *property, mosquitto_property **list)
{
	char *value = strndup(property->value.data, property->value.size);
	char *name = property->id == PROPERTY_USER ? strndup(property->name.data, property->name.size) : NULL;
	int result = MOSQ_ERR_NOMEM;
	if (value && property->id != PROPERTY_USER)
		result = mosquitto_property_add_string(list, (int)property->id, value);
	else if (value && name)
		result = mosquitto_property_add_string_pair(list, PROPERTY_USER, name, value);
	free(value);
	free(name);
	return result;
}

static int add_property(const struct property *property, mosquitto_property **list)
{
	switch (property->id) {
	case PROPERTY_PAYLOAD_FORMAT:
		return mosquitto_property_add_byte(list, PROPERTY_PAYLOAD_FORMAT, (uint8_t)property->number);
	case PROPERTY_EXPIRY:
		return mosquitto_property_add_int32(list, PROPERTY_EXPIRY, property->number);
	case PROPERTY_CORRELATION_DATA:
		return mosquitto_property_add_binary(list, PROPERTY_CORRELATION_DATA, property->value.data,
			(uint16_t)property->value.size);
	case PROPERTY_CONTENT_TYPE:
	case PROPERTY_RESPONSE_TOPIC:
	case PROPERTY_USER:
		break;
	}
	return add_text_property(property, list);
}

bool broker_make_properties(struct bytes section, mosquitto_property **properties)
{
	struct property property;
	*properties = NULL;
	while (property_next(&section, &property))
		if (add_property(&property, properties) != MOSQ_ERR_SUCCESS) {
			mosquitto_property_free_all(properties);
			return false;
		}
	return true;
}

int broker_gone_2_0(struct mosquitto *client)
{
	if (!found.state)
		return -1;
	switch (found.state(client)) {
	case STATE_DISCONNECTING:
	case STATE_DISCONNECT_WITH_WILL:
		return GONE_CLEAN;
	case STATE_TAKEN_OVER:
		return GONE_TAKEN_OVER;
	default:
		return GONE_CONNECTION_LOST;
	}
}

enum broker_stage broker_stage_of(struct mosquitto *client)
{
	if (!found.state)
		return STAGE_UNKNOWN;
	switch (found.state(client)) {
	case STATE_NEW:
	case STATE_AUTHENTICATING:
	case STATE_DELAYED_AUTH:
		/* A session that Mosquitto has read from its file is new too, and has no address. */
		return mosquitto_client_address(client) ? STAGE_CONNECTING : STAGE_AWAY;
	case STATE_ACTIVE:
	case STATE_REAUTHENTICATING:
		return STAGE_CONNECTED;
	default:
		return STAGE_AWAY;
	}
}

bool broker_is_from_unix_socket(const struct mosquitto *client)
{
	/* 2.0 knows no PROXY headers. The listener of a Unix socket has the port 0. */
	return mosquitto_client_protocol(client) == mp_mqtt && (!found.port || found.port(client) == 0);
}

const char *broker_version(bool is_2_1)
{
	static char text[32];
	int major, minor, revision;
	if (!found.version)
		return is_2_1 ? "2.1" : "2.0";
	found.version(&major, &minor, &revision);
	snprintf(text, sizeof text, "%d.%d.%d", major, minor, revision);
	return text;
}

bool broker_send(const char *client_id, const char *topic, struct bytes payload, int qos, mosquitto_property *properties)
{
	/* An empty payload has no address that Mosquitto's copy may read from. */
	const void *data = payload.size ? payload.data : "";
	if (payload.size <= INT_MAX
		&& mosquitto_broker_publish_copy(client_id, topic, (int)payload.size, data, qos, false, properties)
			== MOSQ_ERR_SUCCESS)
		return true;
	mosquitto_property_free_all(&properties);
	return false;
}

static void log_line(int level, const char *format, va_list arguments)
{
	char text[2048];
	vsnprintf(text, sizeof text, format, arguments);
	mosquitto_log_printf(level, "mq2mqtt hook: %s", text);
}

void log_error(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	log_line(MOSQ_LOG_ERR, format, arguments);
	va_end(arguments);
}

void log_notice(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	log_line(MOSQ_LOG_NOTICE, format, arguments);
	va_end(arguments);
}

void log_warning(const char *text)
{
	mosquitto_log_printf(MOSQ_LOG_WARNING, "mq2mqtt hook: %s", text);
}
