// ggml-expert.h - where the CPU mul_mat_id finds the weights of one expert.
//
// Mechanism: a stacked expert tensor normally holds expert e at data + e*nb[2]. For tensors in
// the expert store's buffer nothing is there: a resolver, registered once by libllama, returns
// the address of the expert's slot, and waits for the disk when asked to.
// Invariant: changes where bytes are read from, never their value.
// Limits: one resolver per process; 2D expert slices with the tensor's own nb[1].

#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_EXPERT_MAX 4096 // experts in one tensor

struct ggml_expert_resolver {
    // returns the first byte of expert `expert` of w. with wait = false NULL means: not in memory yet.
    // with wait = true the result is never NULL. returns `stock` for tensors that are not its own
    const char * (*data)  (const struct ggml_tensor * w, int64_t expert, const char * stock, bool wait);
    // sleeps while other threads wait in data() for experts of w
    void         (*settle)(const struct ggml_tensor * w);
    // whether w's experts are not at w->data
    bool         (*owns)  (const struct ggml_tensor * w);
};

// resolver must stay valid
GGML_API void ggml_expert_set_resolver(const struct ggml_expert_resolver * resolver);

// thread-safe; callable by every thread of a graph computation
GGML_API const char * ggml_expert_data(const struct ggml_tensor * w, int64_t expert, bool wait);

// of one thread, over the experts of w that have rows
struct ggml_expert_walk {
    const char * data; // of the expert that was given last

    const struct ggml_tensor * w;
    const int64_t            * n_rows; // [w->ne[2]]
    int64_t next;                      // from ne[2] on: waiting for those that were left out
    bool    waits;                     // experts may still be on their way
    uint8_t done[GGML_EXPERT_MAX];
};

// the experts with rows: those in memory first, then those still on their way; -1: that was all. before it says so
// it sleeps while other threads wait for experts of w: this thread would spin in a barrier next, and the processor that
// it would spin on may be the one that serves the read, or the one where a waiting thread is to run
GGML_API int ggml_expert_walk_first(struct ggml_expert_walk * walk, const struct ggml_tensor * w, const int64_t * n_rows);
GGML_API int ggml_expert_walk_next (struct ggml_expert_walk * walk);

// an id of -1 was skipped by the route op: its row of n floats becomes that of src, zeros if NULL. false: it was not
GGML_API bool ggml_expert_skip(int32_t id, void * dst, const void * src, int64_t n);

struct ggml_compute_params;

// of one thread: its share of an expert's rows times the expert's first byte on, where they can be multiplied together to
// the same bits. rows: (place in a token's list, token) of each; next_chunk: an atomic_int that stands at n_threads.
// false: nothing was done
bool ggml_expert_matmul(
        const struct ggml_compute_params * params, struct ggml_tensor * dst, const char * expert,
        int64_t n_rows, const int32_t * rows, void * next_chunk);

// of llama.cpp's repacked kernels for matrices: nc rows of weights vx times nr interleaved rows vy of n, to s with stride bs
typedef void (*ggml_expert_gemm)(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);

// of one thread: the same for a repacked expert, its rows of weights from begin to end. returns how many of `rows`, from
// the first on, were computed
int64_t ggml_expert_matmul_repacked(
        const struct ggml_compute_params * params, struct ggml_tensor * dst, const char * expert, int64_t begin, int64_t end,
        int64_t n_rows, const int32_t * rows, ggml_expert_gemm gemm);

// for the scheduler: copies experts of w, to which it may apply, into `copy` on a backend, if they are not at w->data.
// used: a bitset of experts; NULL: all. true: nothing is left to copy, also because none is used
GGML_API bool ggml_expert_copy(ggml_backend_t backend, const struct ggml_tensor * w, struct ggml_tensor * copy, const uint32_t * used);

#ifdef __cplusplus
}
#endif
