/* The driver, of virtio-mmio registers; see virtio.h. */
#include "virtio.h"

#include "machine.h"
#include "virtio_pci.h"

#define NOINIT __attribute__((section(".noinit")))

NOINIT struct queue queues[MAX_QUEUES];
uint32_t queue_count;

volatile struct counts counts;

static uint32_t base;
static int with_interrupts;
static uint16_t queue_size, last_used[MAX_QUEUES];
static uint32_t patience;			/* seconds to wait for an answer */
static uint32_t reported;			/* configuration changes already looked at */

/* The device's number on the PCI bus; 0: it is a virtio-mmio one. */
static uint32_t on_pci;

uint32_t reg(uint32_t offset) { return on_pci ? pci_reg(offset) : load32(base + offset); }

void set_reg(uint32_t offset, uint32_t value)
{
	if (on_pci)
		pci_set_reg(offset, value);
	else
		store32(base + offset, value);
}

static int answered(uint32_t queue) { return *(volatile uint16_t *)&queues[queue].used.index != last_used[queue]; }

/* Exactly what Linux's vm_interrupt() does: read, acknowledge what was read, look. */
static void on_interrupt(void)
{
	uint32_t status = reg(REG_INTERRUPT_STATUS);

	set_reg(REG_INTERRUPT_ACK, status);
	if (status & INTERRUPT_CONFIG)
		counts.config_changes++;
	if (status & INTERRUPT_USED)
		counts.interrupts++;
}

void device_open(void)
{
	base = number_arg("mmio", 0);
	on_pci = number_arg("pci", 0);
	if (!base && !on_pci)
		fail("no mmio= or pci= on the command line");
	if (on_pci)
		pci_open(on_pci);
	patience = number_arg("timeout", 20);
	with_interrupts = !arg_is("irq", "off");
	if (with_interrupts) {
		device_handler = on_interrupt;
		if (!on_pci)
			ioapic_route(number_arg("gsi", 5), VECTOR_DEVICE);
	}
	watchdog_start(with_interrupts);
	if (with_interrupts)
		irq_on();
}

uint32_t device_identify(void)
{
	if (reg(REG_MAGIC) != 0x74726976)
		fail("no virtio-mmio device here");
	if (reg(REG_VERSION) != 2)
		fail("not a version 2 virtio-mmio device");
	return reg(REG_DEVICE_ID);
}

uint64_t device_features(void)
{
	uint32_t low;

	set_reg(REG_DEVICE_FEATURES_SEL, 0);
	low = reg(REG_DEVICE_FEATURES);
	set_reg(REG_DEVICE_FEATURES_SEL, 1);
	return (uint64_t)reg(REG_DEVICE_FEATURES) << 32 | low;
}

static void fail_with_status(const char *what, uint32_t status)
{
	irq_off();
	put_field("requests", counts.requests);
	put_field("interrupts", counts.interrupts);
	put("virtio-status=");
	put_hex(status);
	put_char('\n');
	fail(what);
}

void device_reset(void)
{
	set_reg(REG_STATUS, 0);
	watchdog_pet();
	if (with_interrupts)
		irq_on();			/* the watchdog needs them */
	while (reg(REG_STATUS))
		if (watchdog_age() > patience)
			fail_with_status("the device does not reset", reg(REG_STATUS));
}

void device_negotiate(void)
{
	uint32_t status;

	device_reset();
	set_reg(REG_STATUS, STATUS_ACKNOWLEDGE);
	set_reg(REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
	if (!(device_features() >> 32 & 1))
		fail("the device does not offer VERSION_1");
	set_reg(REG_DRIVER_FEATURES_SEL, 0);
	set_reg(REG_DRIVER_FEATURES, number_arg("accept", 0));
	set_reg(REG_DRIVER_FEATURES_SEL, 1);
	set_reg(REG_DRIVER_FEATURES, 1);		/* bit 32, VERSION_1 */
	set_reg(REG_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
	status = reg(REG_STATUS);
	if (!(status & STATUS_FEATURES_OK))
		fail_with_status("the device refuses the features", status);
}

static void set_address(uint32_t low_register, const volatile void *at)
{
	set_reg(low_register, (uint32_t)at);
	set_reg(low_register + 4, 0);
}

static void set_up(uint32_t n)
{
	volatile struct queue *queue = &queues[n];
	uint32_t max;

	set_reg(REG_QUEUE_SEL, n);
	if (reg(REG_QUEUE_READY))
		fail("a queue is in use before its set-up");
	max = reg(REG_QUEUE_NUM_MAX);
	if (!max)
		fail("the device has fewer queues");
	if (queue_size > max)
		queue_size = (uint16_t)max;

	queue->avail.flags = with_interrupts ? 0 : 1;	/* NO_INTERRUPT */
	queue->avail.index = 0;
	queue->used.flags = 0;
	queue->used.index = 0;
	last_used[n] = 0;

	set_reg(REG_QUEUE_NUM, queue_size);
	set_address(REG_QUEUE_DESC_LOW, queue->descriptors);
	set_address(REG_QUEUE_DRIVER_LOW, &queue->avail);
	set_address(REG_QUEUE_DEVICE_LOW, &queue->used);
	set_reg(REG_QUEUE_READY, 1);
}

void queue_setup(void)
{
	queue_count = number_arg("queues", 1);
	if (!queue_count || queue_count > MAX_QUEUES)
		fail("queues= must be 1 to 8");
	queue_size = (uint16_t)number_arg("queue-size", 8);
	if (queue_size > MAX_QUEUE_SIZE)
		queue_size = MAX_QUEUE_SIZE;
	for (uint32_t n = 0; n < queue_count; n++)
		set_up(n);
}

void device_driver_ok(void)
{
	uint32_t status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;

	set_reg(REG_STATUS, status);
	if (reg(REG_STATUS) != status)
		fail_with_status("the device does not start", reg(REG_STATUS));
}

uint32_t device_config32(uint32_t offset) { return reg(REG_CONFIG + offset); }

uint64_t device_capacity(void)
{
	uint32_t generation, low, high;

	do {						/* §2.5.1: until the generation stands still */
		generation = reg(REG_CONFIG_GENERATION);
		low = device_config32(0);
		high = device_config32(4);
	} while (generation != reg(REG_CONFIG_GENERATION));
	return (uint64_t)high << 32 | low;
}

/* Sleeps, or spins a little, and judges whether it has lasted too long. */
static void wait_a_little(uint32_t queue, const char *complaint)
{
	if (with_interrupts) {
		irq_on_and_halt();
	} else {
		for (uint32_t spin = 0; spin < 64 && !answered(queue); spin++)
			__asm__ volatile("pause" : : : "memory");
	}
	/* A broken device says so by a configuration interrupt: no need to wait longer. */
	if (reported != counts.config_changes || !with_interrupts) {
		reported = counts.config_changes;
		if (reg(REG_STATUS) & STATUS_NEEDS_RESET)
			fail_with_status("the device needs a reset", reg(REG_STATUS));
	}
	if (watchdog_age() > patience)
		fail_with_status(complaint, reg(REG_STATUS));
}

uint32_t queue_submit_and_wait(uint32_t n)
{
	volatile struct queue *queue = &queues[n];
	uint16_t index = queue->avail.index;
	uint32_t length;

	/* Volatile keeps the compiler to this order, x86 the processor. */
	queue->avail.ring[queue_size] = last_used[n];	/* used_event, where EVENT_IDX is accepted */
	queue->avail.ring[index % queue_size] = 0;
	__asm__ volatile("" : : : "memory");
	queue->avail.index = (uint16_t)(index + 1);
	watchdog_pet();
	set_reg(REG_QUEUE_NOTIFY, n);

	for (;;) {
		irq_off();
		if (answered(n))
			break;
		wait_a_little(n, "no answer to a request");
	}
	if (with_interrupts)
		irq_on();
	__asm__ volatile("" : : : "memory");
	if (queue->used.ring[last_used[n] % queue_size].id != 0)
		fail("the used ring names a chain that was not offered");
	length = queue->used.ring[last_used[n] % queue_size].length;
	last_used[n]++;
	counts.requests++;
	return length;
}

void wait_config_change(uint32_t seen)
{
	watchdog_pet();
	for (;;) {
		irq_off();
		if (counts.config_changes != seen)
			break;
		if (!with_interrupts && reg(REG_INTERRUPT_STATUS) & INTERRUPT_CONFIG)
			on_interrupt();
		else
			wait_a_little(0, "no configuration change came");
	}
	if (with_interrupts)
		irq_on();
}
