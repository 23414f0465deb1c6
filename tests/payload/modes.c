/* The well-behaved modes: show, blk, rng, ask, loop and resize. */
#include "modes.h"

#include "machine.h"
#include "virtio.h"

#define NOINIT __attribute__((section(".noinit")))

NOINIT static __attribute__((aligned(4096))) uint8_t data[4096];
NOINIT static struct { uint32_t type, reserved; uint64_t sector; } header;
NOINIT static volatile uint8_t request_status;

static void start(uint32_t device_id, const char *complaint)
{
	if (device_identify() != device_id)
		fail(complaint);
	device_negotiate();
	queue_setup();
	device_driver_ok();
}

static void describe(uint32_t queue, uint32_t n, uint32_t address, uint32_t length, uint16_t flags, uint16_t next)
{
	volatile struct descriptor *d = &queues[queue].descriptors[n];

	d->address = address;
	d->length = length;
	d->flags = flags;
	d->next = next;
}

/* ---------------------------------------------------------------- show */

void show(void)
{
	device_open();
	put_field("device", device_identify());
	put_hex_field("vendor", reg(REG_VENDOR_ID));
	put("features=");
	put_hex64(device_features());
	put_char(' ');
	put_hex_field("status", reg(REG_STATUS));
	put_hex_field("interrupt-status", reg(REG_INTERRUPT_STATUS));
	put_field("generation", reg(REG_CONFIG_GENERATION));
	put("\nqueues");
	for (uint32_t queue = 0; queue < 1024; queue++) {
		uint32_t max;

		set_reg(REG_QUEUE_SEL, queue);
		max = reg(REG_QUEUE_NUM_MAX);
		if (!max)
			break;
		put_char(' ');
		put_dec(max);
	}
	put("\nconfig");
	for (uint32_t n = 0; n < 64; n++) {
		put_char(' ');
		put_byte(load8(number_arg("mmio", 0) + REG_CONFIG + n));
	}
	put_char('\n');
}

/* ---------------------------------------------------------------- blk */

enum { BLK_IN = 0, BLK_OUT = 1, SECTOR = 512 };

/* One request as a chain of three descriptors: header, data, status. Virtio 1.2 §5.2.6. */
static void transfer(uint32_t type, uint32_t sector, uint32_t size)
{
	/* The queues take turns. */
	uint32_t queue = counts.requests % queue_count;
	uint32_t written, expected = (type == BLK_IN ? size : 0) + 1;

	header.type = type;
	header.reserved = 0;
	header.sector = sector;
	request_status = 0xff;
	describe(queue, 0, (uint32_t)&header, sizeof header, DESC_NEXT, 1);
	describe(queue, 1, (uint32_t)data, size, type == BLK_IN ? DESC_NEXT | DESC_WRITE : DESC_NEXT, 2);
	describe(queue, 2, (uint32_t)&request_status, 1, DESC_WRITE, 0);
	written = queue_submit_and_wait(queue);
	if (request_status != 0 || written != expected) {
		if (counts.errors++ == 0) {
			put("first-error ");
			put_field("sector", sector);
			put_field("status", request_status);
			put_field("used-length", written);
			put_char('\n');
		}
	}
}

/* What is written: dwords that begin with a mix of `seed` and rise by PATTERN_STEP. Few
 * instructions each: some KVMs emulate every one of them. */
#define PATTERN_START(seed) ((seed) * 0x85ebca6b + 0x5bd1e995)
#define PATTERN_STEP 0x9e3779b9

static void fill(uint32_t seed, uint32_t size)
{
	uint32_t value = PATTERN_START(seed);

	for (volatile uint32_t *at = (volatile uint32_t *)data; at < (volatile uint32_t *)(data + size); at++, value += PATTERN_STEP)
		*at = value;
}

static void compare(uint32_t seed, uint32_t sector, uint32_t size)
{
	uint32_t value = PATTERN_START(seed);

	for (uint32_t n = 0; n < size / 4; n++, value += PATTERN_STEP) {
		if (((volatile uint32_t *)data)[n] != value) {
			if (counts.errors++ == 0) {
				put("first-difference ");
				put_field("sector", sector);
				put_field("byte", 4 * n);
				put_char('\n');
			}
			return;
		}
	}
}

static void print_sector(uint32_t sector)
{
	put_field("sector", sector);
	for (uint32_t n = 0; n < 16; n++) {
		put_byte(data[n]);
		put_char(' ');
	}
	put_char('|');
	for (uint32_t n = 0; n < 16; n++)
		put_char(data[n] >= ' ' && data[n] < 127 ? (char)data[n] : '.');
	put("|\n");
}

static void print_counts(void)
{
	irq_off();
	put_field("requests", counts.requests);
	put_field("interrupts", counts.interrupts);
	put("errors=");
	put_dec(counts.errors);
	put_char('\n');
	if (counts.config_changes) {
		put("config-changes=");
		put_dec(counts.config_changes);
		put_char('\n');
	}
}

static void start_blk(void) { start(DEVICE_BLOCK, "not a block device"); }

/* `n` requests one after the other over `span` places from `sector` on. */
static void requests(uint32_t n, uint32_t size, uint32_t sector, uint32_t span)
{
	int writes = arg_is("op", "write"), verifies = arg_is("op", "verify");

	for (uint32_t i = 0; i < n; i++) {
		/* Verifying writes a place and reads it back: two requests of the n. */
		uint32_t place = verifies ? i / 2 : i;
		uint32_t at = sector + place % span * (size / SECTOR);

		if (writes || (verifies && i % 2 == 0)) {
			fill(at + place, size);
			transfer(BLK_OUT, at, size);
		} else {
			transfer(BLK_IN, at, size);
			if (verifies)
				compare(at + place, at, size);
		}
	}
}

/* Survives a reset of the machine where memory need not: a count in a sector of the disk. */
static void boot_count(void)
{
	uint32_t boots = number_arg("boots", 0), at = number_arg("boots-at", 0);
	uint32_t boot;

	if (!boots)
		return;
	transfer(BLK_IN, at, SECTOR);
	boot = (load32((uint32_t)data) == 0x746f6f62 /* boot */ ? load32((uint32_t)data + 4) : 0) + 1;
	put_field("boot", boot);
	put_char('\n');
	store32((uint32_t)data, 0x746f6f62);
	store32((uint32_t)data + 4, boot < boots ? boot : 0);
	transfer(BLK_OUT, at, SECTOR);
	if (counts.errors)
		fail("the boot count cannot be kept");
	if (boot < boots)
		reset_machine();
}

void blk(void)
{
	uint32_t n = number_arg("n", 1), sector = number_arg("sector", 0), rounds = number_arg("rounds", 1);
	uint32_t size = number_arg("size", 4096) & ~(uint32_t)(SECTOR - 1), span;
	uint64_t capacity;

	if (!size || size > sizeof data)
		fail("size= must be 512 to 4096");
	device_open();
	for (uint32_t round = 0; round < rounds; round++) {
		if (round)
			device_reset();
		start_blk();
	}
	capacity = device_capacity();
	put("capacity=");
	put_hex64(capacity);
	put_char('\n');
	if (capacity >> 32 || sector + size / SECTOR > (uint32_t)capacity)
		fail("sector= is beyond the disk");
	span = number_arg("span", 64);
	if (span > ((uint32_t)capacity - sector) / (size / SECTOR))
		span = ((uint32_t)capacity - sector) / (size / SECTOR);
	if (!span)
		span = 1;

	boot_count();
	if (!arg_is("op", "write") && !arg_is("op", "verify") && n) {
		transfer(BLK_IN, sector, size);
		print_sector(sector);
		n--;
	}
	requests(n, size, sector, span);
	print_counts();
}

/* ---------------------------------------------------------------- rng */

void rng(void)
{
	uint32_t n = number_arg("n", 1), length = 0;

	device_open();
	start(DEVICE_ENTROPY, "not an entropy device");
	for (uint32_t i = 0; i < n; i++) {
		describe(0, 0, (uint32_t)data, 16, DESC_WRITE, 0);
		length = queue_submit_and_wait(0);
		if (!length || length > 16)
			counts.errors++;
	}
	put("entropy");
	for (uint32_t i = 0; i < length && i < 16; i++) {
		put_char(' ');
		put_byte(data[i]);
	}
	put_char('\n');
	print_counts();
}

/* ---------------------------------------------------------------- ask
 * A device of any type: what each `request=` spells in hex is sent, and the answer printed. A digit and a colon before it
 * name another queue than 0. */

static uint32_t digit(char c)
{
	return c >= '0' && c <= '9' ? (uint32_t)(c - '0') : c >= 'a' && c <= 'f' ? (uint32_t)(c - 'a' + 10) : 16;
}

void ask(void)
{
	enum { HALF = sizeof data / 2 };
	uint32_t room = number_arg("answer", 64);
	const char *cursor = command_line, *text;

	if (room > HALF)
		fail("answer= is too large");
	device_open();
	put_field("device", device_identify());
	device_negotiate();
	queue_setup();
	device_driver_ok();
	put_char('\n');
	while ((text = next_arg(&cursor, "request"))) {
		uint32_t length = 0, queue = 0, answered;

		if (text[1] == ':') {
			queue = digit(text[0]);
			text += 2;
		}
		if (queue >= queue_count)
			fail("there is no such queue");
		for (; length < HALF && digit(text[0]) < 16 && digit(text[1]) < 16; text += 2)
			data[length++] = (uint8_t)(digit(text[0]) << 4 | digit(text[1]));
		describe(queue, 0, (uint32_t)data, length, DESC_NEXT, 1);
		describe(queue, 1, (uint32_t)data + HALF, room, DESC_WRITE, 0);
		answered = queue_submit_and_wait(queue);
		put_field("used-length", answered);
		put("answer ");
		for (uint32_t n = 0; n < room; n++)
			put_byte(data[HALF + n]);
		put_char('\n');
	}
	print_counts();
}

/* ---------------------------------------------------------------- loop
 * What a driver does per interrupt and request, with nothing behind it. `start=on` brings
 * the device to DRIVER_OK first, with an empty ring. */

void loop(void)
{
	uint32_t n = number_arg("n", 1000), status = 0;

	device_open();
	device_identify();
	if (arg_is("start", "on")) {
		device_negotiate();
		queue_setup();
		device_driver_ok();
	}
	irq_off();
	put("loop begins\n");
	for (uint32_t i = 0; i < n; i++) {
		status = reg(REG_INTERRUPT_STATUS);
		set_reg(REG_INTERRUPT_ACK, INTERRUPT_USED);
		set_reg(REG_QUEUE_NOTIFY, 0);
	}
	put_field("iterations", n);
	put("interrupt-status=");
	put_hex(status);
	put_char('\n');
}

/* ---------------------------------------------------------------- resize */

void resize(void)
{
	uint32_t n = number_arg("n", 1);

	device_open();
	start_blk();
	put("capacity=");
	put_hex64(device_capacity());
	put_char('\n');
	/* Counted before it is looked at: another change may come while this one is printed, and has a line of its own. */
	for (uint32_t seen = 0; seen < n; ) {
		wait_config_change(seen);
		seen = counts.config_changes;
		put("capacity=");
		put_hex64(device_capacity());
		put_char('\n');
	}
}
