#include "crc32.h"

#include <stdbool.h>

#include "bytes.h"

#define SLICES 8

/* table[s][b]: the CRC of byte b followed by s zero bytes. Eight bytes a step: a frame is read in one go. */
static uint32_t table[SLICES][256];

static void fill_table(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t crc = byte;
		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
		table[0][byte] = crc;
	}
	for (int slice = 1; slice < SLICES; slice++)
		for (uint32_t byte = 0; byte < 256; byte++) {
			uint32_t before = table[slice - 1][byte];
			table[slice][byte] = before >> 8 ^ table[0][before & 0xFF];
		}
}

uint32_t crc32_of(uint32_t crc, const void *data, size_t size)
{
	static bool ready;
	if (!ready) {
		fill_table();
		ready = true;
	}
	const uint8_t *at = data;
	crc = ~crc;
	for (; size >= SLICES; at += SLICES, size -= SLICES) {
		uint32_t low = crc ^ get_u32(at), high = get_u32(at + 4);
		crc = table[7][low & 0xFF] ^ table[6][low >> 8 & 0xFF] ^ table[5][low >> 16 & 0xFF] ^ table[4][low >> 24]
			^ table[3][high & 0xFF] ^ table[2][high >> 8 & 0xFF] ^ table[1][high >> 16 & 0xFF] ^ table[0][high >> 24];
	}
	while (size--)
		crc = crc >> 8 ^ table[0][(crc ^ *at++) & 0xFF];
	return ~crc;
}
