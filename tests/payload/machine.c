/* Text, command line and the ways to end; see machine.h. */
#include "machine.h"

const char *command_line;

/* ---------------------------------------------------------------- text */

/* The UART of the machines this runs on never blocks: no polling of the line status, so
 * that a character costs one access. */
void put_char(char c) { out8(COM1, (uint8_t)c); }

void put(const char *text)
{
	while (*text)
		put_char(*text++);
}

void put_dec(uint32_t value)
{
	char digits[10];
	int n = 0;

	do {
		digits[n++] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	while (n)
		put_char(digits[--n]);
}

static void put_nibble(uint32_t value) { put_char("0123456789abcdef"[value & 15]); }

void put_byte(uint8_t value)
{
	put_nibble(value >> 4);
	put_nibble(value);
}

void put_hex64(uint64_t value)
{
	int shift = 60;

	put("0x");
	while (shift > 0 && !(value >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put_nibble((uint32_t)(value >> shift));
}

void put_hex(uint32_t value) { put_hex64(value); }

void put_field(const char *name, uint32_t value)
{
	put(name);
	put_char('=');
	put_dec(value);
	put_char(' ');
}

void put_hex_field(const char *name, uint32_t value)
{
	put(name);
	put_char('=');
	put_hex(value);
	put_char(' ');
}

/* ---------------------------------------------------------------- command line */

const char *next_arg(const char **cursor, const char *key)
{
	const char *at = *cursor;

	while (*at) {
		const char *k = key;

		while (*at == ' ')
			at++;
		while (*k && *at == *k)
			at++, k++;
		if (!*k && *at == '=') {
			*cursor = at + 1;
			return at + 1;
		}
		while (*at && *at != ' ')
			at++;
	}
	*cursor = at;
	return 0;
}

uint32_t parse_number(const char **text)
{
	const char *at = *text;
	uint32_t value = 0, base = 10;

	if (at[0] == '0' && at[1] == 'x') {
		base = 16;
		at += 2;
	}
	for (;; at++) {
		uint32_t digit;

		if (*at >= '0' && *at <= '9')
			digit = (uint32_t)(*at - '0');
		else if (base == 16 && *at >= 'a' && *at <= 'f')
			digit = (uint32_t)(*at - 'a' + 10);
		else if (base == 16 && *at >= 'A' && *at <= 'F')
			digit = (uint32_t)(*at - 'A' + 10);
		else
			break;
		value = value * base + digit;
	}
	*text = at;
	return value;
}

uint32_t number_arg(const char *key, uint32_t otherwise)
{
	const char *cursor = command_line;
	const char *value = next_arg(&cursor, key);

	return value ? parse_number(&value) : otherwise;
}

int word_is(const char *value, const char *word)
{
	while (*word && *value == *word)
		value++, word++;
	return !*word && (!*value || *value == ' ');
}

int arg_is(const char *key, const char *word)
{
	const char *cursor = command_line;
	const char *value = next_arg(&cursor, key);

	return value && word_is(value, word);
}

/* ---------------------------------------------------------------- the end */

/* One byte, written to one place. */
struct ending {
	enum { NOWHERE, PORT, MEMORY } space;
	uint32_t address;
	uint8_t value;
};

static struct ending power_off, reset;

/* `key=port:0x600,0x34` or `key=mem:0xfea00200,0x34` */
static void ending_arg(struct ending *e, const char *key)
{
	const char *cursor = command_line;
	const char *value = next_arg(&cursor, key);

	if (!value)
		return;
	e->space = value[0] == 'm' ? MEMORY : PORT;
	while (*value && *value != ' ' && *value++ != ':')
		;
	e->address = parse_number(&value);
	if (*value == ',') {
		value++;
		e->value = (uint8_t)parse_number(&value);
	}
}

static void carry_out(const struct ending *e)
{
	if (e->space == PORT)
		out8((uint16_t)e->address, e->value);
	else if (e->space == MEMORY)
		store8(e->address, e->value);
}

/* ACPI 6.5 §5.2.3.2: a generic address structure; space 0 is memory, 1 is I/O. */
static void generic_address(struct ending *e, uint32_t at, uint8_t value)
{
	e->address = load32(at + 4);
	e->value = value;
	if (e->address && !load32(at + 8))
		e->space = load8(at) == 1 ? PORT : MEMORY;
}

/* The sleep type in \_S5, found as small kernels do: by its name and package opcode. */
static uint8_t soft_off_type(uint32_t dsdt)
{
	uint32_t end = dsdt + load32(dsdt + 4);

	for (uint32_t at = dsdt + 36; at + 8 < end; at++) {
		if (load32(at) != 0x5f35535f /* _S5_ */ || load8(at + 4) != 0x12 /* PackageOp */)
			continue;
		at += 7 + (load8(at + 5) >> 6);		/* PkgLength, NumElements */
		return load8(at) == 0x0a /* BytePrefix */ ? load8(at + 1) : load8(at);
	}
	return 5;
}

/* ACPI 6.5 §5.2.9: what the command line leaves out, the FADT tells. */
static void endings_from_acpi(uint32_t rsdp)
{
	uint32_t xsdt = load32(rsdp + 24);
	uint32_t fadt = 0;

	for (uint32_t entry = xsdt + 36; entry < xsdt + load32(xsdt + 4); entry += 8)
		if (load32(load32(entry)) == 0x50434146 /* FACP */)
			fadt = load32(entry);
	if (!fadt || load32(fadt + 4) < 268)
		return;
	if (power_off.space == NOWHERE) {
		uint32_t dsdt = load32(fadt + 140);

		if (!dsdt)
			dsdt = load32(fadt + 40);
		/* §4.8.3.7: sleep type in bits 2 to 4, enable in bit 5. */
		generic_address(&power_off, fadt + 244, (uint8_t)(soft_off_type(dsdt) << 2 | 0x20));
	}
	if (reset.space == NOWHERE)
		generic_address(&reset, fadt + 116, load8(fadt + 128));
}

void endings_init(const struct start_info *info)
{
	ending_arg(&power_off, "off");
	ending_arg(&reset, "reset");
	if (info->rsdp && (power_off.space == NOWHERE || reset.space == NOWHERE))
		endings_from_acpi((uint32_t)info->rsdp);
}

static void hang(void) __attribute__((noreturn));
static void hang(void)
{
	for (;;)
		__asm__ volatile("cli; hlt");
}

static void triple_fault(void) __attribute__((noreturn));
static void triple_fault(void)
{
	static const struct { uint16_t limit; uint32_t base; } __attribute__((packed)) nothing = { 0, 0 };

	/* A division by zero rather than `int3`, which not every KVM can emulate. */
	__asm__ volatile("lidt %0; divl %1" : : "m"(nothing), "r"(0), "a"(0), "d"(0));
	hang();
}

void reset_machine(void)
{
	carry_out(&reset);
	hang();
}

void finish(void)
{
	if (arg_is("end", "reset"))
		reset_machine();
	if (arg_is("end", "triple"))
		triple_fault();
	if (arg_is("end", "panic")) {
		out8(0x505, 1);
		hang();
	}
	if (arg_is("end", "hang"))
		hang();
	if (power_off.space == NOWHERE) {
		put("error: no off= and no FADT: ending by a triple fault\n");
		triple_fault();
	}
	carry_out(&power_off);
	hang();
}

void fail(const char *text)
{
	irq_off();
	put("error: ");
	put(text);
	put_char('\n');
	finish();
}
