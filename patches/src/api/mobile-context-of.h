// mobile-context-of.h - from a llama_context to what it has of ours, for exported functions inside mobile_guard().

#pragma once

#include "mobile-error.h"
#include "route/mobile-context.h"

#include "llama-context.h"

inline constexpr const char * MOBILE_NO_STORE = "this model has no expert store: it has no routed experts, or was loaded without load parameters";

// throws MOBILE_ERR_STATE if there is nothing
inline mobile_context & mobile_context_of(const struct llama_context * ctx) {
    mobile_context * m = ctx ? ctx->get_cparams().mobile.get() : nullptr;
    if (!m) {
        mobile_throw(MOBILE_ERR_STATE, MOBILE_NO_STORE);
    }
    return *m;
}

// after a change of what graphs hold: the next one is built anew, and memory for the largest reserved. throws what llama.cpp
// throws if there is none
inline void mobile_plan_anew(struct llama_context & ctx, mobile_context & m) {
    m.graph.invalidate();
    ctx.synchronize();
    ctx.mobile_reserve();
}
