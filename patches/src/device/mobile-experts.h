// mobile-experts.h - a layer's expert tensors, seen one kind at a time.

#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <array>
#include <cstdint>

// a layer's expert tensors as build_moe_ffn takes them: weights, biases, scales. NULL: there is none
struct mobile_experts {
    ggml_tensor * gate_up   = nullptr;
    ggml_tensor * up        = nullptr;
    ggml_tensor * gate      = nullptr;
    ggml_tensor * down      = nullptr;
    ggml_tensor * gate_up_b = nullptr;
    ggml_tensor * up_b      = nullptr;
    ggml_tensor * gate_b    = nullptr;
    ggml_tensor * down_b    = nullptr;
    ggml_tensor * up_s      = nullptr;
    ggml_tensor * gate_s    = nullptr;
    ggml_tensor * down_s    = nullptr;
};

using mobile_member = ggml_tensor * mobile_experts::*;

constexpr std::array<mobile_member, 11> MOBILE_MEMBERS = {
    &mobile_experts::gate_up,   &mobile_experts::up,     &mobile_experts::gate,   &mobile_experts::down,
    &mobile_experts::gate_up_b, &mobile_experts::up_b,   &mobile_experts::gate_b, &mobile_experts::down_b,
    &mobile_experts::up_s,      &mobile_experts::gate_s, &mobile_experts::down_s,
};

bool mobile_is_weight (mobile_member m);
// the dimension that counts experts: weights [.., .., n], biases [.., n], scales [n]
int  mobile_expert_dim(mobile_member m);

uint64_t mobile_bytes_per_expert(const mobile_experts & experts);
// but for the number of experts
bool     mobile_same_shape      (const mobile_experts & a, const mobile_experts & b);
// whether a device multiplies by n experts like these in one tensor, n_used of them per token. it may know no such
// type, or reach no further into a tensor; then the scheduler would copy the tensor to the CPU for each token. CUDA's
// kernels reach any tensor but number its blocks with 31 bits (mmvf.cu, mmvq.cu, mmq.cuh: channel_x*stride_channel_x).
// down_params: of the op that multiplies by `down`, GGML_MAX_OP_PARAMS bytes
bool     mobile_experts_on_kernels(const mobile_experts & experts, ggml_backend_dev_t dev, int64_t n, int64_t n_used, const void * down_params);
// whether experts can be copied from these tensors
bool     mobile_experts_on_host (const mobile_experts & experts);
