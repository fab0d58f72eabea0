#include "route/mobile-observe.h"

#include "mobile-error.h"
#include "route/mobile-context.h"

#include "llama-context.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>

static const char * DOWN_EXPERTS = "ffn_down_exps.weight";

// a weight's name as in the file: the scheduler calls its copies on other backends DEVICE#name#number
static std::string weight_name(const ggml_tensor * t) {
    std::string name = t->name;
    const size_t begin = name.find('#');
    if (begin == std::string::npos) {
        return name;
    }
    return name.substr(begin + 1, name.find('#', begin + 1) - begin - 1);
}

static bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// a weight of the model, not an activation or the cache
static bool is_weight(const std::string & name) {
    return ends_with(name, ".weight") && (name.compare(0, 4, "blk.") == 0 || name == "output.weight");
}

static int32_t layer_of(const std::string & name) {
    int il = -1;
    return sscanf(name.c_str(), "blk.%d.", &il) == 1 ? il : -1;
}

// the router weights of a layer, whatever has been done to them; the last one before the experts counts
static bool is_router_weights(const ggml_tensor * t) {
    // the route op's result is a view of its own type behind the ids
    static const char * names[] = {
        "ffn_moe_weights-", "ffn_moe_weights_softmax-", "ffn_moe_weights_norm-", "ffn_moe_weights_scaled-", "ffn_moe_routed-",
    };
    for (const char * name : names) {
        if (strncmp(t->name, name, strlen(name)) == 0) {
            return t->type == GGML_TYPE_F32;
        }
    }
    return false;
}

// t's bytes on the host, copied into room if need be; strides stay t's
static const char * on_host(const ggml_tensor * t, std::vector<char> & room) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    if (!buffer || ggml_backend_buffer_is_host(buffer)) {
        return (const char *) t->data;
    }
    room.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, room.data(), 0, room.size());
    return room.data();
}

static void add_squares(float * sum2, const float * x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        sum2[i] += x[i]*x[i];
    }
}

bool mobile_observer::eval(ggml_tensor * t, bool ask, void * user_data) {
    auto * self = (mobile_observer *) user_data;
    if (ask) {
        return self->error.empty() && self->wants(t);
    }
    try {
        self->observe(t);
    } catch (const std::exception & e) {
        self->error = e.what();
    }
    return true; // false would end the computation
}

bool mobile_observer::wants(const ggml_tensor * t) const {
    if ((what & MOBILE_OBSERVE_ROUTES) && is_router_weights(t)) {
        return true;
    }
    if ((what & MOBILE_OBSERVE_LITTLE) && little.wants(t)) {
        return true;
    }
    if (t->op != GGML_OP_MUL_MAT && t->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const std::string name = weight_name(t->src[0]);
    if (t->src[1]->type != GGML_TYPE_F32 || !is_weight(name)) {
        return false;
    }
    if (t->op == GGML_OP_MUL_MAT_ID && ends_with(name, DOWN_EXPERTS)) {
        return true; // its ids are the routed ones as well
    }
    return (what & MOBILE_OBSERVE_INPUTS) != 0;
}

void mobile_observer::observe(const ggml_tensor * t) {
    if (t->op == GGML_OP_MUL_MAT) {
        add_dense(t);
        return;
    }
    if (t->op == GGML_OP_MUL && little.wants(t)) {
        little.add(t, on_host(t, host_input), on_host(t->src[1], host_ids));
        return;
    }
    if (t->op != GGML_OP_MUL_MAT_ID) {
        keep_weights(t);
        return;
    }
    const bool is_down = ends_with(weight_name(t->src[0]), DOWN_EXPERTS);
    if ((what & MOBILE_OBSERVE_INPUTS) || (is_down && (what & MOBILE_OBSERVE_NEURONS))) {
        add_experts(t);
    }
    if (is_down && (what & MOBILE_OBSERVE_ROUTES)) {
        add_route(t);
    }
}

mobile_input_sums & mobile_observer::sums_of(const ggml_tensor * weight, int64_t n_row, int64_t n_mat, int64_t n_count) {
    const std::string name = weight_name(weight);
    mobile_input_sums & sums = inputs[name];
    if (sums.sum2.empty()) {
        sums.n_row = n_row;
        sums.n_mat = n_mat;
        sums.sum2  .assign(n_row*n_mat, 0.0f);
        sums.counts.assign(n_count, 0);
    }
    if (sums.n_row != n_row || sums.n_mat != n_mat || (int64_t) sums.counts.size() != n_count) {
        throw std::runtime_error(name + " is used with inputs of different shapes");
    }
    return sums;
}

void mobile_observer::add_dense(const ggml_tensor * t) {
    const ggml_tensor * w = t->src[0];
    const ggml_tensor * x = t->src[1];

    // matrices of a dense weight (heads, say) all see as many rows, so one count serves; a batch of inputs to a
    // single matrix is only more rows
    mobile_input_sums & sums = sums_of(w, x->ne[0], w->ne[2]*w->ne[3], 1);
    const char * data = on_host(x, host_input);
    for (int64_t i3 = 0; i3 < x->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < x->ne[2]; ++i2) {
            float * sum2 = &sums.sum2[((i3 % w->ne[3])*w->ne[2] + i2 % w->ne[2])*sums.n_row];
            for (int64_t i1 = 0; i1 < x->ne[1]; ++i1) {
                add_squares(sum2, (const float *) (data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]), sums.n_row);
            }
        }
    }
    sums.counts[0] += ggml_nrows(x)/sums.n_mat;
}

void mobile_observer::add_experts(const ggml_tensor * t) {
    const ggml_tensor * w   = t->src[0]; // [n_row, n_out, n_expert]
    const ggml_tensor * x   = t->src[1]; // [n_row, n_used or 1, n_tokens]
    const ggml_tensor * ids = t->src[2]; // [n_used, n_tokens]

    mobile_input_sums & sums = sums_of(w, x->ne[0], w->ne[2], w->ne[2]);
    const char * data    = on_host(x, host_input);
    const char * id_data = on_host(ids, host_ids);
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t rank = 0; rank < ids->ne[0]; ++rank) {
            const int32_t id = *(const int32_t *) (id_data + rank*ids->nb[0] + token*ids->nb[1]);
            if (id < 0 || id >= sums.n_mat) {
                continue; // skipped by the route op
            }
            add_squares(&sums.sum2[id*sums.n_row], (const float *) (data + (rank % x->ne[1])*x->nb[1] + token*x->nb[2]), sums.n_row);
            sums.counts[id]++;
        }
    }
}

void mobile_observer::keep_weights(const ggml_tensor * t) {
    // [1, n_used, n_tokens], or [n_used, n_tokens] before they are given their last shape: a row follows the other
    const char * data = on_host(t, host_input);
    weights.clear();
    for (int64_t i2 = 0; i2 < t->ne[2]; ++i2) {
        for (int64_t i1 = 0; i1 < t->ne[1]; ++i1) {
            for (int64_t i0 = 0; i0 < t->ne[0]; ++i0) {
                weights.push_back(*(const float *) (data + i0*t->nb[0] + i1*t->nb[1] + i2*t->nb[2]));
            }
        }
    }
}

void mobile_observer::add_route(const ggml_tensor * t) {
    const ggml_tensor * ids = t->src[2];

    // experts in segments have one weight and S ids each, e*S + s, those of the first segments before the others
    const int64_t n_tokens   = ids->ne[1];
    const int64_t n_used     = (int64_t) weights.size()/n_tokens;
    const int64_t n_segments = n_used > 0 ? ids->ne[0]/n_used : 0;

    mobile_route_record record;
    record.il       = layer_of(weight_name(t->src[0]));
    record.n_used   = (int32_t) n_used;
    record.n_tokens = (int32_t) n_tokens;
    if (n_segments < 1 || n_segments*(int64_t) weights.size() != ids->ne[0]*n_tokens) {
        throw std::runtime_error("layer " + std::to_string(record.il) + " computes its router weights in a way that is not known here");
    }
    const char * data = on_host(ids, host_ids);
    for (int64_t token = 0; token < n_tokens; ++token) {
        for (int64_t rank = 0; rank < n_used; ++rank) {
            const int32_t id = *(const int32_t *) (data + rank*ids->nb[0] + token*ids->nb[1]);
            record.ids.push_back(id < 0 ? -1 : id/(int32_t) n_segments);
        }
    }
    record.weights = std::move(weights);
    weights.clear();
    routes.push_back(std::move(record));
}

//
// C API
//

static llama_cparams & cparams_of(struct llama_context * ctx) {
    // no context is const; only the callback is changed, which a caller may choose freely
    return const_cast<llama_cparams &>(ctx->get_cparams());
}

static mobile_observer * observer_of(const struct llama_context * ctx) {
    if (!ctx || ctx->get_cparams().cb_eval != mobile_observer::eval) {
        mobile_fail(MOBILE_ERR_STATE, "this context is not observed");
        return nullptr;
    }
    return (mobile_observer *) ctx->get_cparams().cb_eval_user_data;
}

static void set_callback(struct llama_context * ctx, ggml_backend_sched_eval_callback callback, void * user_data) {
    cparams_of(ctx).cb_eval           = callback;
    cparams_of(ctx).cb_eval_user_data = user_data;
    // a graph that is used again does not look into cparams
    ggml_backend_sched_set_eval_callback(ctx->get_sched(), callback, user_data);
}

int32_t mobile_observe_start(struct llama_context * ctx, int32_t what) {
    return mobile_guard([&]() -> int32_t {
        const int32_t all = MOBILE_OBSERVE_ROUTES | MOBILE_OBSERVE_NEURONS | MOBILE_OBSERVE_INPUTS | MOBILE_OBSERVE_LITTLE;
        if (!ctx || what <= 0 || (what & ~all)) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "what to observe must be a sum of enum mobile_observe");
        }
        if (ctx->get_cparams().cb_eval) {
            return mobile_fail(MOBILE_ERR_STATE, "this context is observed already, or has an evaluation callback of its own");
        }
        set_callback(ctx, mobile_observer::eval, new mobile_observer(what));
        return MOBILE_OK;
    });
}

int32_t mobile_observe_stop(struct llama_context * ctx) {
    return mobile_guard([&]() -> int32_t {
        mobile_observer * observer = observer_of(ctx);
        if (!observer) {
            return MOBILE_ERR_STATE;
        }
        set_callback(ctx, nullptr, nullptr);
        delete observer;
        return MOBILE_OK;
    });
}

// the observer if it has seen everything so far
static const mobile_observer * intact_observer_of(const struct llama_context * ctx) {
    const mobile_observer * observer = observer_of(ctx);
    if (observer && !observer->error.empty()) {
        mobile_fail(MOBILE_ERR_STATE, "observation failed: " + observer->error);
        return nullptr;
    }
    return observer;
}

int32_t mobile_observe_n_inputs(const struct llama_context * ctx) {
    return mobile_guard([&]() -> int32_t {
        const mobile_observer * observer = intact_observer_of(ctx);
        return observer ? (int32_t) observer->inputs.size() : MOBILE_ERR_STATE;
    });
}

int32_t mobile_observe_get_input(const struct llama_context * ctx, int32_t i, struct mobile_observed_input * input) {
    return mobile_guard([&]() -> int32_t {
        const mobile_observer * observer = intact_observer_of(ctx);
        if (!observer) {
            return MOBILE_ERR_STATE;
        }
        if (i < 0 || (size_t) i >= observer->inputs.size()) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "there is no such input");
        }
        const auto it = std::next(observer->inputs.begin(), i);
        input->name    = it->first.c_str();
        input->n_row   = it->second.n_row;
        input->n_mat   = it->second.n_mat;
        input->n_count = (int64_t) it->second.counts.size();
        input->sum2    = it->second.sum2.data();
        input->counts  = it->second.counts.data();
        return MOBILE_OK;
    });
}

int32_t mobile_observe_n_routes(const struct llama_context * ctx) {
    return mobile_guard([&]() -> int32_t {
        const mobile_observer * observer = intact_observer_of(ctx);
        return observer ? (int32_t) observer->routes.size() : MOBILE_ERR_STATE;
    });
}

int32_t mobile_observe_get_route(const struct llama_context * ctx, int32_t i, struct mobile_observed_route * route) {
    return mobile_guard([&]() -> int32_t {
        const mobile_observer * observer = intact_observer_of(ctx);
        if (!observer) {
            return MOBILE_ERR_STATE;
        }
        if (i < 0 || (size_t) i >= observer->routes.size()) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "there is no such route");
        }
        const mobile_route_record & record = observer->routes[i];
        route->layer    = record.il;
        route->n_used   = record.n_used;
        route->n_tokens = record.n_tokens;
        route->reserved = 0;
        route->ids      = record.ids.data();
        route->weights  = record.weights.data();
        return MOBILE_OK;
    });
}

int32_t mobile_observe_clear_routes(struct llama_context * ctx) {
    return mobile_guard([&]() -> int32_t {
        mobile_observer * observer = observer_of(ctx);
        if (!observer) {
            return MOBILE_ERR_STATE;
        }
        observer->routes.clear();
        return MOBILE_OK;
    });
}

int32_t mobile_observe_set_little(struct llama_context * ctx, const int32_t * k, const int32_t * mass, int32_t n) {
    return mobile_guard([&]() -> int32_t {
        mobile_observer * observer = observer_of(ctx);
        if (!observer) {
            return MOBILE_ERR_STATE;
        }
        const mobile_context * m = ctx->get_cparams().mobile.get();
        if (!(observer->what & MOBILE_OBSERVE_LITTLE) || !m || m->slots) {
            return mobile_fail(MOBILE_ERR_STATE, "what little passes give is observed with an expert store, with no slots on a device, and if it was asked for");
        }
        mobile_require(k && mass && n > 0, "there must be a way of having fewer experts");
        std::vector<mobile_little_observer::way> ways;
        for (int32_t i = 0; i < n; ++i) {
            mobile_require(k[i] > 0 && k[i] < m->n_expert_used && mass[i] >= 0, "a little token has 1 to " + std::to_string(m->n_expert_used - 1) + " experts, and no negative mass");
            ways.push_back({ k[i], mass[i] });
        }
        observer->little.ask(m, std::move(ways));
        return MOBILE_OK;
    });
}

int32_t mobile_observe_n_little(const struct llama_context * ctx) {
    return mobile_guard([&]() -> int32_t {
        const mobile_observer * observer = intact_observer_of(ctx);
        return observer ? (int32_t) observer->little.sums.size() : MOBILE_ERR_STATE;
    });
}

int32_t mobile_observe_get_little(const struct llama_context * ctx, int32_t i, struct mobile_observed_little * little) {
    return mobile_guard([&]() -> int32_t {
        const mobile_observer * observer = intact_observer_of(ctx);
        if (!observer) {
            return MOBILE_ERR_STATE;
        }
        if (i < 0 || (size_t) i >= observer->little.sums.size()) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "there is no such sum");
        }
        const auto & [place, sums] = *std::next(observer->little.sums.begin(), i);
        little->layer    = place.first;
        little->way      = place.second;
        little->n_embd   = (int64_t) sums.big.size();
        little->n_tokens = sums.n_tokens;
        little->big      = sums.big.data();
        little->big2     = sums.big2.data();
        little->little   = sums.little.data();
        little->little2  = sums.little2.data();
        return MOBILE_OK;
    });
}
