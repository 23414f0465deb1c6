/* What a guest runs to try devices that busybox has no word for. Linked statically: a guest has no libraries.
 *   guest vsock-connect PORT COUNT   sends COUNT blocks to the host and wants each back
 *   guest vsock-echo PORT            echoes what one connection from the host sends, until it ends
 *   guest frames INTERFACE COUNT     sends COUNT Ethernet frames and wants each back, in order, unchanged
 *   guest kexec KERNEL INITRD LINE   starts another kernel (a bzImage) in place of this one
 * Status 0 when all came as it must; else one line says what did not. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/reboot.h>
#include <linux/if_packet.h>
#include <linux/vm_sockets.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

enum { BLOCK = 4096, FRAME = 600 };

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
    if (argc == 4 && !strcmp(argv[1], "frames")) return frames(argv[2], atoi(argv[3]));
    return 2;
}
