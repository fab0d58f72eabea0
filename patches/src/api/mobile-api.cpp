// mobile-api.cpp - the C API of mobile.h: checks arguments, turns failures into codes and texts.

#include "mobile.h"

#include "mobile-error.h"
#include "store/mobile-load.h"
#include "route/mobile-route.h"

#include "llama-context.h"
#include "llama-model.h"

#include <cerrno>
#include <cstring>

static const char * NO_STORE = "this model has no expert store: it has no routed experts, or was loaded without load parameters";

static mobile_context * context_of(const struct llama_context * ctx) {
    mobile_context * m = ctx ? ctx->get_cparams().mobile.get() : nullptr;
    if (!m) {
        mobile_fail(MOBILE_ERR_STATE, NO_STORE);
    }
    return m;
}

int32_t mobile_abi_version(void) {
    return MOBILE_ABI_VERSION;
}

struct mobile_load_params mobile_load_default_params(void) {
    struct mobile_load_params params = {};
    params.budget_bytes = 0;
    params.n_io_threads = 4;
    params.eviction     = MOBILE_EVICTION_DECAY;
    params.io           = MOBILE_IO_AUTO;
    return params;
}

int32_t mobile_load_set_params(const struct mobile_load_params * params) {
    if (params) {
        if (params->n_io_threads <= 0 || params->n_io_threads > 64) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "n_io_threads must be 1 to 64");
        }
        if (params->eviction < MOBILE_EVICTION_LRU || params->eviction > MOBILE_EVICTION_DECAY) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown eviction policy");
        }
        if (params->io < MOBILE_IO_AUTO || params->io > MOBILE_IO_BUFFERED) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown io mode");
        }
        if (params->on_host != 0 && params->on_host != 1) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "on_host must be 0 or 1");
        }
    }
    mobile_load_set_pending(params);
    return MOBILE_OK;
}

int32_t mobile_model_get_info(const struct llama_model * model, struct mobile_model_info * info) {
    const std::shared_ptr<mobile_store> store = model ? mobile_store_of(*model) : nullptr;
    if (!store) {
        return mobile_fail(MOBILE_ERR_STATE, NO_STORE);
    }
    *info = {};
    info->expert_bytes     = store->expert_bytes;
    info->budget_bytes     = store->budget_bytes;
    info->budget_min_bytes = store->budget_min_bytes;
    info->budget_all_bytes = store->budget_all_bytes;
    info->n_layer          = (int32_t) model->hparams.n_layer();
    info->n_layer_moe      = (int32_t) store->layers.size();
    info->n_expert         = store->n_expert_max/store->n_segments;
    info->n_expert_used    = (int32_t) model->hparams.n_expert_used();
    info->direct_io        = store->direct_io();
    info->eviction         = store->params.eviction;
    return MOBILE_OK;
}

int32_t mobile_model_get_residency(const struct llama_model * model, uint8_t * state, size_t n_state) {
    const std::shared_ptr<mobile_store> store = model ? mobile_store_of(*model) : nullptr;
    if (!store) {
        return mobile_fail(MOBILE_ERR_STATE, NO_STORE);
    }
    const size_t n_layer  = model->hparams.n_layer();
    const size_t n_expert = store->n_expert_max/store->n_segments;
    if (n_state != n_layer*n_expert) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "state must have n_layer * n_expert entries");
    }
    memset(state, MOBILE_NOT_RESIDENT, n_state);
    for (size_t i = 0; i < store->layers.size(); ++i) {
        const mobile_layer & l = store->layers[i];
        for (int32_t e = 0; (size_t) l.il < n_layer && e < l.n_expert/store->n_segments; ++e) {
            state[l.il*n_expert + e] = store->residency_of_model((int32_t) i, e);
        }
    }
    return MOBILE_OK;
}

int32_t mobile_model_get_n_segments(const struct llama_model * model) {
    const std::shared_ptr<mobile_store> store = model ? mobile_store_of(*model) : nullptr;
    if (!store) {
        return mobile_fail(MOBILE_ERR_STATE, NO_STORE);
    }
    return store->n_segments;
}

int32_t mobile_set_n_expert_used(struct llama_context * ctx, int32_t k) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (k < 0) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "k must not be negative");
    }
    m->k = k;
    return MOBILE_OK;
}

int32_t mobile_set_batch_n_expert_used(struct llama_context * ctx, const int32_t * k, int32_t n_tokens) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (n_tokens <= 0 || !k) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "k must have an entry per token");
    }
    for (int32_t i = 0; i < n_tokens; ++i) {
        if (k[i] < 0) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "k must not be negative");
        }
    }
    m->k_batch.assign(k, k + n_tokens);
    m->k_batch_ran.assign(n_tokens, 0);
    return MOBILE_OK;
}

int32_t mobile_prefetch_masked(struct llama_context * ctx) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    m->predictor->begin_masked(mobile_route_takes_hints(*m));
    const bool reads   = m->predictor->hints_masked(MOBILE_AHEAD_HOST);
    const bool uploads = m->predictor->hints_masked(MOBILE_AHEAD_DEVICE);
    if (!reads && !uploads) {
        return 0;
    }
    if (uploads) {
        ctx->synchronize(); // no slot is in use
        m->slots->begin_hints();
    }
    int32_t n = 0;
    for (const auto & route : m->routes) {
        const size_t il = route.il;
        if (!route.masked.empty() && il < m->store->layer_of_il.size() && m->store->layer_of_il[il] >= 0) {
            std::vector<int32_t> all;
            std::vector<int32_t> ids; // of these, those that need host memory
            for (int32_t id : route.masked) {
                for (int32_t s = 0; s < m->store->n_segments; ++s) {
                    const int32_t part = id*m->store->n_segments + s;
                    all.push_back(part);
                    if (!mobile_route_on_device(*m, m->store->layer_of_il[il], part)) {
                        ids.push_back(part);
                    }
                }
            }
            // ctx->time is one past the last pass's token
            if (reads) {
                n += m->store->hint(m->store->layer_of_il[il], ids.data(), ids.size(), m->time - 1.0, 0);
            }
            if (uploads) {
                m->slots->hint((int32_t) il, all, m->time - 1.0);
            }
        }
    }
    if (uploads) {
        m->slots->run_ahead();
    }
    return n;
}

int32_t mobile_get_counters(const struct llama_context * ctx, struct mobile_counters * counters) {
    const mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    const mobile_counters now = m->store->counters();
    *counters = now; // resident_bytes and its peak are the store's
    counters->n_tokens          = m->n_tokens;
    counters->n_tokens_little   = m->n_tokens_little;
    counters->n_hits            = now.n_hits            - m->base.n_hits;
    counters->n_misses          = now.n_misses          - m->base.n_misses;
    counters->n_evictions       = now.n_evictions       - m->base.n_evictions;
    counters->n_prefetched      = now.n_prefetched      - m->base.n_prefetched;
    counters->n_prefetch_hits   = now.n_prefetch_hits   - m->base.n_prefetch_hits;
    counters->bytes_read        = now.bytes_read        - m->base.bytes_read;
    counters->bytes_read_demand = now.bytes_read_demand - m->base.bytes_read_demand;
    counters->bytes_routed      = now.bytes_routed      - m->base.bytes_routed;
    counters->stall_us          = now.stall_us          - m->base.stall_us;
    return MOBILE_OK;
}

int32_t mobile_reset_counters(struct llama_context * ctx) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    m->store->reset_peak();
    m->base            = m->store->counters();
    m->predictor->reset_counters();
    m->n_tokens        = 0;
    m->n_tokens_little = 0;
    if (m->slots) {
        m->slots->reset_counters();
    }
    return MOBILE_OK;
}

int32_t mobile_set_prefetch(struct llama_context * ctx, int32_t mode) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (mode < MOBILE_PREFETCH_OFF || mode > MOBILE_PREFETCH_AUTO) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown prefetch mode");
    }
    m->predictor->set_mode((enum mobile_prefetch) mode);
    return MOBILE_OK;
}

int32_t mobile_set_predictor(struct llama_context * ctx, int32_t predictor) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (predictor < MOBILE_PREDICT_AUTO || predictor > MOBILE_PREDICT_TRANSITIONS) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown predictor");
    }
    if (!m->predictor->set_predictor((enum mobile_predict) predictor)) {
        return mobile_fail(MOBILE_ERR_STATE, "this model has no router that could predict the next layer's experts");
    }
    return MOBILE_OK;
}

int32_t mobile_get_prefetch_counters(const struct llama_context * ctx, struct mobile_prefetch_counters * counters) {
    const mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    m->predictor->get_counters(*counters);
    return MOBILE_OK;
}

const char * mobile_context_error(const struct llama_context * ctx) {
    const mobile_context * m = context_of(ctx);
    return m ? m->error.c_str() : "";
}

int32_t mobile_trace_start(struct llama_context * ctx, const char * path) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (m->trace) {
        return mobile_fail(MOBILE_ERR_STATE, "a trace is being recorded already");
    }
    m->trace = fopen(path, "w");
    if (!m->trace) {
        return mobile_fail(MOBILE_ERR_IO, std::string(path) + ": " + strerror(errno));
    }
    m->trace_turn = -1;
    m->trace_step = 0;
    fprintf(m->trace, "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n");
    return MOBILE_OK;
}

int32_t mobile_trace_stop(struct llama_context * ctx) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (!m->trace) {
        return mobile_fail(MOBILE_ERR_STATE, "no trace is being recorded");
    }
    const bool failed = ferror(m->trace) != 0;
    const bool closed = fclose(m->trace) == 0;
    m->trace = nullptr;
    if (failed || !closed) {
        return mobile_fail(MOBILE_ERR_IO, "the trace could not be written in full: " + std::string(strerror(errno)));
    }
    return MOBILE_OK;
}

int32_t mobile_set_replay(struct llama_context * ctx, const int32_t * ids, int32_t n_steps, int32_t n_layer, int32_t k) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (!ids) {
        m->replay.clear();
        m->predictor->set_replay(false);
        return MOBILE_OK;
    }
    if (n_steps <= 0 || n_layer != m->n_layer || k != m->n_expert_used) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "a replay needs [n_steps][" + std::to_string(m->n_layer) + "][" +
            std::to_string(m->n_expert_used) + "] ids for this model");
    }
    const size_t n = (size_t) n_steps*n_layer*k;
    const int32_t n_expert = m->store->n_expert_max/m->store->n_segments;
    for (size_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= n_expert) {
            return mobile_fail(MOBILE_ERR_ARGUMENT, "expert " + std::to_string(ids[i]) + " in the replay: this model has " +
                std::to_string(n_expert));
        }
    }
    m->replay.assign(ids, ids + n);
    m->predictor->set_replay(true);
    m->replay_steps = n_steps;
    m->replay_k     = k;
    return MOBILE_OK;
}
