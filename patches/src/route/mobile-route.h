// mobile-route.h - the route op: one seam in every MoE layer, between router and experts.
//
// Mechanism: build_moe_ffn hands over the ids [K, T] and weights [K, T] of the top-k; one small CPU op
// returns the ids and weights that run: with experts in S segments S ids for each. An id of -1 means "skip":
// mul_mat_id leaves zeros for it. The op also tells the expert store what the layer needs, so that reads start before
// the first matmul.
// Invariant: with every policy off ids and weights pass through unchanged, and logits are bit-identical
// to a build without the op.
// With a device tier (mobile-slots.h) a layer has two chains: the op's ids name experts that the CPU computes, a
// second set names slots of the device, with -1 and zero slots for the respective others. Node order is route op,
// hot chain, cold chain, sum: the device computes while the CPU does.
// Limits: runs on one thread and waits for the disk only to upload an expert (else ggml_expert_data does); weights are
// connected whole, which on a device is one small copy back to the host per layer.

#pragma once

#include "device/mobile-experts.h"
#include "mobile-ids.h"
#include "mobile.h"
#include "route/mobile-loss.h"
#include "store/mobile-store.h"

#include <cstdint>
#include <vector>

struct ggml_tensor;
struct llama_context;
struct mobile_context;

// user data of a layer's op; lives as long as the context
struct mobile_route {
    mobile_context *     ctx = nullptr;
    mobile_model_layer   il;
    bool                 renormalise = false; // the model's top-k weights have a fixed sum
    bool                 ranked      = true;  // ids come in descending order of score
    bool                 routes_cur  = true;  // the router's input is the experts'
    enum mobile_score    kind        = MOBILE_SCORE_LOGIT; // of its probabilities
    int32_t              n_used      = 0;     // ids of a token
    std::vector<int32_t> masked;              // experts that the last single-token pass left out
    std::vector<uint8_t> corrected;           // [n_tokens] 1: its sum of experts is corrected
    mobile_experts       host;                // the layer's tensors, as the last graph had them
    bool                 once    = true;      // no graph had others besides
    bool                 keep    = false;     // a device may compute: no -1, but a weight of 0
    int64_t              start_us = 0;        // of the running cold chain
    int32_t              n_cold   = 0;        // distinct experts in it
    int32_t              n_cold_nodes = 0;    // of the last graph, its end included
};

// what the op of the running layer works with
struct mobile_routing {
    mobile_by<mobile_part, mobile_need> need_of;
    std::vector<mobile_need>            needs;     // those that are needed, ascending
    mobile_by<mobile_part, int32_t>     slot_of;   // in the device's pool, -1: none
    std::vector<int32_t>                routed;    // [n_tokens][K] the model's experts, -1: skipped
    std::vector<float>                  weights;   // [n_tokens][K] of those that the router chose, or `prior` in its place
    std::vector<mobile_loss_token>      losing;    // tokens that may
    std::vector<uint8_t>                partial;   // [n_tokens][K] 1: only with the segments that were there
    std::vector<mobile_routed>          watched;   // the layer's entries of the ring
};

// the op, and the end of a cold chain, which passes its sum on; userdata: a mobile_route. an exception in them makes
// the pass fail
void mobile_route_run     (ggml_tensor * dst, int ith, int nth, void * userdata);
void mobile_route_end_cold(ggml_tensor * dst, int ith, int nth, void * userdata);
// a cold chain without an expert is not computed; see ggml_idle_set()
bool mobile_route_is_idle (ggml_cgraph * split);

// whether the device tier takes hints of experts that will probably be needed
bool mobile_route_takes_hints(const mobile_context & ctx);
// hands new guesses to the device tier, which uploads what it can
void mobile_route_ahead(mobile_context & ctx);
// hints what the last little pass left out; returns how many parts are not in host memory yet. see mobile_prefetch_masked
int32_t mobile_route_hint_masked(mobile_context & ctx, llama_context & lctx);
