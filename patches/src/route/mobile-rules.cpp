#include "route/mobile-rules.h"

#include "llama-batch.h"

#include <algorithm>

void mobile_rules::set_batch(const int32_t * values, int32_t n_tokens) {
    batch.assign(values, values + n_tokens);
    batch_ran.assign(n_tokens, 0);
}

void mobile_rules::set_replay(const int32_t * ids, int32_t n) {
    replay.assign(ids, ids + (size_t) n*n_layer*n_used);
    n_steps = n;
}

void mobile_rules::begin_pass(const llama_ubatch & ubatch, std::vector<int32_t> & k_token) {
    const size_t n_tokens = ubatch.n_tokens;
    const size_t n_index  = ubatch.data ? std::min(n_tokens, ubatch.data->batch_idxs.size()) : 0;

    k_token.assign(n_tokens, k);
    for (size_t i = 0; i < n_index && !batch.empty(); ++i) {
        const size_t index = ubatch.data->batch_idxs[i];
        if (index < batch.size() && batch_ran[index]) {
            batch.clear(); // a token that comes again is another decode's: its batch was shorter than the mask
        }
    }
    for (size_t i = 0; i < n_index && !batch.empty(); ++i) {
        const size_t index = ubatch.data->batch_idxs[i];
        if (index < batch.size()) {
            k_token[i]       = batch[index];
            batch_ran[index] = 1;
        }
    }
}

void mobile_rules::end_pass(bool ok) {
    if (!ok || std::all_of(batch_ran.begin(), batch_ran.end(), [](uint8_t ran) { return ran != 0; })) {
        batch.clear();
    }
}

int32_t mobile_rules::replayed_id(mobile_model_layer il, int32_t pos, int64_t rank) const {
    if (replay.empty() || il.n >= n_layer) {
        return -1;
    }
    return replay[((int64_t) (pos % n_steps)*n_layer + il.n)*n_used + rank];
}
