// mobile-correction.h - what makes up for the experts that a little token lacks: an affine map of each layer's sum of experts.
//
// Mechanism: scales and shifts by layer and channel, found by calibration for tokens with exactly k experts. Where they are
// set, one more custom op stands behind a layer's sum of routed experts (shared ones are not in it): rows of tokens that run
// with k of them are multiplied and shifted, all others are copied.
// Invariant: unset, graphs have no such op. Set, the bits of tokens with all experts, or with another number, are as they were.
// Limits: k is what was asked for, so an expert that a lossy rule displaces is not made up for. Runs on the CPU: a device
// hands the sum over and takes it back. No map for layers behind the model's own (next-token prediction).

#pragma once

#include "mobile-ids.h"

#include <cstdint>
#include <vector>

struct ggml_tensor;

class mobile_correction {
public:
    // scale, shift: [n_layer][n_embd]
    void set(int32_t n_used, const float * scale, const float * shift, int32_t n_layer, int32_t n_channels) {
        const size_t n = (size_t) n_layer*n_channels;
        k      = n_used;
        n_embd = n_channels;
        scales.assign(scale, scale + n);
        shifts.assign(shift, shift + n);
    }
    void clear() { *this = {}; }
    void turn(bool value) { on = value; }

    bool is_set() const { return !scales.empty(); }
    // of n_embd channels
    bool has(mobile_model_layer il, int64_t n_channels) const { return n_channels == n_embd && (size_t) (il.n + 1)*n_embd <= scales.size(); }
    // whether a token that is to run with so many experts is corrected; 0: all
    bool is_of(int32_t n_used) const { return on && is_set() && n_used == k; }

    const float * scale_of(mobile_model_layer il) const { return &scales[(size_t) il.n*n_embd]; }
    const float * shift_of(mobile_model_layer il) const { return &shifts[(size_t) il.n*n_embd]; }

private:
    int32_t k  = 0;
    bool    on = false;
    int64_t n_embd = 0;
    std::vector<float> scales; // empty: not set
    std::vector<float> shifts;
};

// the op; userdata: a mobile_route, whose `corrected` says which rows
void mobile_correct_run(ggml_tensor * dst, int ith, int nth, void * userdata);
