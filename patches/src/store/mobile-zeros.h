// mobile-zeros.h - weights of nothing but zeros, which cost neither reads nor memory: for a trial of a file's header.
//
// Mechanism: every tensor of a load goes to a buffer type of ours, which maps read-only zero pages; the loader's
// copy loop then leaves the data where they are. All else of a load, and every decode, is what it is with real weights.
// Limits: nothing that depends on the values of weights is seen. experts are where the stock loader has them, in
// ordinary buffers, and are marked so that contexts build the route op.

#pragma once

#include "ggml-backend.h"

ggml_backend_buffer_type_t mobile_zeros_type();

inline constexpr const char * MOBILE_EVERY_TENSOR = ".";
