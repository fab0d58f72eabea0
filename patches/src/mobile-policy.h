// mobile-policy.h - which resident expert goes when another needs its slot.
//
// Mechanism: a policy is a pure function that gives an expert a retention key when it is used; the
// expert with the smallest key is evicted first. Keys are comparable across layers and do not change
// until the next use, so one ordered set over all layers serves every policy.
// Limits: a policy sees use counts and times (in tokens), not the future.

#pragma once

#include "mobile.h"

#include <cmath>
#include <cstdint>

// n_uses: tokens routed to the expert so far, > 0; time: of the last use, in tokens
inline double mobile_policy_key(enum mobile_eviction eviction, uint64_t n_uses, double time) {
    switch (eviction) {
        case MOBILE_EVICTION_LRU:
            return time;
        case MOBILE_EVICTION_MOEPIC:
            {
                // P = mu * rho^((now - time)/omega), rho = 0.25, omega = 128 (arXiv 2509.08342). its logarithm
                // orders alike, and the term in `now`, the same for all, drops out
                const double decay = std::log(4.0)/128.0;
                return std::log((double) n_uses) + decay*time;
            }
    }
    return time;
}
