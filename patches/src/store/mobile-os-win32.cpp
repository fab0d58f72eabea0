#if defined(_WIN32)

#include "store/mobile-os.h"

#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#include <io.h>

#include <algorithm>
#include <cerrno>
#include <cwchar>

// one ReadFile asks for no more: its size is a DWORD, and the driver locks as much memory
static constexpr uint64_t READ_BYTES = 64*1024*1024;

// zeros are views of one section, one behind the other: their pages are shared
static constexpr size_t ZEROS_VIEW = 16*1024*1024; // a multiple of the granularity of addresses, 64 KiB
static constexpr int    ZEROS_TRIES = 16;

static std::string utf8_of(const std::wstring & wide) {
    const int n = WideCharToMultiByte(CP_UTF8, 0, wide.data(), (int) wide.size(), nullptr, 0, nullptr, nullptr);
    std::string text(n, '\0');
    WideCharToMultiByte(CP_UTF8, 0, wide.data(), (int) wide.size(), &text[0], n, nullptr, nullptr);
    return text;
}

static bool starts_with(const std::wstring & text, const wchar_t * prefix) {
    return text.compare(0, wcslen(prefix), prefix) == 0;
}

// for error texts, as a person writes it: without the prefix that lifts the limit of 260 characters
static std::string name_of(HANDLE file) {
    std::wstring path(GetFinalPathNameByHandleW(file, nullptr, 0, FILE_NAME_NORMALIZED), L'\0'); // with the end
    const DWORD n = path.empty() ? 0 : GetFinalPathNameByHandleW(file, &path[0], (DWORD) path.size(), FILE_NAME_NORMALIZED);
    if (n == 0 || n >= path.size()) {
        return "(file)";
    }
    path.resize(n);
    if (starts_with(path, L"\\\\?\\UNC\\")) {
        path.replace(0, 8, L"\\\\");
    } else if (starts_with(path, L"\\\\?\\")) {
        path.erase(0, 4);
    }
    return utf8_of(path);
}

static int errno_of(DWORD error) {
    switch (error) {
        case ERROR_HANDLE_EOF:
            return 0;
        case ERROR_NOT_ENOUGH_MEMORY:
        case ERROR_OUTOFMEMORY:
        case ERROR_NO_SYSTEM_RESOURCES:
        case ERROR_WORKING_SET_QUOTA:
        case ERROR_COMMITMENT_LIMIT:
            return ENOMEM;
        case ERROR_ACCESS_DENIED:
        case ERROR_LOCK_VIOLATION:
            return EACCES;
        case ERROR_INVALID_HANDLE:
            return EBADF;
        case ERROR_INVALID_PARAMETER:
            return EINVAL; // an unbuffered read off the disk's blocks
        case ERROR_NOT_READY:
        case ERROR_DEV_NOT_EXIST:
        case ERROR_DEVICE_NOT_CONNECTED:
        case ERROR_BAD_NETPATH:
        case ERROR_NETNAME_DELETED:
        case ERROR_UNEXP_NET_ERR:
            return ENODEV; // pulled out, or the network's
        default:
            return EIO;
    }
}

// whether this file system takes unbuffered reads of blocks of file.align bytes
static bool takes_reads(const mobile_file & file) {
    void * block = VirtualAlloc(nullptr, file.align, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
    if (!block) {
        return false;
    }
    uint64_t n_read = 0;
    const int status = mobile_file_read(file, 0, file.align, block, n_read);
    VirtualFree(block, 0, MEM_RELEASE);
    return status == 0;
}

bool mobile_file_open(mobile_file & file, int fd, enum mobile_io io, std::string & err) {
    const HANDLE given = (HANDLE) _get_osfhandle(fd);
    file.name = name_of(given);

    LARGE_INTEGER size;
    if (!GetFileSizeEx(given, &size)) {
        err = file.name + ": cannot tell its size";
        return false;
    }
    file.size = (uint64_t) size.QuadPart;

    // opened again through the handle, so that a file renamed meanwhile is still the same file
    const DWORD share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    if (io != MOBILE_IO_BUFFERED) {
        const HANDLE direct = ReOpenFile(given, GENERIC_READ, share, FILE_FLAG_NO_BUFFERING | FILE_FLAG_OVERLAPPED);
        if (direct != INVALID_HANDLE_VALUE) {
            file.handle = (intptr_t) direct;
            file.align  = 4096; // sectors are of 512 or of 4096 bytes
            file.direct = true;
            if (takes_reads(file)) {
                return true;
            }
            mobile_file_close(file);
            file.align  = mobile_file().align;
            file.direct = false;
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
    ov.hEvent = CreateEventA(nullptr, TRUE, FALSE, nullptr); // the handle is shared: it would tell of any thread's read
    if (!ov.hEvent) {
        return ENOMEM;
    }
    int status = 0;
    while (n_read < size) {
        const uint64_t left = std::min(size - n_read, READ_BYTES);
        const uint64_t want = file.direct ? (left + file.align - 1) / file.align * file.align : left;
        ov.Offset     = (DWORD) (offset + n_read);
        ov.OffsetHigh = (DWORD) ((offset + n_read) >> 32);
        DWORD n = 0;
        if (!ReadFile((HANDLE) file.handle, (char *) dst + n_read, (DWORD) want, nullptr, &ov) &&
                GetLastError() != ERROR_IO_PENDING) {
            status = errno_of(GetLastError());
            break;
        }
        if (!GetOverlappedResult((HANDLE) file.handle, &ov, &n, TRUE)) {
            status = errno_of(GetLastError());
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
    return VirtualAlloc(nullptr, size, MEM_RESERVE, PAGE_READWRITE);
}

bool mobile_take(void * addr, size_t size) {
    return VirtualAlloc(addr, size, MEM_COMMIT, PAGE_READWRITE) != nullptr;
}

void mobile_huge_pages(void *, size_t, bool) {}

static void unmap_zeros(char * base, size_t size) {
    for (size_t offset = 0; offset < size; offset += ZEROS_VIEW) {
        UnmapViewOfFile(base + offset);
    }
}

// committed memory that is only read would count in full, and a model's weights may be larger than all that may be committed
void * mobile_zeros(size_t size) {
    const DWORD  view    = (DWORD) std::min(size, ZEROS_VIEW);
    const HANDLE section = CreateFileMappingW(INVALID_HANDLE_VALUE, nullptr, PAGE_READWRITE, 0, view, nullptr);
    if (!section) {
        return nullptr;
    }
    char * base = nullptr;
    for (int i = 0; i < ZEROS_TRIES && !base; ++i) {
        base = (char *) mobile_reserve(size);
        if (!base) {
            break;
        }
        // another thread may be given part of it in between
        VirtualFree(base, 0, MEM_RELEASE);
        size_t mapped = 0;
        while (mapped < size && MapViewOfFileEx(section, FILE_MAP_READ, 0, 0, std::min(size - mapped, ZEROS_VIEW), base + mapped)) {
            mapped += ZEROS_VIEW;
        }
        if (mapped < size) {
            unmap_zeros(base, mapped);
            base = nullptr;
        }
    }
    CloseHandle(section); // its views keep it
    return base;
}

bool mobile_prefault(void *, size_t, int64_t &) {
    return false;
}

void mobile_discard(void * addr, size_t size) {
    const uintptr_t page  = mobile_page_size();
    const uintptr_t begin = ((uintptr_t) addr + page - 1)/page*page;
    const uintptr_t end   = ((uintptr_t) addr + size)/page*page;
    if (begin < end) {
        VirtualFree((void *) begin, end - begin, MEM_DECOMMIT);
    }
}

void mobile_unmap(void * addr, size_t size) {
    MEMORY_BASIC_INFORMATION info;
    if (!addr || !VirtualQuery(addr, &info, sizeof(info))) {
        return;
    }
    if (info.Type == MEM_MAPPED) {
        unmap_zeros((char *) addr, size);
    } else {
        VirtualFree(addr, 0, MEM_RELEASE);
    }
}

size_t mobile_page_size() {
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwPageSize;
}

#endif // _WIN32
