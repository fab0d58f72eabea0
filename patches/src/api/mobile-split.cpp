// mobile-split.cpp - which segments of experts are kept: a part of the C API.

#include "api/mobile-context-of.h"

#include "llama-context.h"

#include <string>
#include <utility>

int32_t mobile_set_split(struct llama_context * ctx, bool on_device, const int32_t * kept, const float * shares, int32_t n_layer) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        if (on_device && !m.slots) {
            return mobile_fail(MOBILE_ERR_STATE, "there are no slots on a device that a split could be for");
        }
        mobile_require((!kept && !shares) || n_layer == m.n_layer, "a split needs an entry for each of this model's " + std::to_string(m.n_layer) + " layers");
        const int32_t n_segments = m.store->n_segments;
        mobile_by<mobile_model_layer, int32_t> of_layer;
        mobile_by<mobile_model_layer, double>  share_of;
        for (int32_t il = 0; il < n_layer && (kept || shares); ++il) {
            of_layer.push_back(kept   ? kept[il]   : n_segments);
            share_of.push_back(shares ? shares[il] : 0.0);
            mobile_require(m.store->layer_of(mobile_model_layer(il)).is_none() || (of_layer.back() >= 1 && of_layer.back() <= n_segments),
                "layer " + std::to_string(il) + " cannot keep " + std::to_string(of_layer.back()) + " of " + std::to_string(n_segments) + " segments");
            mobile_require(share_of.back() >= 0.0 && share_of.back() <= 1.0, "layer " + std::to_string(il) + " cannot have a share of " + std::to_string(share_of.back()));
        }
        if (on_device) {
            m.slots->set_split(of_layer, share_of);
            return MOBILE_OK;
        }
        mobile_by<mobile_store_layer, int32_t> in_store;
        mobile_by<mobile_store_layer, double>  wishes;
        for (mobile_store_layer layer(0); m.store->layers.has(layer) && !of_layer.empty(); ++layer) {
            const mobile_model_layer il = m.store->model_layer(layer);
            in_store.push_back(of_layer.has(il) ? of_layer[il] : n_segments);
            wishes  .push_back(share_of.has(il) ? share_of[il] : 0.0);
        }
        m.store->set_split(std::move(in_store), wishes);
        return MOBILE_OK;
    });
}
