// mobile-tag.h - what our hooks write into the op_params of weights.
//
// Mechanism: a weight has no operation, so ggml leaves its op_params zero and reads them nowhere. A tag stands there: a
// magic word, which says of what kind it is, and an address.
// Invariant: a tag is written over zeros only, and taken for one only by its magic word. Should ggml begin to use these
// bytes, loads fail with a text, or passes do, instead of an address being made of what lies there.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <cstring>

enum mobile_tag_kind : uint64_t {
    MOBILE_TAG_ROUTED = 0x6d6f62696c650001, // of a model that gets the route op, in an ordinary buffer. no address
    MOBILE_TAG_STORED = 0x6d6f62696c650002, // in the store; address: its mobile_tensor
};

struct mobile_tag {
    uint64_t     kind    = 0;
    const void * address = nullptr;
};

static_assert(sizeof(mobile_tag) <= sizeof(ggml_tensor::op_params), "a tag must fit into op_params");

// false: something else stands there
inline bool mobile_tag_set(ggml_tensor * t, enum mobile_tag_kind kind, const void * address) {
    static const char zeros[sizeof(t->op_params)] = {};
    if (t->op != GGML_OP_NONE || memcmp(t->op_params, zeros, sizeof(zeros)) != 0) {
        return false;
    }
    mobile_tag tag;
    tag.kind    = kind;
    tag.address = address;
    memcpy(t->op_params, &tag, sizeof(tag));
    return true;
}

inline bool mobile_tag_is(const ggml_tensor * t, enum mobile_tag_kind kind) {
    mobile_tag tag;
    memcpy(&tag, t->op_params, sizeof(tag));
    return tag.kind == kind;
}

// NULL: it is not of this kind, or no longer there
inline const void * mobile_tag_address(const ggml_tensor * t, enum mobile_tag_kind kind) {
    mobile_tag tag;
    memcpy(&tag, t->op_params, sizeof(tag));
    return tag.kind == kind ? tag.address : nullptr;
}
