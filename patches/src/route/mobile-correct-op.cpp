// mobile-correct-op.cpp - the op behind a layer's sum of experts: see mobile-correction.h.

#include "route/mobile-context.h"

#include "ggml.h"

#include <cstring>

void mobile_correct_run(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const mobile_route & route = *(const mobile_route *) userdata;
    const mobile_correction & correction = route.ctx->correction;
    const ggml_tensor * src = dst->src[0];
    const int64_t n = dst->ne[0];

    for (int64_t t = ith; t < dst->ne[1]; t += nth) {
        const float * x = (const float *) ((const char *) src->data + t*src->nb[1]);
        float       * y = (float *) ((char *) dst->data + t*dst->nb[1]);
        if ((size_t) t >= route.corrected.size() || !route.corrected[t]) { // a pass that failed has none
            memcpy(y, x, n*sizeof(float));
            continue;
        }
        const float * scale = correction.scale_of(route.il);
        const float * shift = correction.shift_of(route.il);
        for (int64_t i = 0; i < n; ++i) {
            y[i] = x[i]*scale[i] + shift[i];
        }
    }
}
