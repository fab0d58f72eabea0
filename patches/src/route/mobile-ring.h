// mobile-ring.h - the routed (token, layer, rank)s of the last while, for whoever watches while the model computes.
//
// Mechanism: a ring of entries with numbers that only count up, written by the thread that decodes while somebody
// watches, and copied out under a lock by any. Readers keep their own place, so they take nothing from each other.
// Invariant: writing never waits for a reader longer than one copy takes; what nobody read in time is counted as lost.
// Limits: nothing is kept of what was computed unwatched; the ring's memory is taken when first watched and stays.

#pragma once

#include "mobile.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

class mobile_ring {
public:
    // by any thread

    void watch(bool on) {
        std::lock_guard<std::mutex> lock(mutex);
        if (on) {
            entries.resize(MOBILE_ROUTED_MAX);
        }
        is_on = on;
    }

    bool is_watched() const { return is_on; }

    // up to n entries from number since on; returns how many. next: the number to go on from, n_lost: how many from
    // since on were overwritten
    size_t read(uint64_t since, mobile_routed * to, size_t n, uint64_t & next, uint64_t & n_lost) const {
        std::lock_guard<std::mutex> lock(mutex);
        const uint64_t oldest = end - std::min<uint64_t>(end, entries.size());
        const uint64_t first  = std::min(std::max(since, oldest), end);
        const size_t   count  = (size_t) std::min<uint64_t>(n, end - first);
        for (size_t i = 0; i < count; ++i) {
            to[i] = entries[(first + i) % entries.size()];
        }
        next   = first + count;
        n_lost = since < oldest ? oldest - since : 0;
        return count;
    }

    // by the thread that decodes

    void add(const std::vector<mobile_routed> & routed) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!is_on) {
            return;
        }
        for (const mobile_routed & entry : routed) {
            entries[end++ % entries.size()] = entry;
        }
    }

private:
    mutable std::mutex mutex; // of entries and end
    std::vector<mobile_routed> entries; // [MOBILE_ROUTED_MAX], or none yet
    uint64_t end = 0;                   // the number of the next entry
    std::atomic<bool> is_on { false };
};
