// mobile-store-admit.cpp - experts that were asked for and not computed: they are read while the disk is idle.
//
// Mechanism: a displaced part counts as used, so that it ranks as high as the router has it. One that is to be admitted waits
// in a queue until no read is queued or under way that something waits for, or hinted; then it takes a slot of what ranks
// below it, and is read beside the computation, one at a time.
// Invariants: it evicts nothing that ranks above it; a read of it that fails is no error; its bytes are the answer's, and in
// no demand; what a pass has asked for meanwhile is left to the pass, which may be waiting for that very slot.

#include "store/mobile-store.h"

#include <algorithm>

// what waits longer than this many others has been displaced too long ago
static constexpr size_t ADMITS_MAX = 64;

void mobile_store::get_resident(mobile_store_layer layer, mobile_by<mobile_part, uint8_t> & resident) {
    resident.assign(layers[layer].n_parts, 1);
    if (plain) {
        return;
    }
    locked lock(mutex);
    for (mobile_part part(0); resident.has(part); ++part) {
        resident[part] = experts[store_part_of(layer, part)].state != MOBILE_NOT_RESIDENT;
    }
}

void mobile_store::displace(mobile_store_layer layer, const std::vector<mobile_part> & parts, double time, bool admits_them) {
    if (all_resident || parts.empty()) {
        return;
    }
    locked lock(mutex);
    for (mobile_part part : parts) {
        const mobile_store_part id = store_part_of(layer, part);
        mobile_expert & x = experts[id];
        if (x.state != MOBILE_NOT_RESIDENT) {
            continue;
        }
        mobile_need need;
        need.part     = part;
        need.n_tokens = 1;
        need.time     = time;
        use(x, need);
        if (admits_them && std::find(admits.begin(), admits.end(), id) == admits.end()) {
            admits.push_back(id);
        }
    }
    while (admits.size() > ADMITS_MAX) {
        admits.pop_front();
    }
    lock.unlock();
    wake_io(admits_them);
}

// makes reads of the first part that is not there and may come; false: there is none
bool mobile_store::begin_admit(locked & lock) {
    while (!admits.empty() && n_warm_running == 0) {
        const mobile_store_part part = admits.front();
        admits.pop_front();
        mobile_expert & x = experts[part];
        int32_t slot = -1;
        if (!may_begin(x) || !take_slot(lock, x.layer, SLOT_ADMIT, x.key, slot)) {
            continue;
        }
        begin_load(part, slot, true);
        x.prefetched = false;
        admit_count.n_read++;
        admit_count.bytes += expert_bytes_of(layers[x.layer]);
        queue_reads({ part }, warm_reads);
        wake_io(1);
        return true;
    }
    return false;
}

mobile_admit_counters mobile_store::counters_admit() {
    locked lock(mutex);
    mobile_admit_counters c = admit_count;
    c.n_left = admits.size() + warm_reads.size() + n_warm_running;
    return c;
}
