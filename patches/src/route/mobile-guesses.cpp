#include "route/mobile-guesses.h"

#include "llama-batch.h"

#include <algorithm>

void mobile_guesses::count(mobile_worth & worth) const {
    for (mobile_model_layer il(0); asked.has(il); ++il) {
        for (size_t t = 0; t < asked[il].size(); ++t) {
            if (!refused[t]) {
                worth.add(il, asked[il][t].data(), (int64_t) asked[il][t].size(), time + (double) t);
            }
        }
    }
}

void mobile_guesses::begin_pass(const llama_ubatch & ubatch, double now, mobile_worth & worth) {
    count(worth);
    index.clear();
    asked.clear();
    if (on && ubatch.data) {
        index.assign(ubatch.data->batch_idxs.begin(), ubatch.data->batch_idxs.end());
        refused.assign(index.size(), 0);
        time = now;
    }
}

void mobile_guesses::add(mobile_model_layer il, int32_t token, const int32_t * ids, int64_t n_used) {
    if (!asked.has(il)) {
        asked.resize((size_t) il.n + 1);
    }
    asked[il].resize(index.size());
    asked[il][token].assign(ids, ids + n_used);
}

bool mobile_guesses::refuse(const int32_t * tokens, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
        const auto found = std::find(index.begin(), index.end(), tokens[i]);
        if (found == index.end()) {
            return false;
        }
        refused[found - index.begin()] = 1;
    }
    return true;
}

void mobile_guesses::settle(mobile_store & store, mobile_slots * slots) const {
    const mobile_uses_of used = [&](mobile_model_layer il, mobile_part part) {
        const int32_t expert = mobile_expert_of(part, store.n_segments);
        mobile_use use;
        for (size_t t = 0; asked.has(il) && t < asked[il].size(); ++t) {
            const std::vector<int32_t> & ids = asked[il][t];
            if (std::find(ids.begin(), ids.end(), expert) == ids.end()) {
                continue;
            }
            if (refused[t]) {
                use.n_refused++;
            } else {
                use.time = time + (double) t;
            }
        }
        return use;
    };
    store.settle_uses(used);
    if (slots) {
        slots->settle_uses(used);
    }
}
