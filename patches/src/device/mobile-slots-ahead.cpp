// mobile-slots-ahead.cpp - uploads ahead of need that may turn out wrong.
//
// Mechanism: a hint names an expert that a layer yet to come will probably need. While its layer has not begun, and as
// soon as it is in host memory and the uploader has room, it is uploaded beside the computation, if by the measured
// time in which the link has nothing else to do between two layers it can be there when it is needed. Hinted experts stay until their layer begins, those that
// were in slots already as well; then each is used, or the staler expert that it was before.
// Rule: an upload takes a free slot, or that of the expert with the smallest key. Where misses are fetched that one
// would leave anyway; else only if the running token has not used it, and its key is smaller than that of a use now.
// As many slots as the running layer may need are left to it.
// Invariants: those of mobile-slots.h; uploads ahead are used, wasted (gone without a use) or still there unused.
// Limits: of the thread that decodes, like all of mobile_slots; hints of other threads come by way of the predictor.

#include "device/mobile-slots.h"

#include "ggml.h"

#include <algorithm>

static constexpr double GAP_STEP = 1.0/16; // how much a new gap moves the average

// a hint is wrong in up to half of all cases, and what a right one saves has to pay for both
static constexpr double UPLOADS_PER_USE = 2.0;

// what a miss costs: its upload, its computation on the CPU, or both at once
double mobile_slots::miss_us(const mobile_device & d) const {
    switch (params.miss) {
        case MOBILE_MISS_FETCH: return d.upload_us;
        case MOBILE_MISS_CPU:   return cpu_us_per_expert;
        default:                return d.upload_us <= 0.0 ? 0.0 : d.upload_us*cpu_us_per_expert/(d.upload_us + cpu_us_per_expert);
    }
}

bool mobile_slots::takes_hints(bool forced) const {
    return params.placement == MOBILE_PLACEMENT_CACHE && std::any_of(devices.begin(), devices.end(), [&](const mobile_device & d) {
        return d.uploader && (forced || params.poison || UPLOADS_PER_USE*d.stall_us < miss_us(d));
    });
}

void mobile_slots::hint(mobile_model_layer il, const std::vector<mobile_part> & parts, double now) {
    const mobile_device_layer * l = find(il);
    if (!l || !devices[l->device].uploader) {
        return;
    }
    const mobile_slots_layer layer = layer_of(il);
    const auto at = std::upper_bound(hints.begin(), hints.end(), layer, [](mobile_slots_layer a, const mobile_slot_hint & h) { return a < h.layer; });
    std::vector<mobile_slot_hint> fresh;
    for (mobile_part part : parts) {
        if (l->experts[part].slot < 0) {
            fresh.push_back({ layer, part, now });
        } else if (layer > reached) {
            keep(layer, part);
        }
    }
    hints.insert(at, fresh.begin(), fresh.end());
}

// in slots of the pool, and to stay until their layers begin
int32_t mobile_slots::n_held(int32_t pool) const {
    return (int32_t) std::count_if(held.begin(), held.end(), [&](const mobile_slot_hint & h) { return layers[h.layer].pool == pool; });
}

bool mobile_slots::may_hold(const mobile_pool & p) const {
    return n_held((int32_t) (&p - pools.data())) + n_reserved < p.n_slots - p.n_zero;
}

// what is in a slot and hinted does not leave it
void mobile_slots::keep(mobile_slots_layer layer, mobile_part part) {
    mobile_device_layer & l = layers[layer];
    if (l.experts[part].state == MOBILE_SLOT_IDLE && may_hold(pools[l.pool])) {
        move(l, part, MOBILE_SLOT_AWAITED);
        held.push_back({ layer, part });
    }
}

void mobile_slots::begin_hints() {
    reached    = mobile_slots_layer();
    n_reserved = n_used;
    left_us    = ggml_time_us();
    backlog_us = 0.0;
}

void mobile_slots::run_ahead() {
    if (hints.empty()) {
        return;
    }
    const int64_t start = ggml_time_us();
    collect();
    hints.erase(std::remove_if(hints.begin(), hints.end(), [&](const mobile_slot_hint & h) { return take_ahead(h); }), hints.end());
    count.upload_us += ggml_time_us() - start;
}

// false: it may be possible later
bool mobile_slots::take_ahead(const mobile_slot_hint & h) {
    const mobile_device_layer & l = layers[h.layer];
    if (l.experts[h.part].slot >= 0) {
        return true;
    }
    if (h.layer <= reached || !is_in_time(h)) {
        count.n_ahead_dropped++;
        return true;
    }
    if (!devices[l.device].uploader->has_room() || !store.hold(l.in_store, h.part)) {
        return false;
    }
    count.n_ahead_dropped += !upload_ahead(h);
    store.let_go(l.in_store, h.part);
    return true;
}

// whether an upload that is queued now is there before the layer needs it
bool mobile_slots::is_in_time(const mobile_slot_hint & h) {
    mobile_device & d = devices[layers[h.layer].device];
    const double used = (double) (ggml_time_us() - left_us) - backlog_us;
    const double left = (h.layer - reached)*gap_us - std::max(0.0, used);
    return params.poison || (double) (d.uploader->in_flight() + 1)*d.upload_us <= left;
}

bool mobile_slots::upload_ahead(const mobile_slot_hint & h) {
    mobile_device_layer  & l = layers[h.layer];
    mobile_device_expert & x = l.experts[h.part];
    mobile_pool          & p = pools[l.pool];

    if (!may_hold(p) && !let_expected_go(l.pool)) {
        return false;
    }
    if (p.free.empty()) {
        double key = 0.0;
        const mobile_slots_layer victim = find_victim(l.pool, reached, key);
        if (victim.is_none()) {
            return false;
        }
        const mobile_part leaves = layers[victim].evictable.begin()->second;
        const double      use    = rank(h.layer, h.part, h.now);
        if (params.miss != MOBILE_MISS_FETCH && (key >= use || layers[victim].experts[leaves].last_use >= h.now)) {
            return false;
        }
        evict(victim, leaves);
    }
    mobile_upload up;
    up.layer = h.layer;
    up.part  = h.part;
    x.slot = take_free(p);
    if (!parts_of(l, h.part, x.slot, false, up.parts)) {
        release(l, h.part);
        return false;
    }
    x.upload = devices[l.device].uploader->queue(std::move(up), store.all_resident);
    x.reason = MOBILE_SLOT_HINTED;
    move(l, h.part, MOBILE_SLOT_SENDING_AHEAD);
    held.push_back(h);
    count.n_ahead++;
    count.n_ahead_unused++;
    count.bytes_uploaded       += p.slot_bytes;
    count.bytes_uploaded_ahead += p.slot_bytes;
    return true;
}

// the pass has come to layer `current`
void mobile_slots::begin_layer(const std::vector<mobile_need> & needs) {
    if (!reached.is_none() && current == reached + 1) {
        const double gap = std::max(0.0, (double) (ggml_time_us() - left_us) - backlog_us);
        gap_us = gap_us > 0.0 ? gap_us + GAP_STEP*(gap - gap_us) : gap;
    }
    reached = current;
    int32_t n_ids = 0;
    for (const mobile_need & need : needs) {
        n_ids += (int32_t) need.n_tokens;
    }
    n_reserved = std::max(n_used, std::min(n_ids, layers[current].n_expert));
    settle_ahead(current);
}

// what was awaited for layers up to this one, with all before, is as good as any other
void mobile_slots::settle_ahead(mobile_slots_layer layer) {
    for (const mobile_slot_hint & h : held) {
        mobile_device_layer & l = layers[h.layer];
        const enum mobile_slot_state state = l.experts[h.part].state;
        if (h.layer <= layer && state == MOBILE_SLOT_AWAITED) {
            move(l, h.part, MOBILE_SLOT_IDLE);
        } else if (h.layer <= layer && state == MOBILE_SLOT_SENDING_AHEAD) {
            move(l, h.part, MOBILE_SLOT_SENDING);
        }
    }
    held.erase(std::remove_if(held.begin(), held.end(), [&](const mobile_slot_hint & h) {
        const mobile_device_expert & x = layers[h.layer].experts[h.part];
        return x.state != MOBILE_SLOT_AWAITED && !x.is_sending();
    }), held.end());
}

// the layer needs an expert that is on its way; returns how long it still took
double mobile_slots::wait_ahead(const mobile_device_layer & l, const mobile_device_expert & x) {
    const int64_t start = ggml_time_us();
    devices[l.device].uploader->wait(x.upload);
    collect();
    const int64_t us = ggml_time_us() - start;
    count.upload_us += us;
    return (double) us;
}

void mobile_slots::use_ahead(const mobile_device_layer & l, double waited_us) {
    count.n_ahead_used++;
    count.n_ahead_unused--;
    count.ahead_saved_us += (uint64_t) std::max(0.0, miss_us(devices[l.device]) - waited_us);
}

// x leaves its slot
void mobile_slots::waste_ahead(const mobile_device_layer & l, mobile_device_expert & x) {
    if (x.reason == MOBILE_SLOT_HINTED) {
        count.n_ahead_wasted++;
        count.n_ahead_unused--;
        count.bytes_ahead_wasted += pools[l.pool].slot_bytes;
    }
    x.reason = MOBILE_SLOT_USED;
}

// the pass is over: hints are, too
void mobile_slots::end_hints() {
    count.n_ahead_dropped += std::count_if(hints.begin(), hints.end(), [&](const mobile_slot_hint & h) { return layers[h.layer].experts[h.part].slot < 0; });
    hints.clear();
    settle_ahead(layers.next());
    reached = mobile_slots_layer();
}
