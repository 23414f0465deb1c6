/* Process 1 of a measured guest, and the program that makes its requests. No C library: an exec costs nothing else.
 *
 * As process 1 (rdinit=/bench): marks that init runs, then powers off ("-- boot" on the kernel's command line) or
 * becomes the ordinary /init.
 * As a command: bench COUNT DEVICE: COUNT direct reads of 4 KiB, then as many writes, with marks around either.
 *
 * A mark is a CPUID instruction with a leaf that means nothing: KVM answers it by itself in every VMM, it needs no
 * privilege and causes no exit to userspace, and KVM's tracepoint kvm_cpuid sees it, with the time. */

#define MARK_LEAF 0x0be9c000
#define BLOCK 4096
#define SPAN 1024 /* blocks: the requests go round in the first 4 MiB */

enum { READ = 0, WRITE = 1, OPEN = 2, NANOSLEEP = 35, GETPID = 39, EXECVE = 59, EXIT = 60, REBOOT = 169,
       PREAD = 17, PWRITE = 18 };

static long call(long number, long a, long b, long c, long d) {
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
}

static void mark(unsigned value) {
    unsigned leaf = MARK_LEAF, b;
    __asm__ volatile("cpuid" : "+a"(leaf), "=b"(b), "+c"(value) : : "edx", "memory");
}

static int same(const char *a, const char *b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

static long number(const char *text) {
    long value = 0;
    while (*text >= '0' && *text <= '9') value = value * 10 + *text++ - '0';
    return value;
}

/* Time for whoever measures to look at the VMM, which is idle meanwhile. */
static void pause_for_samples(void) {
    struct { long seconds, nanoseconds; } time = { 1, 0 };
    call(NANOSLEEP, (long)&time, 0, 0, 0);
}

static void fail(const char *text) {
    long length = 0;
    while (text[length]) length++;
    call(WRITE, 2, (long)text, length, 0);
    mark(255);
    call(EXIT, 1, 0, 0, 0);
}

static unsigned char block[BLOCK] __attribute__((aligned(BLOCK)));

static void requests(long count, const char *device) {
    long fd = call(OPEN, (long)device, 02 | 040000 /* O_RDWR | O_DIRECT */, 0, 0);
    if (fd < 0) fail("bench: cannot open the disk\n");
    for (int writing = 0; writing < 2; writing++) {
        pause_for_samples();
        mark(2 + 2 * writing);
        pause_for_samples();
        mark(10 + 2 * writing);
        for (long i = 0; i < count; i++) {
            long done = call(writing ? PWRITE : PREAD, fd, (long)block, BLOCK, i % SPAN * BLOCK);
            if (done != BLOCK) fail("bench: a request failed\n");
        }
        mark(11 + 2 * writing);
        pause_for_samples();
        mark(3 + 2 * writing);
        pause_for_samples();
    }
    mark(6);
}

__attribute__((used)) static void start(long *stack) {
    long count = stack[0];
    char **words = (char **)(stack + 1), **environment = words + count + 1;

    if (call(GETPID, 0, 0, 0, 0) == 1) {
        mark(1);
        if (count > 1 && same(words[1], "boot")) call(REBOOT, 0xfee1dead, 672274793, 0x4321fedc, 0);
        static char *const init[] = { "/init", 0 };
        call(EXECVE, (long)init[0], (long)init, (long)environment, 0);
        fail("bench: cannot run /init\n");
    }
    if (count > 2) requests(number(words[1]), words[2]);
    call(EXIT, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call start\n hlt\n");
