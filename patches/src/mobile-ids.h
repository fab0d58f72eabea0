// mobile-ids.h - the three number spaces of layers and experts.
//
//   mobile_model_layer   a layer of the model: the IL of blk.IL
//   mobile_store_layer   a layer that has routed experts: an index into mobile_store::layers
//   mobile_part          what the store keeps as one: with experts in S segments, segment s of expert e is e*S + s
//
// Experts of the model, as routers number them, are plain int32_t.
// Conversions are mobile_store::layer_of(), model_layer(), part_of() and expert_of(), and nothing else: a number of one
// space is no argument where another is meant.

#pragma once

#include <cstdint>

template <typename space> struct mobile_number {
    int32_t n = -1;

    constexpr mobile_number() = default;
    explicit constexpr mobile_number(int64_t n) : n((int32_t) n) {}

    constexpr bool is_none() const { return n < 0; }

    friend constexpr bool operator==(mobile_number a, mobile_number b) { return a.n == b.n; }
    friend constexpr bool operator!=(mobile_number a, mobile_number b) { return a.n != b.n; }
    friend constexpr bool operator< (mobile_number a, mobile_number b) { return a.n <  b.n; }
};

using mobile_model_layer = mobile_number<struct mobile_space_model_layer>;
using mobile_store_layer = mobile_number<struct mobile_space_store_layer>;
using mobile_part        = mobile_number<struct mobile_space_part>;
