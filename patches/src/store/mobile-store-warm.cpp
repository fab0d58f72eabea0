// mobile-store-warm.cpp - what was worth keeping when the model was last closed, read again while the disk is idle.
//
// Mechanism: a list of parts, the most worthy first. When no read is queued or under way that something asked for, or
// hinted, an I/O thread gives the first that is not there a free slot, and reads it. Until it is used it ranks below what
// was used, and above what a long batch passed through.
// Invariants: it evicts nothing, and ends for good when no slot is free; while a pass runs one read of it is under way at
// most; beside what of it is on its way the budget has room for the largest layer, so that no miss waits for its slots; a
// read of it that fails is no error, and is done again where a pass has asked for the part meanwhile; what it reads stands
// in its own counters and in no answer's.

#include "store/mobile-store.h"

int32_t mobile_store::warm(const std::vector<mobile_store_part> & parts) {
    locked lock(mutex);
    warm_parts.clear();
    if (all_resident) {
        return 0;
    }
    for (mobile_store_part part : parts) {
        if (experts[part].state == MOBILE_NOT_RESIDENT) {
            warm_parts.push_back(part);
        }
    }
    n_warm = warm_parts.size();
    lock.unlock();
    wake_io(n_warm);
    return (int32_t) n_warm;
}

// whether the disk has nothing else to do
bool mobile_store::is_idle() const {
    return n_running == n_warm_running && (!in_pass || n_warm_running == 0);
}

// reads that wait for that
size_t mobile_store::n_idle_work() const {
    return admits.size() + warm_parts.size() + warm_reads.size();
}

// makes reads of the first part that is not there; false: none may be now
bool mobile_store::begin_warm(locked & lock) {
    while (!warm_parts.empty()) {
        const mobile_store_part part = warm_parts.front();
        mobile_expert & x = experts[part];
        const uint64_t bytes = classes[layers[x.layer].cls].slot_bytes;
        if (x.state == MOBILE_NOT_RESIDENT && warm_in_flight > 0 && warm_in_flight + bytes + budget_min_bytes > budget_bytes) {
            return false;
        }
        warm_parts.pop_front();
        int32_t slot = -1;
        if (!may_begin(x) || bytes + budget_min_bytes > budget_bytes || !take_slot(lock, x.layer, SLOT_WARM, 0.0, slot)) {
            continue;
        }
        if (x.n_uses == 0) {
            x.key = -(double) (n_warm - warm_parts.size())/(double) n_warm;
        }
        begin_load(part, slot, true);
        x.prefetched  = false;
        x.warm        = true;
        x.warm_unused = true;
        warm_in_flight += bytes;
        warm_count.n_read++;
        queue_reads({ part }, warm_reads);
        wake_io(1);
        return true;
    }
    return false;
}

mobile_warm_counters mobile_store::counters_warm() {
    locked lock(mutex);
    mobile_warm_counters c = warm_count;
    c.n_left = warm_parts.size();
    return c;
}
