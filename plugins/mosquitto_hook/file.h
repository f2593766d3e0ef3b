/* Whole files of a lane, read into memory: a disk that fails gives an error, where a mapping would end the broker. */
#ifndef MQ2MQTT_FILE_H
#define MQ2MQTT_FILE_H

#include <stdbool.h>

#include "bytes.h"

#define SECTOR_BYTES 512u /* what a disk writes at once or not at all */

/* Reads the file `name` of `directory`, or its first `max_bytes`; release it with `file_free`. False with errno. */
bool file_read(int directory, const char *name, size_t max_bytes, struct bytes *content);

void file_free(struct bytes content);

/* Length of a file; false with errno. */
bool file_size(int directory, const char *name, uint64_t *size);

bool all_zeros(struct bytes content);

#endif
