// mobile-policy.h - which resident expert goes when another needs its slot.
//
// Mechanism: a policy is a pure function that gives an expert a retention key when it is used; the
// expert with the smallest key is evicted first. Keys are comparable across layers and do not change
// until the next use, so ordered sets serve every policy.
// Limits: a policy sees use counts and times (in tokens), not the future.

#pragma once

#include "mobile.h"

#include <cmath>
#include <cstdint>

// MoEpic's P = mu * rho^((now - time)/omega) (arXiv 2509.08342) has the logarithm
//   ln(mu) + time*s - now*s,  s = ln(1/rho)/omega
// which orders alike; the last term, the same for all, drops out. this is s, and 1 for lru: what a key
// gains by a use one token later
inline double mobile_policy_step(enum mobile_eviction eviction) {
    const double ln_rho = std::log(4.0); // rho = 0.25
    switch (eviction) {
        case MOBILE_EVICTION_LRU:    return 1.0;
        case MOBILE_EVICTION_MOEPIC: return ln_rho/128.0;
        // fewest misses on two real traces among one-parameter policies (docs/measurements.md)
        case MOBILE_EVICTION_DECAY:  return ln_rho/12.0;
    }
    return 1.0;
}

// n_uses: tokens routed to the expert so far, > 0; time: of the last use, in tokens
inline double mobile_policy_key(enum mobile_eviction eviction, uint64_t n_uses, double time) {
    const double mu = eviction == MOBILE_EVICTION_LRU ? 0.0 : std::log((double) n_uses);
    return mu + time*mobile_policy_step(eviction);
}

// what to add to the keys of layers that the running pass, of n_tokens of answers, has not reached yet: their experts were
// last used so many tokens ago, but have missed no visit of their layer since
inline double mobile_policy_unvisited(enum mobile_eviction eviction, int32_t n_tokens) {
    return eviction == MOBILE_EVICTION_DECAY ? n_tokens*mobile_policy_step(eviction) : 0.0;
}
