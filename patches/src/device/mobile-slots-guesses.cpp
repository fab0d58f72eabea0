// mobile-slots-guesses.cpp - of passes over drafts in the slots of devices: uses that are taken back (mobile-former.h), and what
// layers yet to come will probably ask for, which does not go for what others miss.

#include "device/mobile-slots.h"

#include <algorithm>

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

bool mobile_slots::is_short() const {
    return params.placement == MOBILE_PLACEMENT_CACHE && std::any_of(pools.begin(), pools.end(), [](const mobile_pool & p) {
        return p.n_slots - p.n_zero < p.n_expert;
    });
}

// as many slots as a layer of the pass may need are left to it
void mobile_slots::expect(mobile_model_layer il, const std::vector<mobile_part> & parts, int32_t n_tokens) {
    const mobile_slots_layer layer = layer_of(il);
    if (layer.is_none() || !is_cached(il, n_tokens)) {
        return;
    }
    mobile_device_layer & l = layers[layer];
    const mobile_pool   & p = pools[l.pool];
    int32_t room = p.n_slots - p.n_zero - std::min(n_tokens*n_used, l.n_expert) - n_held(l.pool);
    for (mobile_part part : parts) {
        if (room > 0 && l.experts[part].state == MOBILE_SLOT_IDLE) {
            move(l, part, MOBILE_SLOT_AWAITED);
            held.push_back({ layer, part, 0.0, true });
            room--;
        }
    }
}

// what is expected last; false: nothing is
bool mobile_slots::let_expected_go(int32_t pool) {
    const auto last = std::find_if(held.rbegin(), held.rend(), [&](const mobile_slot_hint & h) {
        return h.expected && layers[h.layer].pool == pool;
    });
    if (last == held.rend()) {
        return false;
    }
    move(layers[last->layer], last->part, MOBILE_SLOT_IDLE);
    held.erase(std::next(last).base());
    return true;
}
