/* IDT, LAPIC, IOAPIC and the watchdog; see machine.h. */
#include "machine.h"

enum {
	LAPIC = 0xfee00000, LAPIC_ID = 0x20, LAPIC_TPR = 0x80, LAPIC_EOI = 0xb0, LAPIC_SVR = 0xf0,
	LAPIC_ICR = 0x300,
	LAPIC_LVT_TIMER = 0x320, LAPIC_LVT_LINT0 = 0x350,
	LAPIC_TIMER_INITIAL = 0x380, LAPIC_TIMER_CURRENT = 0x390, LAPIC_TIMER_DIVIDE = 0x3e0,
	LVT_MASKED = 1 << 16, LVT_PERIODIC = 1 << 17,
	IOAPIC = 0xfec00000, IOAPIC_SELECT = 0x00, IOAPIC_WINDOW = 0x10, IOAPIC_REDIRECTION = 0x10,
};

extern const uint32_t stub_table[36];

void (*device_handler)(void);
void (*serial_handler)(void);
static volatile uint32_t ticks;

/* ---------------------------------------------------------------- vectors */

static struct gate { uint16_t offset_low, selector, type, offset_high; } idt[VECTOR_SPURIOUS + 1];

static void set_gate(uint32_t vector, uint32_t stub)
{
	idt[vector].offset_low = (uint16_t)stub;
	idt[vector].selector = 0x08;
	idt[vector].type = 0x8e00;		/* present, ring 0, 32-bit interrupt gate */
	idt[vector].offset_high = (uint16_t)(stub >> 16);
}

void interrupt(const struct frame *frame);
void interrupt(const struct frame *frame)
{
	switch (frame->vector) {
	case VECTOR_DEVICE:
		if (device_handler)
			device_handler();
		break;
	case VECTOR_SERIAL:
		if (serial_handler)
			serial_handler();
		break;
	case VECTOR_TIMER:
		ticks++;
		break;
	case VECTOR_SPURIOUS:
		return;				/* no end-of-interrupt for this one */
	default: {
		uint32_t cr2;

		__asm__ volatile("movl %%cr2, %0" : "=r"(cr2));
		put("exception ");
		put_field("vector", frame->vector);
		put_hex_field("code", frame->error_code);
		put_hex_field("eip", frame->eip);
		put_hex_field("cr2", cr2);
		fail("unexpected exception");
	}
	}
	store32(LAPIC + LAPIC_EOI, 0);
}

void interrupts_init(void)
{
	struct { uint16_t limit; uint32_t base; } __attribute__((packed)) pointer = { sizeof idt - 1, (uint32_t)idt };

	for (uint32_t n = 0; n < 32; n++)
		set_gate(n, stub_table[n]);
	for (uint32_t n = VECTOR_DEVICE; n <= VECTOR_SPURIOUS; n++)
		set_gate(n, stub_table[32 + n - VECTOR_DEVICE]);
	__asm__ volatile("lidt %0" : : "m"(pointer));
}

static void lapic_init(void)
{
	out8(0x21, 0xff);			/* the two 8259s, where there are any: masked */
	out8(0xa1, 0xff);
	store32(LAPIC + LAPIC_LVT_LINT0, LVT_MASKED);
	store32(LAPIC + LAPIC_TPR, 0);
	store32(LAPIC + LAPIC_SVR, 0x100 | VECTOR_SPURIOUS);
}

void wake_other_cpus(uint32_t page)
{
	store32(LAPIC + LAPIC_ICR, 0xc4500);		/* INIT, to all but self */
	store32(LAPIC + LAPIC_ICR, 0xc4600 | page >> 12);	/* start-up */
}

static void ioapic_write(uint32_t index, uint32_t value)
{
	store32(IOAPIC + IOAPIC_SELECT, index);
	store32(IOAPIC + IOAPIC_WINDOW, value);
}

void ioapic_route(uint32_t pin, uint8_t vector)
{
	lapic_init();
	/* High half first: the low one unmasks. Fixed delivery, physical destination, edge. */
	ioapic_write(IOAPIC_REDIRECTION + 2 * pin + 1, load32(LAPIC + LAPIC_ID) & 0xff000000);
	ioapic_write(IOAPIC_REDIRECTION + 2 * pin, vector);
}

void ioapic_route_level(uint32_t pin, uint8_t vector)
{
	lapic_init();
	ioapic_write(IOAPIC_REDIRECTION + 2 * pin + 1, load32(LAPIC + LAPIC_ID) & 0xff000000);
	ioapic_write(IOAPIC_REDIRECTION + 2 * pin, 1 << 15 | 1 << 13 | vector);
}

/* ---------------------------------------------------------------- watchdog */

/* KVM's and QEMU's LAPIC timers count nanoseconds; divided by 16 this is about a second. */
#define TICK 62500000u

static uint32_t last_count;

void watchdog_start(int with_interrupts)
{
	lapic_init();
	store32(LAPIC + LAPIC_TIMER_DIVIDE, 3);	/* by 16 */
	store32(LAPIC + LAPIC_LVT_TIMER, VECTOR_TIMER | LVT_PERIODIC | (with_interrupts ? 0u : (uint32_t)LVT_MASKED));
	store32(LAPIC + LAPIC_TIMER_INITIAL, TICK);
	last_count = with_interrupts ? 0 : TICK;
}

void watchdog_pet(void) { ticks = 0; }

uint32_t watchdog_age(void)
{
	if (last_count) {			/* no interrupts: a count that rose has wrapped */
		uint32_t count = load32(LAPIC + LAPIC_TIMER_CURRENT);

		if (count > last_count)
			ticks++;
		last_count = count ? count : 1;
	}
	return ticks;
}
