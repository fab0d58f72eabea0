#if !defined(_WIN32)

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include "store/mobile-os.h"

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

// the path behind a descriptor, for opening it again and for error texts
static std::string mobile_fd_path(int fd) {
    char path[PATH_MAX + 1] = {};
#if defined(__linux__)
    const std::string link = "/proc/self/fd/" + std::to_string(fd);
    const ssize_t n = readlink(link.c_str(), path, PATH_MAX);
    return n > 0 ? std::string(path, n) : link;
#elif defined(__APPLE__)
    return fcntl(fd, F_GETPATH, path) == 0 ? std::string(path) : std::string();
#else
    (void) fd;
    return std::string(path);
#endif
}

#if defined(__linux__)
// the smallest alignment at which this file system takes an unbuffered read of fd; 0: none
static uint32_t mobile_probe_align(int fd) {
    void * buf = nullptr;
    if (posix_memalign(&buf, 4096, 8192) != 0) {
        return 0;
    }
    uint32_t found = 0;
    for (uint32_t align : { 512u, 4096u }) {
        if (pread(fd, (char *) buf + align % 4096, align, align) >= 0) {
            found = align;
            break;
        }
    }
    free(buf);
    return found;
}
#endif

bool mobile_file_open(mobile_file & file, int fd, enum mobile_io io, std::string & err) {
    file.name = mobile_fd_path(fd);

    struct stat st;
    if (fstat(fd, &st) != 0) {
        err = file.name + ": " + strerror(errno);
        return false;
    }
    file.size = st.st_size;

    // through the descriptor, so that a file renamed or replaced meanwhile is still the same file
#if defined(__linux__)
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
#else
    const std::string path = file.name;
#endif

    if (io != MOBILE_IO_BUFFERED) {
#if defined(__linux__)
        const int direct = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
        if (direct >= 0) {
            const uint32_t align = mobile_probe_align(direct);
            if (align > 0) {
                file.handle = direct;
                file.align  = align;
                file.direct = true;
                return true;
            }
            close(direct);
        }
#elif defined(__APPLE__)
        const int direct = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (direct >= 0) {
            if (fcntl(direct, F_NOCACHE, 1) == 0) {
                file.handle = direct;
                file.align  = 4096;
                file.direct = true;
                return true;
            }
            close(direct);
        }
#endif
        if (io == MOBILE_IO_DIRECT) {
            err = file.name + ": the file system refuses unbuffered reads; use buffered ones";
            return false;
        }
    }

    const int buffered = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (buffered < 0) {
        err = file.name + ": " + strerror(errno);
        return false;
    }
    file.handle = buffered;
    return true;
}

void mobile_file_close(mobile_file & file) {
    if (file.handle >= 0) {
        close((int) file.handle);
        file.handle = -1;
    }
}

int mobile_file_read(const mobile_file & file, uint64_t offset, uint64_t size, void * dst, uint64_t & n_read) {
    n_read = 0;
    while (n_read < size) {
        // an unbuffered read covers whole blocks: what lies behind `size` is padding in dst
        const uint64_t left = size - n_read;
        const uint64_t want = file.direct ? (left + file.align - 1) / file.align * file.align : left;
        const ssize_t  n    = pread((int) file.handle, (char *) dst + n_read, want, (off_t) (offset + n_read));
        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno;
        }
        if (n == 0) {
            break; // end of the file
        }
        n_read += n;
        if (file.direct && n_read < size && n_read % file.align != 0) {
            break; // an unbuffered read stops off its alignment at the end of the file only
        }
    }
    if (n_read > size) {
        n_read = size;
    }
#if defined(__linux__)
    if (!file.direct) {
        posix_fadvise((int) file.handle, (off_t) offset, (off_t) size, POSIX_FADV_DONTNEED);
    }
#endif
    return 0;
}

static void * mobile_mmap(size_t size, int prot) {
    void * addr = mmap(nullptr, size, prot, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    return addr == MAP_FAILED ? nullptr : addr;
}

void * mobile_reserve(size_t size) {
    return mobile_mmap(size, PROT_NONE);
}

void * mobile_map(size_t size) {
    return mobile_mmap(size, PROT_READ | PROT_WRITE);
}

bool mobile_take(void * addr, size_t size) {
    (void) addr;
    (void) size;
    return true; // MAP_NORESERVE: nothing is promised, so nothing is counted
}

void mobile_huge_pages(void * addr, size_t size, bool on) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(addr, size, on ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
    (void) addr;
    (void) size;
    (void) on;
#endif
}

void * mobile_zeros(size_t size) {
    return mobile_mmap(size, PROT_READ);
}

#if defined(__linux__)
static int64_t thread_us() {
    timespec t = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec*1000000 + t.tv_nsec/1000;
}
#endif

bool mobile_prefault(void * addr, size_t size, int64_t & spent_us) {
#if defined(__linux__)
    const int     populate_write = 23; // MADV_POPULATE_WRITE, which older headers lack
    const int64_t start = thread_us();
    const bool    ok    = madvise(addr, size, populate_write) == 0;
    spent_us = thread_us() - start;
    return ok;
#else
    (void) addr;
    (void) size;
    (void) spent_us;
    return false;
#endif
}

void mobile_discard(void * addr, size_t size) {
    const uintptr_t page  = mobile_page_size();
    const uintptr_t begin = ((uintptr_t) addr + page - 1)/page*page;
    const uintptr_t end   = ((uintptr_t) addr + size)/page*page;
    if (begin >= end) {
        return;
    }
    addr = (void *) begin;
    size = end - begin;
#if defined(__APPLE__)
    // MADV_FREE would keep the pages charged until there is pressure: map fresh ones over them
    mmap(addr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_FIXED, -1, 0);
#else
    madvise(addr, size, MADV_DONTNEED);
#endif
}

void mobile_unmap(void * addr, size_t size) {
    if (addr) {
        munmap(addr, size);
    }
}

size_t mobile_page_size() {
    return (size_t) sysconf(_SC_PAGESIZE);
}

#endif // !_WIN32
