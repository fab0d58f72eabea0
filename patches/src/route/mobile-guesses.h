// mobile-guesses.h - passes over tokens of which some may turn out to be none of the text.
//
// Mechanism: such a pass keeps which experts each of its tokens asked for, and each tier what the use of a part was before
// it. refuse() names tokens that are none of the text: what only they asked for is as unused as before, and leaves its slot
// first where it came for them. when the next pass begins the other tokens count as single ones do.
// Invariant: changes which expert leaves a slot, never what is computed.
// Limits: a decode of one ubatch.

#pragma once

#include "device/mobile-slots.h"
#include "mobile-ids.h"
#include "route/mobile-worth.h"
#include "store/mobile-store.h"

#include <cstdint>
#include <vector>

struct llama_ubatch;

struct mobile_guesses {
    bool on = false; // of the passes to come

    void begin_pass(const llama_ubatch & ubatch, double time, mobile_worth & worth);
    bool is_kept() const { return !index.empty(); }
    // what a token of the running pass asks of a layer. ids: [n_used], -1: skipped
    void add(mobile_model_layer il, int32_t token, const int32_t * ids, int64_t n_used);
    // tokens by their places in the batch; false: the last pass has no such token
    bool refuse(const int32_t * tokens, int32_t n);
    // tells the tiers of the tokens that are left. slots: NULL where there is no device tier
    void settle(mobile_store & store, mobile_slots * slots) const;

private:
    std::vector<int32_t> index;   // [n_tokens] places in the batch of the last pass, if it was such a one
    std::vector<uint8_t> refused; // [n_tokens]
    double time = 0.0;            // of its first token
    mobile_by<mobile_model_layer, std::vector<std::vector<int32_t>>> asked; // [n_tokens][n_used]

    void count(mobile_worth & worth) const;
};
