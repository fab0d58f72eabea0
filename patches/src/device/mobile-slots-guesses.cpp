// mobile-slots-guesses.cpp - uses that are taken back (mobile-former.h) in the slots of devices.

#include "device/mobile-slots.h"

void mobile_slots::keep_uses(bool on) {
    former.clear();
    keeps_former = on;
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
