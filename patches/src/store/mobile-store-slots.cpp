// mobile-store-slots.cpp - which slot an expert gets, and who has to go for it.

#include "store/mobile-store.h"

#include <algorithm>

// how many experts of a layer are tried for one that may go
static constexpr int VICTIM_SCAN = 8;

// memory that is made present at a time, between two looks at what is asked for
static constexpr uint64_t PREFAULT_BYTES = 2*1024*1024;
// huge pages pay where they come at some GB/s, as cleared memory does. a virtual machine may have to get them from its host
// first, at less than a disk's speed, and a fragmented one has to make them: no more of them after so many slow ones in a row
static constexpr int64_t  SLOW_BYTES_PER_US = 1000; // of processor time
static constexpr uint32_t SLOW_IN_A_ROW     = 3;

// how much staler, in tokens, an expert must be for its slot to change shape
static constexpr double RESHAPE_TOKENS = 64.0;

void mobile_store::list(mobile_store_part part) {
    mobile_expert & x = experts[part];
    if (!x.listed && !all_resident) {
        evictable[x.layer].insert({ x.key, part });
        x.listed = true;
    }
}

void mobile_store::unlist(mobile_store_part part) {
    mobile_expert & x = experts[part];
    if (x.listed) {
        evictable[x.layer].erase({ x.key, part });
        x.listed = false;
    }
}

void mobile_store::release_slot(mobile_expert & x) {
    for (auto & s : x.piece_state) {
        s.store(MOBILE_PIECE_ABSENT, std::memory_order_relaxed);
    }
    classes[layers[x.layer].cls].free.push_back(x.slot);
    waste_hint(x);
    warm_count.n_wasted += x.warm_unused;
    n_transient -= x.transient;
    n_held[x.layer]--;
    x.state      = MOBILE_NOT_RESIDENT;
    x.slot       = -1;
    x.data       = nullptr;
    x.transient  = false;
    x.prefetched = false;
    x.failed     = false;
    x.warm       = false;
    x.warm_unused = false;
}

void mobile_store::evict(mobile_store_part part) {
    unlist(part);
    release_slot(experts[part]);
    count.n_evictions++;
}

bool mobile_store::may_go(const mobile_expert & x, mobile_store_layer layer, slot_use use, double now) const {
    if (x.expected) {
        return false;
    }
    switch (use) {
        case SLOT_DEMAND:
            return true;
        case SLOT_AHEAD:
            // not what is being read ahead itself, and of what single tokens use up to two layers' worth
            return x.layer != layer &&
                (x.transient || (n_transient < 2*(uint64_t) n_parts_max && budget_bytes >= 4*budget_min_bytes));
        case SLOT_PREFETCH:
            return x.last_use < now;
        case SLOT_WARM:
            return false;
        case SLOT_ADMIT:
            return x.key < now; // the newcomer's key
    }
    return false;
}

// the expert to evict for a slot of a layer; none: there is none that may go
mobile_store_part mobile_store::find_victim(mobile_store_layer layer, slot_use use, double now) const {
    const auto   eviction = (enum mobile_eviction) params.eviction;
    const double step     = mobile_policy_step(eviction);

    // the smallest key among slots of the right shape, and among the others
    mobile_store_part best     [2];
    double            best_key [2] = { 0.0, 0.0 };
    for (mobile_store_layer l(0); layers.has(l); ++l) {
        const int    other = layers[l].cls != layers[layer].cls;
        const double lean  = split.lean(eviction, l, n_held[l]);
        int n = 0;
        for (auto it = evictable[l].begin(); it != evictable[l].end() && n < VICTIM_SCAN; ++it, ++n) {
            const mobile_expert & x = experts[it->second];
            if (may_go(x, layer, use, now)) {
                // what is not kept is no reason to change a slot's shape
                const double own = other ? mobile_split<mobile_store_layer>::own_key(it->first) : it->first;
                const double key = own + lean + (l > layer && !x.transient ? mobile_policy_unvisited(eviction, n_pass_tokens) : 0.0);
                if (best[other].is_none() || key < best_key[other]) {
                    best    [other] = it->second;
                    best_key[other] = key;
                }
                break;
            }
        }
    }
    // changing a slot's shape means fresh pages: only for an expert that is clearly staler
    const bool reshape = best[0].is_none() || (!best[1].is_none() && best_key[1] + RESHAPE_TOKENS*step < best_key[0]);
    return reshape ? best[1] : best[0];
}

bool mobile_store::prefault_some(locked & lock) {
    if (!can_prefault || prefaulting) {
        return false;
    }
    // the classes in step, since nobody knows yet which will be asked for
    mobile_slot_class * c = nullptr;
    for (mobile_slot_class & o : classes) {
        const uint64_t begin = std::max(o.n_present, o.n_fresh);
        if (begin < o.n_slots && committed + prefaulted + o.slot_bytes <= budget_bytes &&
            (!c || begin*c->n_experts < std::max(c->n_present, c->n_fresh)*o.n_experts)) {
            c = &o;
        }
    }
    if (!c) {
        return false;
    }
    const uint64_t room  = (budget_bytes - committed - prefaulted)/c->slot_bytes;
    const uint64_t begin = std::max(c->n_present, c->n_fresh);
    const uint64_t n     = std::min({ room, c->n_slots - begin, std::max<uint64_t>(1, PREFAULT_BYTES/c->slot_bytes) });
    const uint64_t page  = mobile_page_size();
    c->n_present  = begin + n;
    prefaulted   += n*c->slot_bytes;
    prefaulting   = true;

    lock.unlock();
    // whole pages: the one that is shared with the slot before is there already
    const uint64_t first = mobile_round_up(begin*c->slot_bytes, page);
    const uint64_t last  = mobile_round_up((begin + n)*c->slot_bytes, page);
    int64_t spent_us = 0;
    const bool ok = last <= first || mobile_prefault(c->arena + first, last - first, spent_us);
    n_slow_in_a_row = spent_us*SLOW_BYTES_PER_US > (int64_t) (last - first) ? n_slow_in_a_row + 1 : 0;
    if (huge_pages && n_slow_in_a_row == SLOW_IN_A_ROW) {
        huge_pages = false;
        mobile_huge_pages(c->arena + last, mobile_round_up(c->n_slots*c->slot_bytes, page) - last, false);
    }
    lock.lock();

    prefaulting  = false;
    can_prefault = ok;
    // given back meanwhile, or not had at all
    const uint64_t kept = std::max(c->n_present, c->n_fresh);
    if (kept < begin + n) {
        mobile_discard(c->arena + kept*c->slot_bytes, (begin + n - kept)*c->slot_bytes);
    }
    return true;
}

void mobile_store::give_back_prefaulted() {
    while (committed + prefaulted > budget_bytes) {
        auto c = std::find_if(classes.begin(), classes.end(), [](const mobile_slot_class & o) { return o.n_present > o.n_fresh; });
        if (c == classes.end()) {
            return;
        }
        c->n_present--;
        prefaulted -= c->slot_bytes;
        mobile_discard(c->arena + c->n_present*c->slot_bytes, c->slot_bytes);
    }
}

// a slot that holds no memory yet, with memory. false: there is none, or the system has no memory for it: what is there has to do
bool mobile_store::take_memory(mobile_slot_class & c, int32_t & slot) {
    const bool is_spare = !c.spare.empty();
    if (!is_spare && c.n_fresh == c.n_slots) {
        return false;
    }
    slot = is_spare ? c.spare.back() : (int32_t) c.n_fresh;
    if (!mobile_take(c.arena + (uint64_t) slot*c.slot_bytes, c.slot_bytes)) {
        return false;
    }
    if (is_spare) {
        c.spare.pop_back();
    } else {
        c.n_fresh++;
        prefaulted -= slot < (int32_t) c.n_present ? c.slot_bytes : 0;
    }
    return true;
}

bool mobile_store::take_slot(locked & lock, mobile_store_layer layer, slot_use use, double now, int32_t & slot) {
    mobile_slot_class & c = classes[layers[layer].cls];
    for (;;) {
        if (!c.free.empty()) {
            slot = c.free.back();
            c.free.pop_back();
            return true;
        }
        if (committed + c.slot_bytes <= budget_bytes && take_memory(c, slot)) {
            committed += c.slot_bytes;
            give_back_prefaulted();
            count.resident_bytes_peak = std::max(count.resident_bytes_peak, committed);
            return true;
        }
        // a free slot of another shape: its pages become budget
        auto other = std::find_if(classes.begin(), classes.end(), [](const mobile_slot_class & o) { return !o.free.empty(); });
        if (other != classes.end()) {
            const int32_t s = other->free.back();
            other->free.pop_back();
            other->spare.push_back(s);
            mobile_discard(other->arena + (uint64_t) s*other->slot_bytes, other->slot_bytes);
            committed -= other->slot_bytes;
            continue;
        }
        const mobile_store_part victim = find_victim(layer, use, now);
        if (!victim.is_none()) {
            evict(victim);
            continue;
        }
        if (use != SLOT_DEMAND) {
            return false;
        }
        if (forget_expected()) {
            continue;
        }
        if (n_in_flight == 0) {
            return false;
        }
        // what is being read ahead can be evicted once it has arrived
        cv_done.wait(lock);
    }
}
