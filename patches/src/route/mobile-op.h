// mobile-op.h - custom ops of ours: made on the CPU, and known again by their function.
//
// Invariant: mobile_op_is() reads what ggml_custom_4d() wrote. Where an op's function stands in its op_params is ggml's
// business, so whoever makes one reads it back: should ggml move it, no context can be created, and the text says why.

#pragma once

#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <array>
#include <cstring>
#include <stdexcept>

static_assert(sizeof(ggml_custom_op_params) <= sizeof(ggml_tensor::op_params), "ggml keeps a custom op's function elsewhere");

inline ggml_custom_op_params mobile_op_params(const ggml_tensor * t) {
    ggml_custom_op_params params;
    memcpy(&params, t->op_params, sizeof(params));
    return params;
}

inline bool mobile_op_is(const ggml_tensor * t, ggml_custom_op_t fun) {
    return t->op == GGML_OP_CUSTOM && mobile_op_params(t).fun == fun;
}

// ne: three dimensions of the result. pinned to the CPU, since some backends claim every op
inline ggml_tensor * mobile_op_new(
        ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, enum ggml_type type, const std::array<int64_t, 3> & ne,
        ggml_tensor ** args, int n_args, ggml_custom_op_t fun, int n_tasks, void * userdata) {
    ggml_tensor * t = ggml_custom_4d(ctx0, type, ne[0], ne[1], ne[2], 1, args, n_args, fun, n_tasks, userdata);
    if (!mobile_op_is(t, fun) || mobile_op_params(t).userdata != userdata) {
        throw std::runtime_error("ggml keeps a custom op's function elsewhere than this engine looks for it");
    }
    ggml_backend_sched_set_tensor_backend(sched, t, backend_cpu);
    return t;
}
