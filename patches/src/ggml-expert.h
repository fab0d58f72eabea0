// ggml-expert.h - where the CPU mul_mat_id finds the weights of one expert.
//
// Mechanism: a stacked expert tensor normally holds expert e at data + e*nb[2]. For tensors in
// the expert store's buffer nothing is there: a resolver, registered once by libllama, returns
// the address of the expert's slot, and waits for the disk when asked to.
// Invariant: changes where bytes are read from, never their value.
// Limits: one resolver per process; 2D expert slices with the tensor's own nb[1].

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_EXPERT_MAX 4096 // experts in one tensor

// returns the first byte of expert `expert` of w. with wait = false NULL means: not in memory yet.
// with wait = true the result is never NULL. returns `stock` for tensors that are not its own
typedef const char * (*ggml_expert_resolver_t)(const struct ggml_tensor * w, int64_t expert, const char * stock, bool wait);

GGML_API void ggml_expert_set_resolver(ggml_expert_resolver_t resolver);

// thread-safe; callable by every thread of a graph computation
GGML_API const char * ggml_expert_data(const struct ggml_tensor * w, int64_t expert, bool wait);

#ifdef __cplusplus
}
#endif
