/* A virtio-pci device under the registers of virtio-mmio, as virtio 1.2 §4.1 says: modern, MSI-X vector 0 for all. */
#include "virtio_pci.h"

#include "machine.h"
#include "virtio.h"

enum { COMMAND = 0x04, BARS = 0x10, CAPABILITIES = 0x34, VENDOR_SPECIFIC = 9, MSI_X = 0x11 };
enum { COMMON = 1, NOTIFY = 2, DEVICE = 4 };
/* §4.1.4.3 */
enum {
	DEVICE_FEATURES_SEL = 0x00, DEVICE_FEATURES = 0x04, DRIVER_FEATURES_SEL = 0x08, DRIVER_FEATURES = 0x0c,
	CONFIG_VECTOR = 0x10, STATUS = 0x14, GENERATION = 0x15, QUEUE_SEL = 0x16, QUEUE_SIZE = 0x18,
	QUEUE_VECTOR = 0x1a, QUEUE_ENABLE = 0x1c, QUEUE_NOTIFY_OFF = 0x1e, QUEUE_DESC = 0x20,
};

static uint32_t device, common, notify, multiplier, device_config;

static uint32_t config(uint32_t at)
{
	out32(0xcf8, 0x80000000u | device << 11 | (at & 0xfc));
	return in32(0xcfc);
}

static void set_config(uint32_t at, uint32_t value)
{
	out32(0xcf8, 0x80000000u | device << 11 | (at & 0xfc));
	out32(0xcfc, value);
}

static uint32_t in_bar(uint32_t bar, uint32_t offset) { return (config(BARS + 4 * bar) & ~15u) + offset; }

static void msix(uint32_t at)
{
	uint32_t place = config(at + 4), table = in_bar(place & 7, place & ~7u);

	store32(table, 0xfee00000);	/* the first CPU */
	store32(table + 4, 0);
	store32(table + 8, VECTOR_DEVICE);
	store32(table + 12, 0);
	set_config(at, 0x80000000u);
}

void pci_open(uint32_t number)
{
	uint32_t seen;

	device = number;
	if ((config(0) & 0xffff) != 0x1af4)
		fail("no virtio-pci device there");
	set_config(COMMAND, 6);
	for (uint32_t at = config(CAPABILITIES) & 0xff; at; at = seen >> 8 & 0xff) {
		seen = config(at);
		if ((seen & 0xff) == MSI_X)
			msix(at);
		if ((seen & 0xff) != VENDOR_SPECIFIC)
			continue;
		if (seen >> 24 == COMMON)
			common = in_bar(config(at + 4) & 0xff, config(at + 8));
		if (seen >> 24 == DEVICE)
			device_config = in_bar(config(at + 4) & 0xff, config(at + 8));
		if (seen >> 24 == NOTIFY) {
			notify = in_bar(config(at + 4) & 0xff, config(at + 8));
			multiplier = config(at + 16);
		}
	}
	if (!common || !notify || !device_config)
		fail("the device has not all structures");
}

uint32_t pci_reg(uint32_t offset)
{
	switch (offset) {
	case REG_MAGIC: return 0x74726976;
	case REG_VERSION: return 2;
	case REG_DEVICE_ID: return (config(0) >> 16) - 0x1040;
	case REG_VENDOR_ID: return config(0) & 0xffff;
	case REG_DEVICE_FEATURES: return load32(common + DEVICE_FEATURES);
	case REG_QUEUE_NUM_MAX: return load16(common + QUEUE_SIZE);
	case REG_QUEUE_READY: return load16(common + QUEUE_ENABLE);
	case REG_STATUS: return load8(common + STATUS);
	case REG_CONFIG_GENERATION: return load8(common + GENERATION);
	case REG_INTERRUPT_STATUS: return INTERRUPT_USED;	/* nobody asks with MSI-X */
	}
	return offset >= REG_CONFIG ? load32(device_config + offset - REG_CONFIG) : 0;
}

void pci_set_reg(uint32_t offset, uint32_t value)
{
	switch (offset) {
	case REG_DEVICE_FEATURES_SEL: store32(common + DEVICE_FEATURES_SEL, value); break;
	case REG_DRIVER_FEATURES_SEL: store32(common + DRIVER_FEATURES_SEL, value); break;
	case REG_DRIVER_FEATURES: store32(common + DRIVER_FEATURES, value); break;
	case REG_STATUS: store8(common + STATUS, (uint8_t)value); break;
	case REG_QUEUE_SEL: store16(common + QUEUE_SEL, (uint16_t)value); break;
	case REG_QUEUE_NUM: store16(common + QUEUE_SIZE, (uint16_t)value); break;
	case REG_QUEUE_READY:
		store16(common + CONFIG_VECTOR, 0);
		store16(common + QUEUE_VECTOR, 0);
		if (load16(common + QUEUE_VECTOR) || load16(common + QUEUE_NOTIFY_OFF) != load16(common + QUEUE_SEL))
			fail("a queue has no vector, or another's notifications");
		store16(common + QUEUE_ENABLE, (uint16_t)value);
		break;
	case REG_QUEUE_NOTIFY: store16(notify + value * multiplier, (uint16_t)value); break;
	case REG_QUEUE_DESC_LOW: case REG_QUEUE_DESC_HIGH: store32(common + QUEUE_DESC + offset - REG_QUEUE_DESC_LOW, value); break;
	case REG_QUEUE_DRIVER_LOW: case REG_QUEUE_DRIVER_HIGH:
		store32(common + QUEUE_DESC + 8 + offset - REG_QUEUE_DRIVER_LOW, value);
		break;
	case REG_QUEUE_DEVICE_LOW: case REG_QUEUE_DEVICE_HIGH:
		store32(common + QUEUE_DESC + 16 + offset - REG_QUEUE_DEVICE_LOW, value);
		break;
	case REG_INTERRUPT_ACK: break;
	default:
		if (offset >= REG_CONFIG)
			store32(device_config + offset - REG_CONFIG, value);
	}
}
