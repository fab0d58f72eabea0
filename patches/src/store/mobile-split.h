// mobile-split.h - which segments of an expert a tier keeps, and how much of it a layer may fill before it gives way
// (MoEpic, arXiv 2509.08342).
//
// Mechanism: of each layer's experts the first `kept` segments have the policy's retention key. The others rank below all of
// those, among themselves by the same policy: they come for a use, and are the first to go. Of an expert's segments the last
// goes first. A layer that fills more than its quota ranks as if its experts had last been used a little earlier.
// Invariants: without a split keys are the policy's to the bit; a quota refuses nothing.
// Limits: it changes what stays, never what is computed.

#pragma once

#include "mobile-ids.h"
#include "store/mobile-policy.h"

#include <algorithm>
#include <utility>

// below what was used and what is read for the warm set, above what a long batch passed through
constexpr double MOBILE_REST_KEY = -1e9;

// so many tokens earlier a layer's experts were used that fills twice its quota, at most; later where it fills none
constexpr double MOBILE_QUOTA_TOKENS = 16.0;

// of parts by retention key, which goes first; of an expert's segments with the same key the last
template <typename part_number> struct mobile_goes_first {
    int32_t n_segments = 1;

    bool operator()(const std::pair<double, part_number> & a, const std::pair<double, part_number> & b) const {
        if (a.first != b.first) {
            return a.first < b.first;
        }
        const int32_t of_a = a.second.n/n_segments;
        const int32_t of_b = b.second.n/n_segments;
        return of_a != of_b ? of_a < of_b : b.second < a.second;
    }
};

// layers: as the tier that has it numbers them
template <typename layer_number> class mobile_split {
public:
    // kept: segments of each layer that stay; quota: parts that a layer may hold, 0: any number
    void set(mobile_by<layer_number, int32_t> && of_layer, mobile_by<layer_number, double> && quota_of) {
        kept  = std::move(of_layer);
        quota = std::move(quota_of);
    }

    bool keeps(layer_number layer, int32_t segment) const { return kept.empty() || segment < kept[layer]; }

    // the retention key of a part that was used n_uses times, last at a time in tokens
    double key(enum mobile_eviction eviction, layer_number layer, int32_t segment, uint64_t n_uses, double time) const {
        const double own = mobile_policy_key(eviction, n_uses, time);
        return keeps(layer, segment) ? own : own + MOBILE_REST_KEY;
    }

    // what to add to the keys of a layer that holds n parts
    double lean(enum mobile_eviction eviction, layer_number layer, uint64_t n) const {
        if (quota.empty() || quota[layer] <= 0.0) {
            return 0.0;
        }
        return -MOBILE_QUOTA_TOKENS*mobile_policy_step(eviction)*std::min((double) n/quota[layer] - 1.0, 1.0);
    }

    // a key without what marks a part that is not kept
    static double own_key(double key) { return key < MOBILE_REST_KEY/2 && key > 2*MOBILE_REST_KEY ? key - MOBILE_REST_KEY : key; }

private:
    mobile_by<layer_number, int32_t> kept;  // empty: all
    mobile_by<layer_number, double>  quota;
};
