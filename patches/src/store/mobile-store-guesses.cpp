// mobile-store-guesses.cpp - uses that are taken back (mobile-former.h) in the store.

#include "store/mobile-store.h"

void mobile_store::keep_uses(bool on, bool goes_on) {
    locked lock(mutex);
    if (!goes_on) {
        for (const former_use & was : former) {
            experts[was.part].former = -1;
        }
        former.clear();
    }
    keeps_former = on;
}

// before the use
void mobile_store::keep_use(mobile_store_part part, const mobile_need & need) {
    mobile_expert & x = experts[part];
    if (x.former < 0) {
        x.former = (int32_t) former.size();
        former.push_back({ { x.n_uses, x.last_use, x.key, x.state != MOBILE_NOT_RESIDENT, 0 }, part, x.transient });
    }
    former[x.former].n_pass += need.lasting ? need.n_tokens : 0;
}

void mobile_store::settle_uses(const mobile_uses_of & used) {
    locked lock(mutex);
    for (const former_use & was : former) {
        mobile_expert & x = experts[was.part];
        const mobile_part part = part_in_layer(was.part);
        const mobile_use  use  = used(model_layer(x.layer), part);
        if (use.n_refused == 0) {
            continue;
        }
        const bool     listed = x.listed;
        const uint64_t n      = was.n_left(use);

        unlist(was.part);
        x.n_uses   = was.n_uses + n;
        x.last_use = was.last_left(use);
        // what came for them goes first
        const bool transient = n == 0 && x.slot >= 0 && (was.transient || !was.there);
        n_transient += (int) transient - (int) x.transient;
        x.transient  = transient;
        x.key        = n > 0 ? rank(x, part, x.last_use) : transient ? transient_key() : was.key;
        if (listed) {
            list(was.part);
        }
    }
}
