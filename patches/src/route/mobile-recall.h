// mobile-recall.h - what tokens asked for when they came last, as a guess of what they will ask for.
//
// Mechanism: each pass keeps, by the token's id and layer, the experts that the router chose, those that were skipped too. Before
// a pass over a draft each tier is told what its tokens asked for last: of that, what is there stays until its layer is reached.
// The little passes that have found a draft have run most of its tokens just before: then the guess is their router's.
// Invariant: changes which expert leaves memory or a slot, never what is computed.
// Limits: so many different tokens, then all is forgotten; nothing is kept where all experts have room.

#pragma once

#include "device/mobile-slots.h"
#include "mobile-ids.h"
#include "store/mobile-store.h"

#include <cstdint>
#include <unordered_map>
#include <vector>

struct llama_ubatch;

class mobile_recall {
public:
    explicit mobile_recall(int32_t n_used) : n_used(n_used) {}

    // is_of_use: some tier has not room for all experts
    void begin_pass(const llama_ubatch & ubatch, bool is_of_use);
    // what a token of the running pass was routed to. ids: [n_used], the model's
    void add(mobile_model_layer il, int32_t token, const int32_t * ids);
    // tells the tiers what the running pass will probably ask for. slots: NULL where there is no device tier
    void tell(mobile_store & store, mobile_slots * slots) const;

private:
    static constexpr size_t   N_TOKENS_MAX = 4096; // 3 MiB of 48 layers and 8 experts
    static constexpr uint16_t NONE         = UINT16_MAX;

    const int32_t n_used;
    std::vector<int32_t> tokens; // [n_tokens] ids of the running pass; empty: it has none
    std::unordered_map<int32_t, std::vector<uint16_t>> last; // [n_layer][n_used] by token
};
