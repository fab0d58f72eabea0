// mobile-device.cpp - the device tier's part of the C API: checks arguments, starts and stops mobile_slots.

#include "mobile.h"

#include "mobile-error.h"
#include "route/mobile-route.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <exception>

static const char * NO_DEVICE = "no device holds layers with routed experts on the host, of a type that it can compute with: load with on_host = 1 and layers on a device";

static mobile_context * context_of(const struct llama_context * ctx) {
    mobile_context * m = ctx ? ctx->get_cparams().mobile.get() : nullptr;
    if (!m) {
        mobile_fail(MOBILE_ERR_STATE, "this model has no expert store: it has no routed experts, or was loaded without load parameters");
    }
    return m;
}

static ggml_backend_t backend_of(const struct llama_context & ctx, ggml_backend_dev_t dev) {
    ggml_backend_sched_t sched = ctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }
    return nullptr;
}

// with the layers whose experts are on the host and whose other weights are on a device
static std::unique_ptr<mobile_slots> make_slots(const struct llama_context & ctx, const mobile_context & m, const mobile_device_params & params) {
    const llama_model & model = ctx.get_model();
    auto slots = std::make_unique<mobile_slots>(params, *m.store, m.n_expert_used*m.store->n_segments);
    for (const mobile_route & route : m.routes) {
        const bool is_stored = route.il < (int32_t) m.store->layer_of_il.size() && m.store->layer_of_il[route.il] >= 0;
        if (!is_stored || !route.once || !mobile_experts_on_host(route.host) || route.host.down->ne[2] != m.store->layers[m.store->layer_of_il[route.il]].n_expert) {
            continue;
        }
        ggml_backend_dev_t dev = model.dev_layer(route.il);
        if (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            continue;
        }
        if (!mobile_experts_on_kernels(route.host, dev, 2*slots->n_used, slots->n_used, m.down_params)) {
            continue; // as stock llama.cpp leaves weights on the host that the device cannot compute with
        }
        if (ggml_backend_t backend = backend_of(ctx, dev)) {
            slots->add_layer(route.il, route.host, dev, backend);
        }
    }
    return slots;
}

struct mobile_device_params mobile_device_default_params(void) {
    struct mobile_device_params params = {};
    params.miss        = MOBILE_MISS_AUTO;
    params.placement   = MOBILE_PLACEMENT_CACHE;
    params.eviction    = MOBILE_EVICTION_DECAY;
    params.n_batch_max = 32;
    params.n_uploads   = 4;
    return params;
}

int32_t mobile_device_start(struct llama_context * ctx, const struct mobile_device_params * params) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (!params || params->miss < MOBILE_MISS_AUTO || params->miss > MOBILE_MISS_CPU) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown miss policy");
    }
    if (params->placement < MOBILE_PLACEMENT_HOST || params->placement > MOBILE_PLACEMENT_LAYERS) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown placement");
    }
    if (params->eviction < MOBILE_EVICTION_LRU || params->eviction > MOBILE_EVICTION_DECAY) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown eviction policy");
    }
    if (params->n_batch_max < 1 || params->n_batch_max > 128) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "n_batch_max must be 1 to 128");
    }
    if (params->n_uploads < 0 || params->n_uploads > 64) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "n_uploads must be 0 to 64");
    }
    if (params->poison < 0 || params->poison > 2 || params->reserved[0] != 0 || params->reserved[1] != 0) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "poison must be 0 to 2, reserved 0");
    }
    if (m->slots) {
        return mobile_fail(MOBILE_ERR_STATE, "the context has a device tier already");
    }
    ctx->synchronize();

    std::unique_ptr<mobile_slots> slots = make_slots(*ctx, *m, *params);
    if (slots->layers.empty()) {
        return mobile_fail(MOBILE_ERR_STATE, NO_DEVICE);
    }
    std::string err;
    int32_t status = MOBILE_ERR_MEMORY;
    try {
        status = slots->start(err);
    } catch (const std::exception & e) { // a driver's
        err = std::string("no device memory for expert slots: ") + e.what();
    }
    if (status != MOBILE_OK) {
        return mobile_fail((enum mobile_status) status, err);
    }
    m->slots      = std::move(slots);
    m->stale      = true;
    m->has_policy = false;
    try {
        ctx->mobile_reserve(); // compute buffers for graphs with hot chains, now and not in the middle of an answer
    } catch (const std::exception & e) {
        err = std::string("no device memory for the graph beside the expert slots: ") + e.what();
        m->slots.reset();
        try {
            ctx->mobile_reserve();
        } catch (const std::exception & e2) {
            err += std::string("; the context is lost: ") + e2.what();
        }
        return mobile_fail(MOBILE_ERR_MEMORY, err);
    }
    return MOBILE_OK;
}

int32_t mobile_device_stop(struct llama_context * ctx) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (m->slots) {
        ctx->synchronize();
        m->slots.reset();
        m->stale = true;
        try {
            ctx->mobile_reserve();
        } catch (const std::exception & e) {
            return mobile_fail(MOBILE_ERR_MEMORY, e.what());
        }
    }
    return MOBILE_OK;
}

int32_t mobile_device_set_placement(struct llama_context * ctx, int32_t placement) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (placement < MOBILE_PLACEMENT_HOST || placement > MOBILE_PLACEMENT_LAYERS) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown placement");
    }
    if (!m->slots) {
        return mobile_fail(MOBILE_ERR_STATE, "the context has no device tier");
    }
    if (placement != m->slots->params.placement) {
        ctx->synchronize();
        m->slots->set_placement((enum mobile_placement) placement);
        m->stale      = true;
        m->has_policy = false;
    }
    return MOBILE_OK;
}

int32_t mobile_device_set_miss(struct llama_context * ctx, int32_t miss) {
    mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    if (miss < MOBILE_MISS_AUTO || miss > MOBILE_MISS_CPU) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "unknown miss policy");
    }
    if (!m->slots) {
        return mobile_fail(MOBILE_ERR_STATE, "the context has no device tier");
    }
    m->slots->params.miss = miss;
    return MOBILE_OK;
}

int32_t mobile_device_count(const struct llama_context * ctx) {
    const mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    return (int32_t) (m->slots ? m->slots->devices.size() : make_slots(*ctx, *m, {})->devices.size());
}

int32_t mobile_device_get_info(const struct llama_context * ctx, int32_t i, struct mobile_device_info * info) {
    const mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    const std::unique_ptr<mobile_slots> made = m->slots ? nullptr : make_slots(*ctx, *m, {});
    const mobile_slots & slots = m->slots ? *m->slots : *made;
    if (i < 0 || (size_t) i >= slots.devices.size()) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "there is no such device");
    }
    const mobile_device & d = slots.devices[i];
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(d.dev, &props);

    *info = {};
    snprintf(info->name,        sizeof(info->name),        "%s", props.name        ? props.name        : "");
    snprintf(info->description, sizeof(info->description), "%s", props.description ? props.description : "");
    info->free_bytes   = props.memory_free;
    info->total_bytes  = props.memory_total;
    info->pool_bytes   = d.pool_bytes;
    info->expert_bytes = d.expert_bytes;
    info->n_layers     = d.n_layers;
    for (const mobile_pool & p : slots.pools) {
        info->n_slots += p.device == i ? std::max(0, p.n_slots - p.n_zero) : 0;
    }
    info->is_gpu   = props.type == GGML_BACKEND_DEVICE_TYPE_GPU || props.type == GGML_BACKEND_DEVICE_TYPE_IGPU;
    info->is_async = props.caps.async;
    info->upload_us = d.upload_us;
    info->stall_us  = d.stall_us;
    return MOBILE_OK;
}

int32_t mobile_device_get_counters(const struct llama_context * ctx, struct mobile_device_counters * counters) {
    const mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    *counters = m->slots ? m->slots->count : mobile_device_counters {};
    return MOBILE_OK;
}

int32_t mobile_device_get_residency(const struct llama_context * ctx, uint8_t * state, size_t n_state) {
    const mobile_context * m = context_of(ctx);
    if (!m) {
        return MOBILE_ERR_STATE;
    }
    const size_t n_layer    = m->n_layer;
    const size_t n_segments = m->store->n_segments;
    const size_t n_expert   = m->store->n_expert_max/n_segments;
    if (n_state != n_layer*n_expert) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "state must have n_layer * n_expert entries");
    }
    memset(state, MOBILE_NOT_RESIDENT, n_state);
    if (!m->slots) {
        return MOBILE_OK;
    }
    m->slots->collect();
    for (const mobile_device_layer & l : m->slots->layers) {
        for (size_t e = 0; (size_t) l.il < n_layer && e < l.n_expert/n_segments; ++e) {
            uint8_t least = MOBILE_RESIDENT; // an expert is as resident as its least resident segment
            for (size_t s = 0; s < n_segments; ++s) {
                const mobile_device_expert & x = l.experts[e*n_segments + s];
                least = std::min<uint8_t>(least, x.slot < 0 ? MOBILE_NOT_RESIDENT : x.loading ? MOBILE_LOADING : MOBILE_RESIDENT);
            }
            state[l.il*n_expert + e] = least;
        }
    }
    return MOBILE_OK;
}
