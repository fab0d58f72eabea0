// mobile-route-graph.cpp - how the route op and the chains behind it stand in a graph.

#include "route/mobile-route.h"

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>

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

// the end of a cold chain: passes its sum on. by now the next layer's experts have been guessed
static void cold_end(ggml_tensor * dst, int ith, int nth, void * userdata) {
    GGML_UNUSED(nth);
    if (ith != 0) {
        return;
    }
    mobile_route & route = *(mobile_route *) userdata;
    memcpy(dst->data, dst->src[0]->data, ggml_nbytes(dst));
    if (route.n_cold > 0 && route.ctx->slots) {
        route.ctx->slots->add_cpu_time(route.n_cold, ggml_time_us() - route.start_us);
    }
    if (route.ctx->slots) {
        mobile_route_ahead(*route.ctx);
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

static bool has_policy(const mobile_context & ctx) {
    // ids of segments come from the route op
    return ctx.store->n_segments > 1 || (ctx.k > 0 && ctx.k < ctx.n_expert_used) || !ctx.k_batch.empty() || !ctx.replay.empty() || ctx.trace;
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
    ctx->is_whole = is_whole;
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
    const bool guesses = !ctx->store->all_resident || (ctx->slots && ctx->slots->params.placement == MOBILE_PLACEMENT_CACHE);
    const int n_args = hot ? 4 : n_tokens <= mobile_predictor::N_TOKENS_MAX && guesses ? 3 : 2;
    ggml_tensor * args[4] = { *ids, *weights, cur, cur };
    ggml_tensor * routed = ggml_custom_4d(ctx0, GGML_TYPE_I32, n_ids + n_used + (hot ? n_ids : 0), n_tokens, 1, 1, args, n_args, mobile_route_run, 1, &route);
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
        mobile_context * ctx, ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * experts, const ggml_tensor * weights) {
    if (ctx && experts->op == GGML_OP_MUL_MAT_ID) {
        memcpy(ctx->down_params, experts->op_params, sizeof(ctx->down_params)); // all layers' are alike
    }
    const int64_t n_used = weights->ne[1];
    if (experts->ne[1] == n_used) {
        return experts;
    }
    if (ctx && (ctx->hot_ids || ctx->is_whole)) { // on a device
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

ggml_tensor * mobile_route_rows(ggml_context * ctx0, ggml_backend_sched_t sched, ggml_backend_t backend_cpu, ggml_tensor * ids) {
    ggml_custom_op_t fun = nullptr;
    if (ids->view_src && ids->view_src->op == GGML_OP_CUSTOM && ids->view_offs == 0) {
        memcpy(&fun, ids->view_src->op_params, sizeof(fun));
    }
    if (fun != mobile_route_run) {
        return ids;
    }
    ggml_tensor * rows = ggml_custom_4d(ctx0, GGML_TYPE_I32, ids->ne[0], ids->ne[1], 1, 1, &ids, 1, route_rows, 1, nullptr);
    ggml_backend_sched_set_tensor_backend(sched, rows, backend_cpu);
    return rows;
}
