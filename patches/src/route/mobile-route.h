// mobile-route.h - the route op: one seam in every MoE layer, between router and experts.
//
// Mechanism: build_moe_ffn hands over the ids [K, T] and weights [K, T] of the top-k; one small CPU op
// returns the ids and weights that run: with experts in S segments S ids for each. An id of -1 means "skip": mul_mat_id leaves zeros for it. The op
// also tells the expert store what the layer needs, so that reads start before the first matmul.
// Invariant: with every policy off ids and weights pass through unchanged, and logits are bit-identical
// to a build without the op.
// With a device tier (mobile-slots.h) a layer has two chains: the op's ids name experts that the CPU computes, a
// second set names slots of the device, with -1 and zero slots for the respective others. Node order is route op,
// hot chain, cold chain, sum: the device computes while the CPU does.
// Limits: runs on one thread and waits for the disk only to upload an expert (else ggml_expert_data does); weights are connected
// whole, which on a device is one small copy back to the host per layer.

#pragma once

#include "route/mobile-predict.h"
#include "device/mobile-slots.h"
#include "store/mobile-store.h"
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
    bool             routes_cur  = true;  // the router's input is the experts'
    std::vector<int32_t> masked;          // ids that the last single-token pass left out
    mobile_experts       host;            // the layer's tensors, as the last graph had them
    bool                 once    = true;  // no graph had others besides
    bool                 keep    = false; // a device may compute: no -1, but a weight of 0
    int64_t              start_us = 0;    // of the running cold chain
    int32_t              n_cold   = 0;    // distinct experts in it
};

// the state behind llama_cparams::mobile; used by the thread that decodes
struct mobile_context {
    std::shared_ptr<mobile_store> store;
    int32_t n_layer  = 0;
    int32_t n_expert_used = 0;

    std::vector<mobile_route> routes; // [n_layer]
    std::unique_ptr<mobile_predictor> predictor;

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
    std::vector<int32_t> routed;      // [n_tokens][K] the model's experts, -1: skipped
    std::vector<uint8_t> on_device;   // [n_expert] of the next layer: in a slot
    std::vector<mobile_need> missing; // of these, those not in a device's slots
    std::vector<int32_t>     slot_of; // [n_expert] in the device's pool, -1: none

    // device tier
    std::unique_ptr<mobile_slots> slots;        // NULL: none
    bool                 stale       = false;   // the graph must be built anew
    bool                 has_policy  = false;   // whole layers on a device have a route op
    bool                 is_whole    = false;   // the layer that is being built lies in slots as a whole
    ggml_tensor *        hot_ids     = nullptr; // while the hot chain is built
    ggml_tensor *        hot_weights = nullptr;
    int                  cold_start  = 0;       // first node of the cold chain that is being built
    int32_t              down_params[GGML_MAX_OP_PARAMS/sizeof(int32_t)] = {}; // of the op that multiplies by `down`

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

// the op; userdata: a mobile_route
void mobile_route_run(ggml_tensor * dst, int ith, int nth, void * userdata);

// whether the device tier takes hints of experts that will probably be needed
bool mobile_route_takes_hints(const mobile_context & ctx);
// hands new guesses to the device tier, which uploads what it can
void mobile_route_ahead(mobile_context & ctx);

// whether an expert of the store's needs no host memory: it lies in a device's slot
bool mobile_route_on_device(const mobile_context & ctx, int32_t layer, int32_t expert);

// for llama_context. false: the last graph cannot be used again
bool     mobile_graph_holds (mobile_context * ctx);
// nodes that hot chains may add to a graph
uint32_t mobile_graph_nodes (const mobile_context * ctx);
// tokens in the largest ubatch with hot chains, at most n_tokens; 0: there is none
uint32_t mobile_graph_tokens(const mobile_context * ctx, uint32_t n_tokens);

// for build_moe_ffn: tensors to use instead, if the whole layer lies in slots; else NULL. ctx may be NULL
const mobile_experts * mobile_route_whole(mobile_context * ctx, int il, const ggml_tensor * down, bool no_lora);

// for build_moe_ffn: puts the route op behind ids [K, T] and weights [1, K, T]. experts: the tensors in use. cur:
// their input [n_embd, 1, T]. returns the slots for which a hot chain is to be built, or NULL. the hot chain's own
// call replaces ids and weights and returns NULL
const mobile_experts * mobile_route_build(
        mobile_context * ctx, ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, int il, bool renormalise, bool ranked,
        bool routes_cur, bool no_lora, const mobile_experts & experts, ggml_tensor * cur, ggml_tensor ** ids, ggml_tensor ** weights);

// for build_moe_ffn: the hot chain is built, the cold one begins
void mobile_route_cold(mobile_context * ctx, ggml_cgraph * gf);

// for build_moe_ffn: the cold chain is built; returns the sum of both
ggml_tensor * mobile_route_sum(
        mobile_context * ctx, ggml_context * ctx0, ggml_cgraph * gf, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, int il, ggml_tensor * cold, ggml_tensor * hot);

// for build_moe_ffn: sums the segments of each expert, [n_embd, K*S, T] to [n_embd, K, T]; whole experts pass through
ggml_tensor * mobile_route_join(
        mobile_context * ctx, ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * experts, const ggml_tensor * weights);

// ids for ggml_get_rows, which knows no -1: skipped ones become 0. others' ids pass through
ggml_tensor * mobile_route_rows(ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * ids);
