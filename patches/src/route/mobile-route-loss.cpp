// mobile-route-loss.cpp - see mobile-loss-state.h

#include "mobile-error.h"
#include "route/mobile-context.h"

#include <algorithm>

// what the layer's rules take for resident
void mobile_route_loss::look(mobile_context & ctx, const mobile_route & route, mobile_store_layer layer, bool on_device) {
    const int32_t n_expert   = ctx.store->n_expert_of(layer);
    const int32_t n_segments = ctx.store->n_segments;
    const uint8_t * state    = ctx.rules.residency_of(route.il, ctx.store->n_parts_max);
    if (state) {
        parts.assign(state, state + n_expert*n_segments);
    } else if (on_device && ctx.slots->miss() == MOBILE_MISS_FETCH) {
        parts.assign(n_expert*n_segments, 0);
    } else {
        ctx.store->get_resident(layer, parts);
    }
    for (mobile_part part(0); on_device && !state && parts.has(part); ++part) {
        parts[part] = parts[part] || ctx.slots->is_there(route.il, part);
    }
    resident.assign(n_expert, 0);
    there   .assign(n_expert, 0.0f);
    for (int32_t e = 0; e < n_expert; ++e) {
        int32_t n = 0;
        for (int32_t s = 0; s < n_segments; ++s) {
            n += parts[ctx.store->part_of(e, s)] != 0;
        }
        resident[e] = n == n_segments;
        there[e]    = (float) n/n_segments;
    }
}

// of the distinct experts that the tokens ask for
double mobile_route_loss::missing_share(const std::vector<mobile_loss_token> & tokens, int32_t k) {
    asked.assign(resident.size(), 0);
    int32_t n_asked = 0, n_missing = 0;
    for (const mobile_loss_token & token : tokens) {
        for (int32_t i = 0; i < k; ++i) {
            const int32_t id = token.ids[i];
            if (id >= 0 && !asked[id]) {
                asked[id] = 1;
                n_asked++;
                n_missing += !resident[id];
            }
        }
    }
    return n_asked > 0 ? (double) n_missing/n_asked : 0.0;
}

void mobile_route_loss::admit(mobile_context & ctx, mobile_store_layer layer, double time) const {
    std::vector<mobile_part> parts;
    std::vector<mobile_part> admitted;
    int32_t n = 0;
    for (const mobile_loss_displaced & d : displaced) {
        const bool admits = d.again && n < ctx.rules.loss_params().admit;
        n += admits;
        for (int32_t s = 0; s < ctx.store->n_segments; ++s) {
            (admits ? admitted : parts).push_back(ctx.store->part_of(d.expert, s));
        }
    }
    ctx.store->displace(layer, parts, time, false);
    ctx.store->displace(layer, admitted, time, true);
}

static void add(mobile_loss_sums & sums, const mobile_loss_sums & more) {
    sums.n_layers      += more.n_layers;
    sums.n_missing     += more.n_missing;
    sums.n_dropped     += more.n_dropped;
    sums.n_left_out    += more.n_left_out;
    sums.n_substituted += more.n_substituted;
    sums.n_again       += more.n_again;
    sums.moved_weight  += more.moved_weight;
    sums.n_partial     += more.n_partial;
}

void mobile_route_loss::run(mobile_context & ctx, const mobile_route & route, mobile_store_layer layer, const std::vector<mobile_loss_token> & tokens, bool on_device, bool in_part) {
    const mobile_loss_params & params = ctx.rules.loss_params();
    if (ctx.rules.reads_scores() && !tokens[0].probs) {
        mobile_throw(MOBILE_ERR_STATE, "layer " + std::to_string(route.il.n) + ": its router gives no score for each expert, which --substitute live and prior choose by");
    }
    look(ctx, route, layer, on_device);

    mobile_loss_layer l;
    l.params        = &params;
    l.k             = route.n_used;
    l.n_expert      = (int32_t) resident.size();
    l.resident      = resident.data();
    l.there         = in_part ? there.data() : nullptr;
    l.buddies       = ctx.rules.buddies_of(route.il);
    l.kind          = route.kind;
    l.missing_share = missing_share(tokens, l.k);
    l.displaced     = displaced_at[layer].data();
    mobile_loss_apply_together(l, tokens, sums);
    for (const mobile_loss_token & token : tokens) {
        displaced.clear();
        mobile_loss_sums of_token;
        mobile_loss_apply(l, token, of_token, displaced);
        add(sums, of_token);
        if (token.index >= 0) {
            add(of_tokens[token.index], of_token);
        }
        if (!displaced.empty()) {
            admit(ctx, layer, token.time);
        }
    }
}

static mobile_loss_counters counters_of(const mobile_loss_sums & sums) {
    mobile_loss_counters counters = {};
    counters.n_layers       = sums.n_layers;
    counters.n_missing      = sums.n_missing;
    counters.n_dropped      = sums.n_dropped;
    counters.n_left_out     = sums.n_left_out;
    counters.n_substituted  = sums.n_substituted;
    counters.n_again        = sums.n_again;
    counters.moved_weight   = sums.moved_weight;
    counters.n_partial      = sums.n_partial;
    return counters;
}

void mobile_route_loss::get(mobile_store & store, mobile_loss_counters & counters) const {
    const mobile_admit_counters now = store.counters_admit();
    counters = counters_of(sums);
    counters.n_admitted     = now.n_read - base.n_read;
    counters.bytes_admitted = now.bytes  - base.bytes;
    counters.n_admit_left   = now.n_left;
}

void mobile_route_loss::get_of_token(int32_t index, mobile_loss_counters & counters) const {
    counters = counters_of((size_t) index < of_tokens.size() ? of_tokens[index] : mobile_loss_sums());
}

void mobile_route_loss::begin_pass(const std::vector<int32_t> & index) {
    for (int32_t i : index) {
        if (i < 0) {
            continue;
        }
        if ((size_t) i >= of_tokens.size()) {
            of_tokens.resize((size_t) i + 1);
        }
        of_tokens[i] = {};
    }
}

void mobile_route_loss::reset_counters(mobile_store & store) {
    base = store.counters_admit();
    sums = {};
}
