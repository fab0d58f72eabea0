// mobile-usage.h - the counters of one context: its own, and the store's since the last reset.

#pragma once

#include "mobile.h"
#include "store/mobile-store.h"

class mobile_usage {
public:
    explicit mobile_usage(mobile_store & store) : base(store.counters()) {}

    void add_tokens(uint64_t n, uint64_t n_little) {
        n_tokens        += n;
        n_tokens_little += n_little;
    }

    void reset(mobile_store & store);
    void get  (mobile_store & store, mobile_counters & counters) const;

private:
    uint64_t        n_tokens        = 0;
    uint64_t        n_tokens_little = 0;
    mobile_counters base; // the store's at the last reset
};
