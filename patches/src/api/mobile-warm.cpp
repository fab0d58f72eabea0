// mobile-warm.cpp - the warm set's part of the C API: from the model's experts to the store's parts, and back.

#include "api/mobile-context-of.h"

#include "mobile-error.h"

#include <string>

int32_t mobile_get_worth(const struct llama_context * ctx, int32_t * experts, int32_t n) {
    return mobile_guard([&] {
        const mobile_context & m = mobile_context_of(ctx);
        mobile_require(n >= 0 && (experts || n == 0), "the experts need room for n pairs");
        const std::vector<mobile_worth_entry> ranked = m.worth.ranked();
        for (size_t i = 0; i < ranked.size() && i < (size_t) n; ++i) {
            experts[2*i]     = ranked[i].il.n;
            experts[2*i + 1] = ranked[i].expert;
        }
        return (int32_t) ranked.size();
    });
}

int32_t mobile_warm(struct llama_context * ctx, const int32_t * experts, int32_t n) {
    return mobile_guard([&] {
        mobile_store & store = *mobile_context_of(ctx).store;
        mobile_require(n >= 0 && (experts || n == 0), "a warm set needs n pairs of layer and expert");
        std::vector<mobile_store_part> parts;
        for (int32_t i = 0; i < n; ++i) {
            const mobile_store_layer layer  = store.layer_of(mobile_model_layer(experts[2*i]));
            const int32_t            expert = experts[2*i + 1];
            mobile_require(!layer.is_none() && expert >= 0 && expert < store.n_expert_of(layer),
                "layer " + std::to_string(experts[2*i]) + " of this model has no expert " + std::to_string(expert));
            for (int32_t s = 0; s < store.n_segments; ++s) {
                parts.push_back(store.store_part_of(layer, store.part_of(expert, s)));
            }
        }
        return store.warm(parts);
    });
}

int32_t mobile_get_warm_counters(const struct llama_context * ctx, struct mobile_warm_counters * counters) {
    return mobile_guard([&] {
        *counters = mobile_context_of(ctx).store->counters_warm();
        return MOBILE_OK;
    });
}
