// same_math.h - the same bits of mathematics from every C library, for engines of two systems that are compared.
//
// Two libraries differ in the last bit of a float in every hundredth sine. Computed as a double and rounded it is the same
// float, but for one in a hundred million. Included before everything else that ggml's CPU backend is compiled from.

#pragma once

#ifdef __cplusplus
#include <cmath>
#else
#include <math.h>
#endif

static inline float same_expf  (float x)          { return (float) exp  ((double) x); }
static inline float same_expm1f(float x)          { return (float) expm1((double) x); }
static inline float same_logf  (float x)          { return (float) log  ((double) x); }
static inline float same_powf  (float x, float y) { return (float) pow  ((double) x, (double) y); }
static inline float same_sinf  (float x)          { return (float) sin  ((double) x); }
static inline float same_cosf  (float x)          { return (float) cos  ((double) x); }
static inline float same_tanhf (float x)          { return (float) tanh ((double) x); }
static inline float same_erff  (float x)          { return (float) erf  ((double) x); }

#define expf(x)    same_expf(x)
#define expm1f(x)  same_expm1f(x)
#define logf(x)    same_logf(x)
#define powf(x, y) same_powf(x, y)
#define sinf(x)    same_sinf(x)
#define cosf(x)    same_cosf(x)
#define tanhf(x)   same_tanhf(x)
#define erff(x)    same_erff(x)
