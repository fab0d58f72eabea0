// mobile-hooks.h - what llama.cpp's own files call: llama-context.cpp and llama-graph.cpp.
//
// Invariant: without an expert store ctx is NULL everywhere, and every call does nothing.

#pragma once

#include "device/mobile-experts.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <array>
#include <cstdint>
#include <functional>
#include <memory>

struct llama_context;
struct llama_memory_context_i;
struct llama_model;
struct llama_ubatch;
struct mobile_context;

// for llama_context. NULL if the model has no expert store
std::shared_ptr<mobile_context> mobile_context_new(const llama_model & model);

// around the computation of a ubatch. end returns its status, or a failure: an expert could not be read
void             mobile_ubatch_begin(mobile_context * ctx, const llama_ubatch & ubatch);
enum ggml_status mobile_ubatch_end  (mobile_context * ctx, enum ggml_status status);

// false: the last graph cannot be used again
bool     mobile_graph_holds(mobile_context * ctx);
// nodes that hot chains may add to a graph
uint32_t mobile_graph_nodes(const mobile_context * ctx);
// reserves the largest graph with hot chains, where there are any; throws std::runtime_error if there is no memory for it
void     mobile_graph_reserve(llama_context & lctx, uint32_t n_tokens, uint32_t n_seqs, uint32_t n_outputs, const llama_memory_context_i * mctx);

// ids for ggml_get_rows, which knows no -1: skipped ones become 0. others' ids pass through
ggml_tensor * mobile_route_rows(ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * ids);

// one call of build_moe_ffn
class mobile_moe {
public:
    struct place {
        mobile_context     * ctx;
        ggml_context       * ctx0;
        ggml_cgraph        * gf;
        ggml_backend_sched_t sched;
        ggml_backend_t       backend_cpu;
        int                  il;
        bool                 no_lora;
    };

    // builds the same layer again, for experts in slots
    using hot_chain = std::function<ggml_tensor * (const mobile_experts & slots, ggml_tensor * ids)>;

    // tensors: where the caller keeps the layer's, in the order of MOBILE_MEMBERS. if the whole layer lies in slots, they
    // become views of those
    mobile_moe(const place & at, const std::array<ggml_tensor **, MOBILE_MEMBERS.size()> & tensors);

    // what the router gave: gating is a llama_expert_gating_func_type; weights are made of probs [1, n_expert, T], and the ids
    // chosen by scores [n_expert, T]
    struct scored {
        int           gating;
        ggml_tensor * probs;
        ggml_tensor * scores;
    };

    // puts the route op behind ids [K, T] and weights [1, K, T], and the hot chain where there is one. ranked: ids come in
    // descending order of score. routes_cur: the router's input is the experts', cur [n_embd, 1, T]
    void route(bool renormalise, bool ranked, bool routes_cur, const scored & router, ggml_tensor * cur, ggml_tensor *& ids, ggml_tensor *& weights, const hot_chain & build_hot);

    // sums the segments of each expert, [n_embd, K*S, T] to [n_embd, K, T]; whole experts pass through
    ggml_tensor * join(ggml_tensor * results, const ggml_tensor * weights) const;

    // the layer's result with that of the hot chain, if there is one, and corrected if a correction is set
    ggml_tensor * sum(ggml_tensor * cold) const;

private:
    ggml_tensor * with_hot(ggml_tensor * cold) const;

    const place    at;
    mobile_experts experts;
    bool           is_whole   = false;   // it lies in slots as a whole
    bool           is_routed  = false;   // the route op stands before its experts
    ggml_tensor  * hot        = nullptr; // what the hot chain gives
    int            cold_start = 0;       // first node behind it
};
