#include "route/mobile-route.h"

#include "store/mobile-load.h"

#include "llama-batch.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>

// a batch of more tokens than this passes through the cache: only its last tokens count as uses, the
// others' experts go first
static constexpr int64_t LASTING_TOKENS = 8;

// the op's tensors by position; the third, the experts' input, is read by predictions, and is there so that the scheduler has copied it to the
// host before the hot chain runs. its result holds ids [K, S] of all tokens, behind them weights [K] of all tokens
// and, with a hot chain, slots [K, S] of all tokens. segment by segment, since mul_mat_id takes input row i % K for
// id i where there is one row per expert
static const ggml_tensor * src_ids    (const ggml_tensor * dst) { return dst->src[0]; }
static const ggml_tensor * src_weights(const ggml_tensor * dst) { return dst->src[1]; }
static const ggml_tensor * src_cur    (const ggml_tensor * dst) { return dst->src[2]; } // NULL: nothing reads it
static bool                has_hot    (const ggml_tensor * dst) { return dst->src[3] != nullptr; }

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

// which token of the ubatch a layer's column is: the last layer computes only tokens with an output
static int32_t token_of(mobile_context & ctx, int64_t column, int64_t n_columns) {
    if (n_columns == (int64_t) ctx.k_token.size()) {
        return (int32_t) column;
    }
    if (n_columns == (int64_t) ctx.outputs.size()) {
        return ctx.outputs[column];
    }
    ctx.mapped = false;
    return 0;
}

//
// ids
//

// marks all but the k heaviest of a token's ids as skipped
static void mask_token(const mobile_route & route, const ggml_tensor * dst, int64_t token, int32_t k) {
    const int64_t n_used = n_used_of(dst);
    int32_t * ids = routed_ids(dst, token);
    if (route.ranked) {
        std::fill(ids + k, ids + n_used, -1);
        return;
    }
    std::vector<int64_t> order(n_used);
    for (int64_t i = 0; i < n_used; ++i) {
        order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return weight_at(src_weights(dst), a, token) > weight_at(src_weights(dst), b, token);
    });
    for (int64_t i = k; i < n_used; ++i) {
        ids[order[i]] = -1;
    }
}

// what the layer needs of the store: distinct experts, ascending, so that reads run forward in the file
static void collect_needs(mobile_context & ctx, const ggml_tensor * dst, int32_t n_expert) {
    const int64_t n_ids    = n_ids_of(dst);
    const int64_t n_tokens = dst->ne[1];

    ctx.need_of.assign(n_expert, {});
    for (int64_t t = 0; t < n_tokens; ++t) {
        const int32_t * ids = routed_ids(dst, t);
        for (int64_t i = 0; i < n_ids; ++i) {
            if (ids[i] >= 0 && ids[i] < n_expert) {
                mobile_need & need = ctx.need_of[ids[i]];
                need.expert  = ids[i];
                need.time    = ctx.time + (double) t;
                need.lasting = t >= n_tokens - LASTING_TOKENS;
                need.n_tokens++;
            }
        }
    }
    ctx.needs.clear();
    for (const mobile_need & need : ctx.need_of) {
        if (need.n_tokens > 0) {
            ctx.needs.push_back(need);
        }
    }
}

// the id of a rank before anything is skipped
static int32_t model_id(const mobile_context & ctx, const mobile_route & route, const ggml_tensor * dst, int64_t rank, int64_t t, int32_t token) {
    if (ctx.replay.empty() || route.il >= ctx.n_layer) {
        return id_at(src_ids(dst), rank, t);
    }
    const int64_t step = ctx.pos[token] % ctx.replay_steps;
    return ctx.replay[(step*ctx.n_layer + route.il)*ctx.replay_k + rank];
}

static void route_ids(const mobile_context & ctx, mobile_route & route, const ggml_tensor * dst, int64_t t, int32_t token) {
    const int64_t n_used = n_used_of(dst);
    int32_t * ids = routed_ids(dst, t);

    for (int64_t rank = 0; rank < n_used; ++rank) {
        ids[rank] = model_id(ctx, route, dst, rank, t, token);
    }
    const int32_t k = ctx.k_token[token];
    if (k > 0 && k < n_used) {
        if (dst->ne[1] == 1 && route.ranked) {
            route.masked.assign(ids + k, ids + n_used);
        }
        mask_token(route, dst, t, k);
    }
}

static void route_weights(const mobile_route & route, const ggml_tensor * dst, int64_t t) {
    const int64_t n_used = n_used_of(dst);
    const int32_t * ids  = routed_ids(dst, t);
    float * weights      = routed_weights(dst, t);

    float sum_all  = 0.0f;
    float sum_kept = 0.0f;
    for (int64_t rank = 0; rank < n_used; ++rank) {
        const float w = weight_at(src_weights(dst), rank, t);
        weights[rank] = ids[rank] >= 0 ? w : 0.0f;
        sum_all  += w;
        sum_kept += weights[rank];
    }
    // the kept experts take over the sum that the model gives its top-k
    if (route.renormalise && sum_kept != sum_all && sum_kept != 0.0f) {
        for (int64_t rank = 0; rank < n_used; ++rank) {
            weights[rank] *= sum_all/sum_kept;
        }
    }
}

static void trace_layer(mobile_context & ctx, const mobile_route & route, int32_t layer, const ggml_tensor * dst) {
    const int64_t n_used = n_used_of(dst);
    const int phase = ctx.k_token.size() > 1 ? 0 : 1;

    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        const long long step = (long long) ctx.trace_step + token_of(ctx, t, dst->ne[1]);
        for (int64_t rank = 0; rank < n_used; ++rank) {
            const int32_t id = routed_ids(dst, t)[rank];
            if (id >= 0) {
                const uint64_t bytes = layer < 0 ? 0 : ctx.store->missing_of_model(layer, id);
                fprintf(ctx.trace, "%d,%d,%lld,%d,%d,%d,%g,%d,%llu\n", ctx.trace_turn, phase, step, route.il, (int) rank, id,
                    routed_weights(dst, t)[rank], layer >= 0 && bytes == 0 ? 1 : 0, (unsigned long long) bytes);
            }
        }
    }
}

// the model's expert e is the store's experts e*S + s; its weight is that of each
static void expand_segments(const ggml_tensor * dst, int64_t t) {
    const int64_t n_used     = n_used_of(dst);
    const int64_t n_segments = n_segments_of(dst);
    int32_t * ids = routed_ids(dst, t);
    for (int64_t i = n_used*n_segments - 1; i >= 0 && n_segments > 1; --i) {
        const int32_t id = ids[i % n_used];
        ids[i] = id < 0 ? -1 : (int32_t) (id*n_segments + i/n_used);
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
        const int32_t slot = ids[i] < 0 ? -1 : ctx.slot_of[ids[i]];
        slots[i] = slot < 0 ? (int32_t) i : slot; // slot i is zero
        ids  [i] = slot < 0 ? ids[i] : -1;
    }
}

// what runs, before devices take their part
static void keep_routed(mobile_context & ctx, const ggml_tensor * dst) {
    const int64_t n_used = n_used_of(dst);
    ctx.routed.resize(n_used*dst->ne[1]);
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        std::copy_n(routed_ids(dst, t), n_used, &ctx.routed[t*n_used]);
    }
}

bool mobile_route_on_device(const mobile_context & ctx, int32_t layer, int32_t expert) {
    const int32_t il = ctx.store->layers[layer].il;
    if (!ctx.slots) {
        return false;
    }
    const mobile_device_layer * l = ctx.slots->layer_of(il);
    return ctx.slots->whole_layer(il) || (l && ctx.slots->is_cached(il, 1) && l->experts[expert].slot >= 0 && !l->experts[expert].loading);
}

bool mobile_route_takes_hints(const mobile_context & ctx) {
    return ctx.slots && ctx.slots->takes_hints(ctx.predictor->forced());
}

void mobile_route_ahead(mobile_context & ctx) {
    for (const mobile_guess & guess : ctx.predictor->take()) {
        ctx.slots->hint(ctx.store->layers[guess.layer].il, guess.experts, guess.now);
    }
    ctx.slots->run_ahead();
}

// hints for the layer that comes next
static void predict_next(mobile_context & ctx, const mobile_route & route, int32_t layer, const ggml_tensor * dst) {
    const int32_t next = layer + 1;
    ctx.on_device.clear();
    if (ctx.slots && next < (int32_t) ctx.store->layers.size()) {
        ctx.on_device.resize(ctx.store->layers[next].n_expert);
        for (size_t e = 0; e < ctx.on_device.size(); ++e) {
            ctx.on_device[e] = mobile_route_on_device(ctx, next, (int32_t) e);
        }
    }
    const ggml_tensor * cur = route.routes_cur ? src_cur(dst) : nullptr;
    ctx.predictor->add_layer(layer, ctx.routed, dst->ne[1], cur ? (const float *) cur->data : nullptr, cur ? cur->ne[0] : 0,
        cur ? cur->nb[2]/sizeof(float) : 0, ctx.on_device, ctx.time);
}

void mobile_route_run(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(nth);
    if (ith != 0) {
        return;
    }
    mobile_route   & route = *(mobile_route *) userdata;
    mobile_context & ctx   = *route.ctx;
    mobile_store   & store = *ctx.store;

    const int64_t n_tokens = dst->ne[1];
    const int32_t layer    = route.il < (int32_t) store.layer_of_il.size() ? store.layer_of_il[route.il] : -1;

    route.masked.clear();
    for (int64_t t = 0; t < n_tokens; ++t) {
        route_ids(ctx, route, dst, t, token_of(ctx, t, n_tokens));
        route_weights(route, dst, t);
    }
    if (ctx.trace) {
        trace_layer(ctx, route, layer, dst); // before the request changes what is resident
    }
    keep_routed(ctx, dst);
    for (int64_t t = 0; t < n_tokens; ++t) {
        if (route.keep && !has_hot(dst)) {
            keep_ids(ctx, route, dst, t, token_of(ctx, t, n_tokens));
        }
        expand_segments(dst, t);
    }
    if (ctx.slots) {
        ctx.slots->admit();
    }
    if (layer < 0) {
        return;
    }
    collect_needs(ctx, dst, store.layers[layer].n_expert);
    if (ctx.slots && ctx.slots->whole_layer(route.il)) {
        ctx.slots->count.n_hits += ctx.needs.size();
        return;
    }
    if (!has_hot(dst)) {
        store.request(layer, ctx.needs);
    } else {
        ctx.slots->assign(route.il, ctx.needs, ctx.slot_of, ctx.missing);
        store.request(layer, ctx.missing);
        ctx.slots->fetch(ctx.slot_of);
        for (int64_t t = 0; t < n_tokens; ++t) {
            split_ids(ctx, dst, t);
        }
        route.n_cold   = (int32_t) std::count_if(ctx.missing.begin(), ctx.missing.end(), [&](const mobile_need & need) { return ctx.slot_of[need.expert] < 0; });
        route.start_us = ggml_time_us();
    }
    predict_next(ctx, route, layer, dst);
    if (has_hot(dst)) {
        mobile_route_ahead(ctx);
    }

    // a batch that needs nearly all of this layer needs nearly all of the next one
    if (n_tokens > LASTING_TOKENS && 10*ctx.needs.size() >= 9*(size_t) store.layers[layer].n_expert && layer + 1 < (int32_t) store.layers.size()) {
        store.read_ahead(layer + 1);
    }
}

//
// context
//

std::shared_ptr<mobile_context> mobile_context_new(const struct llama_model & model) {
    std::shared_ptr<mobile_store> store = mobile_store_of(model);
    if (!store) {
        return nullptr;
    }
    auto ctx = std::make_shared<mobile_context>();
    ctx->store         = store;
    ctx->n_layer       = (int32_t) model.hparams.n_layer();
    ctx->n_expert_used = (int32_t) model.hparams.n_expert_used();
    // layers behind n_layer (next-token prediction) route as well
    ctx->routes.resize(std::max<size_t>(ctx->n_layer, store->layer_of_il.size()));
    for (size_t il = 0; il < ctx->routes.size(); ++il) {
        ctx->routes[il].ctx = ctx.get();
        ctx->routes[il].il  = (int32_t) il;
    }
    ctx->base = store->counters();
    ctx->predictor = std::make_unique<mobile_predictor>(model, store);
    return ctx;
}

mobile_context::~mobile_context() {
    if (trace) {
        fclose(trace);
    }
}

void mobile_ubatch_begin(mobile_context * ctx, const llama_ubatch & ubatch) {
    if (!ctx) {
        return;
    }
    const size_t n_tokens = ubatch.n_tokens;

    ctx->k_token.assign(n_tokens, ctx->k);
    ctx->pos.assign(n_tokens, 0);
    ctx->outputs.clear();
    const size_t n_index = ubatch.data ? std::min(n_tokens, ubatch.data->batch_idxs.size()) : 0;
    for (size_t i = 0; i < n_index && !ctx->k_batch.empty(); ++i) {
        const size_t index = ubatch.data->batch_idxs[i];
        if (index < ctx->k_batch.size() && ctx->k_batch_ran[index]) {
            ctx->k_batch.clear(); // a token that comes again is another decode's: its batch was shorter than the mask
        }
    }
    for (size_t i = 0; i < n_tokens; ++i) {
        if (!ctx->k_batch.empty() && i < n_index) {
            const size_t index = ubatch.data->batch_idxs[i];
            if (index < ctx->k_batch.size()) {
                ctx->k_token[i]         = ctx->k_batch[index];
                ctx->k_batch_ran[index] = 1;
            }
        }
        if (ubatch.pos) {
            ctx->pos[i] = ubatch.pos[i];
        }
        if (ubatch.output && ubatch.output[i]) {
            ctx->outputs.push_back((int32_t) i);
        }
        ctx->n_tokens_little += ctx->k_token[i] > 0 && ctx->k_token[i] < ctx->n_expert_used;
    }
    ctx->n_tokens += n_tokens;
    ctx->mapped    = true;
    ctx->error.clear();
    if (ctx->trace && n_tokens > 1) {
        ctx->trace_turn++;
    }
    ctx->trace_turn = std::max(ctx->trace_turn, 0);
    ctx->store->begin_pass();
    ctx->predictor->begin_pass((int64_t) n_tokens, ctx->k_token[0], mobile_route_takes_hints(*ctx));
}

bool mobile_ubatch_end(mobile_context * ctx) {
    if (!ctx) {
        return true;
    }
    const size_t n_tokens = ctx->k_token.size();
    if (ctx->slots) {
        ctx->slots->admit(); // of the last layer
        ctx->slots->end_pass();
    }
    ctx->time       += (double) n_tokens;
    ctx->trace_step += (int64_t) n_tokens;

    bool ok = ctx->store->end_pass();
    ctx->predictor->end_pass(ok);
    if (!ok) {
        ctx->error = "expert read failed: " + ctx->store->error();
    }
    const bool uniform = std::all_of(ctx->k_token.begin(), ctx->k_token.end(), [&](int32_t k) { return k == ctx->k_token[0]; });
    if (ok && !ctx->mapped && (!uniform || !ctx->replay.empty())) {
        ctx->error = "this model computes a part of the batch in some layer: per-token expert counts cannot be told apart";
        ok = false;
    }
    if (!ok || std::all_of(ctx->k_batch_ran.begin(), ctx->k_batch_ran.end(), [](uint8_t ran) { return ran != 0; })) {
        ctx->k_batch.clear();
    }
    return ok;
}
