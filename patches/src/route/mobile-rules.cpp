#include "route/mobile-rules.h"

#include "llama-batch.h"

#include <algorithm>

void mobile_mask::set(const int32_t * of_tokens, int32_t n_tokens) {
    values.assign(of_tokens, of_tokens + n_tokens);
    ran.assign(n_tokens, 0);
}

void mobile_mask::begin_pass(const llama_ubatch & ubatch, std::vector<int32_t> & of_token) {
    const size_t n_tokens = ubatch.n_tokens;
    const size_t n_index  = ubatch.data ? std::min(n_tokens, ubatch.data->batch_idxs.size()) : 0;

    for (size_t i = 0; i < n_index && !values.empty(); ++i) {
        const size_t index = ubatch.data->batch_idxs[i];
        if (index < values.size() && ran[index]) {
            values.clear(); // a token that comes again is another decode's: its batch was shorter than the mask
        }
    }
    for (size_t i = 0; i < n_index && !values.empty(); ++i) {
        const size_t index = ubatch.data->batch_idxs[i];
        if (index < values.size()) {
            of_token[i] = values[index];
            ran[index]  = 1;
        }
    }
}

void mobile_mask::end_pass(bool ok) {
    if (!ok || std::all_of(ran.begin(), ran.end(), [](uint8_t r) { return r != 0; })) {
        values.clear();
    }
}

mobile_rules::mobile_rules(int32_t n_layer, int32_t n_used) : n_layer(n_layer), n_used(n_used), loss(mobile_loss_defaults()) {
}

void mobile_rules::set_replay(const int32_t * ids, int32_t n) {
    replay.assign(ids, ids + (size_t) n*n_layer*n_used);
    n_steps = n;
}

void mobile_rules::begin_pass(const llama_ubatch & ubatch, std::vector<int32_t> & k_token, std::vector<int32_t> & lossy_token) {
    k_token    .assign(ubatch.n_tokens, k);
    lossy_token.assign(ubatch.n_tokens, lossy);
    batch      .begin_pass(ubatch, k_token);
    batch_lossy.begin_pass(ubatch, lossy_token);
}

void mobile_rules::end_pass(bool ok) {
    batch      .end_pass(ok);
    batch_lossy.end_pass(ok);
}

const uint8_t * mobile_rules::residency_of(mobile_model_layer il, int32_t n_parts) const {
    return residency.empty() || il.n >= n_layer ? nullptr : &residency[(size_t) il.n*n_parts];
}

int32_t mobile_rules::replayed_id(mobile_model_layer il, int32_t pos, int64_t rank) const {
    if (replay.empty() || il.n >= n_layer) {
        return -1;
    }
    return replay[((int64_t) (pos % n_steps)*n_layer + il.n)*n_used + rank];
}
