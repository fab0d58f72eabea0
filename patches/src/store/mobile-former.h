// mobile-former.h - uses that are taken back where the tokens that they are of turn out to be none of the text.
//
// Mechanism: each tier has retention keys of its own. In passes over such tokens it keeps, for each part that a layer asks for,
// what its use was before. Afterwards it is told how many of the passes' uses are none (mobile-guesses.h), and reckons again.
// Invariant: a part that only such tokens asked for is as unused as before, and what came for them alone goes first.

#pragma once

#include "mobile-ids.h"

#include <algorithm>
#include <cstdint>
#include <functional>

// below every other key
constexpr double MOBILE_TRANSIENT_KEY = -1e15;

// uses of a part by tokens that may be none of the text
struct mobile_use {
    uint64_t n_refused = 0;
    double   time      = 0.0; // of the last one that was not refused, if there is one
};

using mobile_uses_of = std::function<mobile_use(mobile_model_layer, mobile_part)>;

// what the use of a part was before passes that are kept together
struct mobile_former_use {
    uint64_t n_uses    = 0;
    double   last_use  = 0.0;
    double   key       = 0.0;
    bool     there     = false; // in a slot, or on its way to one
    uint64_t n_pass    = 0;     // uses by the passes

    // of these, those that are left
    uint64_t n_left(const mobile_use & use) const { return n_pass > use.n_refused ? n_pass - use.n_refused : 0; }
    // time of the last use that is left
    double last_left(const mobile_use & use) const { return n_left(use) > 0 ? std::max(use.time, last_use) : last_use; }
};
