// mobile-slots-pool.cpp - taking the memory of the device tier, and what lies there in which placement.

#include "device/mobile-slots.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <numeric>

mobile_slots::mobile_slots(const mobile_device_params & params, mobile_store & store, mobile_slot_map & map, int32_t n_used) :
    n_used(n_used), params(params), store(store), map(map) {
}

mobile_slots::~mobile_slots() {
    map.clear();
    for (auto & d : devices) {
        d.uploader.reset(); // before the pools it writes to
    }
}

void mobile_slots::add_layer(mobile_model_layer il, const mobile_experts & host, ggml_backend_dev_t dev, ggml_backend_t backend) {
    mobile_device_layer l;
    l.il       = il;
    l.in_store = store.layer_of(il);
    l.host     = host;
    l.n_expert = (int32_t) host.down->ne[2];
    l.experts.resize(l.n_expert);
    l.evictable = decltype(l.evictable)(mobile_goes_first<mobile_part>{ store.n_segments });

    auto device = std::find_if(devices.begin(), devices.end(), [&](const mobile_device & d) { return d.dev == dev; });
    if (device == devices.end()) {
        device = devices.insert(devices.end(), mobile_device());
        device->dev     = dev;
        device->backend = backend;
        ggml_backend_dev_props props;
        ggml_backend_dev_get_props(dev, &props);
        device->is_async = props.caps.async;
    }
    l.device = (int32_t) (device - devices.begin());
    device->n_layers++;
    device->expert_bytes += l.n_expert*mobile_bytes_per_expert(host);

    for (const auto & other : layers) {
        if (other.device == l.device && mobile_same_shape(other.host, host)) {
            l.pool = other.pool;
            break;
        }
    }
    if (l.pool < 0) {
        l.pool = (int32_t) pools.size();
        pools.emplace_back();
        pools.back().device     = l.device;
        pools.back().slot_bytes = mobile_bytes_per_expert(host);
        pools.back().n_zero     = n_used;
        const size_t alignment = ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(dev));
        for (mobile_member m : MOBILE_MEMBERS) {
            if (host.*m) {
                pools.back().step = (int32_t) std::lcm<size_t, size_t>(pools.back().step, alignment/std::gcd(alignment, (host.*m)->nb[mobile_expert_dim(m)]));
            }
        }
    }
    pools[l.pool].n_layers++;
    pools[l.pool].n_expert += l.n_expert;

    if (!index_of.has(il)) {
        index_of.resize(il.n + 1);
    }
    index_of[il] = layers.next();
    layers.push_back(std::move(l));
}

static int32_t round_up(int32_t n, int32_t step) {
    return (n + step - 1)/step*step;
}

const mobile_experts & mobile_slots::like(size_t pool) const {
    return std::find_if(layers.begin(), layers.end(), [&](const mobile_device_layer & l) { return l.pool == (int32_t) pool; })->host;
}

int32_t mobile_slots::n_for_all(size_t pool) const {
    const mobile_pool & p = pools[pool];
    int32_t n = round_up(p.n_zero, p.step);
    for (const auto & l : layers) {
        n += l.pool == (int32_t) pool ? round_up(l.n_expert, p.step) : 0;
    }
    return n;
}

// the second half of its layers gets a pool of their own. false: it is one layer's
bool mobile_slots::split_pool(size_t pool) {
    if (pools[pool].n_layers < 2) {
        return false;
    }
    mobile_pool half;
    half.device     = pools[pool].device;
    half.slot_bytes = pools[pool].slot_bytes;
    half.n_zero     = pools[pool].n_zero;
    half.step       = pools[pool].step;
    for (auto l = layers.rbegin(); l != layers.rend() && half.n_layers < pools[pool].n_layers; ++l) {
        if (l->pool == (int32_t) pool) {
            l->pool = (int32_t) pools.size();
            half.n_layers++;
            half.n_expert += l->n_expert;
            pools[pool].n_layers--;
            pools[pool].n_expert -= l->n_expert;
        }
    }
    pools.push_back(std::move(half));
    return true;
}

// the most slots, at most n, that the device's kernels reach in one tensor
int32_t mobile_slots::n_in_reach(size_t pool, int32_t n) const {
    const auto reaches = [&](int32_t n_slots) {
        return mobile_experts_on_kernels(like(pool), devices[pools[pool].device].dev, n_slots, n_used, nullptr);
    };
    if (n < 1 || reaches(n)) {
        return n;
    }
    int32_t within = 0;
    while (n - within > 1) {
        const int32_t middle = within + (n - within)/2;
        (reaches(middle) ? within : n) = middle;
    }
    return within;
}

int32_t mobile_slots::start(std::string & err) {
    // by expert bytes, to devices and to the shapes on them
    double all = 0.0;
    for (const auto & d : devices) {
        all += (double) d.expert_bytes;
    }
    double smallest = 0.0;
    for (size_t i = 0; i < pools.size(); ++i) {
        int32_t n, n_reached;
        do { // what does not fit in one tensor is divided among several, by layers
            const double bought = (double) params.budget_bytes*(double) pools[i].n_expert/all + 1e-6;
            // all experts have room in a budget of their bytes: the zero slots come on top
            n         = bought >= (double) pools[i].n_expert ? n_for_all(i) : (int32_t) bought;
            n_reached = n_in_reach(i, n);
        } while (n > n_reached && split_pool(i));
        pools[i].n_slots = n_reached;
        if (n_reached < 2*pools[i].n_zero) {
            smallest = std::max(smallest, std::ceil(2.0*pools[i].n_zero*all/(double) pools[i].n_expert));
        }
    }
    if (smallest > 0) {
        err = "a device budget of " + std::to_string(params.budget_bytes) + " bytes is below the smallest that can work, " + std::to_string((uint64_t) smallest) +
            " bytes: the experts of one token in one layer, and as many slots that stay empty, for each expert shape on each device";
        return MOBILE_ERR_BUDGET;
    }
    for (auto & p : pools) {
        const auto l = std::find_if(layers.begin(), layers.end(), [&](const mobile_device_layer & x) { return x.pool == &p - pools.data(); });
        if (!alloc_pool(p, l->host, err)) {
            return MOBILE_ERR_MEMORY;
        }
    }
    for (auto & p : pools) {
        devices[p.device].slot_bytes = std::max(devices[p.device].slot_bytes, p.slot_bytes);
    }
    for (auto & d : devices) {
        d.uploader = std::make_unique<mobile_uploader>();
        if (!d.uploader->start(d.dev, params.n_uploads, d.slot_bytes, params.poison > 1)) {
            d.uploader.reset();
        }
    }
    for (auto & p : pools) {
        measure_link(p);
    }
    const auto placement = (enum mobile_placement) params.placement;
    params.placement = MOBILE_PLACEMENT_HOST;
    set_placement(placement);
    return MOBILE_OK;
}

bool mobile_slots::alloc_pool(mobile_pool & p, const mobile_experts & like, std::string & err) {
    mobile_device & d = devices[p.device];

    ggml_init_params init = {};
    // a tensor per member, and a view of each for whole layers
    init.mem_size = ggml_tensor_overhead()*MOBILE_MEMBERS.size()*(1 + p.n_layers);
    init.no_alloc = true;
    p.ctx.reset(ggml_init(init));
    for (mobile_member m : MOBILE_MEMBERS) {
        if (!(like.*m)) {
            continue;
        }
        int64_t ne[GGML_MAX_DIMS] = { 1, 1, 1, 1 };
        std::copy((like.*m)->ne, (like.*m)->ne + GGML_MAX_DIMS, ne);
        ne[mobile_expert_dim(m)] = p.n_slots;
        p.slots.*m = ggml_new_tensor(p.ctx.get(), (like.*m)->type, mobile_expert_dim(m) + 1, ne);
        ggml_format_name(p.slots.*m, "slots.%s", (like.*m)->name);
    }
    p.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(p.ctx.get(), ggml_backend_dev_buffer_type(d.dev)));
    if (!p.buffer) {
        err = std::string(ggml_backend_dev_name(d.dev)) + ": no memory for " + std::to_string(p.n_slots*p.slot_bytes) + " bytes of expert slots";
        return false;
    }
    ggml_backend_buffer_set_usage(p.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(p.buffer.get(), 0);
    d.pool_bytes += ggml_backend_buffer_get_size(p.buffer.get());

    // where whole layers lie in placement LAYERS: the last ones, as with stock llama.cpp's --n-cpu-moe
    int32_t slot = round_up(p.n_zero, p.step);
    for (auto l = layers.rbegin(); l != layers.rend(); ++l) {
        if (&pools[l->pool] != &p || slot + l->n_expert > p.n_slots) {
            continue;
        }
        for (mobile_member m : MOBILE_MEMBERS) {
            if (ggml_tensor * t = p.slots.*m) {
                const int dim = mobile_expert_dim(m);
                int64_t ne[3] = { t->ne[0], t->ne[1], t->ne[2] };
                ne[dim] = l->n_expert;
                l->whole.*m = ggml_view_3d(p.ctx.get(), t, ne[0], ne[1], ne[2], t->nb[1], t->nb[2], slot*t->nb[dim]);
                ggml_format_name(l->whole.*m, "%s", (l->host.*m)->name);
                ggml_backend_view_init(l->whole.*m);
            }
        }
        l->whole_slot = slot;
        slot = round_up(slot + l->n_expert, p.step);
    }
    return true;
}

//
// placement
//

const mobile_device_layer * mobile_slots::find(mobile_model_layer il) const {
    const mobile_slots_layer layer = layer_of(il);
    return layer.is_none() ? nullptr : &layers[layer];
}

const mobile_experts * mobile_slots::host_layer(mobile_model_layer il) const {
    const mobile_device_layer * l = find(il);
    return l ? &l->host : nullptr;
}

bool mobile_slots::is_cached(mobile_model_layer il, int64_t n_tokens) const {
    return params.placement == MOBILE_PLACEMENT_CACHE && n_tokens <= params.n_batch_max && find(il);
}

const mobile_experts * mobile_slots::whole_layer(mobile_model_layer il) const {
    const mobile_device_layer * l = find(il);
    return params.placement == MOBILE_PLACEMENT_LAYERS && l && l->filled ? &l->whole : nullptr;
}

const mobile_experts * mobile_slots::slots_of(mobile_model_layer il) const {
    const mobile_device_layer * l = find(il);
    return l ? &pools[l->pool].slots : nullptr;
}

bool mobile_slots::is_there(mobile_model_layer il, mobile_part part) const {
    const mobile_device_layer * l = find(il);
    return whole_layer(il) || (l && is_cached(il, 1) && l->experts[part].is_there());
}

int32_t mobile_slots::n_slots_of(int32_t device) const {
    int32_t n = 0;
    for (const mobile_pool & p : pools) {
        n += p.device == device ? std::max(0, p.n_slots - p.n_zero) : 0;
    }
    return n;
}

void mobile_slots::empty() {
    for (auto & d : devices) {
        if (d.uploader) {
            d.uploader->drain();
        }
    }
    collect();
    if (!current.is_none()) {
        unpin_all();
    }
    end_hints();
    for (auto & l : layers) {
        for (mobile_part part(0); l.experts.has(part); ++part) {
            waste_ahead(l, l.experts[part]);
            move(l, part, MOBILE_SLOT_NONE);
            l.experts[part].slot = -1;
        }
        l.filled = false;
    }
    for (auto & p : pools) {
        p.free.clear();
        for (int32_t s = p.n_slots - 1; s >= p.n_zero; --s) {
            p.free.push_back(s);
        }
        if (params.poison) {
            poison(p, p.n_zero, p.n_slots - p.n_zero);
        }
    }
    count.resident_bytes = 0;
}

void mobile_slots::set_placement(enum mobile_placement placement) {
    params.placement = placement;
    if (placement == MOBILE_PLACEMENT_HOST || placement == contents) {
        return; // what is in the slots stays good
    }
    contents = placement;
    empty();
    if (placement == MOBILE_PLACEMENT_LAYERS) {
        fill_layers();
    }
}

// all experts of the layers that fit, from the file where they are not in memory
void mobile_slots::fill_layers() {
    for (mobile_device_layer & l : layers) {
        if (l.whole_slot < 0) {
            continue;
        }
        store.begin_pass();
        store.request(l.in_store, store.all_needs(l.in_store, false)); // what decoding uses stays
        l.filled = true;
        for (mobile_part part(0); l.experts.has(part) && l.filled; ++part) {
            l.filled = upload(l, part, l.slot_in_whole(part), true);
        }
        ggml_backend_synchronize(devices[l.device].backend);
        store.end_pass();
        for (mobile_part part(0); l.experts.has(part) && l.filled; ++part) {
            l.experts[part].slot = l.slot_in_whole(part);
            move(l, part, MOBILE_SLOT_WHOLE);
            count.resident_bytes += pools[l.pool].slot_bytes;
        }
    }
    count.resident_bytes_peak = std::max(count.resident_bytes_peak, count.resident_bytes);
}
