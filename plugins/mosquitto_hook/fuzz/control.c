/* Any bytes as a batch: refused, or every operation lies within them. */
#include <stdlib.h>

#include "control.h"
#include "text.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(struct bytes field, const uint8_t *data, size_t size)
{
	const uint8_t *at = field.data;
	if (at < data || (size_t)(at - data) > size || field.size > size - (size_t)(at - data))
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct batch batch;
	size_t position;
	if (control_parse((struct bytes){data, size}, &batch, &position)) {
		if (position > size)
			abort();
		return 0;
	}
	unsigned count = batch.count;
	struct operation operation;
	while (control_next(&batch, &operation)) {
		count--;
		check(operation.client_id, data, size);
		check(operation.topic, data, size);
		check(operation.properties, data, size);
		check(operation.payload, data, size);
		if ((operation.code == OP_DELIVER || operation.code == OP_PUBLISH) && !text_is_topic(operation.topic))
			abort();
	}
	if (count != 0 || batch.operations.size != 0)
		abort();
	return 0;
}
