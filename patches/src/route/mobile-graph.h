// mobile-graph.h - what the last graph of a context was built for, and what is known only while one is built.

#pragma once

#include "ggml.h"

#include <cstdint>

struct mobile_graph {
    // of the last graph
    bool    is_stale   = false; // it must be built anew
    bool    has_policy = false; // whole layers on a device have a route op
    int32_t down_params[GGML_MAX_OP_PARAMS/sizeof(int32_t)] = {}; // of the op that multiplies by `down`

    // while a hot chain is built
    ggml_tensor * hot_ids     = nullptr;
    ggml_tensor * hot_weights = nullptr;

    // where experts are computed has changed
    void invalidate() {
        is_stale   = true;
        has_policy = false;
    }
};
