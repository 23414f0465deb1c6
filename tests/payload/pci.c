/* pci: does to one PCI function what the words `step=` say, one after the other. Configuration by 0xCF8 and 0xCFC. */
#include "modes.h"

#include "machine.h"
#include "virtio.h"

enum { COMMAND = 0x04, BARS = 0x10, CAPABILITIES = 0x34, MSI_X = 0x11, MSI = 0x05, MESSAGE = 0xfee00000 };

static uint32_t device, released_at, release;
static volatile uint32_t interrupts;

static uint32_t address(uint32_t at) { return 0x80000000u | device << 11 | (at & 0xfc); }

static uint32_t config(uint32_t at)
{
	out32(0xcf8, address(at));
	return in32(0xcfc);
}

static void set_config(uint32_t at, uint32_t value)
{
	out32(0xcf8, address(at));
	out32(0xcfc, value);
}

static uint32_t capability(uint32_t id)
{
	for (uint32_t at = config(CAPABILITIES) & 0xff; at; at = config(at) >> 8 & 0xff)
		if ((config(at) & 0xff) == id)
			return at;
	fail("the function has no such capability");
}

/* Memory of a BAR, or a port with bit 0 set. */
static uint32_t place(uint32_t bar, uint32_t offset)
{
	uint32_t base = config(BARS + 4 * bar);

	return (base & 1 ? base : base & ~15u) + offset;
}

static uint32_t load(uint32_t at) { return at & 1 ? in32((uint16_t)(at & ~1u)) : load32(at); }

static void store(uint32_t at, uint32_t value)
{
	if (at & 1)
		out32((uint16_t)(at & ~1u), value);
	else
		store32(at, value);
}

static uint32_t number(const char **text)
{
	if (**text == ':')
		++*text;
	return parse_number(text);
}

static void on_interrupt(void)
{
	interrupts++;
	if (released_at)
		store32(released_at, release);
}

static void wait_for(uint32_t wanted, uint32_t timeout)
{
	watchdog_pet();
	for (;;) {
		irq_off();
		if (interrupts >= wanted || watchdog_age() > timeout)
			break;
		irq_on_and_halt();
	}
	irq_on();
	put_field("interrupts", interrupts);
	put_char('\n');
}

static void run(char what, const char *text)
{
	uint32_t a = 0, b = 0, n = 0, at;

	switch (what) {
	case 'c':			/* c:OFFSET reads the configuration space */
		a = number(&text);
		put("config ");
		put_hex_field("at", a);
		put_hex_field("value", config(a));
		put_char('\n');
		break;
	case 'C':			/* C:OFFSET:VALUE writes it */
		a = number(&text);
		set_config(a, number(&text));
		break;
	case 'h':			/* h:OFFSET:VALUE writes half a dword of it */
		a = number(&text);
		out32(0xcf8, address(a));
		out16((uint16_t)(0xcfc + (a & 2)), (uint16_t)number(&text));
		break;
	case 'r':			/* r:BAR:OFFSET reads, R:BAR:OFFSET:N so often */
	case 'R':
		a = number(&text);
		b = number(&text);
		n = what == 'R' ? number(&text) : 1;
		at = place(a, b);
		for (a = 0; n--; )
			a = load(at);
		put_hex_field("value", a);
		put_char('\n');
		break;
	case 'w':			/* w:BAR:OFFSET:VALUE writes, W:BAR:OFFSET:N writes 1, 2, … N */
	case 'W':
		a = number(&text);
		b = number(&text);
		n = number(&text);
		at = place(a, b);
		if (what == 'w')
			store(at, n);
		else
			for (a = 1; a <= n; a++)
				store(at, a);
		break;
	case 'v':			/* v:VECTOR:MASK fills an entry of the MSI-X table */
		n = number(&text);
		b = number(&text);
		at = config(capability(MSI_X) + 4);
		at = place(at & 7, (at & ~7u) + 16 * n);
		store32(at, MESSAGE);
		store32(at + 4, 0);
		store32(at + 8, VECTOR_DEVICE);
		store32(at + 12, b);
		break;
	case 'x':			/* x:CONTROL writes the upper half of the first dword of MSI-X */
		at = capability(MSI_X);
		set_config(at, number(&text) << 16);
		break;
	case 'm':			/* m:CONTROL sets up MSI, and writes the same of it */
		at = capability(MSI);
		set_config(at + 4, MESSAGE);
		set_config(at + 8, 0);
		set_config(at + 12, VECTOR_DEVICE);
		set_config(at, number(&text) << 16);
		break;
	case 'p':			/* p:GSI:BAR:OFFSET:VALUE: the pin, which writing that there releases */
		n = number(&text);
		a = number(&text);
		b = number(&text);
		release = number(&text);
		released_at = place(a, b);
		ioapic_route_level(n, VECTOR_DEVICE);
		break;
	case 'l':			/* l:GSI: another level-triggered line, which lowers itself */
		released_at = 0;
		ioapic_route_level(number(&text), VECTOR_DEVICE);
		break;
	case 'o':			/* o:PORT reads a port, O:PORT:VALUE writes it */
		put_hex_field("value", in32((uint16_t)number(&text)));
		put_char('\n');
		break;
	case 'O':
		a = number(&text);
		out32((uint16_t)a, number(&text));
		break;
	case 'U':			/* U:PORT:VALUE waits until that is read */
		a = number(&text);
		n = number(&text);
		watchdog_pet();
		while (in32((uint16_t)a) != n)
			if (watchdog_age() > number_arg("timeout", 20))
				fail("the value never came");
		break;
	case 'i':			/* i:N waits for so many interrupts in all */
		wait_for(number(&text), number_arg("timeout", 20));
		break;
	case 's':			/* s starts the virtio device that pci= names, and rings its queue */
		device_open();
		device_negotiate();
		queue_setup();
		device_driver_ok();
		set_reg(REG_QUEUE_NOTIFY, 0);
		break;
	case 'u':			/* u:BAR:OFFSET:VALUE waits until that is read */
		a = number(&text);
		b = number(&text);
		n = number(&text);
		at = place(a, b);
		watchdog_pet();
		while (load(at) != n)
			if (watchdog_age() > number_arg("timeout", 20))
				fail("the value never came");
		break;
	case 'z':			/* z:BAR:OFFSET:VALUE resets the machine until that many are read there */
		a = number(&text);
		b = number(&text);
		n = number(&text);
		if (load(place(a, b)) < n)
			reset_machine();
		break;
	default:
		fail("no such step=");
	}
}

void pci(void)
{
	const char *cursor = command_line, *step;

	device = number_arg("device", 1);
	device_handler = on_interrupt;
	watchdog_start(1);
	irq_on();
	set_config(COMMAND, number_arg("command", 7));
	while ((step = next_arg(&cursor, "step")))
		run(*step, step + 1);
}
