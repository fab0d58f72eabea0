// mobile-slot-map.h - which parts lie in a device's slots, for whoever asks while the model computes.
//
// Mechanism: one atomic byte per part, written by the thread that decodes (through mobile_slots), read by any.
// Invariant: lives as long as the context, so that a device tier may start and stop while others read.
// Limits: what is read is true of each part by itself, not of all at one moment.

#pragma once

#include "mobile-ids.h"
#include "mobile.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

class mobile_slot_map {
public:
    mobile_slot_map(int32_t n_layer, int32_t n_parts, int32_t n_segments) :
        n_parts(n_parts), n_segments(n_segments), state((size_t) n_layer*n_parts) {}

    // by the thread that decodes. layers behind the model's own (next-token prediction) are not shown
    void set(mobile_model_layer il, mobile_part part, enum mobile_residency residency) {
        const size_t i = (size_t) il.n*n_parts + part.n;
        if (i < state.size()) {
            state[i].store(residency, std::memory_order_relaxed);
        }
    }

    void clear() {
        for (auto & s : state) {
            s.store(MOBILE_NOT_RESIDENT, std::memory_order_relaxed);
        }
    }

    // by any thread

    size_t size() const { return state.size()/n_segments; }

    // to: [size()] by layer, then by expert, which is as resident as its least resident segment
    void read(uint8_t * to) const {
        for (size_t e = 0; e < size(); ++e) {
            uint8_t least = MOBILE_RESIDENT;
            for (int32_t s = 0; s < n_segments; ++s) {
                least = std::min(least, state[e*n_segments + s].load(std::memory_order_relaxed));
            }
            to[e] = least;
        }
    }

private:
    const int32_t n_parts; // of one layer
    const int32_t n_segments;
    std::vector<std::atomic<uint8_t>> state; // [n_layer][n_parts] enum mobile_residency
};
