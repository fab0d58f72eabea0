// stress_barrier.h - a barrier over ggml-barrier.h, for C++: the header's own words are C's.

#pragma once

#ifdef __cplusplus
extern "C" {
#endif

struct stress_barrier;

struct stress_barrier * stress_barrier_new(int n_threads);
void stress_barrier_free(struct stress_barrier * barrier);
// returns once all have come; what anybody wrote before is seen by all
void stress_barrier_pass(struct stress_barrier * barrier);

#ifdef __cplusplus
}
#endif
