// mobile-route-op.cpp - the route op itself: what it does when a layer runs.

#include "route/mobile-context.h"
#include "route/mobile-kept.h"
#include "route/mobile-op.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>

// the op's tensors by position; the third, the experts' input, is read by predictions, and is there so that the
// scheduler has copied it to the host before the hot chain runs. the last two are there for rules that read them. its result holds ids [K, S] of all tokens, behind them
// weights [K] of all tokens and, with a hot chain, slots [K, S] of all tokens. segment by segment, since mul_mat_id takes
// input row i % K for id i where there is one row per expert
static const ggml_tensor * src_ids    (const ggml_tensor * dst) { return dst->src[0]; }
static const ggml_tensor * src_weights(const ggml_tensor * dst) { return dst->src[1]; }
static const ggml_tensor * src_cur    (const ggml_tensor * dst) { return dst->src[2]; } // NULL: nothing reads it
static bool                has_hot    (const ggml_tensor * dst) { return dst->src[3] != nullptr; }
static const ggml_tensor * src_probs  (const ggml_tensor * dst) { return dst->src[4]; } // NULL: nothing reads them
static const ggml_tensor * src_scores (const ggml_tensor * dst) { return dst->src[5]; } // NULL: they are the probabilities

static int64_t n_used_of    (const ggml_tensor * dst) { return src_ids(dst)->ne[0]; }
static int64_t n_segments_of(const ggml_tensor * dst) { return (dst->ne[0]/n_used_of(dst) - 1)/(has_hot(dst) ? 2 : 1); }
static int64_t n_ids_of     (const ggml_tensor * dst) { return n_used_of(dst)*n_segments_of(dst); }

static int32_t id_at(const ggml_tensor * t, int64_t rank, int64_t token) {
    return *(const int32_t *) ((const char *) t->data + rank*t->nb[0] + token*t->nb[1]);
}

static float weight_at(const ggml_tensor * t, int64_t rank, int64_t token) {
    return *(const float *) ((const char *) t->data + rank*t->nb[1] + token*t->nb[2]);
}

// of one token; until expand_segments() the first K are the model's ids
static int32_t * routed_ids    (const ggml_tensor * dst, int64_t token) { return (int32_t *) dst->data + token*n_ids_of(dst); }
static float   * routed_weights(const ggml_tensor * dst, int64_t token) { return (float *) dst->data + dst->ne[1]*n_ids_of(dst) + token*n_used_of(dst); }
static int32_t * routed_slots  (const ggml_tensor * dst, int64_t token) { return routed_ids(dst, dst->ne[1]) + dst->ne[1]*n_used_of(dst) + token*n_ids_of(dst); }

// from expand_segments() on a token's ids are parts, or -1
static mobile_part routed_part(const ggml_tensor * dst, int64_t token, int64_t i) { return mobile_part(routed_ids(dst, token)[i]); }

//
// ids
//

// marks all but the k heaviest of a token's ids as skipped; own: [K] weights
static void mask_token(const mobile_route & route, const ggml_tensor * dst, int64_t token, const float * own, int32_t k) {
    const int64_t n_used = n_used_of(dst);
    int32_t * ids = routed_ids(dst, token);
    const std::vector<int64_t> order = mobile_kept_order(own, n_used, route.ranked);
    for (int64_t i = k; i < n_used; ++i) {
        ids[order[i]] = -1;
    }
}

// what the layer needs of the store: distinct parts, ascending, so that reads run forward in the file
static void collect_needs(mobile_context & ctx, const ggml_tensor * dst, int32_t n_parts) {
    mobile_routing & r = ctx.routing;
    const int64_t n_ids    = n_ids_of(dst);
    const int64_t n_tokens = dst->ne[1];

    r.need_of.assign(n_parts, {});
    for (int64_t t = 0; t < n_tokens; ++t) {
        const bool lasting = t >= n_tokens - MOBILE_LASTING_TOKENS || ctx.pass.single[ctx.pass.token_of(t, n_tokens)];
        for (int64_t i = 0; i < n_ids; ++i) {
            const mobile_part part = routed_part(dst, t, i);
            if (r.need_of.has(part)) {
                mobile_need & need = r.need_of[part];
                need.part    = part;
                need.time    = ctx.pass.time + (double) t;
                need.lasting = need.lasting || lasting;
                need.n_tokens++;
            }
        }
    }
    r.needs.clear();
    for (const mobile_need & need : r.need_of) {
        if (need.n_tokens > 0) {
            r.needs.push_back(need);
        }
    }
}

// the id of a rank before anything is skipped
static int32_t model_id(const mobile_context & ctx, const mobile_route & route, const ggml_tensor * dst, int64_t rank, int64_t t, int32_t token) {
    const int32_t id = ctx.rules.replayed_id(route.il, ctx.pass.pos[token], rank);
    return id < 0 ? id_at(src_ids(dst), rank, t) : id;
}

static void route_ids(mobile_context & ctx, mobile_route & route, const ggml_tensor * dst, int64_t t, int32_t token) {
    const int64_t n_used = n_used_of(dst);
    int32_t * ids = routed_ids(dst, t);

    for (int64_t rank = 0; rank < n_used; ++rank) {
        ids[rank] = model_id(ctx, route, dst, rank, t, token);
    }
    if (n_used == ctx.n_expert_used) {
        ctx.recall.add(route.il, token, ids);
    }
    const int32_t k = ctx.pass.k[token];
    const bool is_little = k > 0 && k < n_used;
    route.corrected[t] = is_little && ctx.correction.is_of(k);
    if (is_little) {
        if (dst->ne[1] == 1 && route.ranked) {
            route.masked.assign(ids + k, ids + n_used);
        }
        mask_token(route, dst, t, &ctx.routing.weights[t*n_used], k);
    }
}

// own: [K] of the ids that run, those skipped as well. mass: what the kept ones are divided by is that of so many; 0: their own
static void route_weights(const mobile_route & route, const ggml_tensor * dst, int64_t t, const float * own, int32_t mass) {
    const int64_t n_used = n_used_of(dst);
    const int32_t * ids  = routed_ids(dst, t);
    float * weights      = routed_weights(dst, t);

    float sum_all  = 0.0f;
    float sum_kept = 0.0f;
    for (int64_t rank = 0; rank < n_used; ++rank) {
        weights[rank] = ids[rank] >= 0 ? own[rank] : 0.0f;
        sum_all  += weight_at(src_weights(dst), rank, t);
        sum_kept += weights[rank];
    }
    // the kept experts take over the sum that the model gives its top-k, or the share of it that so many would have
    if (route.renormalise && sum_kept != sum_all && sum_kept != 0.0f) {
        const float divisor = mobile_kept_divisor(own, n_used, sum_kept, mass);
        for (int64_t rank = 0; rank < n_used; ++rank) {
            weights[rank] *= sum_all/divisor;
        }
    }
}

// the row of a token in what has one value per expert
static const float * scores_at(const ggml_tensor * t, int64_t token) {
    // [n_expert, T], or [1, n_expert, T]
    return t ? (const float *) ((const char *) t->data + token*(t->ne[0] == 1 ? t->nb[2] : t->nb[1])) : nullptr;
}

// what becomes of missing experts
static void lose(mobile_context & ctx, const mobile_route & route, mobile_store_layer layer, const ggml_tensor * dst) {
    mobile_routing & r = ctx.routing;
    r.losing.clear();
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        const int32_t token = ctx.pass.token_of(t, dst->ne[1]);
        if (ctx.pass.lossy[token]) {
            mobile_loss_token losing;
            losing.ids     = routed_ids(dst, t);
            losing.weights = &r.weights[t*n_used_of(dst)];
            losing.partial = &r.partial[t*n_used_of(dst)];
            losing.probs   = scores_at(src_probs(dst), t);
            losing.scores  = src_scores(dst) ? scores_at(src_scores(dst), t) : losing.probs;
            losing.time    = ctx.pass.time + token;
            losing.index   = ctx.pass.index[token];
            r.losing.push_back(losing);
        }
    }
    if (!r.losing.empty()) {
        // where a device may compute nothing is skipped, but weighs nothing, and a weight is all its segments'
        const bool in_part = ctx.store->n_segments > 1 && (!route.keep || has_hot(dst));
        ctx.loss.run(ctx, route, layer, r.losing, has_hot(dst), in_part);
    }
}

// whether the layer needs nothing of an expert from the host
static bool in_slots(const mobile_context & ctx, const mobile_route & route, const ggml_tensor * dst, int32_t expert) {
    if (!ctx.slots || !(has_hot(dst) || ctx.slots->whole_layer(route.il))) {
        return false;
    }
    for (int32_t s = 0; s < ctx.store->n_segments; ++s) {
        if (!ctx.slots->is_there(route.il, ctx.store->part_of(expert, s))) {
            return false;
        }
    }
    return true;
}

// what the layer asks for, to the trace and to those who watch
static void record_layer(mobile_context & ctx, const mobile_route & route, mobile_store_layer layer, const ggml_tensor * dst) {
    std::vector<mobile_routed> & watched = ctx.routing.watched;
    watched.clear();
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        const int32_t token = ctx.pass.token_of(t, dst->ne[1]);
        for (int64_t rank = 0; rank < n_used_of(dst); ++rank) {
            const int32_t id = routed_ids(dst, t)[rank];
            if (id < 0) {
                continue;
            }
            const bool     reads = !layer.is_none() && !ctx.routing.partial[t*n_used_of(dst) + rank];
            const uint64_t bytes = reads ? ctx.store->missing_of_model(layer, id) : 0;
            if (ctx.trace.is_on()) {
                ctx.trace.add(route.il, token, rank, id, routed_weights(dst, t)[rank], !layer.is_none(), bytes);
            }
            const bool missed = bytes > 0 && !in_slots(ctx, route, dst, id);
            watched.push_back({ (int32_t) ctx.pass.n_run + token, route.il.n, id, missed });
        }
    }
    ctx.ring.add(watched);
}

// from the model's experts to their parts; the weight is that of each
static void expand_segments(const mobile_context & ctx, const ggml_tensor * dst, int64_t t) {
    const uint8_t * partial  = &ctx.routing.partial[t*n_used_of(dst)];
    const int64_t n_used     = n_used_of(dst);
    const int64_t n_segments = n_segments_of(dst);
    int32_t * ids = routed_ids(dst, t);
    for (int64_t i = n_used*n_segments - 1; i >= 0 && n_segments > 1; --i) {
        const int32_t     id   = ids[i % n_used];
        const mobile_part part = ctx.store->part_of(std::max(id, 0), (int32_t) (i/n_used));
        const bool        runs = id >= 0 && !(partial[i % n_used] && !ctx.loss.is_there(part));
        ids[i] = runs ? part.n : -1;
    }
}

// on a device an expert that is skipped is computed, and weighs nothing
static void keep_ids(const mobile_context & ctx, const mobile_route & route, const ggml_tensor * dst, int64_t t, int32_t token) {
    const int64_t n_used = n_used_of(dst);
    int32_t * ids = routed_ids(dst, t);
    for (int64_t rank = 0; rank < n_used; ++rank) {
        if (ids[rank] < 0) {
            ids[rank] = model_id(ctx, route, dst, rank, t, token);
        }
    }
}

// what is in slots goes to the hot chain, the rest stays in the cold one
static void split_ids(const mobile_context & ctx, const ggml_tensor * dst, int64_t t) {
    int32_t * ids   = routed_ids  (dst, t);
    int32_t * slots = routed_slots(dst, t);
    for (int64_t i = 0; i < n_ids_of(dst); ++i) {
        const int32_t slot = ids[i] < 0 ? -1 : ctx.routing.slot_of[routed_part(dst, t, i)];
        slots[i] = slot < 0 ? (int32_t) i : slot; // slot i is zero
        ids  [i] = slot < 0 ? ids[i] : -1;
    }
}

// what runs, before devices take their part
static void keep_routed(mobile_context & ctx, const ggml_tensor * dst) {
    const int64_t n_used = n_used_of(dst);
    ctx.routing.routed.resize(n_used*dst->ne[1]);
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        std::copy_n(routed_ids(dst, t), n_used, &ctx.routing.routed[t*n_used]);
    }
}

// what single tokens use, for whoever wants to have it again
static void count_worth(mobile_context & ctx, const mobile_route & route, const ggml_tensor * dst) {
    const int64_t n_used = n_used_of(dst);
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        const int32_t token = ctx.pass.token_of(t, dst->ne[1]);
        if (ctx.pass.single[token] && ctx.guesses.is_kept()) {
            ctx.guesses.add(route.il, token, &ctx.routing.routed[t*n_used], n_used); // counts when it is known to be of the text
        } else if (ctx.pass.single[token]) {
            ctx.worth.add(route.il, &ctx.routing.routed[t*n_used], n_used, ctx.pass.time + token);
        }
    }
}

// hints for the layer that comes next
static void predict_next(mobile_context & ctx, const mobile_route & route, mobile_store_layer layer, const ggml_tensor * dst) {
    const ggml_tensor * cur = route.routes_cur ? src_cur(dst) : nullptr;
    ctx.predictor.add_layer(layer, ctx.routing.routed, dst->ne[1], cur ? (const float *) cur->data : nullptr, cur ? cur->ne[0] : 0,
        cur ? cur->nb[2]/sizeof(float) : 0, ctx.pass.time);
}

static void run(mobile_route & route, ggml_tensor * dst) {
    mobile_context & ctx   = *route.ctx;
    mobile_store   & store = *ctx.store;
    mobile_routing & r     = ctx.routing;

    const int64_t            n_tokens = dst->ne[1];
    const mobile_store_layer layer    = store.layer_of(route.il);

    route.masked.clear();
    route.corrected.assign(n_tokens, 0);
    r.weights.resize(n_used_of(dst)*n_tokens);
    r.partial.assign(n_used_of(dst)*n_tokens, 0);
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t rank = 0; rank < n_used_of(dst); ++rank) {
            r.weights[t*n_used_of(dst) + rank] = weight_at(src_weights(dst), rank, t);
        }
        route_ids(ctx, route, dst, t, ctx.pass.token_of(t, n_tokens));
    }
    // a layer that lies in slots as a whole misses nothing
    if (ctx.rules.has_loss() && !layer.is_none() && !(ctx.slots && ctx.slots->whole_layer(route.il))) {
        lose(ctx, route, layer, dst);
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
        route_weights(route, dst, t, &r.weights[t*n_used_of(dst)], ctx.rules.mass_of_kept());
    }
    if (ctx.trace.is_on() || ctx.ring.is_watched()) {
        record_layer(ctx, route, layer, dst); // before the request changes what is resident
    }
    keep_routed(ctx, dst);
    count_worth(ctx, route, dst);
    for (int64_t t = 0; t < n_tokens; ++t) {
        if (route.keep && !has_hot(dst)) {
            keep_ids(ctx, route, dst, t, ctx.pass.token_of(t, n_tokens));
        }
        expand_segments(ctx, dst, t);
    }
    if (ctx.slots) {
        ctx.slots->admit();
    }
    if (layer.is_none()) {
        return;
    }
    const int32_t n_parts = store.layers[layer].n_parts;
    collect_needs(ctx, dst, n_parts);
    if (ctx.slots && ctx.slots->whole_layer(route.il)) {
        ctx.slots->add_whole_hits(r.needs.size());
        return;
    }
    if (!has_hot(dst)) {
        store.request(layer, r.needs);
    } else {
        route.n_cold = ctx.slots->assign(route.il, r.needs, r.slot_of);
        for (int64_t t = 0; t < n_tokens; ++t) {
            split_ids(ctx, dst, t);
        }
        route.start_us = ggml_time_us();
    }
    predict_next(ctx, route, layer, dst);
    if (has_hot(dst)) {
        mobile_route_ahead(ctx);
    }

    // a batch that needs nearly all of this layer needs nearly all of the next one
    if (n_tokens > MOBILE_LASTING_TOKENS && 10*r.needs.size() >= 9*(size_t) n_parts && store.layers.has(layer + 1)) {
        store.read_ahead(layer + 1);
    }
}

// nothing is computed where it can be helped: the pass fails
static void skip_all(const mobile_route & route, const ggml_tensor * dst) {
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        std::fill_n(routed_weights(dst, t), n_used_of(dst), 0.0f);
        for (int64_t i = 0; i < n_ids_of(dst); ++i) {
            routed_ids(dst, t)[i] = route.keep && !has_hot(dst) ? (int32_t) i : -1;
            if (has_hot(dst)) {
                routed_slots(dst, t)[i] = (int32_t) i; // slot i is zero
            }
        }
    }
}

void mobile_route_run(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(nth);
    if (ith != 0) {
        return;
    }
    mobile_route & route = *(mobile_route *) userdata;
    if (!route.ctx->guard([&] { run(route, dst); })) {
        skip_all(route, dst);
    }
}

static void end_cold(mobile_route & route) {
    if (!route.ctx->slots) {
        return;
    }
    route.ctx->guard([&] {
        if (route.n_cold > 0) {
            route.ctx->slots->add_cpu_time(route.n_cold, ggml_time_us() - route.start_us);
        }
        mobile_route_ahead(*route.ctx); // by now the next layer's experts have been guessed
    });
}

void mobile_route_end_cold(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(nth);
    if (ith != 0) {
        return;
    }
    memcpy(dst->data, dst->src[0]->data, ggml_nbytes(dst));
    end_cold(*(mobile_route *) userdata);
}

bool mobile_route_is_idle(ggml_cgraph * split) {
    ggml_tensor * end = ggml_graph_node(split, -1);
    if (!mobile_op_is(end, mobile_route_end_cold)) {
        return false;
    }
    mobile_route & route = *(mobile_route *) mobile_op_params(end).userdata;
    // a split is a row of the graph's nodes: one with no more than the chain's has no others
    if (route.n_cold > 0 || ggml_graph_n_nodes(split) > route.n_cold_nodes) {
        return false;
    }
    memset(end->data, 0, ggml_nbytes(end));
    end_cold(route);
    return true;
}
