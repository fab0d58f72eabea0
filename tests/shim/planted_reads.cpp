#include "planted_reads.h"

#include "stress.h"

#include <condition_variable>
#include <mutex>
#include <stdexcept>

#define mobile_file_read real_file_read
// one of them is empty
#include "store/mobile-os-posix.cpp"
#include "store/mobile-os-win32.cpp"
#undef mobile_file_read

static std::atomic<uint32_t> g_delayed  = 0;
static std::atomic<uint32_t> g_failed   = 0;
static std::atomic<uint32_t> g_thrown   = 0;
static std::atomic<uint64_t> g_seed     = 0;
static std::atomic<uint64_t> g_n_faults = 0;

static std::mutex              g_mutex;
static std::condition_variable g_changed;
// guarded by it
static bool                  g_held    = false;
static int                   g_allowed = 0; // < 0: all
static std::vector<uint64_t> g_log;

void planted_reads_set(uint32_t delayed, uint32_t failed, uint32_t thrown, uint64_t seed) {
    g_delayed = delayed;
    g_failed  = failed;
    g_thrown  = thrown;
    g_seed    = seed;
}

uint64_t planted_reads_n_faults() {
    return g_n_faults;
}

void planted_reads_hold() {
    std::lock_guard<std::mutex> lock(g_mutex);
    g_held    = true;
    g_allowed = 0;
    g_log.clear();
}

void planted_reads_allow(int n) {
    std::lock_guard<std::mutex> lock(g_mutex);
    g_allowed = n < 0 ? -1 : g_allowed + n;
    g_changed.notify_all();
}

void planted_reads_wait(int n) {
    std::unique_lock<std::mutex> lock(g_mutex);
    g_changed.wait(lock, [n] { return (int) g_log.size() >= n; });
}

std::vector<uint64_t> planted_reads_log() {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_log;
}

static void wait_until_allowed(uint64_t offset) {
    std::unique_lock<std::mutex> lock(g_mutex);
    if (!g_held) {
        return;
    }
    g_log.push_back(offset);
    g_changed.notify_all();
    g_changed.wait(lock, [] { return g_allowed != 0; });
    g_allowed -= g_allowed > 0;
}

int mobile_file_read(const mobile_file & file, uint64_t offset, uint64_t size, void * dst, uint64_t & n_read) {
    wait_until_allowed(offset);
    stress_dice dice(g_seed.fetch_add(1));
    if (dice.one_in(g_delayed)) {
        stress_delay(dice);
    }
    if (dice.one_in(g_thrown)) {
        g_n_faults++;
        throw std::runtime_error("planted");
    }
    if (dice.one_in(g_failed)) {
        g_n_faults++;
        n_read = 0;
        return dice.one_in(2) ? EIO : 0; // or the end of the file
    }
    return real_file_read(file, offset, size, dst, n_read);
}
