/* What MQTT allows in a text. */
#ifndef MQ2MQTT_TEXT_H
#define MQ2MQTT_TEXT_H

#include <stdbool.h>

#include "bytes.h"

/* Whether `text` is UTF-8 without NUL and surrogates (MQTT-1.5.3-1, MQTT-1.5.3-2). */
bool text_is_mqtt(struct bytes text);

/* Whether `text` is a topic name: not empty, no wildcards (MQTT-3.3.2-2, MQTT-4.7.3-1). */
bool text_is_topic(struct bytes text);

#endif
