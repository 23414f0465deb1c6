/* A stand-in for an SPI device, preloaded into the backend that believes to drive one by spidev's ioctls on some file: words of 8 bits,
 * 1 MHz at most, one line each way; what comes back is what was sent, inverted. */
#include <errno.h>
#include <linux/spi/spidev.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    MODES = SPI_CPHA | SPI_CPOL | SPI_LOOP,
    /* The kernel leaves these out when it has not so many lines, and says nothing. */
    LINES = SPI_TX_DUAL | SPI_TX_QUAD | SPI_TX_OCTAL | SPI_RX_DUAL | SPI_RX_QUAD | SPI_RX_OCTAL,
    BITS = 8,
    HZ = 1000000,
};

static uint32_t mode;

static int refuse(void) {
    errno = EINVAL;
    return -1;
}

static int transfer(const struct spi_ioc_transfer *parts, unsigned count) {
    int total = 0;
    for (unsigned part = 0; part < count; part++) {
        const uint8_t *sent = (const uint8_t *)(uintptr_t)parts[part].tx_buf;
        uint8_t *back = (uint8_t *)(uintptr_t)parts[part].rx_buf;
        if (parts[part].speed_hz > HZ || parts[part].bits_per_word != BITS) return refuse();
        for (unsigned at = 0; back && at < parts[part].len; at++) back[at] = sent ? (uint8_t)~sent[at] : 0;
        total += (int)parts[part].len;
    }
    return total;
}

int ioctl(int fd, unsigned long request, ...) {
    va_list more;
    void *argument;
    va_start(more, request);
    argument = va_arg(more, void *);
    va_end(more);
    if (_IOC_TYPE(request) != SPI_IOC_MAGIC) return (int)syscall(SYS_ioctl, fd, request, argument);
    switch (request) {
    case SPI_IOC_RD_MODE32: *(uint32_t *)argument = mode; return 0;
    case SPI_IOC_WR_MODE32:
        if (*(uint32_t *)argument & ~(uint32_t)(MODES | LINES)) return refuse();
        mode = *(uint32_t *)argument & MODES;
        return 0;
    case SPI_IOC_RD_BITS_PER_WORD: *(uint8_t *)argument = BITS; return 0;
    case SPI_IOC_WR_BITS_PER_WORD: return *(uint8_t *)argument == BITS ? 0 : refuse();
    case SPI_IOC_RD_MAX_SPEED_HZ: *(uint32_t *)argument = HZ; return 0;
    case SPI_IOC_WR_MAX_SPEED_HZ: return *(uint32_t *)argument <= HZ ? 0 : refuse();
    }
    if (_IOC_NR(request) == 0) return transfer(argument, _IOC_SIZE(request) / sizeof(struct spi_ioc_transfer));
    return refuse();
}
