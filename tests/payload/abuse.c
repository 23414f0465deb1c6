/*
 * The ill-behaved modes. Whatever the guest does here, the VMM must live, and the device
 * must work again after a reset: both modes end with ordinary requests (as mode=blk).
 */
#include "modes.h"

#include "machine.h"
#include "virtio.h"

/* ---------------------------------------------------------------- abuse
 * Every offset of the register page in every width, odd ones included, is read and then
 * written with absurd values; the configuration only on request (bytes=0x200), since a back
 * end may take offence at what is written there. DRIVER_OK is left out of the writes to Status: a started
 * device with garbage for rings is the subject of badring. */

static const uint32_t absurd[] = { 0, 0xffffffff, 0x80000000, 1, 0xffff, 0x7fffff01 };

void abuse(void)
{
	uint32_t mmio = number_arg("mmio", 0), end = number_arg("bytes", REG_CONFIG);
	uint32_t reads = 0, writes = 0, sum = 0;

	device_open();
	irq_off();
	device_identify();
	for (uint32_t at = 0; at < end; at++) {
		sum += load8(mmio + at);
		sum += load16(mmio + at);
		sum += load32(mmio + at);
		reads += 3;
	}
	for (uint32_t v = 0; v < sizeof absurd / sizeof absurd[0]; v++) {
		for (uint32_t at = 0; at < end; at++) {
			uint32_t value = absurd[v];

			if (at + 4 > REG_STATUS && at < REG_STATUS + 4)
				value &= ~(uint32_t)0x04040404;
			store8(mmio + at, (uint8_t)value);
			store16(mmio + at, (uint16_t)value);
			store32(mmio + at, value);
			writes += 3;
		}
	}
	put_field("reads", reads);
	put_field("writes", writes);
	put_hex_field("sum", sum);
	put_hex_field("status", reg(REG_STATUS));
	put_char('\n');
	device_reset();
	blk();
}

/* ---------------------------------------------------------------- badring
 * Starts the device with one thing wrong in queue 0 at a time, and says what came of it. */

struct bad_case {
	const char *name;
	uint32_t size, low[3], high[3];			/* 0: leave as it should be */
	uint32_t ready;
};

enum { OUTSIDE = 0xe0000000 };				/* in the hole below 4 GiB: no RAM */

static const struct bad_case cases[] = {
	{ "size-0", 0xdead0000, { 0 }, { 0 }, 1 },
	{ "size-3", 3, { 0 }, { 0 }, 1 },
	{ "size-huge", 0x10000, { 0 }, { 0 }, 1 },
	{ "desc-outside", 0, { OUTSIDE, 0, 0 }, { 0 }, 1 },
	{ "driver-outside", 0, { 0, OUTSIDE, 0 }, { 0 }, 1 },
	{ "device-outside", 0, { 0, 0, OUTSIDE }, { 0 }, 1 },
	{ "desc-high", 0, { 0 }, { 0xffffffff, 0, 0 }, 1 },
	{ "driver-high", 0, { 0 }, { 0, 0xffffffff, 0 }, 1 },
	{ "device-high", 0, { 0 }, { 0, 0, 0xffffffff }, 1 },
	{ "desc-wraps", 0, { 0xfffffff0, 0, 0 }, { 0xffffffff, 0, 0 }, 1 },
	{ "desc-odd", 0, { 1, 0, 0 }, { 0 }, 1 },
	{ "driver-odd", 0, { 0, 1, 0 }, { 0 }, 1 },
	{ "device-odd", 0, { 0, 0, 1 }, { 0 }, 1 },
	{ "ready-2", 0, { 0 }, { 0 }, 2 },
	{ "not-ready", 0, { 0 }, { 0 }, 0 },
};

static uint32_t ring_address(const struct bad_case *c, uint32_t part, uint32_t proper)
{
	if (c->low[part] == 1)
		return proper + 1;			/* misaligned */
	return c->low[part] ? c->low[part] : proper;
}

static void try_case(const struct bad_case *c)
{
	volatile struct queue *queue = &queues[0];

	device_negotiate();
	set_reg(REG_QUEUE_SEL, 0);
	queue->avail.flags = 0;
	queue->avail.index = 0;
	queue->used.flags = 0;
	queue->used.index = 0;
	set_reg(REG_QUEUE_NUM, c->size == 0xdead0000 ? 0 : c->size ? c->size : 8);
	set_reg(REG_QUEUE_DESC_LOW, ring_address(c, 0, (uint32_t)queue->descriptors));
	set_reg(REG_QUEUE_DESC_HIGH, c->high[0]);
	set_reg(REG_QUEUE_DRIVER_LOW, ring_address(c, 1, (uint32_t)&queue->avail));
	set_reg(REG_QUEUE_DRIVER_HIGH, c->high[1]);
	set_reg(REG_QUEUE_DEVICE_LOW, ring_address(c, 2, (uint32_t)&queue->used));
	set_reg(REG_QUEUE_DEVICE_HIGH, c->high[2]);
	if (c->ready)
		set_reg(REG_QUEUE_READY, c->ready);
	set_reg(REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
	put("case=");
	put(c->name);
	put_char(' ');
	put_field("ready", reg(REG_QUEUE_READY));
	put("status=");
	put_hex(reg(REG_STATUS));
	put_char('\n');
	set_reg(REG_QUEUE_NOTIFY, 0);
	set_reg(REG_QUEUE_NOTIFY, 0xffff);
}

void badring(void)
{
	const char *cursor = command_line;
	int all = !next_arg(&cursor, "case");

	device_open();
	device_identify();
	for (uint32_t n = 0; n < sizeof cases / sizeof cases[0]; n++)
		if (all || arg_is("case", cases[n].name))
			try_case(&cases[n]);
	device_reset();
	blk();
}
