/*
 * The tiny kernel: what `mode=` names, then the ending that `end=` names. README.md has the
 * table of modes, arguments and the lines they print.
 */
#include "machine.h"
#include "virtio.h"

#include "modes.h"

static const struct start_info *start_info;

static void hello(void) { put("hello from the tiny kernel\n"); }

/* What the boot protocol handed over: for tests of loaders, without booting Linux. */
static void info(void)
{
	uint32_t at = (uint32_t)start_info->memory_map;

	put("command-line: ");
	put(command_line);
	put_char('\n');
	put_hex_field("rsdp", (uint32_t)start_info->rsdp);
	put_field("modules", start_info->modules);
	put_char('\n');
	for (uint32_t n = 0; n < start_info->modules; n++) {
		uint32_t module = (uint32_t)start_info->module_list + 32 * n;
		uint32_t start = load32(module), size = load32(module + 8), sum = 0;

		for (uint32_t i = 0; i < size; i++)
			sum += load8(start + i);
		put("module ");
		put_hex_field("start", start);
		put_field("size", size);
		put_field("sum", sum);
		put_char('\n');
	}
	for (uint32_t n = 0; n < start_info->memory_map_entries; n++, at += 24) {
		put("memory start=");
		put_hex64((uint64_t)load32(at + 4) << 32 | load32(at));
		put(" size=");
		put_hex64((uint64_t)load32(at + 12) << 32 | load32(at + 8));
		put_char(' ');
		put_field("type", load32(at + 16));
		put_char('\n');
	}
}

/* ---------------------------------------------------------------- poke
 * Reads and writes places that no device claims: `at=port:0x123` and `at=mem:0xd1000000`,
 * as many as wanted. All ones are expected. */

static void poke_place(int memory, uint32_t at)
{
	uint8_t byte = memory ? load8(at) : in8((uint16_t)at);
	uint16_t word = memory ? load16(at) : in16((uint16_t)at);
	uint32_t dword = memory ? load32(at) : in32((uint16_t)at);

	put(memory ? "mem " : "port ");
	put_hex_field("at", at);
	put_hex_field("byte", byte);
	put_hex_field("word", word);
	put_hex_field("dword", dword);
	put_char('\n');
	if (memory) {
		store8(at, 0);
		store16(at, 0);
		store32(at, 0);
	} else {
		out8((uint16_t)at, 0);
		out16((uint16_t)at, 0);
		out32((uint16_t)at, 0);
	}
}

static void poke(void)
{
	const char *cursor = command_line;
	const char *value;

	while ((value = next_arg(&cursor, "at"))) {
		int memory = *value == 'm';

		while (*value && *value != ' ' && *value++ != ':')
			;
		poke_place(memory, parse_number(&value));
	}
}

/* ---------------------------------------------------------------- echo
 * Gives serial input back until 'q'. With irq=on the UART's interrupt wakes it. */

enum { UART_IER = COM1 + 1, UART_IIR = COM1 + 2, UART_MCR = COM1 + 4, UART_LSR = COM1 + 5, LSR_DATA_READY = 1 };

static volatile uint32_t serial_interrupts;
static volatile int quit;

static void echo_input(void)
{
	while (!quit && in8(UART_LSR) & LSR_DATA_READY) {
		char c = (char)in8(COM1);

		if (c == 'q')
			quit = 1;
		else
			put_char(c);
	}
}

static void on_serial_interrupt(void)
{
	(void)in8(UART_IIR);
	serial_interrupts++;
	echo_input();
}

static void echo(void)
{
	int with_interrupts = !arg_is("irq", "off");

	if (with_interrupts) {
		serial_handler = on_serial_interrupt;
		ioapic_route(number_arg("serial-gsi", 4), VECTOR_SERIAL);
		out8(UART_MCR, 0x0b);		/* DTR, RTS, and OUT2: the gate of the interrupt line */
		out8(UART_IER, 1);		/* received data */
	}
	put("echo ready\n");
	for (;;) {
		irq_off();
		echo_input();			/* what came before the interrupt was enabled */
		if (quit)
			break;
		if (with_interrupts)
			irq_on_and_halt();
	}
	put("\necho ");
	put_field("interrupts", serial_interrupts);
	put_char('\n');
}

/* ---------------------------------------------------------------- cpus
 * Wakes the other CPUs and waits until `n=` of them, this one included, have counted themselves. */

extern const uint8_t ap_start[], ap_count[], ap_end[];

static void cpus(void)
{
	enum { PAGE = 0x10000 };
	uint32_t expected = number_arg("n", 1), timeout = number_arg("timeout", 20), awake;

	for (uint32_t i = 0; i < (uint32_t)(ap_end - ap_start); i++)
		store8(PAGE + i, ap_start[i]);
	watchdog_start(0);
	wake_other_cpus(PAGE);
	do
		awake = 1u + load16(PAGE + (uint32_t)(ap_count - ap_start));
	while (awake < expected && watchdog_age() <= timeout);
	put("cpus=");
	put_dec(awake);
	put_char('\n');
}

/* ---------------------------------------------------------------- */

void payload_main(const struct start_info *from) __attribute__((noreturn));
void payload_main(const struct start_info *from)
{
	static const struct { const char *name; void (*run)(void); } modes[] = {
		{ "hello", hello }, { "info", info }, { "poke", poke }, { "echo", echo }, { "cpus", cpus },
		{ "show", show }, { "blk", blk }, { "rng", rng }, { "ask", ask }, { "loop", loop },
		{ "resize", resize }, { "abuse", abuse }, { "badring", badring },
		{ "deep", deep }, { "drive", drive }, { "pci", pci },
	};

	const char *cursor, *mode;

	start_info = from;
	command_line = from->command_line ? (const char *)(uint32_t)from->command_line : "";
	interrupts_init();
	if (from->magic != 0x336ec578)
		fail("the start info has no PVH magic");
	endings_init(from);
	cursor = command_line;
	mode = next_arg(&cursor, "mode");
	if (!mode)
		mode = "hello";
	for (uint32_t n = 0; n < sizeof modes / sizeof modes[0]; n++) {
		if (word_is(mode, modes[n].name)) {
			modes[n].run();
			finish();
		}
	}
	fail("no such mode=");
}
