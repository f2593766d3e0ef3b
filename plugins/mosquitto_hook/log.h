/* Lines in Mosquitto's log, each with the hook's name before it. */
#ifndef MQ2MQTT_LOG_H
#define MQ2MQTT_LOG_H

__attribute__((format(printf, 1, 2))) void log_error(const char *format, ...);
__attribute__((format(printf, 1, 2))) void log_notice(const char *format, ...);

/* As a lane wants it. */
void log_warning(const char *text);

#endif
