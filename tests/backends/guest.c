/* What a guest runs to try devices that busybox has no word for. Linked statically: a guest has no libraries.
 *   guest vsock-connect PORT COUNT   sends COUNT blocks to the host and wants each back
 *   guest vsock-echo PORT            echoes what one connection from the host sends, until it ends
 *   guest frames INTERFACE COUNT     sends COUNT Ethernet frames and wants each back, in order, unchanged
 *   guest cipher DRIVER COUNT        AES-CBC by this driver of the kernel: known vectors, then COUNT KiB there and back
 *   guest keys DEVICE COUNT          waits for the keys 1 to COUNT of an input device, each pressed and let go, in this order; tells each
 *   guest edges FILE COUNT           waits for COUNT interrupts of a line, by sysfs; tells each, and the line's value after it
 *   guest kexec KERNEL INITRD LINE   starts another kernel (a bzImage) in place of this one
 * Status 0 when all came as it must; else one line says what did not. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_alg.h>
#include <linux/input.h>
#include <linux/reboot.h>
#include <linux/if_packet.h>
#include <linux/vm_sockets.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

enum { BLOCK = 4096, FRAME = 600, KIB = 1024 };

static int fail(const char *what) {
    printf("%s: %s\n", what, errno ? strerror(errno) : "differs");
    return 1;
}

static int whole(int fd, char *bytes, size_t size) {
    for (size_t done = 0; done < size;) {
        ssize_t got = read(fd, bytes + done, size - done);
        if (got <= 0) return 0;
        done += (size_t)got;
    }
    return 1;
}

static int vsock(void) {
    struct timeval limit = { .tv_sec = 30 };
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return fd;
}

static int vsock_connect(unsigned port, int count) {
    static char sent[BLOCK], back[BLOCK];
    struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_HOST };
    int fd = vsock();
    if (connect(fd, (struct sockaddr *)&host, sizeof host)) return fail("connect");
    for (int block = 0; block < count; block++) {
        for (int at = 0; at < BLOCK; at++) sent[at] = (char)(block * 7 + at);
        if (write(fd, sent, BLOCK) != BLOCK) return fail("write");
        if (!whole(fd, back, BLOCK)) return fail("read");
        errno = 0;
        if (memcmp(sent, back, BLOCK)) return fail("echo");
    }
    printf("blocks=%d\n", count);
    return 0;
}

static int vsock_echo(unsigned port) {
    static char bytes[BLOCK];
    struct sockaddr_vm any = { .svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_ANY };
    int listener = vsock(), fd;
    ssize_t got;
    long total = 0;
    if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 1)) return fail("listen");
    puts("listening");
    fflush(stdout);
    fd = accept(listener, NULL, NULL);
    if (fd < 0) return fail("accept");
    while ((got = read(fd, bytes, sizeof bytes)) > 0) {
        if (write(fd, bytes, (size_t)got) != got) return fail("write");
        total += got;
    }
    if (got < 0) return fail("read");
    printf("echoed=%ld\n", total);
    return 0;
}

static int frames(const char *interface, int count) {
    static unsigned char sent[FRAME], back[FRAME + 1];
    struct timeval limit = { .tv_sec = 10 };
    struct sockaddr_ll from, at = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_802_EX1) };
    socklen_t size;
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_802_EX1));
    at.sll_ifindex = (int)if_nametoindex(interface);
    if (bind(fd, (struct sockaddr *)&at, sizeof at)) return fail("bind");
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    /* To all, from a station that is not here, of a type that nobody takes. */
    memset(sent, 0xff, 6);
    memcpy(sent + 6, "\x02outb", 6);
    sent[12] = ETH_P_802_EX1 >> 8;
    sent[13] = ETH_P_802_EX1 & 0xff;
    for (int frame = 0; frame < count; frame++) {
        ssize_t got;
        for (int byte = 14; byte < FRAME; byte++) sent[byte] = (unsigned char)(frame * 3 + byte);
        if (send(fd, sent, FRAME, 0) != FRAME) return fail("send");
        do {
            size = sizeof from;
            got = recvfrom(fd, back, sizeof back, 0, (struct sockaddr *)&from, &size);
        } while (got >= 0 && from.sll_pkttype == PACKET_OUTGOING);
        if (got < 0) return fail("receive");
        errno = 0;
        if (got != FRAME || memcmp(sent, back, FRAME)) return fail("frame");
    }
    printf("frames=%d\n", count);
    return 0;
}

static int keys(const char *device, int count) {
    struct input_event event;
    struct input_id id;
    unsigned char bits[KEY_CNT / 8] = { 0 };
    char name[80] = "";
    int fd = open(device, O_RDONLY), known = 0;
    if (fd < 0) return fail("open");
    if (ioctl(fd, EVIOCGNAME(sizeof name), name) < 0 || ioctl(fd, EVIOCGID, &id) || ioctl(fd, EVIOCGBIT(EV_KEY, sizeof bits), bits) < 0)
        return fail("ioctl");
    for (int key = 0; key < KEY_CNT; key++) known += bits[key / 8] >> (key % 8) & 1;
    printf("name: %s, vendor %#x, product %#x\nknown=%d\nwaiting\n", name, id.vendor, id.product, known);
    fflush(stdout);
    for (int at = 0; at < 2 * count;) {
        if (!whole(fd, (char *)&event, sizeof event)) return fail("read");
        if (event.type != EV_KEY) continue;
        if (event.code != 1 + at / 2 || event.value != !(at % 2)) {
            printf("key %d is %d instead of %d\n", event.code, event.value, 1 + at / 2);
            return 1;
        }
        if (at++ % 2) printf("key %d.\n", event.code);
        fflush(stdout);
    }
    printf("keys=%d\n", count);
    return 0;
}

static int edges(const char *file, int count) {
    struct pollfd line = { open(file, O_RDONLY), POLLPRI, 0 };
    char value;
    if (line.fd < 0 || read(line.fd, &value, 1) != 1) return fail("open");
    puts("waiting");
    fflush(stdout);
    for (int edge = 1; edge <= count; edge++) {
        if (poll(&line, 1, 30000) != 1) return fail("poll");
        if (lseek(line.fd, 0, SEEK_SET) || read(line.fd, &value, 1) != 1) return fail("read");
        printf("edge %d to %c.\n", edge, value);
        fflush(stdout);
    }
    printf("edges=%d\n", count);
    return 0;
}

/* One operation of a cipher whose key is set. */
static int cipher_once(int cipher, unsigned operation, const unsigned char *iv, const void *from, void *to, size_t size) {
    union {
        char bytes[CMSG_SPACE(4) + CMSG_SPACE(sizeof(struct af_alg_iv) + 16)];
        struct cmsghdr header;
    } control;
    struct iovec data = { (void *)from, size };
    struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
    struct cmsghdr *part;
    struct af_alg_iv *vector;
    int fd = accept(cipher, NULL, 0), whole_answer;
    if (fd < 0) return 0;
    memset(&control, 0, sizeof control);
    part = CMSG_FIRSTHDR(&message);
    *part = (struct cmsghdr){ CMSG_LEN(4), SOL_ALG, ALG_SET_OP };
    memcpy(CMSG_DATA(part), &operation, 4);
    part = CMSG_NXTHDR(&message, part);
    *part = (struct cmsghdr){ CMSG_LEN(sizeof *vector + 16), SOL_ALG, ALG_SET_IV };
    vector = (void *)CMSG_DATA(part);
    vector->ivlen = 16;
    memcpy(vector->iv, iv, 16);
    whole_answer = sendmsg(fd, &message, 0) == (ssize_t)size && whole(fd, to, size);
    close(fd);
    return whole_answer;
}

static int cipher(const char *driver, int count) {
    /* NIST SP 800-38A, F.2.1, F.2.3 and F.2.5: the same four blocks under keys of 128, 192 and 256 bits. */
    static const unsigned char plain[64] =
        "\x6b\xc1\xbe\xe2\x2e\x40\x9f\x96\xe9\x3d\x7e\x11\x73\x93\x17\x2a\xae\x2d\x8a\x57\x1e\x03\xac\x9c\x9e\xb7\x6f\xac\x45\xaf\x8e\x51"
        "\x30\xc8\x1c\x46\xa3\x5c\xe4\x11\xe5\xfb\xc1\x19\x1a\x0a\x52\xef\xf6\x9f\x24\x45\xdf\x4f\x9b\x17\xad\x2b\x41\x7b\xe6\x6c\x37\x10";
    static const struct {
        size_t size;
        unsigned char key[32], coded[64];
    } vectors[] = {
        { 16, "\x2b\x7e\x15\x16\x28\xae\xd2\xa6\xab\xf7\x15\x88\x09\xcf\x4f\x3c",
          "\x76\x49\xab\xac\x81\x19\xb2\x46\xce\xe9\x8e\x9b\x12\xe9\x19\x7d\x50\x86\xcb\x9b\x50\x72\x19\xee\x95\xdb\x11\x3a\x91\x76\x78\xb2"
          "\x73\xbe\xd6\xb8\xe3\xc1\x74\x3b\x71\x16\xe6\x9e\x22\x22\x95\x16\x3f\xf1\xca\xa1\x68\x1f\xac\x09\x12\x0e\xca\x30\x75\x86\xe1\xa7" },
        { 24, "\x8e\x73\xb0\xf7\xda\x0e\x64\x52\xc8\x10\xf3\x2b\x80\x90\x79\xe5\x62\xf8\xea\xd2\x52\x2c\x6b\x7b",
          "\x4f\x02\x1d\xb2\x43\xbc\x63\x3d\x71\x78\x18\x3a\x9f\xa0\x71\xe8\xb4\xd9\xad\xa9\xad\x7d\xed\xf4\xe5\xe7\x38\x76\x3f\x69\x14\x5a"
          "\x57\x1b\x24\x20\x12\xfb\x7a\xe0\x7f\xa9\xba\xac\x3d\xf1\x02\xe0\x08\xb0\xe2\x79\x88\x59\x88\x81\xd9\x20\xa9\xe6\x4f\x56\x15\xcd" },
        { 32, "\x60\x3d\xeb\x10\x15\xca\x71\xbe\x2b\x73\xae\xf0\x85\x7d\x77\x81\x1f\x35\x2c\x07\x3b\x61\x08\xd7\x2d\x98\x10\xa3\x09\x14\xdf\xf4",
          "\xf5\x8c\x4c\x04\xd6\xe5\xf1\xba\x77\x9e\xab\xfb\x5f\x7b\xfb\xd6\x9c\xfc\x4e\x96\x7e\xdb\x80\x8d\x67\x9f\x77\x7b\xc6\x70\x2c\x7d"
          "\x39\xf2\x33\x69\xa9\xd9\xba\xcf\xa5\x30\xe2\x63\x04\x23\x14\x61\xb2\xeb\x05\xe2\xc3\x9b\xe9\xfc\xda\x6c\x19\x07\x8c\x6a\x9d\x1b" },
    };
    static const unsigned char iv[16] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
    static unsigned char sent[KIB], coded[KIB], back[KIB];
    struct sockaddr_alg name = { .salg_family = AF_ALG, .salg_type = "skcipher" };
    int fd = socket(AF_ALG, SOCK_SEQPACKET, 0), keys = 0;
    snprintf((char *)name.salg_name, sizeof name.salg_name, "%s", driver);
    if (bind(fd, (struct sockaddr *)&name, sizeof name)) return fail("bind");
    for (unsigned at = 0; at < sizeof vectors / sizeof *vectors; at++) {
        if (setsockopt(fd, SOL_ALG, ALG_SET_KEY, vectors[at].key, (socklen_t)vectors[at].size)) return fail("key");
        if (!cipher_once(fd, ALG_OP_ENCRYPT, iv, plain, coded, sizeof plain)) return fail("encrypt");
        errno = 0;
        if (memcmp(coded, vectors[at].coded, sizeof plain)) return fail("cipher text");
        if (!cipher_once(fd, ALG_OP_DECRYPT, iv, coded, back, sizeof plain)) return fail("decrypt");
        errno = 0;
        if (memcmp(back, plain, sizeof plain)) return fail("plain text");
        keys++;
    }
    for (int piece = 0; piece < count; piece++) {
        for (int at = 0; at < KIB; at++) sent[at] = (unsigned char)(piece * 5 + at * 3);
        if (!cipher_once(fd, ALG_OP_ENCRYPT, iv, sent, coded, KIB) || !cipher_once(fd, ALG_OP_DECRYPT, iv, coded, back, KIB)) return fail("KiB");
        errno = 0;
        if (memcmp(sent, back, KIB) || !memcmp(sent, coded, KIB)) return fail("KiB");
    }
    printf("keys=%d pieces=%d\n", keys, count);
    return 0;
}

static int start_kernel(const char *kernel, const char *initrd, const char *line) {
    int kernel_fd = open(kernel, O_RDONLY), initrd_fd = open(initrd, O_RDONLY);
    if (kernel_fd < 0 || initrd_fd < 0) return fail("open");
    if (syscall(SYS_kexec_file_load, kernel_fd, initrd_fd, strlen(line) + 1, line, 0UL)) return fail("kexec_file_load");
    puts("kexec");
    fflush(stdout);
    syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
    return fail("reboot");
}

int main(int argc, char **argv) {
    if (argc == 5 && !strcmp(argv[1], "kexec")) return start_kernel(argv[2], argv[3], argv[4]);
    if (argc == 4 && !strcmp(argv[1], "vsock-connect")) return vsock_connect((unsigned)atoi(argv[2]), atoi(argv[3]));
    if (argc == 3 && !strcmp(argv[1], "vsock-echo")) return vsock_echo((unsigned)atoi(argv[2]));
    if (argc == 4 && !strcmp(argv[1], "keys")) return keys(argv[2], atoi(argv[3]));
    if (argc == 4 && !strcmp(argv[1], "edges")) return edges(argv[2], atoi(argv[3]));
    if (argc == 4 && !strcmp(argv[1], "cipher")) return cipher(argv[2], atoi(argv[3]));
    if (argc == 4 && !strcmp(argv[1], "frames")) return frames(argv[2], atoi(argv[3]));
    return 2;
}
