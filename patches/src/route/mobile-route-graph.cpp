// mobile-route-graph.cpp - how the route op and the chains behind it stand in a graph.

#include "route/mobile-context.h"
#include "route/mobile-hooks.h"
#include "route/mobile-op.h"

#include "llama-context.h"
#include "llama-model.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

//
// graphs
//

static bool has_policy(const mobile_context & ctx) {
    // ids of segments come from the route op
    return ctx.store->n_segments > 1 || ctx.rules.any() || ctx.trace.is_on() || ctx.ring.is_watched();
}

bool mobile_graph_holds(mobile_context * ctx) {
    if (!ctx) {
        return true;
    }
    const bool is_whole = ctx->slots && ctx->slots->placement() == MOBILE_PLACEMENT_LAYERS;
    const bool holds = !ctx->graph.is_stale && (ctx->graph.has_policy || !is_whole || !has_policy(*ctx));
    ctx->graph.is_stale = false;
    return holds;
}

uint32_t mobile_graph_nodes(const mobile_context * ctx) {
    // of a chain: a sum over K*S results by views, matrices, biases, scales, activation, and router nodes of no use
    return ctx && ctx->slots ? (uint32_t) (ctx->slots->n_layers()*(64 + 4*ctx->n_expert_used*ctx->store->n_segments)) : 0;
}

void mobile_graph_reserve(llama_context & lctx, uint32_t n_tokens, uint32_t n_seqs, uint32_t n_outputs, const llama_memory_context_i * mctx) {
    const mobile_context * ctx = lctx.get_cparams().mobile.get();
    if (!ctx || !ctx->slots) {
        return;
    }
    const uint32_t n = std::min<uint32_t>(n_tokens, ctx->slots->n_batch_max());
    if (!lctx.graph_reserve(n, std::min(n_seqs, n), std::min(n, n_outputs), mctx, lctx.get_model().hparams.no_alloc)) {
        throw std::runtime_error("failed to allocate compute buffers for experts on devices");
    }
}

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

//
// a layer
//

mobile_moe::mobile_moe(const place & at, const std::array<ggml_tensor **, MOBILE_MEMBERS.size()> & tensors) : at(at) {
    for (size_t i = 0; i < tensors.size(); ++i) {
        experts.*MOBILE_MEMBERS[i] = *tensors[i];
    }
    const mobile_slots * slots = at.ctx ? at.ctx->slots.get() : nullptr;
    const mobile_model_layer il(at.il);
    const mobile_experts * whole = slots && at.no_lora ? slots->whole_layer(il) : nullptr;
    is_whole = whole && slots->host_layer(il)->down == experts.down;
    if (is_whole) {
        experts = *whole;
        for (size_t i = 0; i < tensors.size(); ++i) {
            *tensors[i] = experts.*MOBILE_MEMBERS[i];
        }
    }
}

// of the probabilities that the router's gating makes
static enum mobile_score score_of(int gating) {
    switch (gating) {
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX:       return MOBILE_SCORE_SOFTMAX;
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID:       return MOBILE_SCORE_SIGMOID;
        case LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS: return MOBILE_SCORE_SOFTPLUS;
        default:                                          return MOBILE_SCORE_LOGIT;
    }
}

void mobile_moe::route(bool renormalise, bool ranked, bool routes_cur, const scored & router, ggml_tensor * cur, ggml_tensor *& ids, ggml_tensor *& weights, const hot_chain & build_hot) {
    mobile_context * ctx = at.ctx;
    if (!ctx) {
        return;
    }
    mobile_graph & graph = ctx->graph;
    if (graph.hot_ids) { // this is the hot chain
        ids     = graph.hot_ids;
        weights = graph.hot_weights;
        return;
    }
    const mobile_model_layer il(at.il);
    if (!ctx->routes.has(il)) {
        return;
    }
    mobile_route & route = ctx->routes[il];
    if (is_whole) {
        graph.has_policy = graph.has_policy || has_policy(*ctx);
        if (!graph.has_policy) {
            return;
        }
    } else {
        route.once = route.once && (!route.host.down || route.host.down == experts.down);
        route.host = experts;
    }
    route.renormalise = renormalise;
    route.ranked      = ranked;
    route.routes_cur  = routes_cur;
    route.kind        = score_of(router.gating);
    route.n_used      = (int32_t) ids->ne[0];

    const int64_t n_used   = ids->ne[0];
    const int64_t n_tokens = ids->ne[1];
    const int64_t n_ids    = n_used*ctx->store->n_segments;

    const mobile_slots * slots = ctx->slots.get();
    const bool has_hot = slots && at.no_lora && n_used == ctx->n_expert_used && slots->is_cached(route.il, n_tokens) && slots->host_layer(route.il)->down == experts.down;
    route.keep = is_whole || (n_tokens > 1 && has_offload(at.sched));

    // the next layer is predicted of it in short passes only. with a hot chain a fourth argument says so
    const bool guesses = slots && slots->placement() == MOBILE_PLACEMENT_CACHE;
    int n_args = has_hot ? 4 : n_tokens <= mobile_predictor::N_TOKENS_MAX && guesses ? 3 : 2;
    ggml_tensor * args[6] = { ids, weights, n_args > 2 ? cur : nullptr, has_hot ? cur : nullptr, nullptr, nullptr };
    const mobile_store_layer layer = ctx->store->layer_of(il);
    const int64_t n_expert = layer.is_none() ? 0 : ctx->store->n_expert_of(layer);
    // some number groups of experts
    if (ctx->rules.reads_scores() && router.scores->ne[0] == n_expert && router.probs->ne[1] == n_expert) {
        args[4] = router.probs;
        args[5] = router.probs->src[0] == router.scores ? nullptr : router.scores;
        n_args  = args[5] ? 6 : 5;
    }
    ggml_tensor * routed = mobile_op_new(at.ctx0, at.sched, at.backend_cpu, GGML_TYPE_I32, { n_ids + n_used + (has_hot ? n_ids : 0), n_tokens, 1 }, args, n_args, mobile_route_run, 1, &route);
    ggml_format_name(routed, "ffn_moe_routed-%d", at.il);
    is_routed = true;

    const size_t size = sizeof(int32_t);
    ggml_tensor * ids_in = ids;
    ids     = ggml_view_2d(at.ctx0, routed, n_ids, n_tokens, n_ids*size, 0);
    weights = ggml_view_3d(at.ctx0, routed, 1, n_used, n_tokens, size, n_used*size, n_ids*n_tokens*size);
    weights->type = GGML_TYPE_F32; // of the same size: what lies behind the ids is floats
    if (!has_hot) {
        return;
    }
    graph.hot_ids     = ggml_view_2d(at.ctx0, routed, n_ids, n_tokens, n_ids*size, (n_ids + n_used)*n_tokens*size);
    graph.hot_weights = weights;
    hot = build_hot(*slots->slots_of(route.il), ids_in);
    graph.hot_ids     = nullptr;
    graph.hot_weights = nullptr;
    cold_start = ggml_graph_n_nodes(at.gf);
}

ggml_tensor * mobile_moe::sum(ggml_tensor * cold) const {
    ggml_tensor * all = hot ? with_hot(cold) : cold;
    if (!is_routed) {
        return all;
    }
    const mobile_model_layer il(at.il);
    mobile_route & route = at.ctx->routes[il];
    if (!route.once || !at.ctx->correction.has(il, all->ne[0])) {
        return all;
    }
    return mobile_op_new(at.ctx0, at.sched, at.backend_cpu, GGML_TYPE_F32, { all->ne[0], all->ne[1], 1 }, &all, 1, mobile_correct_run, GGML_N_TASKS_MAX, &route);
}

ggml_tensor * mobile_moe::with_hot(ggml_tensor * cold) const {
    // the routed ids are an input so that their memory is not used again before the device has read its own
    ggml_tensor * args[2] = { cold, nullptr };
    for (int i = cold_start; i < ggml_graph_n_nodes(at.gf); ++i) {
        ggml_tensor * node = ggml_graph_node(at.gf, i);
        if (node->op == GGML_OP_MUL_MAT_ID && !args[1]) {
            args[1] = node->src[2]->view_src;
        }
        if (node->op != GGML_OP_VIEW && node->op != GGML_OP_RESHAPE) {
            ggml_backend_sched_set_tensor_backend(at.sched, node, at.backend_cpu);
        }
    }
    at.ctx->routes[mobile_model_layer(at.il)].n_cold_nodes = ggml_graph_n_nodes(at.gf) - cold_start + 1;
    ggml_tensor * end = mobile_op_new(at.ctx0, at.sched, at.backend_cpu, GGML_TYPE_F32, { cold->ne[0], cold->ne[1], 1 }, args, args[1] ? 2 : 1, mobile_route_end_cold, 1, &at.ctx->routes[mobile_model_layer(at.il)]);
    ggml_format_name(end, "ffn_moe_cold-%d", at.il);
    return ggml_add(at.ctx0, hot, end);
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

ggml_tensor * mobile_moe::join(ggml_tensor * results, const ggml_tensor * weights) const {
    mobile_context * ctx = at.ctx;
    if (!ctx) {
        return results;
    }
    if (results->op == GGML_OP_MUL_MAT_ID) {
        memcpy(ctx->graph.down_params, results->op_params, sizeof(ctx->graph.down_params)); // all layers' are alike
    }
    const int64_t n_used = weights->ne[1];
    if (results->ne[1] == n_used) {
        return results;
    }
    if (ctx->graph.hot_ids || is_whole) { // on a device
        ggml_tensor * sum = nullptr;
        for (int64_t i = 0; i < results->ne[1]; i += n_used) {
            ggml_tensor * part = ggml_view_3d(at.ctx0, results, results->ne[0], n_used, results->ne[2], results->nb[1], results->nb[2], i*results->nb[1]);
            sum = sum ? ggml_add(at.ctx0, sum, part) : part;
        }
        return sum;
    }
    return mobile_op_new(at.ctx0, at.sched, at.backend_cpu, GGML_TYPE_F32, { results->ne[0], n_used, results->ne[2] }, &results, 1, join_segments, GGML_N_TASKS_MAX, nullptr);
}

//
// scales
//

static void route_rows(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(nth);
    GGML_UNUSED(userdata);
    if (ith != 0) {
        return;
    }
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        for (int64_t rank = 0; rank < dst->ne[0]; ++rank) {
            *(int32_t *) ((char *) dst->data + rank*dst->nb[0] + t*dst->nb[1]) = std::max(*(const int32_t *) ((const char *) dst->src[0]->data + rank*dst->src[0]->nb[0] + t*dst->src[0]->nb[1]), 0);
        }
    }
}

ggml_tensor * mobile_route_rows(ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * ids) {
    if (!ids->view_src || ids->view_offs != 0 || !mobile_op_is(ids->view_src, mobile_route_run)) {
        return ids;
    }
    return mobile_op_new(ctx0, sched, backend_cpu, GGML_TYPE_I32, { ids->ne[0], ids->ne[1], 1 }, &ids, 1, route_rows, 1, nullptr);
}
