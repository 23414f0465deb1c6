/* What QEMU's contrib/vhost-user-blk and its libvhost-user take from QEMU's own header of this name, so that they are built
 * without the rest of QEMU. */
#pragma once

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <glib.h>

#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))
