// mobile-guesses.h - passes over tokens of which some may turn out to be none of the text.
//
// Mechanism: such a pass keeps which experts each of its tokens asked for, and each tier what the use of a part was before
// it. refuse() names tokens that are none of the text: what only they asked for is as unused as before, and leaves its slot
// first where it came for them. when the next pass begins the other tokens count as single ones do.
// Passes that are run for a draft are none of the text at all. They are kept together with the pass over the draft, so that
// what they asked for counts as used meanwhile: the draft will want most of it.
// Invariant: changes which expert leaves a slot, never what is computed.
// Limits: decodes of one ubatch.

#pragma once

#include "device/mobile-slots.h"
#include "mobile-ids.h"
#include "mobile.h"
#include "route/mobile-worth.h"
#include "store/mobile-store.h"

#include <cstdint>
#include <vector>

struct llama_ubatch;

struct mobile_guesses {
    enum mobile_guessed kind = MOBILE_GUESSED_NONE; // of the passes to come

    // whether the next pass is kept together with the last one
    bool goes_on() const { return kind != MOBILE_GUESSED_NONE && last == MOBILE_GUESSED_SOURCE; }
    // whether the tiers were not told yet of tokens that are none of the text
    bool is_open() const { return open; }
    void begin_pass(const llama_ubatch & ubatch, double time, mobile_worth & worth);
    bool is_kept () const { return last != MOBILE_GUESSED_NONE; }
    bool is_draft() const { return last == MOBILE_GUESSED_DRAFT; }
    // the time after the passes that are kept, by their tokens of the text
    double end() const;
    // what a token of the running pass asks of a layer. ids: [n_used], -1: skipped
    void add(mobile_model_layer il, int32_t token, const int32_t * ids, int64_t n_used);
    // tokens by their places in the batch; false: the last pass has no such token
    bool refuse(const int32_t * tokens, int32_t n);
    // tells the tiers of the tokens that are left. slots: NULL where there is no device tier
    void settle(mobile_store & store, mobile_slots * slots);

private:
    struct guess {
        int32_t index   = -1;    // place in the batch
        bool    refused = false;
        double  time    = 0.0;
    };

    enum mobile_guessed last = MOBILE_GUESSED_NONE; // of the last pass
    bool open = false;
    std::vector<guess> tokens; // of the passes that are kept, in their order
    size_t n_before = 0;       // of them, of passes before the last one
    double start    = 0.0;     // when the first of the passes began
    mobile_by<mobile_model_layer, std::vector<std::vector<int32_t>>> asked; // [tokens][n_used]

    void count(mobile_worth & worth) const;
};
