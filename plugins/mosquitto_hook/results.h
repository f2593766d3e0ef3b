/* What becomes of the sidecar's batches.
 *
 * A message that the hook injects is routed when Mosquitto comes to it, and each receiver gets an ACL check then. The
 * answer is queued behind a batch's messages; when Mosquitto asks whether the sidecar may read it, everything before it
 * has been routed, and the answer is filled in. */
#ifndef MQ2MQTT_RESULTS_H
#define MQ2MQTT_RESULTS_H

#include "buffer.h"
#include "control.h"

struct expected; /* a batch whose answer is on its way */

struct results {
	struct expected *first, *last;
	size_t count;
};

/* Begins a batch: NULL without memory. */
struct expected *results_begin(struct results *results, uint32_t number, uint16_t count);

void results_set(struct expected *expected, size_t operation, enum operation_result result);

/* `operation` was queued for the subscribers of `topic`; false without memory. */
bool results_wait(struct expected *expected, size_t operation, struct bytes topic);

/* A message for `topic` is handed to a subscriber. */
void results_routed(struct results *results, const char *topic);

/* Bytes of the answer to the batch: those known now. */
struct bytes results_bytes(const struct expected *expected);

/* Mosquitto hands the answer out: puts what became of the batch into it. */
void results_fill(struct results *results, void *answer, size_t size);

/* Forgets the last batch, whose answer went another way. */
void results_forget(struct results *results, struct expected *expected);

void results_clear(struct results *results);

#endif
