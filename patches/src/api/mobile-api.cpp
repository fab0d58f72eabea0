// mobile-api.cpp - the C API of mobile.h: checks arguments; what fails below is thrown, and becomes a code and a text.

#include "api/mobile-context-of.h"

#include "mobile-error.h"
#include "store/mobile-load.h"

#include "llama-context.h"
#include "llama-model.h"

#include <cstring>

static std::shared_ptr<mobile_store> store_of(const struct llama_model * model) {
    std::shared_ptr<mobile_store> store = model ? mobile_store_of(*model) : nullptr;
    if (!store) {
        mobile_throw(MOBILE_ERR_STATE, MOBILE_NO_STORE);
    }
    return store;
}

int32_t mobile_abi_version(void) {
    return MOBILE_ABI_VERSION;
}

struct mobile_load_params mobile_load_default_params(void) {
    return mobile_store_default_params();
}

static void check(const struct mobile_load_params & params) {
    mobile_require(params.n_io_threads > 0 && params.n_io_threads <= 64, "n_io_threads must be 1 to 64");
    mobile_require(params.eviction >= MOBILE_EVICTION_LRU && params.eviction <= MOBILE_EVICTION_DECAY, "unknown eviction policy");
    mobile_require(params.io >= MOBILE_IO_AUTO && params.io <= MOBILE_IO_BUFFERED, "unknown io mode");
    mobile_require(params.prefault == 0 || params.prefault == 1, "prefault must be 0 or 1");
    mobile_require(params.n_at_once >= 0, "n_at_once must not be negative");
    mobile_require(params.on_host == 0 || params.on_host == 1, "on_host must be 0 or 1");
}

int32_t mobile_load_set_params(const struct mobile_load_params * params) {
    return mobile_guard([&] {
        if (params) {
            check(*params);
        }
        mobile_load_set_pending(params);
        return MOBILE_OK;
    });
}

int32_t mobile_model_get_info(const struct llama_model * model, struct mobile_model_info * info) {
    return mobile_guard([&] {
        const std::shared_ptr<mobile_store> store = store_of(model);
        *info = {};
        info->expert_bytes     = store->expert_bytes;
        info->budget_bytes     = store->budget_bytes;
        info->budget_min_bytes = store->budget_min_bytes;
        info->budget_all_bytes = store->budget_all_bytes;
        info->n_layer          = (int32_t) model->hparams.n_layer();
        info->n_layer_moe      = (int32_t) store->layers.size();
        info->n_expert         = store->n_expert_max();
        info->n_expert_used    = (int32_t) model->hparams.n_expert_used();
        info->direct_io        = store->direct_io();
        info->eviction         = store->params.eviction;
        return MOBILE_OK;
    });
}

int32_t mobile_model_get_residency(const struct llama_model * model, uint8_t * state, size_t n_state) {
    return mobile_guard([&] {
        const std::shared_ptr<mobile_store> store = store_of(model);
        const size_t n_layer  = model->hparams.n_layer();
        const size_t n_expert = store->n_expert_max();
        mobile_require(n_state == n_layer*n_expert, "state must have n_layer * n_expert entries");
        memset(state, MOBILE_NOT_RESIDENT, n_state);
        for (mobile_store_layer layer(0); store->layers.has(layer); ++layer) {
            const size_t il = store->model_layer(layer).n;
            for (int32_t e = 0; il < n_layer && e < store->n_expert_of(layer); ++e) {
                state[il*n_expert + e] = store->residency_of_model(layer, e);
            }
        }
        return MOBILE_OK;
    });
}

int32_t mobile_model_get_n_segments(const struct llama_model * model) {
    return mobile_guard([&] { return store_of(model)->n_segments; });
}

int32_t mobile_set_n_expert_used(struct llama_context * ctx, int32_t k) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(k >= 0, "k must not be negative");
        m.rules.set_k(k);
        return MOBILE_OK;
    });
}

int32_t mobile_set_mass(struct llama_context * ctx, int32_t k) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(k >= 0, "k must not be negative");
        m.rules.set_mass(k);
        return MOBILE_OK;
    });
}

int32_t mobile_set_batch_n_expert_used(struct llama_context * ctx, const int32_t * k, int32_t n_tokens) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(n_tokens > 0 && k, "k must have an entry per token");
        for (int32_t i = 0; i < n_tokens; ++i) {
            mobile_require(k[i] >= 0, "k must not be negative");
        }
        m.rules.set_batch(k, n_tokens);
        return MOBILE_OK;
    });
}

int32_t mobile_prefetch_masked(struct llama_context * ctx) {
    return mobile_guard([&] { return mobile_route_hint_masked(mobile_context_of(ctx), *ctx); });
}

int32_t mobile_get_counters(const struct llama_context * ctx, struct mobile_counters * counters) {
    return mobile_guard([&] {
        const mobile_context & m = mobile_context_of(ctx);
        m.usage.get(*m.store, *counters);
        return MOBILE_OK;
    });
}

int32_t mobile_reset_counters(struct llama_context * ctx) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        m.usage.reset(*m.store);
        m.predictor.reset_counters();
        m.loss.reset_counters(*m.store);
        if (m.slots) {
            m.slots->reset_counters();
        }
        return MOBILE_OK;
    });
}

int32_t mobile_set_prefetch(struct llama_context * ctx, int32_t mode) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(mode >= MOBILE_PREFETCH_OFF && mode <= MOBILE_PREFETCH_AUTO, "unknown prefetch mode");
        m.predictor.set_mode((enum mobile_prefetch) mode);
        return MOBILE_OK;
    });
}

int32_t mobile_set_predictor(struct llama_context * ctx, int32_t predictor) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(predictor >= MOBILE_PREDICT_AUTO && predictor <= MOBILE_PREDICT_TRANSITIONS, "unknown predictor");
        if (!m.predictor.set_predictor((enum mobile_predict) predictor)) {
            return mobile_fail(MOBILE_ERR_STATE, "this model has no router that could predict the next layer's experts");
        }
        return MOBILE_OK;
    });
}

int32_t mobile_get_prefetch_counters(const struct llama_context * ctx, struct mobile_prefetch_counters * counters) {
    return mobile_guard([&] {
        mobile_context_of(ctx).predictor.get_counters(*counters);
        return MOBILE_OK;
    });
}

const char * mobile_context_error(const struct llama_context * ctx) {
    return mobile_guard_or("", [&] { return mobile_context_of(ctx).error.c_str(); });
}

int32_t mobile_trace_start(struct llama_context * ctx, const char * path) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(path, "a trace needs a path");
        m.trace.start(path);
        return MOBILE_OK;
    });
}

int32_t mobile_trace_stop(struct llama_context * ctx) {
    return mobile_guard([&] {
        mobile_context_of(ctx).trace.stop();
        return MOBILE_OK;
    });
}

int32_t mobile_routed_watch(struct llama_context * ctx, bool on) {
    return mobile_guard([&] {
        mobile_context_of(ctx).ring.watch(on);
        return MOBILE_OK;
    });
}

int32_t mobile_routed_read(const struct llama_context * ctx, uint64_t since, struct mobile_routed * routed, int32_t n, uint64_t * next, uint64_t * n_lost) {
    return mobile_guard([&] {
        const mobile_context & m = mobile_context_of(ctx);
        mobile_require(n >= 0 && (routed || n == 0) && next && n_lost, "reading needs room for n entries, and for two numbers");
        return (int32_t) m.ring.read(since, routed, (size_t) n, *next, *n_lost);
    });
}

int32_t mobile_set_replay(struct llama_context * ctx, const int32_t * ids, int32_t n_steps, int32_t n_layer, int32_t k) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        if (!ids) {
            m.rules.clear_replay();
            m.predictor.set_replay(false);
            return MOBILE_OK;
        }
        mobile_require(n_steps > 0 && n_layer == m.n_layer && k == m.n_expert_used,
            "a replay needs [n_steps][" + std::to_string(m.n_layer) + "][" + std::to_string(m.n_expert_used) + "] ids for this model");
        if (m.rules.reads_scores()) {
            return mobile_fail(MOBILE_ERR_STATE, "a replay takes the place of the router's scores, which the rules in force choose by");
        }
        const size_t  n        = (size_t) n_steps*n_layer*k;
        const int32_t n_expert = m.store->n_expert_max();
        for (size_t i = 0; i < n; ++i) {
            if (ids[i] < 0 || ids[i] >= n_expert) {
                return mobile_fail(MOBILE_ERR_ARGUMENT, "expert " + std::to_string(ids[i]) + " in the replay: this model has " + std::to_string(n_expert));
            }
        }
        m.rules.set_replay(ids, n_steps);
        m.predictor.set_replay(true);
        return MOBILE_OK;
    });
}
