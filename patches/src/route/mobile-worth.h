// mobile-worth.h - which experts the tokens of answers used, for whoever wants to have them again.
//
// Prompts do not count: they pass through nearly all experts, and say little about the next one's. Of several answers that
// are made at once each token counts. Owned by the thread that decodes.

#pragma once

#include "mobile-ids.h"

#include <cstdint>
#include <vector>

struct mobile_worth_entry {
    mobile_model_layer il;
    int32_t  expert   = -1;
    uint64_t n_uses   = 0;
    double   last_use = 0.0; // in tokens
};

class mobile_worth {
public:
    // what a token uses of a layer. experts: [n] the model's, -1: skipped
    void add(mobile_model_layer il, const int32_t * experts, int64_t n, double time);
    // those that were used, the most used first; of as many uses the last used
    std::vector<mobile_worth_entry> ranked() const;

private:
    mobile_by<mobile_model_layer, std::vector<mobile_worth_entry>> entries; // by expert
};
