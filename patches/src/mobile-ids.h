// mobile-ids.h - the number spaces of layers and experts.
//
//   mobile_model_layer   a layer of the model: the IL of blk.IL
//   mobile_store_layer   a layer that has routed experts: an index into mobile_store::layers
//   mobile_slots_layer   a layer that a device has slots for: an index into mobile_slots::layers
//   mobile_part          what the store keeps as one, among those of its layer; an expert or a segment of one
//   mobile_store_part    the same among those of all layers: an index into mobile_store::experts
//
// Experts of the model, as routers number them, are plain int32_t.
// From one space to another there are the functions at the end of this file, mobile_store::layer_of(), model_layer(),
// store_part_of(), layer_of_part() and part_in_layer(), and mobile_slots::layer_of(). A number of one space is no argument
// where another is meant, and no index of another's list (mobile_by).
// A plain integer becomes a number where it comes from elsewhere: a name in a file, the rows of a tensor, an op's ids, the
// first of a loop. A number becomes a plain integer, `n`, where it goes elsewhere: a text, ggml, the C API, a table of two
// dimensions. tests/patches/test_sources.py looks for numbers that are made of another's `n`.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

template <typename space> struct mobile_number {
    int32_t n = -1;

    constexpr mobile_number() = default;
    explicit constexpr mobile_number(int64_t n) : n((int32_t) n) {}

    constexpr bool is_none() const { return n < 0; }

    mobile_number & operator++() {
        ++n;
        return *this;
    }

    // so many further on, or back; how many from b to a
    friend constexpr mobile_number operator+(mobile_number a, int32_t by)      { return mobile_number(a.n + by); }
    friend constexpr mobile_number operator-(mobile_number a, int32_t by)      { return mobile_number(a.n - by); }
    friend constexpr int32_t       operator-(mobile_number a, mobile_number b) { return a.n - b.n; }

    friend constexpr bool operator==(mobile_number a, mobile_number b) { return a.n == b.n; }
    friend constexpr bool operator!=(mobile_number a, mobile_number b) { return a.n != b.n; }
    friend constexpr bool operator< (mobile_number a, mobile_number b) { return a.n <  b.n; }
    friend constexpr bool operator<=(mobile_number a, mobile_number b) { return a.n <= b.n; }
    friend constexpr bool operator> (mobile_number a, mobile_number b) { return a.n >  b.n; }
};

using mobile_model_layer = mobile_number<struct mobile_space_model_layer>;
using mobile_store_layer = mobile_number<struct mobile_space_store_layer>;
using mobile_slots_layer = mobile_number<struct mobile_space_slots_layer>;
using mobile_part        = mobile_number<struct mobile_space_part>;
using mobile_store_part  = mobile_number<struct mobile_space_store_part>;

// a vector whose index is a number of one space
template <typename number, typename value> class mobile_by : std::vector<value> {
    using base = std::vector<value>;

public:
    using base::base;
    using base::assign;
    using base::back;
    using base::begin;
    using base::clear;
    using base::empty;
    using base::end;
    using base::push_back;
    using base::rbegin;
    using base::rend;
    using base::resize;
    using base::size;

    value       & operator[](number i)       { return base::operator[]((size_t) i.n); }
    const value & operator[](number i) const { return base::operator[]((size_t) i.n); }

    bool   has(number i) const { return i.n >= 0 && (size_t) i.n < size(); }
    // of what is pushed back next
    number next() const { return number((int64_t) size()); }
};

// experts in S segments: segment s of expert e is part e*S + s
constexpr mobile_part mobile_part_of   (int32_t expert, int32_t segment, int32_t n_segments) { return mobile_part(expert*n_segments + segment); }
constexpr int32_t     mobile_expert_of (mobile_part part, int32_t n_segments) { return part.n/n_segments; }
constexpr int32_t     mobile_segment_of(mobile_part part, int32_t n_segments) { return part.n%n_segments; }
