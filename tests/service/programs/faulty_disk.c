/* A disk with faults, by LD_PRELOAD. The first letter of the file that FAULTY_DISK names says which; without it there are none.

   e  fsync fails (EIO)
   n  writes find no room (ENOSPC)
   b  the process is killed before an fsync      a  after it
   t  a write of more than one byte is torn: its first half is written, and the process is killed

   b, a and t happen once: the file is removed. Only files whose path contains "layers.db" are meant. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static char fault(int descriptor) {
    char link[64], path[4096], letter = 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    const char *control = getenv("FAULTY_DISK");
    if (!control || !strstr(path, "layers.db")) return 0;
    int file = open(control, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    if (read(file, &letter, 1) != 1) letter = 0;
    close(file);
    return letter;
}

static void die(void) {
    unlink(getenv("FAULTY_DISK"));
    raise(SIGKILL);
}

static int flush(long call, int descriptor) {
    char letter = fault(descriptor);
    if (letter == 'e') {
        errno = EIO;
        return -1;
    }
    if (letter == 'b') die();
    int result = syscall(call, descriptor);
    if (letter == 'a') die();
    return result;
}

int fsync(int descriptor) { return flush(SYS_fsync, descriptor); }
int fdatasync(int descriptor) { return flush(SYS_fdatasync, descriptor); }

static ssize_t put(int descriptor, const void *bytes, size_t count, off64_t offset) {
    char letter = fault(descriptor);
    if (letter == 'n') {
        errno = ENOSPC;
        return -1;
    }
    if (letter == 't' && count > 1) {
        syscall(SYS_pwrite64, descriptor, bytes, count / 2, offset);
        die();
    }
    return syscall(SYS_pwrite64, descriptor, bytes, count, offset);
}

ssize_t pwrite(int descriptor, const void *bytes, size_t count, off_t offset) { return put(descriptor, bytes, count, offset); }
ssize_t pwrite64(int descriptor, const void *bytes, size_t count, off64_t offset) { return put(descriptor, bytes, count, offset); }
