// ggml-barrier.h - waiting at a barrier that gives the processor back.
//
// Mechanism: a thread that comes early polls for some microseconds, then sleeps until the last one has come. Yielding
// instead would give a whole time slice to whoever else wants to run, at each of the hundreds of barriers of a token.
// One that wakes from sleep is preferred to those that computed all the time. How long polling pays is learnt from how
// long the waits were: beside others, or a disk, the last thread comes late, and polling is in its way.
// Invariant: nobody sleeps once `word` has changed; the last thread makes no system call where nobody sleeps.
// Limits: one count of sleepers and one time to poll for the process.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#else
#include <stdatomic.h>

// returns once *word differs from `seen`
GGML_API void ggml_barrier_wait(atomic_int * word, int seen);
// after *word was changed (seq_cst): wakes all that sleep for it
GGML_API void ggml_barrier_wake(atomic_int * word);
#endif

#ifdef __cplusplus
}
#endif
