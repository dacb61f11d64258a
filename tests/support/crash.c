/* Makes a process die, or use memory without end, while it holds a file with a mark in it.
 *
 * Preloaded (LD_PRELOAD), it looks at what pread() gave: decoder workers get their images that way.
 * A file that contains CI2P-CRASH-<what> is a file whose decoder does just that:
 *
 *   SEGV     writes to address 0            ABRT   abort(), as the C library does on a torn heap
 *   KILL     SIGKILL, as the kernel's out-of-memory killer sends it
 *   EXIT     exit code 1, as libjpeg's default error handler has it
 *   XCPU     the signal of the limit of processor time
 *   SPIN     computes until something ends it
 *   MEMORY   allocates all that the limit of the process leaves, and keeps it
 *   ONCE     SEGV if there is no file yet at the path that follows, to the end of the file; makes it
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static const char mark[] = "CI2P-CRASH-";

static int says(const char *found, const char *end, const char *what)
{
    found += sizeof mark - 1;
    size_t length = strlen(what);
    return (size_t)(end - found) >= length && !memcmp(found, what, length);
}

static void act(const char *data, ssize_t size)
{
    if (size <= 0)
        return;
    const char *found = memmem(data, (size_t)size, mark, sizeof mark - 1), *end = data + size;
    if (!found)
        return;
    if (says(found, end, "SEGV"))
        *(volatile int *)0 = 1;
    if (says(found, end, "ABRT"))
        abort();
    if (says(found, end, "KILL"))
        kill(getpid(), SIGKILL);
    if (says(found, end, "EXIT"))
        _exit(1);
    if (says(found, end, "XCPU"))
        raise(SIGXCPU);
    for (volatile long turns = 0; says(found, end, "SPIN"); ++turns)
        ;
    for (size_t size = 1 << 26; says(found, end, "MEMORY") && size; size /= 2)
        while (malloc(size))
            ;
    if (says(found, end, "ONCE ")) {
        char path[4096];
        const char *start = found + sizeof mark - 1 + strlen("ONCE ");
        size_t length = (size_t)(end - start) < sizeof path ? (size_t)(end - start) : 0;
        memcpy(path, start, length);
        path[length] = '\0';
        if (open(path, O_CREAT | O_EXCL | O_WRONLY, 0600) >= 0)
            *(volatile int *)0 = 1;
    }
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset)
{
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (!real)
        real = (ssize_t(*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    ssize_t got = real(fd, data, size, offset);
    act(data, got);
    return got;
}
