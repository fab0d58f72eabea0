#include "ggml-barrier.h"

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

void ggml_barrier_sleep(atomic_int * word, int seen) {
    atomic_fetch_add(&g_sleepers, 1);
    sleep_while(word, seen);
    atomic_fetch_sub(&g_sleepers, 1);
}

void ggml_barrier_wake(atomic_int * word) {
    if (atomic_load(&g_sleepers) > 0) {
        wake_all(word);
    }
}
