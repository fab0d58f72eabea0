// ggml-precise.h - F16 and BF16 matrices times float32 activations on the CPU.
//
// Mechanism: ggml rounds the activations of a product to the type of a 16-bit matrix. Switched on, the CPU
// backend's traits of these types name a dot product that widens the matrix instead, so that what a model
// computes differs from float32 arithmetic on its weights by summation order alone.
// Invariant: changes products with F16 and BF16 matrices and nothing else; off, nothing at all.
// Limits: one switch per process, turned while nothing is computed; a few times slower; the CPU backend
// only, and not its optional kernels for repacked weights.

#pragma once

#include "ggml-cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// ggml-cpu tells where its traits are: traits [GGML_TYPE_COUNT] is written to by ggml_precise_set
GGML_API void ggml_precise_register(
        struct ggml_type_traits_cpu * traits,
        void (*f16_to_f32) (const ggml_fp16_t *, float *, int64_t),
        void (*bf16_to_f32)(const ggml_bf16_t *, float *, int64_t));

// false: no CPU backend has registered yet
GGML_API bool ggml_precise_set(bool on);

#ifdef __cplusplus
}
#endif
