// mobile-slots-guesses.cpp - uses that are taken back (mobile-former.h) in the slots of devices.

#include "device/mobile-slots.h"

void mobile_slots::keep_uses(bool on, bool goes_on) {
    if (!goes_on) {
        for (const former_use & was : former) {
            layers[was.layer].experts[was.part].former = -1;
        }
        former.clear();
    }
    keeps_former = on;
}

// before the use, by the running layer
void mobile_slots::keep_use(const mobile_need & need) {
    mobile_device_expert & x = layers[current].experts[need.part];
    if (x.former < 0) {
        x.former = (int32_t) former.size();
        former.push_back({ { x.n_uses, x.last_use, x.key, x.slot >= 0, 0 }, current, need.part, x.lately });
    }
    former[x.former].n_pass += need.n_tokens;
}

void mobile_slots::settle_uses(const mobile_uses_of & used) {
    for (const former_use & was : former) {
        mobile_device_layer  & l = layers[was.layer];
        mobile_device_expert & x = l.experts[was.part];
        const mobile_use use = used(l.il, was.part);
        if (use.n_refused == 0) {
            continue;
        }
        const uint64_t n    = was.n_left(use);
        const double   last = was.last_left(use);

        x.n_uses   = was.n_uses + n;
        x.lately   = was.lately;
        x.last_use = was.last_use;
        if (n > 0) {
            x.lately = x.lately_at(last) + (double) n;
        }
        x.last_use = last;
        // what came for them goes first
        const bool transient = n == 0 && x.slot >= 0 && !was.there;
        set_key(l, was.part, n > 0 ? rank(was.layer, was.part, last) : transient ? MOBILE_TRANSIENT_KEY : was.key);
    }
}
