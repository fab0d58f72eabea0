// mobile-correction.cpp - corrections of little tokens: a part of the C API.

#include "api/mobile-context-of.h"
#include "mobile.h"

#include "llama-model.h"

#include <cmath>
#include <string>

int32_t mobile_set_correction(struct llama_context * ctx, int32_t k, const float * scale, const float * shift, int32_t n_layer, int32_t n_embd) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        const mobile_correction before = m.correction;
        if (!scale && !shift) {
            m.correction.clear();
        } else {
            const int32_t n_channels = (int32_t) ctx->get_model().hparams.n_embd;
            mobile_require(scale && shift && n_layer == m.n_layer && n_embd == n_channels,
                "a correction needs [" + std::to_string(m.n_layer) + "][" + std::to_string(n_channels) + "] scales and shifts for this model");
            mobile_require(k > 0 && k < m.n_expert_used, "a correction is of tokens with 1 to " + std::to_string(m.n_expert_used - 1) + " experts");
            for (size_t i = 0; i < (size_t) n_layer*n_embd; ++i) {
                mobile_require(std::isfinite(scale[i]) && std::isfinite(shift[i]), "a correction's numbers must be finite");
            }
            for (const mobile_route & route : m.routes) {
                if (!route.once) {
                    return mobile_fail(MOBILE_ERR_STATE, "this model computes the experts of layer " + std::to_string(route.il.n) + " twice: its sum cannot be corrected");
                }
            }
            m.correction.set(k, scale, shift, n_layer, n_embd);
        }
        if (m.correction.is_set() != before.is_set()) {
            try {
                mobile_plan_anew(*ctx, m);
            } catch (const std::exception & e) {
                m.correction = before;
                mobile_throw(MOBILE_ERR_MEMORY, std::string("no memory for a graph that corrects sums of experts: ") + e.what());
            }
        }
        return MOBILE_OK;
    });
}

int32_t mobile_set_corrected(struct llama_context * ctx, bool on) {
    return mobile_guard([&] {
        mobile_context_of(ctx).correction.turn(on);
        return MOBILE_OK;
    });
}
