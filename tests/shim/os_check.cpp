// os_check.cpp - what the store has of the operating system, held against what mobile-os.h promises: positioned reads of a
// sparse file of more than 4 GiB, names, errors, and memory that comes and goes.
//
//     os_check FOLDER

#include "stress.h"

#include "store/mobile-os.h"

#include <fcntl.h>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <io.h>
#include <windows.h>
#include <winioctl.h>
#else
#define O_BINARY 0
#endif

static constexpr uint64_t GIB   = 1ull << 30;
static constexpr uint64_t BLOCK = 4096; // of every file system's unbuffered reads
static constexpr uint64_t TAIL  = 1000; // the file ends off every alignment
static constexpr uint64_t FILE_BYTES  = 4*GIB + 64*BLOCK + TAIL;

#define CHECK(fact) do { if (!(fact)) { stress_fail("line %d: %s", __LINE__, #fact); } } while (0)

static uint8_t byte_at(uint64_t offset) {
    return (uint8_t) (((offset ^ (offset >> 11))*0x9e3779b97f4a7c15u) >> 56);
}

#if defined(_WIN32)
static std::wstring wide_of(const std::string & text) {
    std::wstring wide(MultiByteToWideChar(CP_UTF8, 0, text.data(), (int) text.size(), nullptr, 0), L'\0');
    MultiByteToWideChar(CP_UTF8, 0, text.data(), (int) text.size(), &wide[0], (int) wide.size());
    return wide;
}

static int open_file(const std::string & path) {
    return _wopen(wide_of(path).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_BINARY, 0600);
}

static void make_sparse(int fd) {
    DWORD n = 0;
    DeviceIoControl((HANDLE) _get_osfhandle(fd), FSCTL_SET_SPARSE, nullptr, 0, nullptr, 0, &n, nullptr);
}

static bool write_at(int fd, uint64_t offset, const void * data, size_t size) {
    return _lseeki64(fd, (int64_t) offset, SEEK_SET) >= 0 && write(fd, data, (unsigned) size) == (int) size;
}

static bool truncate_to(int fd, uint64_t size) {
    return _chsize_s(fd, (int64_t) size) == 0;
}

static void remove_file(const std::string & path) {
    _wunlink(wide_of(path).c_str());
}

// of this process that the system has promised memory for
static uint64_t promised() {
    uint64_t bytes = 0;
    MEMORY_BASIC_INFORMATION info;
    for (char * at = nullptr; VirtualQuery(at, &info, sizeof(info)); at = (char *) info.BaseAddress + info.RegionSize) {
        bytes += info.State == MEM_COMMIT && info.Type == MEM_PRIVATE ? info.RegionSize : 0;
    }
    return bytes;
}
#else
static int  open_file(const std::string & path) { return open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600); }
static void make_sparse(int) {}
static bool write_at(int fd, uint64_t offset, const void * data, size_t size) { return pwrite(fd, data, size, (off_t) offset) == (ssize_t) size; }
static bool truncate_to(int fd, uint64_t size) { return ftruncate(fd, (off_t) size) == 0; }
static void remove_file(const std::string & path) { unlink(path.c_str()); }
#endif

// the places that are written: the file's ends, and both sides of 4 GiB
static const std::vector<std::pair<uint64_t, uint64_t>> WRITTEN = {
    { 0, 16*BLOCK }, { 4*GIB - 16*BLOCK, 32*BLOCK }, { 4*GIB + 32*BLOCK, FILE_BYTES - 4*GIB - 32*BLOCK },
};

static void write_file(int fd) {
    make_sparse(fd);
    for (const auto & [begin, size] : WRITTEN) {
        std::vector<uint8_t> bytes(size);
        for (uint64_t i = 0; i < size; ++i) {
            bytes[i] = byte_at(begin + i);
        }
        CHECK(write_at(fd, begin, bytes.data(), bytes.size()));
    }
}

class pages {
public:
    explicit pages(size_t size) : size(size), data((uint8_t *) mobile_map(size)) { CHECK(data && mobile_take(data, size)); }
    ~pages() { mobile_unmap(data, size); }
    const size_t    size;
    uint8_t * const data;
};

static void read_places(const mobile_file & file, uint64_t seed, int n) {
    pages room(64*BLOCK);
    stress_dice dice(seed);
    for (int i = 0; i < n; ++i) {
        const auto & [begin, size] = WRITTEN[dice.below((uint32_t) WRITTEN.size())];
        const uint64_t offset = begin + dice.below((uint32_t) (size/BLOCK))*BLOCK;
        const uint64_t wanted = 1 + dice.below((uint32_t) (begin + size - offset));
        uint64_t n_read = 0;
        CHECK(mobile_file_read(file, offset, wanted, room.data, n_read) == 0);
        CHECK(n_read == wanted);
        for (uint64_t b = 0; b < wanted; ++b) {
            if (room.data[b] != byte_at(offset + b)) {
                stress_fail("byte %llu is another one", (unsigned long long) (offset + b));
            }
        }
    }
}

static void check_reads(int fd, const std::string & name, enum mobile_io io) {
    mobile_file file;
    std::string err;
    if (!mobile_file_open(file, fd, io, err)) {
        stress_fail("%s", err.c_str());
    }
    CHECK(file.size == FILE_BYTES);
    CHECK(io != MOBILE_IO_DIRECT || file.direct);
    CHECK(io != MOBILE_IO_BUFFERED || !file.direct);
    CHECK(file.name.size() >= name.size() && file.name.compare(file.name.size() - name.size(), name.size(), name) == 0);
    read_places(file, 1, 100);

    std::vector<std::thread> threads;
    for (uint64_t seed = 2; seed < 8; ++seed) {
        threads.emplace_back(read_places, std::cref(file), seed, 50);
    }
    for (auto & thread : threads) {
        thread.join();
    }

    // the end of the file, and behind it
    pages room(16*BLOCK);
    uint64_t n_read = 0;
    CHECK(mobile_file_read(file, FILE_BYTES - TAIL, 8*BLOCK, room.data, n_read) == 0 && n_read == TAIL);
    CHECK(mobile_file_read(file, FILE_BYTES - TAIL + 4*BLOCK, BLOCK, room.data, n_read) == 0 && n_read == 0);

    mobile_file closed = file;
    mobile_file_close(file);
    CHECK(file.handle == -1);
    CHECK(mobile_file_read(file, 0, BLOCK, room.data, n_read) != 0 && n_read == 0);
    CHECK(mobile_file_read(closed, 0, BLOCK, room.data, n_read) != 0 && n_read == 0);
}

static void check_shorter(int fd) {
    mobile_file file;
    std::string err;
    CHECK(mobile_file_open(file, fd, MOBILE_IO_AUTO, err));
    CHECK(truncate_to(fd, 2*BLOCK));
    pages room(16*BLOCK);
    uint64_t n_read = 0;
    CHECK(mobile_file_read(file, BLOCK, 4*BLOCK, room.data, n_read) == 0 && n_read == BLOCK);
    CHECK(mobile_file_read(file, 4*GIB, BLOCK, room.data, n_read) == 0 && n_read == 0);
    mobile_file_close(file);
}

static bool all_are(const uint8_t * data, size_t size, uint8_t value) {
    return size == 0 || (data[0] == value && memcmp(data, data + 1, size - 1) == 0);
}

static void check_memory() {
    const size_t page = mobile_page_size(), size = 1024*page;
    uint8_t * data = (uint8_t *) mobile_map(size);
    CHECK(data);
    // three neighbours off the pages' ends
    const size_t slot = 5*page + page/2;
    for (int i = 0; i < 3; ++i) {
        CHECK(mobile_take(data + i*slot, slot));
        CHECK(all_are(data + i*slot + (i > 0 ? page : 0), slot - page, 0));
        memset(data + i*slot, i + 1, slot);
    }
    mobile_discard(data + slot, slot);
    CHECK(all_are(data, slot, 1));
    CHECK(all_are(data + 2*slot, slot, 3));
    CHECK(mobile_take(data + slot, slot));
    CHECK(all_are(data + 6*page, 4*page, 0)); // the whole pages of it
    CHECK(all_are(data, slot, 1));
    mobile_discard(data + slot, page/2); // no whole page
    CHECK(all_are(data + 2*slot, slot, 3));
    mobile_unmap(data, size);

    const size_t n_zeros = 40*1024*1024 + 3*page;
    const uint8_t * zeros = (const uint8_t *) mobile_zeros(n_zeros);
    CHECK(zeros && all_are(zeros, n_zeros, 0));
    mobile_unmap((void *) zeros, n_zeros);
}

// what is not taken is not promised, and zeros take nothing: 256 GiB of each are no matter
static void check_promises() {
#if defined(_WIN32)
    const size_t   much  = 256*GIB, some = 1024*1024;
    const uint64_t slack = some/2; // of the heap's
    const uint64_t before = promised();
    char * data = (char *) mobile_map(much);
    CHECK(data);
    CHECK(promised() < before + slack);
    CHECK(mobile_take(data + GIB, some));
    CHECK(promised() >= before + some && promised() < before + some + slack);
    mobile_discard(data + GIB, some);
    CHECK(promised() < before + slack);
    mobile_unmap(data, much);
    const size_t n_zeros = 2*GIB;
    void * zeros = mobile_zeros(n_zeros);
    CHECK(zeros && promised() < before + slack);
    mobile_unmap(zeros, n_zeros);
    MEMORY_BASIC_INFORMATION info;
    CHECK(VirtualQuery((char *) zeros + GIB, &info, sizeof(info)) && info.State == MEM_FREE);
#endif
}

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    check_memory();
    check_promises();
    const std::string name = "Gr\xc3\xb6\xc3\x9f" "e \xe6\xa8\xa1\xe5\x9e\x8b.bin"; // UTF-8, in no code page of one byte
    const std::string path = std::string(argv[1]) + "/" + name;
    const int fd = open_file(path);
    CHECK(fd >= 0);
    write_file(fd);
    for (enum mobile_io io : { MOBILE_IO_AUTO, MOBILE_IO_DIRECT, MOBILE_IO_BUFFERED }) {
        check_reads(fd, name, io);
    }
    check_shorter(fd);
    close(fd);
    remove_file(path);
    mobile_file file;
    std::string err;
    CHECK(!mobile_file_open(file, -1, MOBILE_IO_AUTO, err) && !err.empty());
    puts("ok");
    return 0;
}
