/* The DMA engine of tests/servers on libvfio-user, by its public interface alone: the same registers (tests/servers/README.md),
 * so that one guest and one set of tests drive both. What libvfio-user of QEMU 7.2 cannot be told is not there: MSI, shadow
 * doorbells, a socket of the server's own.
 *   engine [-v]... [--quiesce MS] --socket PATH
 * One client after another. A single thread: messages, doorbells, and what a command leaves for later. With --quiesce it takes
 * that long before memory may come or go, or the device be reset, as SPDK does while requests are on their way. */
#include <err.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/param.h>
#include <time.h>
#include <unistd.h>

#include "libvfio-user.h"
#include "pci_caps/dsn.h"
#include "pci_caps/msix.h"
#include "pci_caps/pm.h"
#include "pci_caps/px.h"

enum { IDLE, BUSY, DONE, FAILED };
enum { SPARSE = 0x10000, LARGE = 0x100000, VECTORS = 32, PIECE = 64 << 10, DOORBELLS = 8 };
enum { LATER = 0x100, INTERRUPT = 0x200, DATAMATCH = 1 };

static struct {
    uint32_t scratch, status, command, vector, pattern, checksum, mode, pin, sink_count, sink_sum, port, port_writes;
    uint32_t doorbells[2 * DOORBELLS];
    uint64_t source, destination, length;
} now;
static uint32_t reads, writes, resets, maps, raised, dropped, waiting, pin_masked, pin_pending;
static int verbose, sparse_file, large_file, bells[2 * DOORBELLS], quiesce_time, quiescing;
static struct timespec quiet_at;
static uint8_t *sparse, *large;
static vfu_ctx_t *ctx;
static ssize_t msix_at;

static void say(vfu_ctx_t *_ctx, int level, const char *text) {
    (void)_ctx, (void)level;
    fprintf(stderr, "engine: %s\n", text);
}

static vfu_pci_config_space_t *config(void) { return vfu_pci_get_config_space(ctx); }
static struct msixcap *msix(void) { return (struct msixcap *)((uint8_t *)config() + msix_at); }

static void signal_vector(uint32_t vector) {
    if (vfu_irq_trigger(ctx, vector) == 0) raised++;
    else dropped++;
}

/* All kinds share one list of eventfds: which kind is on is told by the configuration space. */
static void raise_vector(uint32_t vector) {
    if (msix()->mxc.mxe) {
        if (vector < VECTORS) signal_vector(vector);
        return;
    }
    now.pin = 1;
    config()->hdr.sts.is = 1;
    if (pin_masked || config()->hdr.cmd.id) pin_pending = 1;
    else signal_vector(0);
}

static void pin_state(vfu_ctx_t *_ctx, uint32_t start, uint32_t count, bool mask) {
    (void)_ctx, (void)start, (void)count;
    pin_masked = mask;
    if (mask || !pin_pending || config()->hdr.cmd.id) return;
    pin_pending = 0;
    signal_vector(0);
}

/* One piece of guest memory, into or out of `data`. */
static int memory(uint64_t at, void *data, size_t size, int prot) {
    char room[32 * 64];
    dma_sg_t *list = (dma_sg_t *)room;
    struct iovec to;
    if (dma_sg_size() > sizeof room / 32) errx(1, "a list entry has %zu bytes", dma_sg_size());
    if (at + size < at) return -1;
    while (size > 0) {
        size_t here = size;
        /* Where one piece of memory ends and the next begins, by halves. */
        int entries = vfu_addr_to_sgl(ctx, (void *)at, here, list, 1, prot);
        while (entries != 1 && here > 4096 && entries < 0) {
            here /= 2;
            entries = vfu_addr_to_sgl(ctx, (void *)at, here, list, 1, prot);
        }
        if (entries != 1) return -1;
        if (now.mode != 0 || !vfu_sg_is_mappable(ctx, list)) {
            /* This libvfio-user sends messages for the first byte of the region, wherever the memory is: its entry, of which the
             * address is the first field, is set right. */
            *(uint64_t *)list = at;
            int failed = prot == PROT_WRITE ? vfu_sgl_write(ctx, list, 1, data) : vfu_sgl_read(ctx, list, 1, data);
            if (failed < 0) return -1;
        } else {
            if (vfu_sgl_get(ctx, list, &to, 1, 0) < 0) return -1;
            if (prot == PROT_WRITE) {
                memcpy(to.iov_base, data, here);
                vfu_sgl_mark_dirty(ctx, list, 1);
            } else {
                memcpy(data, to.iov_base, here);
            }
            vfu_sgl_put(ctx, list, &to, 1);
        }
        at += here, data = (char *)data + here, size -= here;
    }
    return 0;
}

/* 1 memory to memory, 2 a pattern to memory, 3 the sum of memory, 4 BAR 2 to memory, 5 memory to BAR 2. Mode 2: the whole in one
 * message. */
static int transfer(uint32_t command) {
    uint64_t most = now.mode == 2 ? 64 << 20 : PIECE;
    uint32_t sum = 0, word;
    uint8_t *data;
    if (now.length > 64 << 20 || command < 1 || command > 5) return -1;
    if ((data = malloc(MAX(MIN(most, now.length), 4))) == NULL) return -1;
    for (uint64_t at = 0; at < now.length;) {
        uint64_t here = MIN(now.length - at, most), from = now.source + at, to = now.destination + at;
        int failed = 0;
        if (command == 2)
            for (uint64_t n = 0; n < here; n++) data[n] = (uint8_t)(now.pattern >> n % 4 * 8);
        else if (command != 4)
            failed = from < now.source ? -1 : memory(from, data, here, PROT_READ);
        else if (from + here > LARGE || from > LARGE)
            failed = -1;
        else
            memcpy(data, large + from, here);
        for (uint64_t n = 0; n < here; n += 4) {
            word = 0;
            memcpy(&word, data + n, MIN(4, here - n));
            sum += word;
        }
        if (!failed && command == 5) {
            if (to > LARGE || to + here > LARGE) failed = -1;
            else memcpy(large + to, data, here);
        } else if (!failed && command != 3) {
            failed = to < now.destination ? -1 : memory(to, data, here, PROT_WRITE);
        }
        if (failed) {
            free(data);
            return -1;
        }
        at += here;
    }
    free(data);
    now.checksum = sum;
    return 0;
}

static void execute(uint32_t command) {
    now.status = transfer(command & 0xff) == 0 ? DONE : FAILED;
    if (command & INTERRUPT) raise_vector(now.vector);
}

static void ring(uint64_t number, uint64_t times) { now.doorbells[number] += (uint32_t)times; }

static uint32_t get(uint64_t at) {
    uint32_t sum = 0;
    switch (at) {
    case 0x00: return 0x4e474e45;
    case 0x04: return 1;
    case 0x08: return now.scratch;
    case 0x0c: return now.status;
    case 0x10: return now.command;
    case 0x14: return now.vector;
    case 0x18: return (uint32_t)now.source;
    case 0x1c: return (uint32_t)(now.source >> 32);
    case 0x20: return (uint32_t)now.destination;
    case 0x24: return (uint32_t)(now.destination >> 32);
    case 0x28: return (uint32_t)now.length;
    case 0x2c: return (uint32_t)(now.length >> 32);
    case 0x30: return now.pattern;
    case 0x34: return now.checksum;
    case 0x3c: return now.pin;
    case 0x40: return writes;
    case 0x44: return reads;
    case 0x48: return resets;
    case 0x4c: return now.mode;
    case 0x54: return now.sink_count;
    case 0x58: return now.sink_sum;
    case 0x5c: return maps;
    case 0x64: return raised;
    case 0x68: return dropped;
    case 0x6c:
        for (int n = 0; n < 2 * DOORBELLS; n++) sum += now.doorbells[n];
        return sum;
    }
    return at >= 0x80 && at < 0xc0 ? now.doorbells[(at - 0x80) / 4] : 0;
}

static void halve(uint64_t *wide, uint64_t at, uint32_t value) {
    memcpy((char *)wide + (at & 4), &value, 4);
}

static int set(uint64_t at, uint32_t value) {
    switch (at) {
    case 0x08: now.scratch = value; break;
    case 0x10:
        now.command = value;
        now.status = BUSY;
        if (value & LATER) waiting = value;
        else execute(value);
        break;
    case 0x14: now.vector = value; break;
    case 0x18: halve(&now.source, 0, value); break;
    case 0x1c: halve(&now.source, 4, value); break;
    case 0x20: halve(&now.destination, 0, value); break;
    case 0x24: halve(&now.destination, 4, value); break;
    case 0x28: halve(&now.length, 0, value); break;
    case 0x2c: halve(&now.length, 4, value); break;
    case 0x30: now.pattern = value; break;
    case 0x38: raise_vector(value); break;
    case 0x3c:
        now.pin = pin_pending = 0;
        config()->hdr.sts.is = 0;
        break;
    case 0x4c: now.mode = value; break;
    case 0x50: now.sink_count++, now.sink_sum += value; break;
    case 0x60:
        for (uint32_t n = 0; n < (value & 0xffffff); n++) raise_vector(value >> 24);
        break;
    case 0xf0: errno = EIO; return -1;
    case 0xf4: exit(9);
    case 0xf8: usleep(1000 * MIN(value, 20000)); break;
    case 0x840: ring(DOORBELLS + value % DOORBELLS, 1); break;
    default:
        if (at >= 0x800 && at < 0x800 + 4 * DOORBELLS) ring((at - 0x800) / 4, 1);
    }
    return 0;
}

static void drain(void) {
    for (int n = 0; n < 2 * DOORBELLS; n++) {
        eventfd_t times;
        if (eventfd_read(bells[n], &times) == 0) ring((uint64_t)n, times);
    }
}

static ssize_t registers(vfu_ctx_t *_ctx, char *data, size_t size, loff_t at, bool is_write) {
    (void)_ctx;
    /* What was rung before is counted before. */
    drain();
    if (is_write) {
        writes++;
        for (size_t n = 0; n < size; n += 4) {
            uint32_t word = 0;
            memcpy(&word, data + n, MIN(4, size - n));
            if (set((uint64_t)at + n, word) < 0) return -1;
        }
        return (ssize_t)size;
    }
    reads++;
    if ((at & ~3) == 0xf0) {
        errno = EIO;
        return -1;
    }
    for (size_t n = 0; n < size; n++) {
        uint64_t byte = (uint64_t)at + n;
        data[n] = (char)(get(byte & ~3ull) >> byte % 4 * 8);
    }
    return (ssize_t)size;
}

static ssize_t in_area(uint8_t *area, char *data, size_t size, loff_t at, bool is_write) {
    if (is_write) memcpy(area + at, data, size);
    else memcpy(data, area + at, size);
    return (ssize_t)size;
}

static ssize_t sparse_access(vfu_ctx_t *_ctx, char *data, size_t size, loff_t at, bool is_write) {
    (void)_ctx;
    return in_area(sparse, data, size, at, is_write);
}

static ssize_t large_access(vfu_ctx_t *_ctx, char *data, size_t size, loff_t at, bool is_write) {
    (void)_ctx;
    return in_area(large, data, size, at, is_write);
}

static ssize_t ports(vfu_ctx_t *_ctx, char *data, size_t size, loff_t at, bool is_write) {
    (void)_ctx;
    uint32_t word = at < 4 ? now.port : at < 8 ? now.port_writes : 0;
    if (!is_write) {
        for (size_t n = 0; n < size; n++) data[n] = (char)(word >> ((uint64_t)at + n) % 4 * 8);
        return (ssize_t)size;
    }
    word = 0;
    memcpy(&word, data, MIN(4, size));
    now.port_writes++;
    if (at == 0) now.port = word;
    if (at == 8) raise_vector(word);
    return (ssize_t)size;
}

/* The table and the pending bits are the client's. */
static ssize_t table(vfu_ctx_t *_ctx, char *data, size_t size, loff_t at, bool is_write) {
    (void)_ctx, (void)data, (void)size, (void)at, (void)is_write;
    errno = EPERM;
    return -1;
}

static int reset(vfu_ctx_t *_ctx, vfu_reset_type_t type) {
    (void)_ctx;
    drain();
    memset(&now, 0, sizeof now);
    waiting = pin_masked = pin_pending = 0;
    resets++;
    memset(sparse, 0, SPARSE);
    memset(large, 0, LARGE);
    config()->hdr.sts.is = 0;
    if (type != VFU_RESET_PCI_FLR) {
        config()->hdr.cmd.raw = 0;
        msix()->mxc.mxe = msix()->mxc.fm = 0;
    }
    return 0;
}

static int quiesce(vfu_ctx_t *_ctx) {
    (void)_ctx;
    clock_gettime(CLOCK_MONOTONIC, &quiet_at);
    quiescing = 1;
    errno = EBUSY;
    return -1;
}

/* Milliseconds until the device is quiet. */
static int until_quiet(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    int64_t gone = (at.tv_sec - quiet_at.tv_sec) * 1000 + (at.tv_nsec - quiet_at.tv_nsec) / 1000000;
    return gone >= quiesce_time ? 0 : (int)(quiesce_time - gone);
}

static void mapped(vfu_ctx_t *_ctx, vfu_dma_info_t *info) { (void)_ctx, (void)info, maps++; }
static void unmapped(vfu_ctx_t *_ctx, vfu_dma_info_t *info) { (void)_ctx, (void)info, maps--; }

static void must(int outcome, const char *what) {
    if (outcome < 0) err(1, "%s", what);
}

static uint8_t *file(const char *name, size_t size, int *fd) {
    uint8_t *at;
    if ((*fd = memfd_create(name, MFD_CLOEXEC)) < 0 || ftruncate(*fd, (off_t)size) < 0) err(1, "%s", name);
    if ((at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0)) == MAP_FAILED) err(1, "%s", name);
    return at;
}

/* All descriptors but the sockets. Before there is a socket: who sees this server listen may count them. */
static void open_all(void) {
    sparse = file("engine-bar1", SPARSE, &sparse_file);
    large = file("engine-bar2", LARGE, &large_file);
    for (int n = 0; n < 2 * DOORBELLS; n++) must(bells[n] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
}

static void describe(void) {
    int rw = VFU_REGION_FLAG_RW;
    struct iovec pieces[] = { { (void *)0x1000, 0x2000 }, { (void *)0x8000, 0x8000 } };
    must(vfu_pci_init(ctx, VFU_PCI_TYPE_EXPRESS, PCI_HEADER_TYPE_NORMAL, 0), "PCI");
    vfu_pci_set_id(ctx, 0x1234, 0x0b0f, 0x1af4, 0x0b0f);
    vfu_pci_set_class(ctx, 0xff, 0, 0);
    config()->hdr.rid = 1;
    must(vfu_setup_region(ctx, 0, 0x1000, registers, rw | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0), "BAR 0");
    must(vfu_setup_region(ctx, 1, SPARSE, sparse_access, rw | VFU_REGION_FLAG_MEM, pieces, 2, sparse_file, 0), "BAR 1");
    must(vfu_setup_region(ctx, 2, LARGE, large_access, rw | VFU_REGION_FLAG_MEM, NULL, 0, large_file, 0), "BAR 2");
    config()->hdr.bars[2].mem.locatable = 2;
    config()->hdr.bars[2].mem.prefetchable = 1;
    must(vfu_setup_region(ctx, 4, 32, ports, rw, NULL, 0, -1, 0), "BAR 4");
    must(vfu_setup_region(ctx, 5, 0x2000, table, rw | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0), "BAR 5");
    struct msixcap vectors = { { PCI_CAP_ID_MSIX, 0 }, { .ts = VECTORS - 1 }, { .tbir = 5 }, { .pbir = 5, .pbao = 0x1000 >> 3 } };
    msix_at = vfu_pci_add_capability(ctx, 0, 0, &vectors);
    must((int)msix_at, "MSI-X");
    struct { struct vsc head; char text[13]; } vendor = { { { PCI_CAP_ID_VNDR, 0 }, sizeof vendor }, "libvfio-user" };
    must((int)vfu_pci_add_capability(ctx, 0, 0, &vendor), "vendor");
    struct pxcap express = { .hdr.id = PCI_CAP_ID_EXP, .pxcaps = { .ver = 2, .dpt = 9 }, .pxdcap = { .rer = 1, .flrc = 1 } };
    must((int)vfu_pci_add_capability(ctx, 0, 0, &express), "PCI Express");
    struct pmcap power = { .hdr.id = PCI_CAP_ID_PM, .pc = { .vs = 3 }, .pmcs = { .nsfrst = 1 } };
    must((int)vfu_pci_add_capability(ctx, 0, 0, &power), "power management");
    struct dsncap serial = { { .id = PCI_EXT_CAP_ID_DSN, .version = 1 }, 0x0b0f1234, 0x11223344 };
    must((int)vfu_pci_add_capability(ctx, 0, VFU_CAP_FLAG_EXTENDED, &serial), "serial number");
    for (int n = 0; n < 2 * DOORBELLS; n++) {
        int own = n < DOORBELLS;
        size_t at = own ? 0x800 + 4 * (size_t)n : 0x840;
        must(vfu_create_ioeventfd(ctx, 0, bells[n], at, 4, own ? 0 : DATAMATCH, own ? 0 : (uint64_t)n - DOORBELLS), "doorbell");
    }
    must(vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1), "INTx");
    must(vfu_setup_device_nr_irqs(ctx, VFU_DEV_MSIX_IRQ, VECTORS), "MSI-X");
    must(vfu_setup_irq_state_callback(ctx, VFU_DEV_INTX_IRQ, pin_state), "INTx");
    must(vfu_setup_device_reset_cb(ctx, reset), "reset");
    must(vfu_setup_device_dma(ctx, mapped, unmapped), "DMA");
    if (quiesce_time) vfu_setup_device_quiesce_cb(ctx, quiesce);
    must(vfu_realize_ctx(ctx), "realize");
}

int main(int argc, char *argv[]) {
    const char *path = NULL;
    int connected = 0;
    for (int n = 1; n < argc; n++) {
        if (!strcmp(argv[n], "-v")) verbose++;
        else if (!strcmp(argv[n], "--socket") && n + 1 < argc) path = argv[++n];
        else if (!strcmp(argv[n], "--quiesce") && n + 1 < argc) quiesce_time = atoi(argv[++n]);
        else errx(2, "usage: engine [-v]... [--quiesce MS] --socket PATH");
    }
    if (path == NULL) errx(2, "--socket is missing");
    open_all();
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, path, LIBVFIO_USER_FLAG_ATTACH_NB, NULL, VFU_DEV_TYPE_PCI);
    if (ctx == NULL) err(1, "%s", path);
    must(vfu_setup_log(ctx, say, verbose > 1 ? 7 : verbose ? 6 : 3), "log");
    describe();
    int listening = vfu_get_poll_fd(ctx);
    for (;;) {
        /* While the device is not quiet yet, nothing is read. */
        struct pollfd wait[1 + 2 * DOORBELLS] = { { quiescing ? -1 : vfu_get_poll_fd(ctx), POLLIN, 0 } };
        for (int n = 0; n < 2 * DOORBELLS; n++) wait[1 + n] = (struct pollfd){ bells[n], POLLIN, 0 };
        if (poll(wait, 1 + 2 * DOORBELLS, waiting ? 0 : quiescing ? until_quiet() : -1) < 0 && errno != EINTR) err(1, "poll");
        drain();
        if (quiescing && until_quiet() == 0) {
            quiescing = 0;
            /* Of the last client's end there is nobody to tell. */
            if (vfu_device_quiesced(ctx, 0) < 0 && errno != ENOTCONN) err(1, "quiesced");
            connected = vfu_get_poll_fd(ctx) != listening;
            continue;
        }
        if (!connected) {
            /* Who goes before anything was agreed on is no reason to end. */
            if (wait[0].revents) connected = vfu_attach_ctx(ctx) == 0;
            continue;
        }
        if (wait[0].revents && vfu_run_ctx(ctx) < 0) {
            if (errno == ENOTCONN) connected = 0;
            else if (errno != EBUSY) err(1, "libvfio-user");
        }
        if (waiting) {
            uint32_t command = waiting;
            waiting = 0;
            execute(command);
        }
    }
}
