#include "route/mobile-usage.h"

void mobile_usage::reset(mobile_store & store) {
    store.reset_peak();
    base            = store.counters();
    n_tokens        = 0;
    n_tokens_little = 0;
}

void mobile_usage::get(mobile_store & store, mobile_counters & counters) const {
    const mobile_counters now = store.counters();
    counters = now; // resident_bytes and its peak are the store's
    counters.n_tokens          = n_tokens;
    counters.n_tokens_little   = n_tokens_little;
    counters.n_hits            = now.n_hits            - base.n_hits;
    counters.n_misses          = now.n_misses          - base.n_misses;
    counters.n_evictions       = now.n_evictions       - base.n_evictions;
    counters.n_prefetched      = now.n_prefetched      - base.n_prefetched;
    counters.n_prefetch_hits   = now.n_prefetch_hits   - base.n_prefetch_hits;
    counters.bytes_read        = now.bytes_read        - base.bytes_read;
    counters.bytes_read_demand = now.bytes_read_demand - base.bytes_read_demand;
    counters.bytes_routed      = now.bytes_routed      - base.bytes_routed;
    counters.stall_us          = now.stall_us          - base.stall_us;
}
