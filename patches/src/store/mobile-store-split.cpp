// mobile-store-split.cpp - keeping leading segments of experts before others: mobile-split.h in the store.

#include "store/mobile-store.h"

#include <algorithm>
#include <utility>

// the retention key of a use of x at a time in tokens
double mobile_store::rank(const mobile_expert & x, mobile_part part, double time) const {
    return split.key((enum mobile_eviction) params.eviction, x.layer, mobile_segment_of(part, n_segments), std::max<uint64_t>(x.n_uses, 1), time);
}

void mobile_store::set_split(mobile_by<mobile_store_layer, int32_t> && kept, const mobile_by<mobile_store_layer, double> & shares) {
    locked lock(mutex);
    mobile_by<mobile_store_layer, double> quota;
    for (mobile_store_layer layer(0); shares.has(layer); ++layer) {
        quota.push_back(shares[layer]*(double) budget_bytes/(double) classes[layers[layer].cls].slot_bytes);
    }
    split.set(std::move(kept), std::move(quota));
    // what was used before ranks as if it had been used under this one
    for (mobile_store_part part(0); experts.has(part); ++part) {
        mobile_expert & x = experts[part];
        if (x.n_uses == 0 || x.transient) {
            continue;
        }
        const bool was_listed = x.listed;
        unlist(part);
        x.key     = rank(x, part_in_layer(part), x.last_use);
        x.own_key = x.hinted ? rank(x, part_in_layer(part), x.own_use) : x.own_key;
        if (was_listed) {
            list(part);
        }
    }
}
