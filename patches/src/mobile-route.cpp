#include "mobile-route.h"

#include "mobile-load.h"

#include "llama-batch.h"
#include "llama-model.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>

// a batch of more tokens than this passes through the cache: only its last tokens count as uses, the
// others' experts go first
static constexpr int64_t LASTING_TOKENS = 8;

// the op's tensors by position; the third, the experts' input, is there so that the scheduler has copied it to the
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
    return ctx.slots->whole_layer(il) || (l && ctx.slots->is_cached(il, 1) && l->experts[expert].slot >= 0);
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

static void route(ggml_tensor * dst, int ith, int nth, void * userdata) {
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
        const bool computes = std::any_of(ctx.missing.begin(), ctx.missing.end(), [&](const mobile_need & need) { return ctx.slot_of[need.expert] < 0; });
        route.start_us = computes ? ggml_time_us() : 0;
    }
    predict_next(ctx, route, layer, dst);

    // a batch that needs nearly all of this layer needs nearly all of the next one
    if (n_tokens > LASTING_TOKENS && 10*ctx.needs.size() >= 9*(size_t) store.layers[layer].n_expert && layer + 1 < (int32_t) store.layers.size()) {
        store.read_ahead(layer + 1);
    }
}

static void route_rows(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(nth);
    GGML_UNUSED(userdata);
    if (ith != 0) {
        return;
    }
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        for (int64_t rank = 0; rank < dst->ne[0]; ++rank) {
            *(int32_t *) ((char *) dst->data + rank*dst->nb[0] + t*dst->nb[1]) = std::max(id_at(dst->src[0], rank, t), 0);
        }
    }
}

// the end of a cold chain: passes its sum on
static void cold_end(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(nth);
    if (ith != 0) {
        return;
    }
    mobile_route & route = *(mobile_route *) userdata;
    memcpy(dst->data, dst->src[0]->data, ggml_nbytes(dst));
    if (route.start_us > 0 && route.ctx->slots) {
        route.ctx->slots->add_cpu_time(ggml_time_us() - route.start_us);
    }
}

//
// graph
//

// whether some device would take over ops whose weights are in host memory
static bool has_offload(ggml_backend_sched_t sched) {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_dev_t dev = ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i));
        if (dev && dev->iface.offload_op) {
            return true;
        }
    }
    return false;
}

static bool has_policy(const mobile_context & ctx) {
    return (ctx.k > 0 && ctx.k < ctx.n_expert_used) || !ctx.k_batch.empty() || !ctx.replay.empty() || ctx.trace;
}

bool mobile_graph_holds(mobile_context * ctx) {
    if (!ctx || !ctx->slots) {
        return true;
    }
    const bool holds = !ctx->stale && (ctx->has_policy || ctx->slots->params.placement != MOBILE_PLACEMENT_LAYERS || !has_policy(*ctx));
    ctx->stale = false;
    return holds;
}

uint32_t mobile_graph_nodes(const mobile_context * ctx) {
    // of a chain: a sum over K*S results by views, matrices, biases, scales, activation, and router nodes of no use
    return ctx && ctx->slots ? (uint32_t) (ctx->slots->layers.size()*(64 + 4*ctx->n_expert_used*ctx->store->n_segments)) : 0;
}

uint32_t mobile_graph_tokens(const mobile_context * ctx, uint32_t n_tokens) {
    return ctx && ctx->slots ? std::min<uint32_t>(n_tokens, ctx->slots->params.n_batch_max) : 0;
}

const mobile_experts * mobile_route_whole(mobile_context * ctx, int il, const ggml_tensor * down, bool no_lora) {
    const mobile_experts * whole = ctx && ctx->slots && no_lora ? ctx->slots->whole_layer(il) : nullptr;
    return whole && ctx->slots->layer_of(il)->host.down == down ? whole : nullptr;
}

const mobile_experts * mobile_route_build(
        mobile_context * ctx, ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, int il, bool renormalise, bool ranked,
        bool routes_cur, bool no_lora, const mobile_experts & experts, ggml_tensor * cur, ggml_tensor ** ids, ggml_tensor ** weights) {
    if (ctx->hot_ids) {
        *ids     = ctx->hot_ids;
        *weights = ctx->hot_weights;
        return nullptr;
    }
    if (il < 0 || il >= (int) ctx->routes.size()) {
        return nullptr;
    }
    mobile_route & route = ctx->routes[il];

    const mobile_experts * whole = ctx->slots ? ctx->slots->whole_layer(il) : nullptr;
    const bool is_whole = whole && whole->down == experts.down;
    if (is_whole) {
        ctx->has_policy = ctx->has_policy || has_policy(*ctx);
        if (!ctx->has_policy) {
            return nullptr;
        }
    } else {
        route.once = route.once && (!route.host.down || route.host.down == experts.down);
        route.host = experts;
    }
    route.renormalise = renormalise;
    route.ranked      = ranked;
    route.routes_cur  = routes_cur;

    const int64_t n_used   = (*ids)->ne[0];
    const int64_t n_tokens = (*ids)->ne[1];
    const int64_t n_ids    = n_used*ctx->store->n_segments;

    const bool hot = ctx->slots && no_lora && n_used == ctx->n_expert_used && ctx->slots->is_cached(il, n_tokens) && ctx->slots->layer_of(il)->host.down == experts.down;
    route.keep = is_whole || (n_tokens > 1 && has_offload(sched));

    // the next layer is predicted of it in short passes only. with a hot chain a fourth argument says so
    const int n_args = hot ? 4 : n_tokens <= mobile_predictor::N_TOKENS_MAX && !ctx->store->all_resident ? 3 : 2;
    ggml_tensor * args[4] = { *ids, *weights, cur, cur };
    ggml_tensor * routed = ggml_custom_4d(ctx0, GGML_TYPE_I32, n_ids + n_used + (hot ? n_ids : 0), n_tokens, 1, 1, args, n_args, ::route, 1, &route);
    ggml_format_name(routed, "ffn_moe_routed-%d", il);

    // some backends claim every op
    ggml_backend_sched_set_tensor_backend(sched, routed, backend_cpu);

    const size_t size = sizeof(int32_t);
    *ids     = ggml_view_2d(ctx0, routed, n_ids, n_tokens, n_ids*size, 0);
    *weights = ggml_view_3d(ctx0, routed, 1, n_used, n_tokens, size, n_used*size, n_ids*n_tokens*size);
    (*weights)->type = GGML_TYPE_F32; // of the same size: what lies behind the ids is floats
    if (!hot) {
        return nullptr;
    }
    ctx->hot_ids     = ggml_view_2d(ctx0, routed, n_ids, n_tokens, n_ids*size, (n_ids + n_used)*n_tokens*size);
    ctx->hot_weights = *weights;
    return ctx->slots->slots_of(il);
}

void mobile_route_cold(mobile_context * ctx, ggml_cgraph * gf) {
    ctx->hot_ids     = nullptr;
    ctx->hot_weights = nullptr;
    ctx->cold_start  = ggml_graph_n_nodes(gf);
}

ggml_tensor * mobile_route_sum(
        mobile_context * ctx, ggml_context * ctx0, ggml_cgraph * gf, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, int il, ggml_tensor * cold, ggml_tensor * hot) {
    // the routed ids are an input so that their memory is not used again before the device has read its own
    ggml_tensor * args[2] = { cold, nullptr };
    for (int i = ctx->cold_start; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_MUL_MAT_ID && !args[1]) {
            args[1] = node->src[2]->view_src;
        }
        if (node->op != GGML_OP_VIEW && node->op != GGML_OP_RESHAPE) {
            ggml_backend_sched_set_tensor_backend(sched, node, backend_cpu);
        }
    }
    ggml_tensor * end = ggml_custom_4d(ctx0, GGML_TYPE_F32, cold->ne[0], cold->ne[1], 1, 1, args, args[1] ? 2 : 1, cold_end, 1, &ctx->routes[il]);
    ggml_format_name(end, "ffn_moe_cold-%d", il);
    ggml_backend_sched_set_tensor_backend(sched, end, backend_cpu);
    return ggml_add(ctx0, hot, end);
}

// dst [n_embd, K, T]: the sum over a rank's segments in src [n_embd, K*S, T]
static void join_segments(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(userdata);
    const ggml_tensor * src = dst->src[0];
    const int64_t n_used = dst->ne[1];

    for (int64_t row = ith; row < n_used*dst->ne[2]; row += nth) {
        const int64_t rank = row % n_used;
        const int64_t t    = row/n_used;
        float * sum = (float *) ((char *) dst->data + rank*dst->nb[1] + t*dst->nb[2]);
        for (int64_t i = rank; i < src->ne[1]; i += n_used) {
            const float * part = (const float *) ((const char *) src->data + i*src->nb[1] + t*src->nb[2]);
            for (int64_t j = 0; j < dst->ne[0]; ++j) {
                sum[j] = i == rank ? part[j] : sum[j] + part[j];
            }
        }
    }
}

ggml_tensor * mobile_route_join(
        const mobile_context * ctx, ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * experts, const ggml_tensor * weights) {
    const int64_t n_used = weights->ne[1];
    if (experts->ne[1] == n_used) {
        return experts;
    }
    if (ctx && ctx->hot_ids) { // on a device
        ggml_tensor * sum = nullptr;
        for (int64_t i = 0; i < experts->ne[1]; i += n_used) {
            ggml_tensor * part = ggml_view_3d(ctx0, experts, experts->ne[0], n_used, experts->ne[2], experts->nb[1], experts->nb[2], i*experts->nb[1]);
            sum = sum ? ggml_add(ctx0, sum, part) : part;
        }
        return sum;
    }
    ggml_tensor * joined = ggml_custom_4d(ctx0, GGML_TYPE_F32, experts->ne[0], n_used, experts->ne[2], 1, &experts, 1, join_segments, GGML_N_TASKS_MAX, nullptr);
    ggml_backend_sched_set_tensor_backend(sched, joined, backend_cpu);
    return joined;
}

ggml_tensor * mobile_route_rows(ggml_context * ctx0, ggml_tensor * ids) {
    ggml_custom_op_t fun = nullptr;
    if (ids->view_src && ids->view_src->op == GGML_OP_CUSTOM && ids->view_offs == 0) {
        memcpy(&fun, ids->view_src->op_params, sizeof(fun));
    }
    if (fun != ::route) {
        return ids;
    }
    return ggml_custom_4d(ctx0, GGML_TYPE_I32, ids->ne[0], ids->ne[1], 1, 1, &ids, 1, route_rows, 1, nullptr);
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
    ctx->predictor->begin_pass((int64_t) n_tokens, ctx->k_token[0]);
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
