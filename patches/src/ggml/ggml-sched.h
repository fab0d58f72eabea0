// ggml-sched.h - the scheduler's splits, as our hooks see them. Included by ggml-backend.cpp behind its own structures.

#pragma once

#include "ggml-copies.h"
#include "ggml-idle.h"

#include <algorithm>

// whether the next split on the host takes something from this split's backend, and so waits for it
static bool ggml_sched_is_waited_for(ggml_backend_sched_t sched, int split_id) {
    for (int i = split_id + 1; i < sched->n_splits; ++i) {
        const struct ggml_backend_sched_split & next = sched->splits[i];
        if (ggml_backend_buft_is_host(sched->bufts[next.backend_id])) {
            return std::any_of(next.inputs, next.inputs + next.n_inputs, [&](ggml_tensor * input) {
                return !(input->flags & GGML_TENSOR_FLAG_INPUT) && tensor_backend_id(input) == sched->splits[split_id].backend_id;
            });
        }
    }
    return false;
}

// true: the input of a split on a backend is copied, or will be by a queue; weights are copied expert by expert
static bool ggml_sched_copy(ggml_backend_sched_t sched, ggml_copies & copies, int to, ggml_tensor * input, ggml_tensor * copy) {
    const int from = tensor_backend_id(input);
    return sched->n_copies == 1 && ggml_backend_buffer_get_usage(ggml_copies::buffer_of(input)) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS &&
        copies.copy(sched->backends[from], from, sched->backends[to], to, input, copy);
}

// the split's inputs are copied; true: and its results are there as well
static bool ggml_sched_begin(ggml_backend_sched_t sched, ggml_copies & copies, int split_id) {
    struct ggml_backend_sched_split & split = sched->splits[split_id];
    copies.begin_split(split.backend_id, ggml_sched_is_waited_for(sched, split_id));
    return !sched->callback_eval && ggml_idle(&split.graph);
}
