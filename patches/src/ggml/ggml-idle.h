// ggml-idle.h - splits that have nothing to compute.
//
// Mechanism: before the scheduler runs a split it asks a function, registered once by libllama, whether the split's
// result is known already. A cold chain without an expert is a dozen ops on zeros, each with a barrier of all threads.
// Invariant: a split that is left out has the result that it would have computed.
// Limits: one function per process; not where somebody watches single nodes.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// true: the split's results are written
typedef bool (*ggml_idle_t)(struct ggml_cgraph * split);

GGML_API void ggml_idle_set(ggml_idle_t is_idle);
GGML_API bool ggml_idle(struct ggml_cgraph * split);

#ifdef __cplusplus
}
#endif
