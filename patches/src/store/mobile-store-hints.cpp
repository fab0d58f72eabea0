// mobile-store-hints.cpp - reads for the pass that runs again what a little pass left out.
//
// Mechanism: a hint names an expert that a layer will need, unless the run again is routed otherwise. It costs nothing until an I/O thread has
// no other read to do; only then does it take a slot and become a read. What a layer needs is known when it
// asks, so its hints are dropped then: those that became reads are used, or kept as the staler expert they were.
// Invariants: a hint evicts nothing that the running token has used; a read of a hint that fails is no error;
// experts read by hints are used, wasted (gone without a use) or still there unused.

#include "store/mobile-store.h"

#include <algorithm>

// hints become reads only while at most so many reads of misses are under way
static constexpr uint32_t HINT_DEMAND_MAX = 0;

int32_t mobile_store::hint(mobile_store_layer layer, const std::vector<mobile_part> & parts, double now) {
    const mobile_layer & l = layers[layer];

    locked lock(mutex);
    if (all_resident) {
        return 0;
    }
    int32_t n = 0;
    for (mobile_part part : parts) {
        if (part.n >= 0 && part.n < l.n_parts && experts[store_part_of(layer, part)].state == MOBILE_NOT_RESIDENT) {
            hints.push_back({ store_part_of(layer, part), now });
            n++;
        }
    }
    lock.unlock();
    wake_io(n);
    return n;
}

// makes a read of the first hint that can be one; false: there is none
bool mobile_store::begin_hint(locked & lock) {
    if (n_demand_running > HINT_DEMAND_MAX) {
        return false;
    }
    while (!hints.empty()) {
        const hinted h = hints.front();
        hints.pop_front();

        mobile_expert & x = experts[h.part];
        int32_t slot = -1;
        if (!may_begin(x)) {
            continue;
        }
        if (!take_slot(lock, x.layer, SLOT_PREFETCH, h.now, slot)) {
            hints.clear();
            return false;
        }
        x.hinted    = true;
        x.own_use   = x.last_use;
        x.own_key   = x.key;
        x.last_use  = h.now;
        x.key       = rank(x, part_in_layer(h.part), h.now);
        begin_load(h.part, slot, true);
        hinted_reads.push_back(h.part);
        count.n_prefetched++;
        ahead_count.n_queued++;
        queue_reads({ h.part }, ahead);
        wake_io(1);
        return true;
    }
    return false;
}

// a need of what a hint has read
void mobile_store::use_hint(mobile_store_part part) {
    mobile_expert & x = experts[part];
    const mobile_layer & l = layers[x.layer];
    uint32_t n_pieces = 0;
    for (int p = 0; p < l.n_pieces; ++p) {
        n_pieces += n_chunks(range_of(part, p));
    }
    ahead_count.n_used++;
    ahead_count.bytes_early += expert_bytes_of(l)*(n_pieces - x.n_pending)/n_pieces;
    x.hinted = false;
}

// x leaves its slot, or its read has failed
void mobile_store::waste_hint(mobile_expert & x) {
    if (x.hinted) {
        ahead_count.n_wasted++;
        ahead_count.bytes_wasted += expert_bytes_of(layers[x.layer]);
        x.hinted = false;
    }
}

// the needs of a layer are known and pinned: its hints have served
void mobile_store::settle_hints(mobile_store_layer layer) {
    hints.erase(std::remove_if(hints.begin(), hints.end(), [&](const hinted & h) {
        return layer_of_part(h.part) == layer;
    }), hints.end());

    auto others = std::stable_partition(hinted_reads.begin(), hinted_reads.end(), [&](mobile_store_part part) {
        return layer_of_part(part) != layer;
    });
    for (auto it = others; it != hinted_reads.end(); ++it) {
        mobile_expert & x = experts[*it];
        if (x.hinted && !x.pinned) {
            // a wrong one is worth no more than before
            const bool was_listed = x.listed;
            unlist(*it);
            x.last_use = x.own_use;
            x.key      = x.own_key;
            if (was_listed) {
                list(*it);
            }
        }
    }
    hinted_reads.erase(others, hinted_reads.end());
}

// the pass is over
void mobile_store::drop_hints() {
    hints.clear();
    hinted_reads.clear();
}

mobile_ahead_counters mobile_store::counters_ahead() {
    locked lock(mutex);
    mobile_ahead_counters c = ahead_count;
    c.stall_us = count.stall_us;
    return c;
}
