// mobile-store-pass.cpp - what a computation asks of the store while it runs.

#include "store/mobile-store.h"

#include "ggml.h"

#include <algorithm>

void mobile_store::begin_pass(int32_t n_tokens) {
    locked lock(mutex);
    in_pass       = true;
    n_pass_tokens = n_tokens;
    error_text    = error_for_good;
}

void mobile_store::fail_for_good(const std::string & text) {
    locked lock(mutex);
    if (error_for_good.empty()) {
        error_for_good = text;
        error_text     = text;
    }
}

void mobile_store::unpin_all() {
    for (mobile_store_part part : pinned) {
        mobile_expert & x = experts[part];
        x.pinned = false;
        if (x.state == MOBILE_RESIDENT) {
            if (x.failed) {
                release_slot(x);
            } else {
                list(part);
            }
        }
    }
    pinned.clear();
}

bool mobile_store::end_pass() {
    locked lock(mutex);
    in_pass = false;
    unpin_all();
    forget_expected();
    drop_hints();
    cv_done.notify_all();
    wake_io(n_idle_work());
    if (error_text.empty()) {
        error_text = thrown;
    }
    thrown[0] = 0;
    return error_text.empty();
}

// the newest lowest: a long batch passes through few slots, and its first layers stay for the next batch
double mobile_store::transient_key() {
    return MOBILE_TRANSIENT_KEY - (double) ++transient_seq;
}

// gives x a new key; it is not listed
void mobile_store::use(mobile_expert & x, const mobile_need & need) {
    const bool transient = need.lasting ? false : x.transient || x.state == MOBILE_NOT_RESIDENT;

    n_transient += (int) transient - (int) x.transient;
    x.transient  = transient;
    if (need.lasting) {
        x.n_uses  += need.n_tokens;
        x.last_use = need.time;
        x.key      = rank(x, need.part, x.last_use);
    } else if (transient) {
        x.key = transient_key();
    }
}

void mobile_store::request(mobile_store_layer layer, const std::vector<mobile_need> & needs) {
    locked lock(mutex);
    try {
        ask(lock, layer, needs);
    } catch (...) {
        catch_thrown(lock);
        throw;
    }
}

void mobile_store::ask(locked & lock, mobile_store_layer layer, const std::vector<mobile_need> & needs) {
    const mobile_layer & l = layers[layer];

    cv_done.wait(lock, [&] { return n_catching == 0; }); // what it asks for would fail with the rest

    count.bytes_routed += needs.size()*(expert_bytes_of(l));
    if (plain || (all_resident && experts[l.first].state == MOBILE_RESIDENT)) {
        count.n_hits += needs.size();
        return;
    }
    unpin_all();
    forget_expected(layer);

    std::vector<mobile_store_part> misses;
    std::vector<mobile_store_part> on_their_way;
    for (const auto & need : needs) {
        const mobile_store_part part = store_part_of(layer, need.part);
        mobile_expert & x = experts[part];
        pinned.push_back(part);
        unlist(part);
        if (keeps_former) {
            keep_use(part, need);
        }
        use(x, need);
        x.pinned = true;
        if (x.state == MOBILE_NOT_RESIDENT) {
            count.n_misses++;
            misses.push_back(part);
            continue;
        }
        count.n_hits++;
        if (x.prefetched) {
            count.n_prefetch_hits++;
            x.prefetched = false;
        }
        if (x.hinted) {
            use_hint(part);
        }
        if (x.warm_unused) {
            warm_count.n_used++;
            x.warm_unused = false;
        }
        if (x.state == MOBILE_LOADING) {
            forgive(part);
            on_their_way.push_back(part);
        }
    }
    promote(on_their_way);
    settle_hints(layer);
    if (needs.size()*classes[l.cls].slot_bytes > budget_bytes) { // legal with params.n_at_once
        for (mobile_store_part part : misses) {
            no_slot(part);
        }
        return;
    }
    std::vector<mobile_store_part> loads;
    for (mobile_store_part part : misses) {
        int32_t slot = -1;
        // the budget holds what the layer asks for, and only this one is pinned
        if (!take_slot(lock, layer, SLOT_DEMAND, 0.0, slot)) {
            no_slot(part);
            continue;
        }
        begin_load(part, slot, false);
        loads.push_back(part);
    }
    queue_reads(loads, demand);
    const size_t n_queued = demand.size();
    lock.unlock();
    wake_io(n_queued);
}

void mobile_store::read_ahead(mobile_store_layer layer) {
    locked lock(mutex);
    if (all_resident) {
        return;
    }
    try {
        ask_ahead(lock, layer);
    } catch (...) {
        catch_thrown(lock);
        throw;
    }
}

void mobile_store::ask_ahead(locked & lock, mobile_store_layer layer) {
    const mobile_layer & l = layers[layer];

    cv_done.wait(lock, [&] { return n_catching == 0; }); // what it asks for would fail with the rest

    std::vector<mobile_store_part> loads;
    for (mobile_store_part part = l.first; part < l.first + l.n_parts; ++part) {
        mobile_expert & x = experts[part];
        int32_t slot = -1;
        if (x.state != MOBILE_NOT_RESIDENT) {
            continue;
        }
        if (!take_slot(lock, layer, SLOT_AHEAD, 0.0, slot)) {
            break;
        }
        mobile_need need;
        need.lasting = false;
        use(x, need);
        begin_load(part, slot, true);
        loads.push_back(part);
    }
    count.n_prefetched += loads.size();
    queue_reads(loads, ahead);
    lock.unlock();
    wake_io(loads.size());
}

bool mobile_store::hold(mobile_store_layer layer, mobile_part part) {
    if (plain) {
        return true;
    }
    const mobile_store_part id = store_part_of(layer, part);

    locked lock(mutex);
    if (experts[id].state != MOBILE_RESIDENT || experts[id].failed) {
        return false;
    }
    unlist(id);
    return true;
}

void mobile_store::let_go(mobile_store_layer layer, mobile_part part) {
    if (plain) {
        return;
    }
    const mobile_store_part id = store_part_of(layer, part);

    locked lock(mutex);
    if (!experts[id].pinned) {
        list(id);
    }
}

// the experts that are in use leave no slot for this one: its pieces read as zeros, and the pass fails
void mobile_store::no_slot(mobile_store_part part) {
    mobile_expert & x = experts[part];
    for (auto & s : x.piece_state) {
        s.store(MOBILE_PIECE_FAILED, std::memory_order_release);
    }
    if (error_text.empty()) {
        error_text = "layer " + std::to_string(model_layer(x.layer).n) + ": more experts are needed at once than the budget holds";
    }
}

const char * mobile_store::resolve(mobile_store_layer layer, int32_t piece, mobile_part part, bool wait) {
    const mobile_store_part id = store_part_of(layer, part);
    const mobile_expert & x = experts[id];

    const auto address = [&] {
        const mobile_range & r = range_of(id, piece);
        return x.data + classes[layers[layer].cls].piece_offset[piece] + r.offset % files[r.file].align;
    };

    if (x.piece_state[piece].load(std::memory_order_acquire) == MOBILE_PIECE_READY) {
        return address();
    }
    if (!wait) {
        return nullptr;
    }

    locked lock(mutex);
    if (n_waiting++ == 0) {
        stall_start = ggml_time_us();
    }
    bool arrived = false;
    try {
        arrived = arrives(lock, layer, piece, id);
    } catch (...) {
        catch_thrown(lock);
    }
    if (--n_waiting == 0) {
        count.stall_us += ggml_time_us() - stall_start;
        cv_done.notify_all();
    }
    return arrived ? address() : zeros;
}

// waits for a piece, and serves the queue meanwhile; false: it cannot be read, and the pass fails
bool mobile_store::arrives(locked & lock, mobile_store_layer layer, int32_t piece, mobile_store_part part) {
    mobile_expert & x = experts[part];
    if (x.state == MOBILE_NOT_RESIDENT && (!x.pinned || x.piece_state[piece].load(std::memory_order_relaxed) == MOBILE_PIECE_ABSENT)) {
        // not requested by the route op, or not to the end: a graph of somebody else's. load it as a need of this layer
        int32_t slot = -1;
        if (!x.pinned) {
            pinned.push_back(part);
            x.pinned = true;
        }
        const bool taken = take_slot(lock, layer, SLOT_DEMAND, 0.0, slot);
        if (x.state != MOBILE_NOT_RESIDENT) {
            // another computing thread was quicker, while this one waited for a slot
            if (taken) {
                classes[layers[layer].cls].free.push_back(slot);
            }
        } else if (taken) {
            count.n_misses++;
            begin_load(part, slot, false);
            queue_reads({ part }, demand);
            wake_io(1);
        } else {
            no_slot(part);
        }
    }
    uint32_t state;
    while ((state = x.piece_state[piece].load(std::memory_order_acquire)) < MOBILE_PIECE_READY) {
        if (!run_one(lock, true)) {
            cv_done.wait(lock);
        }
    }
    if (state == MOBILE_PIECE_READY) {
        return true;
    }
    if (error_text.empty() && thrown[0] == 0) {
        // it was read ahead, and failed before this pass asked for it
        error_text = describe(part, piece) + ": a read ahead of need failed";
    }
    return false;
}

void mobile_store::settle() {
    if (n_waiting.load(std::memory_order_relaxed) > 0) {
        locked lock(mutex);
        cv_done.wait(lock, [&] { return n_waiting.load(std::memory_order_relaxed) == 0; });
    }
}
