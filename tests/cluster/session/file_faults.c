// Preloaded into a process: fails, or dies in, the k-th write or sync of a file below one folder, and keeps a record of
// them all, from which test_journal_faults.py rebuilds what a power cut leaves. Never really syncs: that takes time, and
// only a power cut could tell. Shared memory files ("-shm") are left out of the record: no power cut keeps them.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define REAL(result, name, ...) ((result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

enum kind { NONE, FAIL, SHORT, DIE_IN, DIE_AFTER, FAIL_SYNC };

static char folder[1024];
static int countdown, kind, error_number, record_fd = -1, hits;
static char hit_path[1024], hit_what;

// The k-th write or sync from now on below `path` meets its fault (k = 0: none does).
EXPORT void faults_arm(const char *path, int k, int how, int number, int record) {
    snprintf(folder, sizeof folder, "%s", path);
    countdown = k, kind = how, error_number = number, record_fd = record, hits = 0;
}
EXPORT void faults_off(void) { folder[0] = 0, record_fd = -1; }
EXPORT int faults_hits(void) { return hits; }
EXPORT const char *faults_path(void) { return hit_path; }
EXPORT int faults_what(void) { return hit_what; }

static void record(char what, const char *path, int64_t offset, const void *bytes, int64_t size) {
    if (record_fd < 0) return;
    int64_t head[4] = {what, (int64_t)strlen(path), offset, size};
    ssize_t (*put)(int, const void *, size_t) = REAL(ssize_t, write, int, const void *, size_t);
    int64_t carried = bytes == NULL ? 0 : size;
    if (put(record_fd, head, sizeof head) < 0 || put(record_fd, path, head[1]) < 0) _exit(99);
    if (carried && put(record_fd, bytes, carried) != carried) _exit(99);
}
// A moment of the caller's own, in order with the rest.
EXPORT void faults_note(int64_t number) { record('a', "", number, NULL, 0); }

static int below(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int ours(int fd, char path[1024]) {
    char link[64];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 1023);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}
// Whether this call is the one.
static int met(const char *path, char what) {
    if (countdown == 0 || --countdown) return 0;
    hits++, hit_what = what;
    snprintf(hit_path, sizeof hit_path, "%s", path);
    return 1;
}

static ssize_t put(int fd, const void *bytes, size_t size, off64_t offset, int at) {
    ssize_t (*pwrite_)(int, const void *, size_t, off64_t) = REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    ssize_t (*write_)(int, const void *, size_t) = REAL(ssize_t, write, int, const void *, size_t);
    char path[1024];
    if (fd == record_fd || !ours(fd, path)) return at ? pwrite_(fd, bytes, size, offset) : write_(fd, bytes, size);
    if (!at) offset = lseek64(fd, 0, SEEK_CUR);
    int hit = met(path, 'w');
    if (hit && kind == FAIL) return errno = error_number, -1;
    if (hit && (kind == SHORT || kind == DIE_IN)) {
        ssize_t half = size > 1 ? pwrite_(fd, bytes, size / 2, offset) : 0;
        if (kind == DIE_IN) _exit(77);
        if (half > 0) record('w', path, offset, bytes, half);
        return errno = error_number, -1;
    }
    ssize_t done = at ? pwrite_(fd, bytes, size, offset) : write_(fd, bytes, size);
    if (hit && kind == DIE_AFTER) _exit(77);
    if (done > 0 && !strstr(path, "-shm")) record('w', path, offset, bytes, done);
    return done;
}
EXPORT ssize_t write(int fd, const void *bytes, size_t size) { return put(fd, bytes, size, 0, 0); }
EXPORT ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) { return put(fd, bytes, size, offset, 1); }
EXPORT ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t offset) { return put(fd, bytes, size, offset, 1); }

static int synced(int fd) {
    char path[1024];
    if (!ours(fd, path)) return 0;
    int hit = met(path, 's');
    if (hit && (kind == DIE_IN || kind == DIE_AFTER)) _exit(77);
    record(hit ? 'f' : 's', path, 0, NULL, 0);
    return hit ? (errno = error_number, -1) : 0;
}
EXPORT int fsync(int fd) { return synced(fd); }
EXPORT int fdatasync(int fd) { return synced(fd); }

static int cut(int fd, off64_t size) {
    char path[1024];
    int inside = ours(fd, path), hit = inside && met(path, 't');
    if (hit && kind == DIE_IN) _exit(77);
    if (hit && kind != DIE_AFTER && kind != FAIL_SYNC) return errno = error_number, -1;
    int result = REAL(int, ftruncate64, int, off64_t)(fd, size);
    if (hit && kind == DIE_AFTER) _exit(77);
    if (inside && result == 0 && !strstr(path, "-shm")) record('t', path, size, NULL, 0);
    return result;
}
EXPORT int ftruncate(int fd, off_t size) { return cut(fd, size); }
EXPORT int ftruncate64(int fd, off64_t size) { return cut(fd, size); }

static int opened(const char *path, int flags, mode_t mode) {
    int made = (flags & O_CREAT) && below(path) && access(path, F_OK) != 0;
    int fd = REAL(int, open64, const char *, int, ...)(path, flags, mode);
    if (made && fd >= 0 && !strstr(path, "-shm")) record('c', path, 0, NULL, 0);
    return fd;
}
#define OPEN(name)                                   \
    EXPORT int name(const char *path, int flags, ...) { \
        va_list rest;                                \
        va_start(rest, flags);                       \
        mode_t mode = (flags & O_CREAT) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                \
        return opened(path, flags, mode);            \
    }
OPEN(open)
OPEN(open64)

EXPORT int unlink(const char *path) {
    int result = REAL(int, unlink, const char *)(path);
    if (result == 0 && below(path) && !strstr(path, "-shm")) record('u', path, 0, NULL, 0);
    return result;
}
EXPORT int mkdir(const char *path, mode_t mode) {
    int result = REAL(int, mkdir, const char *, mode_t)(path, mode);
    if (result == 0 && below(path)) record('m', path, 0, NULL, 0);
    return result;
}
