// mobile-route.h - the route op: one seam in every MoE layer, between router and experts.
//
// Mechanism: build_moe_ffn hands over the ids [K, T] and weights [K, T] of the top-k; one small CPU op
// returns the ids and weights that run: with experts in S segments S ids for each. An id of -1 means "skip": mul_mat_id leaves zeros for it. The op
// also tells the expert store what the layer needs, so that reads start before the first matmul.
// Invariant: with every policy off ids and weights pass through unchanged, and logits are bit-identical
// to a build without the op.
// Limits: runs on one thread and never waits for the disk (ggml_expert_data does); weights are connected
// whole, which on a device is one small copy back to the host per layer.

#pragma once

#include "mobile-store.h"
#include "mobile.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

struct ggml_context;
struct ggml_cgraph;
struct ggml_tensor;
struct llama_ubatch;
struct mobile_context;

// user data of a layer's op; lives as long as the context
struct mobile_route {
    mobile_context * ctx   = nullptr;
    int32_t          il    = -1;
    bool             renormalise = false; // the model's top-k weights have a fixed sum
    bool             ranked      = true;  // ids come in descending order of score
    std::vector<int32_t> masked;          // ids that the last single-token pass left out
};

// the state behind llama_cparams::mobile; used by the thread that decodes
struct mobile_context {
    std::shared_ptr<mobile_store> store;
    int32_t n_layer  = 0;
    int32_t n_expert_used = 0;

    std::vector<mobile_route> routes; // [n_layer]

    // policy
    int32_t              k = 0;       // experts per token; 0: all
    std::vector<int32_t> k_batch;     // [n_tokens] of the next decode, in batch order; empty: k
    std::vector<int32_t> replay;      // [replay_steps][n_layer][replay_k]; empty: off
    int32_t replay_steps = 0;
    int32_t replay_k     = 0;

    // of the running ubatch
    std::vector<int32_t> k_token;     // [n_tokens]
    std::vector<int32_t> pos;         // [n_tokens]
    std::vector<int32_t> outputs;     // tokens with an output, ascending: what the last layer keeps
    std::vector<uint8_t> k_batch_ran; // of k_batch: this token ran
    double time         = 0.0;        // of its first token, in tokens since the context began
    bool   mapped       = true;       // every layer's tokens could be told apart

    // of the running layer
    std::vector<mobile_need> need_of; // [n_expert]
    std::vector<mobile_need> needs;   // those that are needed, ascending

    // trace
    FILE *  trace      = nullptr;
    int32_t trace_turn = -1;
    int64_t trace_step = 0;           // of the ubatch's first token

    uint64_t n_tokens        = 0;
    uint64_t n_tokens_little = 0;
    mobile_counters base     = {};    // the store's counters at the last reset
    std::string error;

    ~mobile_context();
};

// for llama_context. NULL if the model has no expert store
std::shared_ptr<mobile_context> mobile_context_new(const struct llama_model & model);

// around the computation of a ubatch; ctx may be NULL. false: an expert could not be read
void mobile_ubatch_begin(mobile_context * ctx, const llama_ubatch & ubatch);
bool mobile_ubatch_end  (mobile_context * ctx);

// for build_moe_ffn: puts the route op behind ids [K, T] and weights [1, K, T]
void mobile_route_build(
        mobile_context * ctx, ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu,
        int il, bool renormalise, bool ranked, ggml_tensor ** ids, ggml_tensor ** weights);

// for build_moe_ffn: sums the segments of each expert, [n_embd, K*S, T] to [n_embd, K, T]; whole experts pass through
ggml_tensor * mobile_route_join(
        ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * experts, const ggml_tensor * weights);

// ids for ggml_get_rows, which knows no -1: skipped ones become 0. others' ids pass through
ggml_tensor * mobile_route_rows(ggml_context * ctx0, ggml_tensor * ids);
