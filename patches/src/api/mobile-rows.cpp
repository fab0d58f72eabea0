// mobile-rows.cpp - passes whose tokens have the bits that each has alone: a part of the C API.

#include "api/mobile-context-of.h"
#include "mobile.h"

#include "ggml-backend.h"
#include "llama-context.h"

typedef void (*set_use_ref_t)(ggml_backend_t backend, bool use_ref);

int32_t mobile_set_row_exact(struct llama_context * ctx, bool on) {
    return mobile_guard([&] {
        mobile_require(ctx, "there is no context");
        const ggml_backend_sched_t sched = ctx->get_sched();
        for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
            const ggml_backend_t     backend = ggml_backend_sched_get_backend(sched, i);
            const ggml_backend_dev_t device  = ggml_backend_get_device(backend);
            const ggml_backend_reg_t reg     = device ? ggml_backend_dev_backend_reg(device) : nullptr;
            const auto set_use_ref = reg ? (set_use_ref_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_set_use_ref") : nullptr;
            if (set_use_ref) {
                set_use_ref(backend, on);
            }
        }
        return MOBILE_OK;
    });
}
