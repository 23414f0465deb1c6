/*
 * What the tiny kernel knows of the machine: I/O, text on the serial port, the command
 * line, interrupts (LAPIC, IOAPIC), the watchdog, and the ways to end.
 * Addresses of the board come from the command line, never from here; fixed by the PC
 * architecture are only COM1, the LAPIC and the IOAPIC.
 */
#pragma once

#include <stdint.h>

/* ---------------------------------------------------------------- I/O */

static inline void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline void out16(uint16_t port, uint16_t value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline void out32(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline uint8_t in8(uint16_t port) { uint8_t value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }
static inline uint16_t in16(uint16_t port) { uint16_t value; __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }
static inline uint32_t in32(uint16_t port) { uint32_t value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }

static inline uint8_t load8(uint32_t at) { return *(volatile uint8_t *)at; }
static inline uint16_t load16(uint32_t at) { return *(volatile uint16_t *)at; }
static inline uint32_t load32(uint32_t at) { return *(volatile uint32_t *)at; }
static inline void store8(uint32_t at, uint8_t value) { *(volatile uint8_t *)at = value; }
static inline void store16(uint32_t at, uint16_t value) { *(volatile uint16_t *)at = value; }
static inline void store32(uint32_t at, uint32_t value) { *(volatile uint32_t *)at = value; }

static inline void irq_off(void) { __asm__ volatile("cli" : : : "memory"); }
static inline void irq_on(void) { __asm__ volatile("sti" : : : "memory"); }
/* `sti` takes effect after the next instruction: nothing is lost between the two. */
static inline void irq_on_and_halt(void) { __asm__ volatile("sti; hlt" : : : "memory"); }

/* ---------------------------------------------------------------- text out, COM1 */

#define COM1 0x3f8

void put(const char *text);
void put_char(char c);
void put_dec(uint32_t value);
void put_hex(uint32_t value);			/* 0x…, no leading zeros */
void put_hex64(uint64_t value);
void put_byte(uint8_t value);			/* two digits */
void put_field(const char *name, uint32_t value);	/* "name=123 " */
void put_hex_field(const char *name, uint32_t value);	/* "name=0x7b " */

/* ---------------------------------------------------------------- command line */

extern const char *command_line;

/* The value of the first word `key=…` at or after *cursor, or 0; moves *cursor behind it. */
const char *next_arg(const char **cursor, const char *key);
uint32_t number_arg(const char *key, uint32_t otherwise);
/* Does the value of `key` equal `word`? False when the key is missing. */
int arg_is(const char *key, const char *word);
int word_is(const char *value, const char *word);
/* Decimal or 0x…; *text moves behind the digits. */
uint32_t parse_number(const char **text);

/* ---------------------------------------------------------------- PVH start info */

struct start_info {
	uint32_t magic;				/* 0x336ec578 */
	uint32_t version, flags, modules;
	uint64_t module_list, command_line, rsdp, memory_map;
	uint32_t memory_map_entries, reserved;
};

/* ---------------------------------------------------------------- interrupts */

enum { VECTOR_DEVICE = 0x40, VECTOR_SERIAL = 0x41, VECTOR_TIMER = 0x42, VECTOR_SPURIOUS = 0x43 };

/* What the stubs of start.S push. */
struct frame {
	uint32_t edi, esi, ebp, esp, ebx, edx, ecx, eax;
	uint32_t vector, error_code, eip, cs, eflags;
};

void interrupts_init(void);
/* Routes an edge-triggered, active-high IOAPIC pin to a vector of this CPU. */
void ioapic_route(uint32_t pin, uint8_t vector);
/* The same for a level-triggered, active-low one, as PCI has them. */
void ioapic_route_level(uint32_t pin, uint8_t vector);
/* Starts every other CPU in real mode at a page below 1 MiB. */
void wake_other_cpus(uint32_t page);
/* Handlers, called with interrupts off, before the end-of-interrupt. */
extern void (*device_handler)(void);
extern void (*serial_handler)(void);

/* ---------------------------------------------------------------- watchdog
 * The LAPIC timer, about one tick a second: a wait that is never answered ends the
 * machine with a line of text, not with a stuck test. */

void watchdog_start(int with_interrupts);
void watchdog_pet(void);
/* Seconds without watchdog_pet(). Also to be called from polling loops: it reads the timer. */
uint32_t watchdog_age(void);

/* ---------------------------------------------------------------- the end */

void endings_init(const struct start_info *info);
/* Ends the machine as `end=` says. */
void finish(void) __attribute__((noreturn));
/* Prints "error: …" and finishes. */
void fail(const char *text) __attribute__((noreturn));
void reset_machine(void) __attribute__((noreturn));
