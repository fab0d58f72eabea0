#define _GNU_SOURCE

#include "stress_barrier.h"

#include "ggml-barrier.h"

#include <stdlib.h>
#include <time.h>

struct stress_barrier {
    int        n_threads;
    atomic_int n_come;
    atomic_int n_passed; // what all but the last wait for
};

struct stress_barrier * stress_barrier_new(int n_threads) {
    struct stress_barrier * barrier = calloc(1, sizeof(*barrier));
    barrier->n_threads = n_threads;
    return barrier;
}

void stress_barrier_free(struct stress_barrier * barrier) {
    free(barrier);
}

void stress_barrier_pass(struct stress_barrier * barrier) {
    const int seen = atomic_load_explicit(&barrier->n_passed, memory_order_relaxed);
    if (atomic_fetch_add(&barrier->n_come, 1) == barrier->n_threads - 1) {
        atomic_store_explicit(&barrier->n_come, 0, memory_order_relaxed);
        atomic_fetch_add(&barrier->n_passed, 1);
        ggml_barrier_wake(&barrier->n_passed);
        return;
    }
    ggml_barrier_wait(&barrier->n_passed, seen);
    atomic_load(&barrier->n_passed); // it polls without ordering: that is the caller's
}

int64_t ggml_time_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t) now.tv_sec*1000000 + now.tv_nsec/1000;
}
