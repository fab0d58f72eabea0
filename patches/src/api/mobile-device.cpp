// mobile-device.cpp - the device tier's part of the C API: checks arguments, starts and stops mobile_slots.

#include "api/mobile-context-of.h"

#include "ggml/ggml-idle.h"
#include "mobile-error.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <exception>

static const char * NO_DEVICE = "no device holds layers with routed experts on the host, of a type that it can compute with: load with on_host = 1 and layers on a device";

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
static std::unique_ptr<mobile_slots> make_slots(const struct llama_context & ctx, mobile_context & m, const mobile_device_params & params) {
    const llama_model & model = ctx.get_model();
    auto slots = std::make_unique<mobile_slots>(params, *m.store, m.slot_map, m.n_expert_used*m.store->n_segments);
    for (const mobile_route & route : m.routes) {
        const mobile_store_layer layer = m.store->layer_of(route.il);
        if (layer.is_none() || !route.once || !mobile_experts_on_host(route.host) || route.host.down->ne[2] != m.store->layers[layer].n_parts) {
            continue;
        }
        ggml_backend_dev_t dev = model.dev_layer(route.il.n);
        if (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            continue;
        }
        if (!mobile_experts_on_kernels(route.host, dev, 2*slots->n_used, slots->n_used, m.graph.down_params)) {
            continue; // as stock llama.cpp leaves weights on the host that the device cannot compute with
        }
        if (ggml_backend_t backend = backend_of(ctx, dev)) {
            slots->add_layer(route.il, route.host, dev, backend);
        }
    }
    return slots;
}

static mobile_slots & slots_of(const mobile_context & m) {
    if (!m.slots) {
        mobile_throw(MOBILE_ERR_STATE, "the context has no device tier");
    }
    return *m.slots;
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

static void check_miss(int32_t miss) {
    mobile_require(miss >= MOBILE_MISS_AUTO && miss <= MOBILE_MISS_CPU, "unknown miss policy");
}

static void check_placement(int32_t placement) {
    mobile_require(placement >= MOBILE_PLACEMENT_HOST && placement <= MOBILE_PLACEMENT_LAYERS, "unknown placement");
}

static void check(const struct mobile_device_params & params) {
    check_miss(params.miss);
    check_placement(params.placement);
    mobile_require(params.eviction >= MOBILE_EVICTION_LRU && params.eviction <= MOBILE_EVICTION_DECAY, "unknown eviction policy");
    mobile_require(params.n_batch_max >= 1 && params.n_batch_max <= 128, "n_batch_max must be 1 to 128");
    mobile_require(params.n_uploads >= 0 && params.n_uploads <= 64, "n_uploads must be 0 to 64");
    mobile_require(params.poison >= 0 && params.poison <= 2 && params.reserved[0] == 0 && params.reserved[1] == 0, "poison must be 0 to 2, reserved 0");
}

static enum mobile_status start(struct llama_context & ctx, mobile_context & m, const mobile_device_params & params) {
    ctx.synchronize();

    std::unique_ptr<mobile_slots> slots = make_slots(ctx, m, params);
    if (slots->n_layers() == 0) {
        return mobile_fail(MOBILE_ERR_STATE, NO_DEVICE);
    }
    std::string err;
    int32_t status = MOBILE_ERR_MEMORY;
    try {
        status = slots->start(err);
    } catch (const mobile_error &) {
        throw;
    } catch (const std::exception & e) { // a driver's
        err = std::string("no device memory for expert slots: ") + e.what();
    }
    if (status != MOBILE_OK) {
        return mobile_fail((enum mobile_status) status, err);
    }
    m.slots = std::move(slots);
    ggml_idle_set(mobile_route_is_idle);
    m.graph.invalidate();
    try {
        ctx.mobile_reserve(); // compute buffers for graphs with hot chains, now and not in the middle of an answer
    } catch (const std::exception & e) {
        err = std::string("no device memory for the graph beside the expert slots: ") + e.what();
        m.slots.reset();
        try {
            ctx.mobile_reserve();
        } catch (const std::exception & e2) {
            err += std::string("; the context is lost: ") + e2.what();
        }
        return mobile_fail(MOBILE_ERR_MEMORY, err);
    }
    return MOBILE_OK;
}

int32_t mobile_device_start(struct llama_context * ctx, const struct mobile_device_params * params) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(params, "a device tier needs parameters");
        check(*params);
        if (m.slots) {
            return mobile_fail(MOBILE_ERR_STATE, "the context has a device tier already");
        }
        return start(*ctx, m, *params);
    });
}

int32_t mobile_device_stop(struct llama_context * ctx) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        if (!m.slots) {
            return MOBILE_OK;
        }
        ctx->synchronize();
        m.slots.reset();
        m.graph.is_stale = true;
        try {
            ctx->mobile_reserve();
        } catch (const std::exception & e) {
            return mobile_fail(MOBILE_ERR_MEMORY, e.what());
        }
        return MOBILE_OK;
    });
}

int32_t mobile_device_set_placement(struct llama_context * ctx, int32_t placement) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        check_placement(placement);
        mobile_slots & slots = slots_of(m);
        if (placement != slots.placement()) {
            ctx->synchronize();
            slots.set_placement((enum mobile_placement) placement);
            m.graph.invalidate();
        }
        return MOBILE_OK;
    });
}

int32_t mobile_device_set_miss(struct llama_context * ctx, int32_t miss) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        check_miss(miss);
        slots_of(m).set_miss((enum mobile_miss) miss);
        return MOBILE_OK;
    });
}

int32_t mobile_device_count(const struct llama_context * ctx) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        return (int32_t) (m.slots ? m.slots->all_devices().size() : make_slots(*ctx, m, {})->all_devices().size());
    });
}

int32_t mobile_device_get_info(const struct llama_context * ctx, int32_t i, struct mobile_device_info * info) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        const std::unique_ptr<mobile_slots> made = m.slots ? nullptr : make_slots(*ctx, m, {});
        const mobile_slots & slots = m.slots ? *m.slots : *made;
        mobile_require(i >= 0 && (size_t) i < slots.all_devices().size(), "there is no such device");
        const mobile_device & d = slots.all_devices()[i];
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
        info->n_slots      = slots.n_slots_of(i);
        info->is_gpu       = props.type == GGML_BACKEND_DEVICE_TYPE_GPU || props.type == GGML_BACKEND_DEVICE_TYPE_IGPU;
        info->is_async     = props.caps.async;
        info->upload_us    = d.upload_us;
        info->stall_us     = d.stall_us;
        return MOBILE_OK;
    });
}

int32_t mobile_device_get_counters(const struct llama_context * ctx, struct mobile_device_counters * counters) {
    return mobile_guard([&] {
        const mobile_context & m = mobile_context_of(ctx);
        *counters = m.slots ? m.slots->counters() : mobile_device_counters {};
        return MOBILE_OK;
    });
}

int32_t mobile_device_get_residency(const struct llama_context * ctx, uint8_t * state, size_t n_state) {
    return mobile_guard([&] {
        const mobile_context & m = mobile_context_of(ctx);
        mobile_require(n_state == m.slot_map.size(), "state must have n_layer * n_expert entries");
        m.slot_map.read(state);
        return MOBILE_OK;
    });
}
