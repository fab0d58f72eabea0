// mobile-rules.h - what changes outputs: how many experts each token uses, which, and what becomes of those that are missing.
//
// Mechanism: the C API sets rules between decodes; each ubatch asks for its tokens' counts, and the route op for ids that
// a replay has in the place of the router's.
// Invariant: without rules the model's own top-k passes through.

#pragma once

#include "mobile-ids.h"
#include "mobile.h"
#include "route/mobile-loss.h"

#include <cstdint>
#include <vector>

struct llama_ubatch;

// a value per token of the next decode, in batch order
class mobile_mask {
public:
    void set(const int32_t * values, int32_t n_tokens);
    bool empty() const { return values.empty(); }

    // around a ubatch. of_token: [n_tokens]; those that the mask does not name keep theirs
    void begin_pass(const llama_ubatch & ubatch, std::vector<int32_t> & of_token);
    void end_pass  (bool ok);

private:
    std::vector<int32_t> values; // empty: off
    std::vector<uint8_t> ran;    // this token of it ran
};

class mobile_rules {
public:
    mobile_rules(int32_t n_layer, int32_t n_used);

    // experts per token; 0: all
    void set_k(int32_t value) { k = value; }
    // of the next decode only, in batch order
    void set_batch(const int32_t * values, int32_t n_tokens) { batch.set(values, n_tokens); }
    // of how many experts a token's kept weights take over the mass; 0: of those that are kept, so all of it
    void    set_mass    (int32_t value) { mass = value; }
    int32_t mass_of_kept() const { return mass; }
    // ids: [n_steps][n_layer][n_used]
    void set_replay  (const int32_t * ids, int32_t n_steps);
    void clear_replay() { replay.clear(); }

    // for missing experts of tokens that may lose
    void set_loss     (const mobile_loss_params & params) { loss = params; }
    void set_lossy    (bool on) { lossy = on; }
    void set_lossy    (const int32_t * values, int32_t n_tokens) { batch_lossy.set(values, n_tokens); }
    void set_buddies  (mobile_by<mobile_model_layer, mobile_buddies> && lists) { buddies = std::move(lists); }
    // [n_layer][n_parts]; empty: what is
    void set_residency(std::vector<uint8_t> && state) { residency = std::move(state); }

    bool has_loss   () const { return mobile_loss_is_on(loss); }
    bool reads_scores() const { return mobile_loss_reads_scores(loss); }
    const mobile_loss_params & loss_params() const { return loss; }
    bool has_buddies() const { return !buddies.empty(); }
    // NULL: none have been set
    const mobile_buddies * buddies_of(mobile_model_layer il) const { return buddies.has(il) ? &buddies[il] : nullptr; }
    // NULL: what is
    const uint8_t * residency_of(mobile_model_layer il, int32_t n_parts) const;

    bool is_replay() const { return !replay.empty(); }
    // whether anything but the model's own top-k may run
    bool any() const { return is_little(k) || !batch.empty() || is_replay(); }
    bool is_little(int32_t value) const { return value > 0 && value < n_used; }

    // around a ubatch. k_token, lossy_token: [n_tokens]
    void begin_pass(const llama_ubatch & ubatch, std::vector<int32_t> & k_token, std::vector<int32_t> & lossy_token);
    void end_pass  (bool ok);

    // the replayed id of a rank; -1: the router's counts
    int32_t replayed_id(mobile_model_layer il, int32_t pos, int64_t rank) const;

private:
    const int32_t n_layer;
    const int32_t n_used; // the model's top-k

    int32_t              k    = 0;
    int32_t              mass = 0;
    mobile_mask          batch;  // of the next decode; empty: k
    std::vector<int32_t> replay; // [n_steps][n_layer][n_used]; empty: off
    int32_t              n_steps = 0;

    mobile_loss_params   loss;
    bool                 lossy = false;
    mobile_mask          batch_lossy; // empty: lossy
    mobile_by<mobile_model_layer, mobile_buddies> buddies;
    std::vector<uint8_t> residency;
};
