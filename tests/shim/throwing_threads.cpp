// throwing_threads.cpp - preloaded into a process under test: what the engine's own threads call throws.
//
// throwing_threads_arm() chooses what throws, and how often. The thread that arms is the one that computes. Of reads it
// also chooses who throws: the other's reads wait until one has thrown, so that it is not left to chance. Linux, glibc.

#include <dlfcn.h>
#include <pthread.h>
#include <sys/types.h>
#include <time.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

struct ggml_backend;
struct ggml_tensor;

enum what { NOTHING, READ, OWN_READ, MEMORY, UPLOAD };

static constexpr int WAIT_SECONDS = 300; // in case nobody has a read to do

static std::atomic<int> g_what   = NOTHING;
static std::atomic<int> g_times  = 0;
static std::atomic<int> g_thrown = 0;
static pthread_t        g_armed_by;

static pthread_mutex_t mutex  = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  opened = PTHREAD_COND_INITIALIZER;

static bool is_own() { return pthread_equal(pthread_self(), g_armed_by) != 0; }

// returns how often it threw since the last call
extern "C" int throwing_threads_arm(int what, int times) {
    g_armed_by = pthread_self();
    g_what  = NOTHING;
    g_times = times;
    const int thrown = g_thrown.exchange(0);
    g_what  = what;
    return thrown;
}

static void throw_if(int what) {
    if (g_what != what || g_times.fetch_sub(1) <= 0) {
        return;
    }
    g_what = NOTHING; // what is thrown asks for memory as well
    std::logic_error planted("planted");
    pthread_mutex_lock(&mutex);
    g_thrown++;
    if (g_times > 0) {
        g_what = what;
    }
    pthread_cond_broadcast(&opened);
    pthread_mutex_unlock(&mutex);
    throw planted;
}

static void wait_for_the_other() {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_SECONDS;
    pthread_mutex_lock(&mutex);
    while (g_thrown == 0 && pthread_cond_timedwait(&opened, &mutex, &until) == 0) {
    }
    pthread_mutex_unlock(&mutex);
}

static ssize_t read_at(int fd, void * data, size_t size, off_t offset) {
    static auto * real = (ssize_t (*)(int, void *, size_t, off_t)) dlsym(RTLD_NEXT, "pread64");
    const int what = g_what;
    if (what == READ || what == OWN_READ) {
        if (is_own() == (what == OWN_READ)) {
            throw_if(what);
        } else {
            wait_for_the_other();
        }
    }
    return real(fd, data, size, offset);
}

extern "C" ssize_t pread      (int fd, void * data, size_t size, off_t   offset) { return read_at(fd, data, size, offset); }
extern "C" ssize_t pread64    (int fd, void * data, size_t size, off64_t offset) { return read_at(fd, data, size, offset); }
// what a fortified build calls
extern "C" ssize_t __pread_chk  (int fd, void * data, size_t size, off_t   offset, size_t) { return read_at(fd, data, size, offset); }
extern "C" ssize_t __pread64_chk(int fd, void * data, size_t size, off64_t offset, size_t) { return read_at(fd, data, size, offset); }

extern "C" void ggml_backend_tensor_set_async(ggml_backend * backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    using upload = void (*)(ggml_backend *, ggml_tensor *, const void *, size_t, size_t);
    static auto * real = (upload) dlsym(dlopen("libggml-base.so", RTLD_NOLOAD | RTLD_LAZY), "ggml_backend_tensor_set_async");
    if (!is_own()) {
        throw_if(UPLOAD);
    }
    real(backend, tensor, data, offset, size);
}

void * operator new(std::size_t size) {
    if (g_what == MEMORY && !is_own()) {
        throw_if(MEMORY);
    }
    void * p = std::malloc(size > 0 ? size : 1);
    if (!p) {
        throw std::bad_alloc();
    }
    return p;
}

void operator delete(void * p) noexcept { std::free(p); }
void operator delete(void * p, std::size_t) noexcept { std::free(p); }
