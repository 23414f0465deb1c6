/*
 * Many requests at once, on one device or several: README.md, modes deep and drive. A driver of its own, with one split
 * queue a device and everything in its slots, so that an answer that is lost, doubled or of another request shows.
 */
#include "modes.h"

#include "machine.h"
#include "virtio.h"

#define NOINIT __attribute__((section(".noinit")))

enum { DEVICES = 16, DEPTH = 32, LENGTH = 128, PARTS = 3, SECTOR = 512, LARGEST = 4096 };
enum { BLK_IN = 0, BLK_OUT = 1, NEVER = 0xff };

/* One request at a time: a write to one of its places, then a read of the same. */
struct slot {
	struct { uint32_t type, reserved; uint64_t sector; } header;
	volatile uint8_t status;
	uint8_t busy, reading;
	uint32_t round;
};

struct device {
	uint32_t base, gsi;
	uint16_t available, taken;
	uint32_t wanted, begun, done, touched;
	uint32_t quiet_since, touched_at;	/* the watchdog's age at its last answer, at its last touch */
	const char *fault;
};

NOINIT static struct queue rings[DEVICES];
NOINIT static __attribute__((aligned(4096))) uint8_t buffers[DEVICES][DEPTH][LARGEST];
NOINIT static struct slot slots[DEVICES][DEPTH];
static struct device devices[DEVICES];
static uint32_t device_count, depth, size, places;
static volatile uint32_t config_changes;

static uint32_t get(const struct device *d, uint32_t offset) { return load32(d->base + offset); }
static void set(const struct device *d, uint32_t offset, uint32_t value) { store32(d->base + offset, value); }
static uint32_t number_of(const struct device *d) { return (uint32_t)(d - devices); }

/* As Linux's vm_interrupt(), for all: they share a vector. */
static void on_interrupt(void)
{
	for (uint32_t n = 0; n < device_count; n++) {
		uint32_t status = get(&devices[n], REG_INTERRUPT_STATUS);

		set(&devices[n], REG_INTERRUPT_ACK, status);
		if (status & INTERRUPT_CONFIG)
			config_changes++;
	}
}

/* The devices by `mmio=` and `gsi=`, which may be there several times. */
static void find_devices(void)
{
	const char *at_base = command_line, *at_gsi = command_line, *base, *gsi;

	while (device_count < DEVICES && (base = next_arg(&at_base, "mmio")) && (gsi = next_arg(&at_gsi, "gsi"))) {
		struct device *d = &devices[device_count++];

		d->base = parse_number(&base);
		d->gsi = parse_number(&gsi);
	}
	if (!device_count)
		fail("no mmio= and gsi= on the command line");
	depth = number_arg("depth", 8);
	size = number_arg("size", 512) & ~(uint32_t)(SECTOR - 1);
	places = number_arg("places", 2);
	if (!depth || depth > DEPTH || !size || size > LARGEST || !places)
		fail("depth= must be 1 to 32, size= 512 to 4096");
}

/* The status that it ends with is that of the device; nothing here waits for anything. */
static uint32_t bring_up(struct device *d)
{
	volatile struct queue *ring = &rings[number_of(d)];
	uint32_t status = STATUS_ACKNOWLEDGE | STATUS_DRIVER;

	set(d, REG_STATUS, 0);
	set(d, REG_STATUS, STATUS_ACKNOWLEDGE);
	set(d, REG_STATUS, status);
	set(d, REG_DRIVER_FEATURES_SEL, 0);
	set(d, REG_DRIVER_FEATURES, number_arg("accept", 0));
	set(d, REG_DRIVER_FEATURES_SEL, 1);
	set(d, REG_DRIVER_FEATURES, 1);			/* bit 32, VERSION_1 */
	status |= STATUS_FEATURES_OK;
	set(d, REG_STATUS, status);
	if (!(get(d, REG_STATUS) & STATUS_FEATURES_OK))
		return get(d, REG_STATUS);
	ring->avail.flags = ring->avail.index = ring->used.flags = ring->used.index = 0;
	d->available = d->taken = 0;
	for (uint32_t n = 0; n < depth; n++)
		slots[number_of(d)][n].busy = slots[number_of(d)][n].reading = 0;
	set(d, REG_QUEUE_SEL, 0);
	set(d, REG_QUEUE_NUM, LENGTH);
	set(d, REG_QUEUE_DESC_LOW, (uint32_t)ring->descriptors);
	set(d, REG_QUEUE_DESC_HIGH, 0);
	set(d, REG_QUEUE_DRIVER_LOW, (uint32_t)&ring->avail);
	set(d, REG_QUEUE_DRIVER_HIGH, 0);
	set(d, REG_QUEUE_DEVICE_LOW, (uint32_t)&ring->used);
	set(d, REG_QUEUE_DEVICE_HIGH, 0);
	set(d, REG_QUEUE_READY, 1);
	set(d, REG_STATUS, status | STATUS_DRIVER_OK);
	return get(d, REG_STATUS);
}

/* What a place holds after a round: no two rounds, slots or devices agree. */
static uint32_t pattern(const struct device *d, uint32_t slot, uint32_t round)
{
	return (round * 0x85ebca6b + 0x5bd1e995) ^ (slot << 8 | number_of(d)) * 0x01000193;
}

static void describe(volatile struct descriptor *d, const volatile void *address, uint32_t length, uint16_t flags, uint16_t next)
{
	d->address = (uint32_t)address;
	d->length = length;
	d->flags = flags;
	d->next = next;
}

static void submit(struct device *d, uint32_t n)
{
	volatile struct queue *ring = &rings[number_of(d)];
	struct slot *slot = &slots[number_of(d)][n];
	uint32_t *data = (uint32_t *)buffers[number_of(d)][n], head = n * PARTS;

	if (!slot->reading)
		slot->round++;
	for (uint32_t i = 0, value = pattern(d, n, slot->round); i < size / 4; i++, value += 0x9e3779b9)
		((volatile uint32_t *)data)[i] = slot->reading ? 0xdeadbeef : value;
	slot->header.type = slot->reading ? BLK_IN : BLK_OUT;
	slot->header.reserved = 0;
	slot->header.sector = (uint64_t)((n * places + slot->round % places) * (size / SECTOR));
	slot->status = NEVER;
	slot->busy = 1;
	describe(&ring->descriptors[head], &slot->header, sizeof slot->header, DESC_NEXT, (uint16_t)(head + 1));
	describe(&ring->descriptors[head + 1], data, size, slot->reading ? DESC_NEXT | DESC_WRITE : DESC_NEXT, (uint16_t)(head + 2));
	describe(&ring->descriptors[head + 2], &slot->status, 1, DESC_WRITE, 0);
	ring->avail.ring[d->available % LENGTH] = (uint16_t)head;
	__asm__ volatile("" : : : "memory");
	ring->avail.index = ++d->available;
	d->begun++;
}

static const char *check(const struct device *d, uint32_t n, uint32_t length)
{
	const struct slot *slot = &slots[number_of(d)][n];
	volatile uint32_t *data = (volatile uint32_t *)buffers[number_of(d)][n];

	if (slot->status)
		return slot->status == NEVER ? "a request was given back undone" : "a request failed";
	/* QEMU's vhost-user-blk counts what it took as well, which no driver looks at. */
	if (length != size + 1 && (slot->reading || length != 1))
		return "a used length is wrong";
	for (uint32_t i = 0, value = pattern(d, n, slot->round); slot->reading && i < size / 4; i++, value += 0x9e3779b9)
		if (data[i] != value)
			return "a place does not hold what was written last";
	return 0;
}

/* Takes what was used; true when there was something. */
static int take(struct device *d)
{
	volatile struct queue *ring = &rings[number_of(d)];
	int any = 0;

	while (!d->fault && ring->used.index != d->taken) {
		uint32_t head = ring->used.ring[d->taken % LENGTH].id, n = head / PARTS;

		__asm__ volatile("" : : : "memory");
		if (head % PARTS || n >= depth || !slots[number_of(d)][n].busy) {
			d->fault = "a request was given back twice, or was none";
			break;
		}
		d->fault = check(d, n, ring->used.ring[d->taken % LENGTH].length);
		d->taken++;
		d->done++;
		slots[number_of(d)][n].busy = 0;
		slots[number_of(d)][n].reading ^= 1;
		any = 1;
	}
	return any;
}

/* A write to the configuration, §5.2.4 `writeback`: the device has to ask its backend. */
static void touch(struct device *d, uint32_t value) { store8(d->base + REG_CONFIG + 32, (uint8_t)(value & 1)); }

/* A 'q' on the serial port ends the load: what was begun is finished, nothing new begins. */
enum { UART_IER = COM1 + 1, UART_IIR = COM1 + 2, UART_MCR = COM1 + 4, UART_LSR = COM1 + 5, LSR_DATA_READY = 1 };

static volatile int enough;

static void on_key(void)
{
	(void)in8(UART_IIR);
	while (in8(UART_LSR) & LSR_DATA_READY)
		enough |= in8(COM1) == 'q';
}

static int finished(const struct device *d) { return d->fault || d->done == d->wanted; }

/* One look at a device: what was used, what can be asked, whether it is well. */
static int work(struct device *d, uint32_t patience, uint32_t touches)
{
	int any = take(d), asked = 0;

	for (uint32_t n = 0; !d->fault && n < depth && d->begun < d->wanted; n++) {
		if (!slots[number_of(d)][n].busy) {
			submit(d, n);
			asked = 1;
		}
	}
	if (asked)
		set(d, REG_QUEUE_NOTIFY, 0);
	if (touches && (d->done / touches > d->touched || watchdog_age() != d->touched_at)) {
		d->touched_at = watchdog_age();
		touch(d, ++d->touched);
	}
	if (any || asked)
		d->quiet_since = watchdog_age();
	if (!d->fault && get(d, REG_STATUS) & STATUS_NEEDS_RESET)
		d->fault = "the device needs a reset";
	if (!d->fault && watchdog_age() - d->quiet_since > patience)
		d->fault = "no answer to a request";
	return any || asked;
}

static void report(const struct device *d)
{
	put_field("device", number_of(d));
	put_field("done", d->done);
	put(d->fault ? "fault: " : "well");
	put(d->fault ? d->fault : "");
	put_char('\n');
}

void deep(void)
{
	uint32_t patience = number_arg("timeout", 20), touches = number_arg("touch", 0), open, total = 0, faults = 0;

	find_devices();
	device_handler = on_interrupt;
	serial_handler = on_key;
	watchdog_start(1);
	ioapic_route(number_arg("serial-gsi", 4), VECTOR_SERIAL);
	out8(UART_MCR, 0x0b);
	out8(UART_IER, 1);
	for (uint32_t n = 0; n < device_count; n++) {
		struct device *d = &devices[n];

		ioapic_route(d->gsi, VECTOR_DEVICE);
		if (get(d, REG_MAGIC) != 0x74726976 || get(d, REG_DEVICE_ID) != DEVICE_BLOCK)
			fail("not a block device");
		d->wanted = number_arg("n", 1000);
		if (!(bring_up(d) & STATUS_DRIVER_OK))
			d->fault = "it does not start";
		put_field("signature", load32(d->base + REG_CONFIG));
	}
	put("\nrunning\n");
	watchdog_pet();
	do {
		int any = 0;

		open = 0;
		for (uint32_t n = 0; n < device_count; n++) {
			if (finished(&devices[n]))
				continue;
			if (enough)
				devices[n].wanted = devices[n].begun;
			any |= work(&devices[n], patience, touches);
			if (finished(&devices[n]))
				report(&devices[n]);
			else
				open++;
		}
		irq_off();
		for (uint32_t n = 0; n < device_count; n++)
			any |= !finished(&devices[n]) && *(volatile uint16_t *)&rings[n].used.index != devices[n].taken;
		if (open && !any)
			irq_on_and_halt();
		else
			irq_on();
	} while (open);
	irq_off();
	for (uint32_t n = 0; n < device_count; n++) {
		total += devices[n].done;
		faults += !!devices[n].fault;
	}
	put_field("requests", total);
	put_field("config-changes", config_changes);
	put("errors=");
	put_dec(faults);
	put_char('\n');
}

/* ---------------------------------------------------------------- drive
 * One key, one step, one line: whoever types measures how long it takes. A small letter is for the first device, a
 * capital one for all of them, one after the other. */

static const char *one_request(struct device *d, uint32_t patience)
{
	watchdog_pet();
	d->fault = 0;
	submit(d, 0);
	set(d, REG_QUEUE_NOTIFY, 0);
	while (!take(d) && !d->fault) {
		if (get(d, REG_STATUS) & STATUS_NEEDS_RESET)
			return "needs-reset";
		if (watchdog_age() > patience)
			return "no-answer";
		__asm__ volatile("pause" : : : "memory");
	}
	return d->fault ? d->fault : "answered";
}

void drive(void)
{
	uint32_t patience = number_arg("timeout", 1), touches = 0;
	struct device *d = devices;
	char key;

	find_devices();
	watchdog_start(0);
	put("ready\n");
	do {
		const char *outcome = "done";

		while (!(in8(UART_LSR) & LSR_DATA_READY))
			__asm__ volatile("pause" : : : "memory");
		key = (char)in8(COM1);
		switch (key) {
		case 'b': outcome = one_request(d, patience); break;
		case 'c': touch(d, ++touches); break;
		case 'k': set(d, REG_QUEUE_NOTIFY, 0); break;
		case 'r': set(d, REG_STATUS, 0); break;
		case 's': bring_up(d); break;
		case 'C':
			touches++;
			for (uint32_t n = 0; n < device_count; n++)
				touch(&devices[n], touches);
			break;
		case 'R':
			for (uint32_t n = 0; n < device_count; n++)
				set(&devices[n], REG_STATUS, 0);
			break;
		case 'S':
			for (uint32_t n = 0; n < device_count; n++)
				bring_up(&devices[n]);
			break;
		case 'x': reset_machine(); break;
		case 'q': break;
		default: outcome = "unknown";
		}
		put("key ");
		put_char(key);
		put_char(' ');
		put_hex_field("status", get(d, REG_STATUS));
		put(outcome);
		put_char('\n');
	} while (key != 'q');
}
