#include "ggml-precise.h"

#include <stddef.h>

#define CHUNK 512 // floats that are widened at a time

static struct ggml_type_traits_cpu * g_traits = NULL; // [GGML_TYPE_COUNT], set once by the CPU backend

static void (*g_f16_to_f32) (const ggml_fp16_t *, float *, int64_t);
static void (*g_bf16_to_f32)(const ggml_bf16_t *, float *, int64_t);

// the stock traits, while ours are in their place
static struct ggml_type_traits_cpu g_stock_f16;
static struct ggml_type_traits_cpu g_stock_bf16;
static bool g_on = false;

static void add_dot(float * sum, int n, float * widened, const float * y) {
    float part;
    g_traits[GGML_TYPE_F32].vec_dot(n, &part, 0, widened, 0, y, 0, 1);
    *sum += part;
}

static void vec_dot_f16_f32(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) {
    float widened[CHUNK];
    float sum = 0.0f;
    for (int i = 0; i < n; i += CHUNK) {
        const int m = n - i < CHUNK ? n - i : CHUNK;
        g_f16_to_f32((const ggml_fp16_t *) x + i, widened, m);
        add_dot(&sum, m, widened, (const float *) y + i);
    }
    *s = sum;

    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
}

static void vec_dot_bf16_f32(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc) {
    float widened[CHUNK];
    float sum = 0.0f;
    for (int i = 0; i < n; i += CHUNK) {
        const int m = n - i < CHUNK ? n - i : CHUNK;
        g_bf16_to_f32((const ggml_bf16_t *) x + i, widened, m);
        add_dot(&sum, m, widened, (const float *) y + i);
    }
    *s = sum;

    GGML_UNUSED(bs);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(nrc);
}

void ggml_precise_register(
        struct ggml_type_traits_cpu * traits,
        void (*f16_to_f32) (const ggml_fp16_t *, float *, int64_t),
        void (*bf16_to_f32)(const ggml_bf16_t *, float *, int64_t)) {
    if (!g_traits) {
        g_traits      = traits;
        g_f16_to_f32  = f16_to_f32;
        g_bf16_to_f32 = bf16_to_f32;
    }
}

bool ggml_precise_set(bool on) {
    if (!g_traits) {
        return false;
    }
    if (on == g_on) {
        return true;
    }
    struct ggml_type_traits_cpu * f16  = &g_traits[GGML_TYPE_F16];
    struct ggml_type_traits_cpu * bf16 = &g_traits[GGML_TYPE_BF16];
    if (on) {
        g_stock_f16  = *f16;
        g_stock_bf16 = *bf16;
        f16->vec_dot  = vec_dot_f16_f32;
        bf16->vec_dot = vec_dot_bf16_f32;
        f16->vec_dot_type = bf16->vec_dot_type = GGML_TYPE_F32;
        f16->nrows        = bf16->nrows        = 1;
    } else {
        *f16  = g_stock_f16;
        *bf16 = g_stock_bf16;
    }
    g_on = on;
    return true;
}
