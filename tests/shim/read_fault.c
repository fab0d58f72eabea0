// read_fault.c - preloaded into a process under test: spoils positioned reads of one file.
//
// read_fault_set() chooses the file, what happens to its reads, how many are left alone first and how many
// are spoilt. All other reads, and those of other files, go through untouched. Linux, glibc.

#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum mode {
    MODE_OFF       = 0,
    MODE_EIO       = 1, // fails
    MODE_EOF       = 2, // nothing there
    MODE_SHORT     = 3, // at most half of what was asked for, in whole blocks, but something
    MODE_EINTR     = 4, // interrupted before anything was read
    MODE_FAIL_HOLD = 5, // one read fails; after it other threads' reads wait for one by the main thread
};

#define BLOCK 512
#define HOLD_SECONDS 2 // in case the main thread has no read to do

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  opened = PTHREAD_COND_INITIALIZER;

// guarded by mutex
static int   g_mode;
static dev_t g_dev;
static ino_t g_ino;
static int   g_after;   // reads to leave alone first
static int   g_times;   // reads to spoil; < 0: all
static int   g_spoilt;  // since the last read_fault_set
static int   g_holding; // reads by other threads wait

// returns how many reads were spoilt since the last call, or -1 if there is no such file
int read_fault_set(const char * path, int mode, int after, int times) {
    struct stat st;
    if (stat(path, &st) != 0) {
        return -1;
    }
    pthread_mutex_lock(&mutex);
    const int spoilt = g_spoilt;
    g_mode    = mode;
    g_dev     = st.st_dev;
    g_ino     = st.st_ino;
    g_after   = after;
    g_times   = times;
    g_spoilt  = 0;
    g_holding = 0;
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&mutex);
    return spoilt;
}

// what to do with a read of fd
static int judge(int fd) {
    struct stat st;
    if (fstat(fd, &st) != 0) {
        return MODE_OFF;
    }
    int mode = MODE_OFF;
    pthread_mutex_lock(&mutex);
    if (g_mode != MODE_OFF && st.st_dev == g_dev && st.st_ino == g_ino) {
        if (g_mode == MODE_FAIL_HOLD && g_spoilt > 0) {
            if (gettid() == getpid()) {
                g_holding = 0;
                pthread_cond_broadcast(&opened);
            }
            struct timespec until;
            clock_gettime(CLOCK_REALTIME, &until);
            until.tv_sec += HOLD_SECONDS;
            while (g_holding && pthread_cond_timedwait(&opened, &mutex, &until) == 0) {
            }
        } else if (g_after > 0) {
            g_after--;
        } else if (g_times != 0) {
            mode = g_mode == MODE_FAIL_HOLD ? MODE_EIO : g_mode;
            g_holding = g_mode == MODE_FAIL_HOLD;
            g_spoilt++;
            if (g_times > 0) {
                g_times--;
            }
            if (g_mode == MODE_EINTR) {
                g_after = 1; // the next try succeeds
            }
        }
    }
    pthread_mutex_unlock(&mutex);
    return mode;
}

typedef ssize_t (*pread_t)(int, void *, size_t, off_t);

static ssize_t spoil(int fd, void * data, size_t size, off_t offset) {
    static pread_t real;
    if (!real) {
        real = (pread_t) dlsym(RTLD_NEXT, "pread64");
    }
    switch (judge(fd)) {
        case MODE_EIO:
            errno = EIO;
            return -1;
        case MODE_EINTR:
            errno = EINTR;
            return -1;
        case MODE_EOF:
            return 0;
        case MODE_SHORT:
            if (size >= 2*BLOCK) {
                size = size/2/BLOCK*BLOCK;
            }
            break;
        default:
            break;
    }
    return real(fd, data, size, offset);
}

ssize_t pread(int fd, void * data, size_t size, off_t offset) {
    return spoil(fd, data, size, offset);
}

ssize_t pread64(int fd, void * data, size_t size, off64_t offset) {
    return spoil(fd, data, size, offset);
}

// what a fortified build calls
ssize_t __pread_chk(int fd, void * data, size_t size, off_t offset, size_t room) {
    (void) room;
    return spoil(fd, data, size, offset);
}

ssize_t __pread64_chk(int fd, void * data, size_t size, off64_t offset, size_t room) {
    (void) room;
    return spoil(fd, data, size, offset);
}

// one buffer of a vector is a short read, which callers have to expect anyway
ssize_t preadv(int fd, const struct iovec * v, int n, off_t offset) {
    return n > 0 ? spoil(fd, v[0].iov_base, v[0].iov_len, offset) : 0;
}

ssize_t preadv64(int fd, const struct iovec * v, int n, off64_t offset) {
    return n > 0 ? spoil(fd, v[0].iov_base, v[0].iov_len, offset) : 0;
}
