// mobile-route-ahead.cpp - hints of experts that will be needed: to the device tier from the predictor, to both tiers from
// little passes.

#include "route/mobile-context.h"

#include "llama-context.h"

bool mobile_route_takes_hints(const mobile_context & ctx) {
    return ctx.slots && ctx.slots->takes_hints(ctx.predictor.forced());
}

void mobile_route_ahead(mobile_context & ctx) {
    for (const mobile_guess & guess : ctx.predictor.take()) {
        ctx.slots->hint(ctx.store->model_layer(guess.layer), guess.parts, guess.now);
    }
    ctx.slots->run_ahead();
}

int32_t mobile_route_hint_masked(mobile_context & ctx, llama_context & lctx) {
    const bool uploads = ctx.predictor.begin_masked(mobile_route_takes_hints(ctx));
    const bool reads   = !ctx.predictor.is_off() && !ctx.store->all_resident;
    if (!reads && !uploads) {
        return 0;
    }
    if (uploads) {
        lctx.synchronize(); // no slot is in use
        ctx.slots->begin_hints();
    }
    const double last = ctx.pass.time - 1.0; // the last pass's token
    int32_t n = 0;
    for (const mobile_route & route : ctx.routes) {
        const mobile_store_layer layer = ctx.store->layer_of(route.il);
        if (route.masked.empty() || layer.is_none()) {
            continue;
        }
        std::vector<mobile_part> all;
        std::vector<mobile_part> absent; // of these, those that need host memory
        for (int32_t expert : route.masked) {
            for (int32_t s = 0; s < ctx.store->n_segments; ++s) {
                const mobile_part part = ctx.store->part_of(expert, s);
                all.push_back(part);
                if (!ctx.slots || !ctx.slots->is_there(route.il, part)) {
                    absent.push_back(part);
                }
            }
        }
        if (reads) {
            n += ctx.store->hint(layer, absent, last);
        }
        if (uploads) {
            ctx.slots->hint(route.il, all, last);
        }
    }
    if (uploads) {
        ctx.slots->run_ahead();
    }
    return n;
}
