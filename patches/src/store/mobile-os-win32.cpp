#if defined(_WIN32)

#include "store/mobile-os.h"

#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#include <io.h>

#include <cerrno>

bool mobile_file_open(mobile_file & file, int fd, enum mobile_io io, std::string & err) {
    const HANDLE given = (HANDLE) _get_osfhandle(fd);

    char path[MAX_PATH + 1] = {};
    const DWORD n = GetFinalPathNameByHandleA(given, path, MAX_PATH, FILE_NAME_NORMALIZED);
    file.name = n > 0 && n <= MAX_PATH ? std::string(path, n) : std::string("(file)");

    LARGE_INTEGER size;
    if (!GetFileSizeEx(given, &size)) {
        err = file.name + ": cannot tell its size";
        return false;
    }
    file.size = (uint64_t) size.QuadPart;

    const DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    if (io != MOBILE_IO_BUFFERED) {
        const HANDLE direct = ReOpenFile(given, GENERIC_READ, share, FILE_FLAG_NO_BUFFERING | FILE_FLAG_OVERLAPPED);
        if (direct != INVALID_HANDLE_VALUE) {
            file.handle = (intptr_t) direct;
            file.align  = 4096;
            file.direct = true;
            return true;
        }
        if (io == MOBILE_IO_DIRECT) {
            err = file.name + ": the file system refuses unbuffered reads; use buffered ones";
            return false;
        }
    }

    const HANDLE buffered = ReOpenFile(given, GENERIC_READ, share, FILE_FLAG_RANDOM_ACCESS | FILE_FLAG_OVERLAPPED);
    if (buffered == INVALID_HANDLE_VALUE) {
        err = file.name + ": cannot be opened again";
        return false;
    }
    file.handle = (intptr_t) buffered;
    return true;
}

void mobile_file_close(mobile_file & file) {
    if (file.handle != -1) {
        CloseHandle((HANDLE) file.handle);
        file.handle = -1;
    }
}

int mobile_file_read(const mobile_file & file, uint64_t offset, uint64_t size, void * dst, uint64_t & n_read) {
    n_read = 0;
    OVERLAPPED ov = {};
    ov.hEvent = CreateEventA(nullptr, TRUE, FALSE, nullptr);
    if (!ov.hEvent) {
        return ENOMEM;
    }
    int status = 0;
    while (n_read < size) {
        const uint64_t left = size - n_read;
        const uint64_t want = file.direct ? (left + file.align - 1) / file.align * file.align : left;
        ov.Offset     = (DWORD) (offset + n_read);
        ov.OffsetHigh = (DWORD) ((offset + n_read) >> 32);
        DWORD n = 0;
        if (!ReadFile((HANDLE) file.handle, (char *) dst + n_read, (DWORD) want, nullptr, &ov) &&
                GetLastError() != ERROR_IO_PENDING) {
            status = GetLastError() == ERROR_HANDLE_EOF ? 0 : EIO;
            break;
        }
        if (!GetOverlappedResult((HANDLE) file.handle, &ov, &n, TRUE)) {
            status = GetLastError() == ERROR_HANDLE_EOF ? 0 : EIO;
            break;
        }
        if (n == 0) {
            break;
        }
        n_read += n;
        if (file.direct && n_read < size && n_read % file.align != 0) {
            break;
        }
    }
    CloseHandle(ov.hEvent);
    if (n_read > size) {
        n_read = size;
    }
    return status;
}

void * mobile_reserve(size_t size) {
    return VirtualAlloc(nullptr, size, MEM_RESERVE, PAGE_NOACCESS);
}

void * mobile_map(size_t size) {
    return VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void mobile_huge_pages(void *, size_t, bool) {}

void * mobile_zeros(size_t size) {
    return VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READONLY);
}

bool mobile_prefault(void *, size_t, int64_t &) {
    return false;
}

void mobile_discard(void * addr, size_t size) {
    VirtualFree(addr, size, MEM_DECOMMIT);
    VirtualAlloc(addr, size, MEM_COMMIT, PAGE_READWRITE);
}

void mobile_unmap(void * addr, size_t) {
    if (addr) {
        VirtualFree(addr, 0, MEM_RELEASE);
    }
}

size_t mobile_page_size() {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

#endif // _WIN32
