// mobile-rules.h - what changes outputs: how many experts each token uses, and which.
//
// Mechanism: the C API sets rules between decodes; each ubatch asks for its tokens' counts, and the route op for ids that
// a replay has in the place of the router's.
// Invariant: without rules the model's own top-k passes through.

#pragma once

#include "mobile-ids.h"

#include <cstdint>
#include <vector>

struct llama_ubatch;

class mobile_rules {
public:
    mobile_rules(int32_t n_layer, int32_t n_used) : n_layer(n_layer), n_used(n_used) {}

    // experts per token; 0: all
    void set_k(int32_t value) { k = value; }
    // of the next decode only, in batch order
    void set_batch(const int32_t * values, int32_t n_tokens);
    // ids: [n_steps][n_layer][n_used]
    void set_replay  (const int32_t * ids, int32_t n_steps);
    void clear_replay() { replay.clear(); }

    bool is_replay() const { return !replay.empty(); }
    // whether anything but the model's own top-k may run
    bool any() const { return is_little(k) || !batch.empty() || is_replay(); }
    bool is_little(int32_t value) const { return value > 0 && value < n_used; }

    // around a ubatch. k_token: [n_tokens]
    void begin_pass(const llama_ubatch & ubatch, std::vector<int32_t> & k_token);
    void end_pass  (bool ok);

    // the replayed id of a rank; -1: the router's counts
    int32_t replayed_id(mobile_model_layer il, int32_t pos, int64_t rank) const;

private:
    const int32_t n_layer;
    const int32_t n_used; // the model's top-k

    int32_t              k = 0;
    std::vector<int32_t> batch;     // [n_tokens] of the next decode; empty: k
    std::vector<uint8_t> batch_ran; // this token of it ran
    std::vector<int32_t> replay;    // [n_steps][n_layer][n_used]; empty: off
    int32_t              n_steps = 0;
};
