/* One virtio-mmio device and its queues, driven as virtio 1.2 §3.1.1 and §4.2.3 say. */
#pragma once

#include <stdint.h>

/* Virtio 1.2 §4.2.2, table 4.1 */
enum {
	REG_MAGIC = 0x000, REG_VERSION = 0x004, REG_DEVICE_ID = 0x008, REG_VENDOR_ID = 0x00c,
	REG_DEVICE_FEATURES = 0x010, REG_DEVICE_FEATURES_SEL = 0x014,
	REG_DRIVER_FEATURES = 0x020, REG_DRIVER_FEATURES_SEL = 0x024,
	REG_QUEUE_SEL = 0x030, REG_QUEUE_NUM_MAX = 0x034, REG_QUEUE_NUM = 0x038, REG_QUEUE_READY = 0x044,
	REG_QUEUE_NOTIFY = 0x050, REG_INTERRUPT_STATUS = 0x060, REG_INTERRUPT_ACK = 0x064, REG_STATUS = 0x070,
	REG_QUEUE_DESC_LOW = 0x080, REG_QUEUE_DESC_HIGH = 0x084,
	REG_QUEUE_DRIVER_LOW = 0x090, REG_QUEUE_DRIVER_HIGH = 0x094,
	REG_QUEUE_DEVICE_LOW = 0x0a0, REG_QUEUE_DEVICE_HIGH = 0x0a4,
	REG_SHM_SEL = 0x0ac, REG_SHM_LEN_LOW = 0x0b0, REG_SHM_LEN_HIGH = 0x0b4,
	REG_CONFIG_GENERATION = 0x0fc, REG_CONFIG = 0x100,
};

enum { STATUS_ACKNOWLEDGE = 1, STATUS_DRIVER = 2, STATUS_DRIVER_OK = 4, STATUS_FEATURES_OK = 8, STATUS_NEEDS_RESET = 0x40, STATUS_FAILED = 0x80 };
enum { DEVICE_BLOCK = 2, DEVICE_ENTROPY = 4 };
enum { INTERRUPT_USED = 1, INTERRUPT_CONFIG = 2 };

/* §2.7: the split ring. The rings are as long as the longest queue; a shorter one uses their
 * beginnings, and its used_event is avail.ring[size]. */
enum { DESC_NEXT = 1, DESC_WRITE = 2, MAX_QUEUE_SIZE = 128, MAX_QUEUES = 8 };
struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct avail_ring { uint16_t flags, index, ring[MAX_QUEUE_SIZE + 1]; };
struct used_ring { uint16_t flags, index; struct { uint32_t id, length; } ring[MAX_QUEUE_SIZE]; uint16_t avail_event; };

/* Each part on a page of its own: none is in reach of an error in another. */
struct queue {
	__attribute__((aligned(4096))) struct descriptor descriptors[MAX_QUEUE_SIZE];
	__attribute__((aligned(4096))) struct avail_ring avail;
	__attribute__((aligned(4096))) struct used_ring used;
};
extern struct queue queues[MAX_QUEUES];
/* How many queue_setup() has set up. */
extern uint32_t queue_count;

struct counts { uint32_t requests, interrupts, config_changes, errors; };
extern volatile struct counts counts;

uint32_t reg(uint32_t offset);
void set_reg(uint32_t offset, uint32_t value);

/* Reads the arguments mmio=, gsi= and irq=, and routes the interrupt. */
void device_open(void);
/* Checks magic and version; fails with a text otherwise. Returns the device id. */
uint32_t device_identify(void);
uint64_t device_features(void);
/* Writes 0 to Status and waits until it reads 0. */
void device_reset(void);
/* Up to and with FEATURES_OK: VERSION_1 and what `accept=` names of the low 32 bits. */
void device_negotiate(void);
/* Sets up `queues=` (1) queues of `queue-size=` (8) descriptors; DRIVER_OK is the caller's. */
void queue_setup(void);
void device_driver_ok(void);
uint32_t device_config32(uint32_t offset);
uint64_t device_capacity(void);			/* a block device's, in sectors */

/* Offers the chain that starts at descriptor 0 of a queue, waits for it, and returns the used length. */
uint32_t queue_submit_and_wait(uint32_t queue);
/* Sleeps until there have been more than `seen` configuration changes. */
void wait_config_change(uint32_t seen);
