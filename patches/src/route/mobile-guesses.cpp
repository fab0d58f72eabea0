#include "route/mobile-guesses.h"

#include "llama-batch.h"

#include <algorithm>

void mobile_guesses::count(mobile_worth & worth) const {
    for (mobile_model_layer il(0); asked.has(il); ++il) {
        for (size_t t = 0; t < asked[il].size(); ++t) {
            if (!tokens[t].refused) {
                worth.add(il, asked[il][t].data(), (int64_t) asked[il][t].size(), tokens[t].time);
            }
        }
    }
}

void mobile_guesses::begin_pass(const llama_ubatch & ubatch, double now, mobile_worth & worth) {
    if (!goes_on()) {
        count(worth);
        tokens.clear();
        asked.clear();
        start = now;
        open  = false;
    }
    n_before = tokens.size();
    last     = ubatch.data ? kind : MOBILE_GUESSED_NONE;
    if (!is_kept()) {
        return;
    }
    for (int32_t index : ubatch.data->batch_idxs) {
        tokens.push_back({ index, kind == MOBILE_GUESSED_SOURCE, now + (double) (tokens.size() - n_before) });
    }
    open = open || kind == MOBILE_GUESSED_SOURCE;
}

double mobile_guesses::end() const {
    return start + (double) std::count_if(tokens.begin(), tokens.end(), [](const guess & one) { return !one.refused; });
}

void mobile_guesses::add(mobile_model_layer il, int32_t token, const int32_t * ids, int64_t n_used) {
    if (!asked.has(il)) {
        asked.resize((size_t) il.n + 1);
    }
    asked[il].resize(tokens.size());
    asked[il][n_before + token].assign(ids, ids + n_used);
}

bool mobile_guesses::refuse(const int32_t * places, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
        const auto found = std::find_if(tokens.begin() + n_before, tokens.end(), [&](const guess & one) { return one.index == places[i]; });
        if (found == tokens.end()) {
            return false;
        }
        found->refused = true;
    }
    return true;
}

void mobile_guesses::settle(mobile_store & store, mobile_slots * slots) {
    const mobile_uses_of used = [&](mobile_model_layer il, mobile_part part) {
        const int32_t expert = mobile_expert_of(part, store.n_segments);
        mobile_use use;
        for (size_t t = 0; asked.has(il) && t < asked[il].size(); ++t) {
            const std::vector<int32_t> & ids = asked[il][t];
            if (std::find(ids.begin(), ids.end(), expert) == ids.end()) {
                continue;
            }
            if (tokens[t].refused) {
                use.n_refused++;
            } else {
                use.time = tokens[t].time;
            }
        }
        return use;
    };
    store.settle_uses(used);
    if (slots) {
        slots->settle_uses(used);
    }
    open = false;
}
