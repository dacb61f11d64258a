/* Makes the Nth call that changes something below one folder fail, or kills the process there.
 *
 * Preloaded into a process (LD_PRELOAD), it counts the calls of the C library that change files
 * below CI2P_FAULT_ROOT: write, pwrite, writev, fsync, fdatasync, ftruncate, rename*, unlink*,
 * rmdir, mkdir*, and open* with O_CREAT or O_TRUNC. When the count reaches CI2P_FAULT_AT, what
 * CI2P_FAULT_KIND says happens:
 *
 *   EIO      this one call fails with EIO and does nothing
 *   ENOSPC   this call fails with ENOSPC, and so does every later one that needs space (write,
 *            mkdir, open of a new file): a full disk stays full
 *   before   SIGKILL instead of the call
 *   after    the call, then SIGKILL
 *   trace    nothing fails; every call is told on stderr
 *
 * ci2p_fault_arm() does the same from inside a process, so that a warm one can fork a child per
 * fault; the call that is hit is told on stderr.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NONE, FAIL_EIO, FAIL_ENOSPC, KILL_BEFORE, KILL_AFTER, TRACE };
enum verdict { PASS, FAIL, DIE_AFTER };

static char root[PATH_MAX];
static size_t root_length;
static long fault_at;
static enum kind fault_kind;
static atomic_long count;

long ci2p_fault_count(void) { return atomic_load(&count); }

void ci2p_fault_arm(const char *folder, long at, const char *kind)
{
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    fault_at = at;
    fault_kind = !strcmp(kind, "EIO")      ? FAIL_EIO
                 : !strcmp(kind, "ENOSPC") ? FAIL_ENOSPC
                 : !strcmp(kind, "before") ? KILL_BEFORE
                 : !strcmp(kind, "after")  ? KILL_AFTER
                 : !strcmp(kind, "trace")  ? TRACE
                                           : NONE;
    atomic_store(&count, 0);
}

__attribute__((constructor)) static void arm_from_environment(void)
{
    const char *folder = getenv("CI2P_FAULT_ROOT"), *at = getenv("CI2P_FAULT_AT");
    const char *kind = getenv("CI2P_FAULT_KIND");
    if (folder && *folder)
        ci2p_fault_arm(folder, at ? atol(at) : 0, kind ? kind : "");
}

static int is_below(const char *path)
{
    return !strncmp(path, root, root_length)
           && (path[root_length] == '/' || path[root_length] == '\0');
}

/* The path of a descriptor; empty where it has none. */
static void path_of(int descriptor, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = '\0';
}

/* `name` below the folder `descriptor` as an absolute path, without following links. */
static void path_at(int descriptor, const char *name, char *path)
{
    char folder[PATH_MAX];
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (descriptor == AT_FDCWD) {
        if (!getcwd(folder, sizeof folder))
            folder[0] = '\0';
    } else {
        path_of(descriptor, folder);
    }
    if (snprintf(path, PATH_MAX, "%s/%s", folder, name) >= PATH_MAX)
        path[0] = '\0';
}

static enum verdict judge(const char *call, const char *path, int needs_space)
{
    if (!root_length || !is_below(path))
        return PASS;
    long number = atomic_fetch_add(&count, 1) + 1;
    if (fault_kind == TRACE)
        dprintf(2, "ci2p-fault %ld %s %s\n", number, call, path);
    if (fault_kind == FAIL_ENOSPC && fault_at && number > fault_at && needs_space) {
        errno = ENOSPC;
        return FAIL;
    }
    if (number != fault_at || fault_kind == NONE || fault_kind == TRACE)
        return PASS;
    dprintf(2, "ci2p-fault hit %ld %s %s\n", number, call, path);
    switch (fault_kind) {
    case KILL_BEFORE:
        kill(getpid(), SIGKILL);
        return FAIL;
    case KILL_AFTER:
        return DIE_AFTER;
    default:
        errno = fault_kind == FAIL_ENOSPC ? ENOSPC : EIO;
        return FAIL;
    }
}

static enum verdict judge_fd(const char *call, int descriptor, int needs_space)
{
    char path[PATH_MAX];
    /* 0 to 2 are never files of ours, and dprintf above must not come back here. */
    if (!root_length || descriptor <= 2)
        return PASS;
    int kept = errno;
    path_of(descriptor, path);
    errno = kept;
    return judge(call, path, needs_space);
}

static enum verdict judge_at(const char *call, int descriptor, const char *name, int needs_space)
{
    char path[PATH_MAX];
    if (!root_length || !name)
        return PASS;
    int kept = errno;
    path_at(descriptor, name, path);
    errno = kept;
    return judge(call, path, needs_space);
}

#define REAL(type, name, ...)                                                                     \
    static type (*real)(__VA_ARGS__);                                                             \
    if (!real)                                                                                    \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

#define ANSWER(type, judged, call)                                                                \
    do {                                                                                          \
        enum verdict verdict_ = (judged);                                                         \
        if (verdict_ == FAIL)                                                                     \
            return -1;                                                                            \
        type result_ = (call);                                                                    \
        if (verdict_ == DIE_AFTER)                                                                \
            kill(getpid(), SIGKILL);                                                              \
        return result_;                                                                           \
    } while (0)

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(ssize_t, "write", int, const void *, size_t)
    ANSWER(ssize_t, judge_fd("write", fd, 1), real(fd, data, size));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t)
    ANSWER(ssize_t, judge_fd("pwrite", fd, 1), real(fd, data, size, offset));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)
    ANSWER(ssize_t, judge_fd("pwrite", fd, 1), real(fd, data, size, offset));
}

ssize_t writev(int fd, const struct iovec *parts, int number)
{
    REAL(ssize_t, "writev", int, const struct iovec *, int)
    ANSWER(ssize_t, judge_fd("writev", fd, 1), real(fd, parts, number));
}

int fsync(int fd)
{
    REAL(int, "fsync", int)
    ANSWER(int, judge_fd("fsync", fd, 0), real(fd));
}

int fdatasync(int fd)
{
    REAL(int, "fdatasync", int)
    ANSWER(int, judge_fd("fdatasync", fd, 0), real(fd));
}

int ftruncate(int fd, off_t size)
{
    REAL(int, "ftruncate", int, off_t)
    ANSWER(int, judge_fd("ftruncate", fd, 0), real(fd, size));
}

int ftruncate64(int fd, off64_t size)
{
    REAL(int, "ftruncate64", int, off64_t)
    ANSWER(int, judge_fd("ftruncate", fd, 0), real(fd, size));
}

int rename(const char *from, const char *to)
{
    REAL(int, "rename", const char *, const char *)
    ANSWER(int, judge_at("rename", AT_FDCWD, to, 0), real(from, to));
}

int renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    REAL(int, "renameat", int, const char *, int, const char *)
    ANSWER(int, judge_at("rename", to_fd, to, 0), real(from_fd, from, to_fd, to));
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags)
{
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned)
    ANSWER(int, judge_at("rename", to_fd, to, 0), real(from_fd, from, to_fd, to, flags));
}

int unlink(const char *path)
{
    REAL(int, "unlink", const char *)
    ANSWER(int, judge_at("unlink", AT_FDCWD, path, 0), real(path));
}

int unlinkat(int fd, const char *path, int flags)
{
    REAL(int, "unlinkat", int, const char *, int)
    ANSWER(int, judge_at("unlink", fd, path, 0), real(fd, path, flags));
}

int rmdir(const char *path)
{
    REAL(int, "rmdir", const char *)
    ANSWER(int, judge_at("rmdir", AT_FDCWD, path, 0), real(path));
}

int mkdir(const char *path, mode_t mode)
{
    REAL(int, "mkdir", const char *, mode_t)
    ANSWER(int, judge_at("mkdir", AT_FDCWD, path, 1), real(path, mode));
}

int mkdirat(int fd, const char *path, mode_t mode)
{
    REAL(int, "mkdirat", int, const char *, mode_t)
    ANSWER(int, judge_at("mkdir", fd, path, 1), real(fd, path, mode));
}

static enum verdict judge_open(int fd, const char *path, int flags)
{
    return flags & (O_CREAT | O_TRUNC) ? judge_at("open", fd, path, 1) : PASS;
}

#define MODE(flags)                                                                               \
    mode_t mode = 0;                                                                              \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                        \
        va_list rest;                                                                             \
        va_start(rest, flags);                                                                    \
        mode = va_arg(rest, mode_t);                                                              \
        va_end(rest);                                                                             \
    }

int open(const char *path, int flags, ...)
{
    REAL(int, "open", const char *, int, ...)
    MODE(flags)
    ANSWER(int, judge_open(AT_FDCWD, path, flags), real(path, flags, mode));
}

int open64(const char *path, int flags, ...)
{
    REAL(int, "open64", const char *, int, ...)
    MODE(flags)
    ANSWER(int, judge_open(AT_FDCWD, path, flags), real(path, flags, mode));
}

int openat(int fd, const char *path, int flags, ...)
{
    REAL(int, "openat", int, const char *, int, ...)
    MODE(flags)
    ANSWER(int, judge_open(fd, path, flags), real(fd, path, flags, mode));
}

int openat64(int fd, const char *path, int flags, ...)
{
    REAL(int, "openat64", int, const char *, int, ...)
    MODE(flags)
    ANSWER(int, judge_open(fd, path, flags), real(fd, path, flags, mode));
}
