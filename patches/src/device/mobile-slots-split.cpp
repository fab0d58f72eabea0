// mobile-slots-split.cpp - keeping leading segments of experts before others: mobile-split.h in the slots of devices.

#include "device/mobile-slots.h"

#include <algorithm>
#include <utility>

// the retention key of a use at a time in tokens
double mobile_slots::rank(mobile_slots_layer layer, mobile_part part, double time) const {
    const uint64_t n_uses = std::max<uint64_t>(layers[layer].experts[part].n_uses, 1);
    return split.key((enum mobile_eviction) params.eviction, layer, mobile_segment_of(part, store.n_segments), n_uses, time);
}

// whether what the CPU computed may take the slot of what would leave; victim: none, there is a free one. what is not kept
// takes no slot of what is, which takes its slots if an upload pays at all
bool mobile_slots::may_leave(const mobile_device_layer & l, const mobile_device_expert & candidate, mobile_slots_layer victim, mobile_part leaves) const {
    if (victim.is_none()) {
        return is_earned(l, candidate, nullptr);
    }
    const mobile_device_expert & x = layers[victim].experts[leaves];
    const bool kept   = candidate.key > MOBILE_REST_KEY/2;
    const bool leaver = x.key         > MOBILE_REST_KEY/2;
    if (kept != leaver) {
        return kept && is_earned(l, candidate, nullptr);
    }
    return is_earned(l, candidate, &x);
}

void mobile_slots::set_split(const mobile_by<mobile_model_layer, int32_t> & kept, const mobile_by<mobile_model_layer, double> & shares) {
    mobile_by<mobile_slots_layer, int32_t> of_layer;
    mobile_by<mobile_slots_layer, double>  quota;
    for (const mobile_device_layer & l : layers) {
        if (!kept.empty()) {
            of_layer.push_back(kept.has(l.il) ? kept[l.il] : store.n_segments);
        }
        const auto share = [&](const mobile_device_layer & x) { return shares.has(x.il) ? shares[x.il] : 0.0; };
        double of_pool = 0.0; // wished by the layers that share its slots
        for (const mobile_device_layer & other : layers) {
            of_pool += other.pool == l.pool ? share(other) : 0.0;
        }
        const mobile_pool & p = pools[l.pool];
        quota.push_back(of_pool > 0.0 ? share(l)/of_pool*(p.n_slots - p.n_zero) : 0.0);
    }
    split.set(std::move(of_layer), std::move(quota));
    // what was used before ranks as if it had been used under this one
    for (mobile_slots_layer layer(0); layers.has(layer); ++layer) {
        mobile_device_layer & l = layers[layer];
        for (mobile_part part(0); l.experts.has(part); ++part) {
            if (l.experts[part].n_uses > 0) {
                set_key(l, part, rank(layer, part, l.experts[part].last_use));
            }
        }
    }
}
