#include "segment.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "crc32.h"

#define VERSION 1u
#define MAGIC "mq2lane\n"
#define MAGIC_BYTES 8u
#define NAME_DIGITS 20
#define SUFFIX ".seg"

enum { AT_VERSION = 8, AT_HEADER_BYTES = 10, AT_RESERVED = 12, AT_BASE = 16, AT_CREATED = 24, AT_PREVIOUS_BASE = 32,
	AT_PREVIOUS_END = 40, AT_PREVIOUS_BYTES = 48, AT_BOOT_ID = 56, AT_RESERVED_2 = 72, AT_CRC = 76 };

void segment_header_pack(const struct segment_header *header, uint8_t file[SEGMENT_HEADER_BYTES])
{
	memcpy(file, MAGIC, MAGIC_BYTES);
	put_u16(file + AT_VERSION, VERSION);
	put_u16(file + AT_HEADER_BYTES, SEGMENT_HEADER_BYTES);
	put_u32(file + AT_RESERVED, 0);
	put_u64(file + AT_BASE, header->base);
	put_u64(file + AT_CREATED, header->created_us);
	put_u64(file + AT_PREVIOUS_BASE, header->previous_base);
	put_u64(file + AT_PREVIOUS_END, header->previous_end);
	put_u64(file + AT_PREVIOUS_BYTES, header->previous_bytes);
	memcpy(file + AT_BOOT_ID, header->boot_id, BOOT_ID_BYTES);
	put_u32(file + AT_RESERVED_2, 0);
	put_u32(file + AT_CRC, crc32_of(0, file, AT_CRC));
}

const char *segment_header_unpack(struct segment_header *header, const uint8_t *file, size_t size)
{
	if (size < SEGMENT_HEADER_BYTES || memcmp(file, MAGIC, MAGIC_BYTES) != 0)
		return "no segment of a lane; move the file away";
	if (get_u16(file + AT_VERSION) != VERSION || get_u16(file + AT_HEADER_BYTES) != SEGMENT_HEADER_BYTES)
		return "unknown segment version; drain it with the program that wrote it";
	if (get_u32(file + AT_CRC) != crc32_of(0, file, AT_CRC))
		return "damaged segment header (CRC mismatch); restore or move the file";
	header->base = get_u64(file + AT_BASE);
	header->created_us = get_u64(file + AT_CREATED);
	header->previous_base = get_u64(file + AT_PREVIOUS_BASE);
	header->previous_end = get_u64(file + AT_PREVIOUS_END);
	header->previous_bytes = get_u64(file + AT_PREVIOUS_BYTES);
	memcpy(header->boot_id, file + AT_BOOT_ID, BOOT_ID_BYTES);
	return NULL;
}

void segment_name(uint64_t base, char name[SEGMENT_NAME_BYTES])
{
	snprintf(name, SEGMENT_NAME_BYTES, "%0*" PRIu64 SUFFIX, NAME_DIGITS, base);
}

bool segment_base(const char *name, uint64_t *base)
{
	if (strspn(name, "0123456789") != NAME_DIGITS || strcmp(name + NAME_DIGITS, SUFFIX) != 0)
		return false;
	errno = 0;
	*base = strtoull(name, NULL, 10);
	return errno == 0;
}
