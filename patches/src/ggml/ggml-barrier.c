#include "ggml-barrier.h"

#include <stdbool.h>
#include <stdint.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <limits.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#endif

// who is about to sleep or sleeps. seq_cst here and at `word`: either the last thread sees the sleeper, or the
// sleeper sees that the word has changed
static atomic_int g_sleepers = 0;

#if defined(__linux__)

static void sleep_while(atomic_int * word, int seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void wake_all(atomic_int * word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

#else

#if defined(_WIN32)
static SRWLOCK            g_lock = SRWLOCK_INIT;
static CONDITION_VARIABLE g_come = CONDITION_VARIABLE_INIT;
#define LOCK()   AcquireSRWLockExclusive(&g_lock)
#define UNLOCK() ReleaseSRWLockExclusive(&g_lock)
#define WAIT()   SleepConditionVariableSRW(&g_come, &g_lock, INFINITE, 0)
#define WAKE()   WakeAllConditionVariable(&g_come)
#else
static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  g_come = PTHREAD_COND_INITIALIZER;
#define LOCK()   pthread_mutex_lock(&g_lock)
#define UNLOCK() pthread_mutex_unlock(&g_lock)
#define WAIT()   pthread_cond_wait(&g_come, &g_lock)
#define WAKE()   pthread_cond_broadcast(&g_come)
#endif

static void sleep_while(atomic_int * word, int seen) {
    LOCK();
    while (atomic_load(word) == seen) {
        WAIT();
    }
    UNLOCK();
}

// under the lock: a sleeper that has looked at the word waits already, or will see the change
static void wake_all(atomic_int * word) {
    (void) word;
    LOCK();
    WAKE();
    UNLOCK();
}

#endif

//
// polling
//

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield" ::: "memory")
#else
#define RELAX() ((void) 0)
#endif

#define POLLS    32  // between looks at the clock
#define LATE_US  400 // a wait that polling would not have shortened

// time to poll, in parts of a microsecond: half as long after a wait that was late, a little longer after any other.
// alone, late ones are rare, and it grows to where it does not matter; beside others there are some in every token.
// never less than what it costs to be woken: a prompt's layers are late as well, and the tokens after it are not
#define PARTS    16
#define MIN_POLL (40*PARTS)
#define MAX_POLL (400*PARTS)
#define LONGER   4

static atomic_int g_poll = 64*PARTS;

static void learn(int64_t waited_us) {
    const int poll   = atomic_load_explicit(&g_poll, memory_order_relaxed);
    const int better = waited_us > LATE_US ? poll/2 : poll + LONGER;
    if (better >= MIN_POLL && better <= MAX_POLL) {
        atomic_store_explicit(&g_poll, better, memory_order_relaxed);
    }
}

static bool poll_for(atomic_int * word, int seen, int n_polls) {
    for (int i = 0; i < n_polls; ++i) {
        if (atomic_load_explicit(word, memory_order_relaxed) != seen) {
            return true;
        }
        RELAX();
    }
    return false;
}

void ggml_barrier_wait(atomic_int * word, int seen) {
    // most waits end here, and cost no look at the clock
    if (poll_for(word, seen, POLLS)) {
        return;
    }
    const int64_t started = ggml_time_us();
    const int64_t until   = started + atomic_load_explicit(&g_poll, memory_order_relaxed)/PARTS;
    while (!poll_for(word, seen, POLLS)) {
        if (ggml_time_us() < until) {
            continue;
        }
        atomic_fetch_add(&g_sleepers, 1);
        while (atomic_load(word) == seen) {
            sleep_while(word, seen);
        }
        atomic_fetch_sub(&g_sleepers, 1);
        break;
    }
    learn(ggml_time_us() - started);
}

void ggml_barrier_wake(atomic_int * word) {
    if (atomic_load(&g_sleepers) > 0) {
        wake_all(word);
    }
}
