/* A keyboard that nobody sits at, in the lab: /dev/uinput. Says where its events are; then types each number that a line of
 * standard input has, the key pressed and let go. Ends with its input. Linked statically, as guest.c is. */
#include <dirent.h>
#include <fcntl.h>
#include <linux/uinput.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { KEYS = 200 };

static int say(int fd, unsigned short type, unsigned short code, int value) {
    struct input_event event = { .type = type, .code = code, .value = value };
    return write(fd, &event, sizeof event) == sizeof event;
}

int main(void) {
    struct uinput_setup setup = { .id = { BUS_VIRTUAL, 0x1234, 0x5678, 1 }, .name = "outboard keyboard" };
    char name[64] = "", folder[128];
    int fd = open("/dev/uinput", O_WRONLY), number;
    DIR *entries;
    if (fd < 0 || ioctl(fd, UI_SET_EVBIT, EV_KEY)) return perror("/dev/uinput"), 1;
    for (int key = 1; key <= KEYS; key++) ioctl(fd, UI_SET_KEYBIT, key);
    if (ioctl(fd, UI_DEV_SETUP, &setup) || ioctl(fd, UI_DEV_CREATE) || ioctl(fd, UI_GET_SYSNAME(sizeof name), name) < 0)
        return perror("uinput"), 1;
    snprintf(folder, sizeof folder, "/sys/devices/virtual/input/%s", name);
    entries = opendir(folder);
    for (struct dirent *entry; entries && (entry = readdir(entries));)
        if (!strncmp(entry->d_name, "event", 5)) printf("/dev/input/%s\n", entry->d_name);
    fflush(stdout);
    while (scanf("%d", &number) == 1)
        for (int down = 1; down >= 0; down--)
            if (!say(fd, EV_KEY, (unsigned short)number, down) || !say(fd, EV_SYN, SYN_REPORT, 0)) return perror("write"), 1;
    return 0;
}
