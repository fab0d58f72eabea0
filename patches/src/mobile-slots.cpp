#include "mobile-slots.h"

#include "ggml-expert.h"

#include "ggml.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

// an expert that the CPU computed has earned a slot that something else would have to leave if this is not its
// first use within so many tokens, and if its key is larger than the victim's by a margin: one token's worth
static constexpr double ADMIT_WINDOW = 64.0;

static constexpr uint8_t POISON = 0xff; // NaN as F16, BF16 and F32, and as the scales of quantised blocks

using member = ggml_tensor * mobile_experts::*;

static constexpr std::array<member, 11> MEMBERS = {
    &mobile_experts::gate_up,   &mobile_experts::up,   &mobile_experts::gate,   &mobile_experts::down,
    &mobile_experts::gate_up_b, &mobile_experts::up_b, &mobile_experts::gate_b, &mobile_experts::down_b,
    &mobile_experts::up_s,      &mobile_experts::gate_s, &mobile_experts::down_s,
};

static bool is_weight(member m) {
    return m == &mobile_experts::gate_up || m == &mobile_experts::up || m == &mobile_experts::gate || m == &mobile_experts::down;
}

// the dimension that counts experts: weights [.., .., n], biases [.., n], scales [n]
static int expert_dim(member m) {
    const bool is_scale = m == &mobile_experts::up_s || m == &mobile_experts::gate_s || m == &mobile_experts::down_s;
    return is_weight(m) ? 2 : is_scale ? 0 : 1;
}

static uint64_t bytes_per_expert(const mobile_experts & experts) {
    uint64_t bytes = 0;
    for (member m : MEMBERS) {
        bytes += experts.*m ? (experts.*m)->nb[expert_dim(m)] : 0;
    }
    return bytes;
}

static bool same_shape(const mobile_experts & a, const mobile_experts & b) {
    for (member m : MEMBERS) {
        const ggml_tensor * x = a.*m;
        const ggml_tensor * y = b.*m;
        if (!x != !y) {
            return false;
        }
        for (int d = 0; x && d < expert_dim(m); ++d) {
            if (x->ne[d] != y->ne[d]) {
                return false;
            }
        }
        if (x && x->type != y->type) {
            return false;
        }
    }
    return true;
}

bool mobile_experts_on_host(const mobile_experts & experts) {
    if (!experts.down || !(experts.up || experts.gate_up)) {
        return false;
    }
    const int64_t n_expert = experts.down->ne[2];
    for (member m : MEMBERS) {
        const ggml_tensor * t = experts.*m;
        if (!t) {
            continue;
        }
        const int d = expert_dim(m);
        if (t->op != GGML_OP_NONE || !t->buffer || !ggml_backend_buffer_is_host(t->buffer) || t->ne[d] != n_expert || !ggml_is_contiguous(t) ||
            (int64_t) t->nb[d]*n_expert != (int64_t) ggml_nbytes(t)) {
            return false;
        }
    }
    return true;
}

mobile_slots::mobile_slots(const mobile_device_params & params, mobile_store & store, int32_t n_used) : params(params), store(store), n_used(n_used) {
}

void mobile_slots::add_layer(int32_t il, const mobile_experts & host, ggml_backend_dev_t dev, ggml_backend_t backend) {
    mobile_device_layer l;
    l.il       = il;
    l.host     = host;
    l.n_expert = (int32_t) host.down->ne[2];
    l.experts.resize(l.n_expert);

    auto device = std::find_if(devices.begin(), devices.end(), [&](const mobile_device & d) { return d.dev == dev; });
    if (device == devices.end()) {
        device = devices.insert(devices.end(), mobile_device());
        device->dev     = dev;
        device->backend = backend;
    }
    l.device = (int32_t) (device - devices.begin());
    device->n_layers++;
    device->expert_bytes += l.n_expert*bytes_per_expert(host);

    for (const auto & other : layers) {
        if (other.device == l.device && same_shape(other.host, host)) {
            l.pool = other.pool;
            break;
        }
    }
    if (l.pool < 0) {
        l.pool = (int32_t) pools.size();
        pools.emplace_back();
        pools.back().device     = l.device;
        pools.back().slot_bytes = bytes_per_expert(host);
        pools.back().n_zero     = n_used;
    }
    pools[l.pool].n_layers++;
    pools[l.pool].n_expert += l.n_expert;

    if ((int32_t) layer_of_il.size() <= il) {
        layer_of_il.resize(il + 1, -1);
    }
    layer_of_il[il] = (int32_t) layers.size();
    layers.push_back(std::move(l));
}

int32_t mobile_slots::start(std::string & err) {
    // by expert bytes, to devices and to the shapes on them
    double all = 0.0;
    for (const auto & d : devices) {
        all += (double) d.expert_bytes;
    }
    uint64_t smallest = 0;
    for (auto & p : pools) {
        const double share = (double) (p.n_expert*p.slot_bytes)/all;
        const uint64_t n   = (uint64_t) ((double) params.budget_bytes*share/(double) p.slot_bytes + 1e-6);
        // all experts have room in a budget of their bytes: the zero slots come on top
        p.n_slots = (int32_t) (n >= (uint64_t) p.n_expert ? p.n_expert + p.n_zero : n);
        const double need = (double) ((uint64_t) 2*p.n_zero*p.slot_bytes)/share;
        if (p.n_slots < 2*p.n_zero) {
            smallest = std::max(smallest, (uint64_t) std::ceil(need));
        }
    }
    if (smallest > 0) {
        err = "a device budget of " + std::to_string(params.budget_bytes) + " bytes is below the smallest that can work, " + std::to_string(smallest) +
            " bytes: the experts of one token in one layer, and as many slots that stay empty, for each expert shape on each device";
        return MOBILE_ERR_BUDGET;
    }
    for (auto & p : pools) {
        const auto l = std::find_if(layers.begin(), layers.end(), [&](const mobile_device_layer & x) { return x.pool == &p - pools.data(); });
        if (!alloc_pool(p, l->host, err)) {
            return MOBILE_ERR_MEMORY;
        }
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
    init.mem_size = ggml_tensor_overhead()*MEMBERS.size()*(1 + p.n_layers);
    init.no_alloc = true;
    p.ctx.reset(ggml_init(init));
    for (member m : MEMBERS) {
        if (!(like.*m)) {
            continue;
        }
        int64_t ne[GGML_MAX_DIMS] = { 1, 1, 1, 1 };
        std::copy((like.*m)->ne, (like.*m)->ne + GGML_MAX_DIMS, ne);
        ne[expert_dim(m)] = p.n_slots;
        p.slots.*m = ggml_new_tensor(p.ctx.get(), (like.*m)->type, expert_dim(m) + 1, ne);
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
    int32_t slot = p.n_zero;
    for (auto l = layers.rbegin(); l != layers.rend(); ++l) {
        if (&pools[l->pool] != &p || slot + l->n_expert > p.n_slots) {
            continue;
        }
        for (member m : MEMBERS) {
            if (ggml_tensor * t = p.slots.*m) {
                const int dim = expert_dim(m);
                int64_t ne[3] = { t->ne[0], t->ne[1], t->ne[2] };
                ne[dim] = l->n_expert;
                l->whole.*m = ggml_view_3d(p.ctx.get(), t, ne[0], ne[1], ne[2], t->nb[1], t->nb[2], slot*t->nb[dim]);
                ggml_format_name(l->whole.*m, "%s", (l->host.*m)->name);
                ggml_backend_view_init(l->whole.*m);
            }
        }
        l->whole_slot = slot;
        slot += l->n_expert;
    }
    return true;
}

//
// placement
//

const mobile_device_layer * mobile_slots::layer_of(int32_t il) const {
    return il >= 0 && il < (int32_t) layer_of_il.size() && layer_of_il[il] >= 0 ? &layers[layer_of_il[il]] : nullptr;
}

bool mobile_slots::is_cached(int32_t il, int64_t n_tokens) const {
    return params.placement == MOBILE_PLACEMENT_CACHE && n_tokens <= params.n_batch_max && layer_of(il);
}

const mobile_experts * mobile_slots::whole_layer(int32_t il) const {
    const mobile_device_layer * l = layer_of(il);
    return params.placement == MOBILE_PLACEMENT_LAYERS && l && l->filled ? &l->whole : nullptr;
}

const mobile_experts * mobile_slots::slots_of(int32_t il) const {
    const mobile_device_layer * l = layer_of(il);
    return l ? &pools[l->pool].slots : nullptr;
}

void mobile_slots::empty() {
    unpin_all();
    for (auto & l : layers) {
        for (int32_t e = 0; e < l.n_expert; ++e) {
            l.experts[e].slot   = -1;
            l.experts[e].listed = false;
            l.experts[e].fresh  = false;
        }
        l.evictable.clear();
        l.filled = false;
    }
    for (auto & p : pools) {
        p.free.clear();
        for (int32_t s = p.n_slots - 1; s >= p.n_zero; --s) {
            p.free.push_back(s);
        }
    }
    count.resident_bytes = 0;
}

void mobile_slots::set_placement(enum mobile_placement placement) {
    const auto held = (enum mobile_placement) params.placement;
    params.placement = placement;
    if (placement == MOBILE_PLACEMENT_HOST || placement == held) {
        return; // what is in the slots stays good
    }
    empty();
    if (placement == MOBILE_PLACEMENT_LAYERS) {
        fill_layers();
    }
}

// all experts of the layers that fit, from the file where they are not in memory
void mobile_slots::fill_layers() {
    std::vector<mobile_need> needs;
    for (size_t i = 0; i < layers.size(); ++i) {
        mobile_device_layer & l = layers[i];
        if (l.whole_slot < 0) {
            continue;
        }
        needs.assign(l.n_expert, {});
        for (int32_t e = 0; e < l.n_expert; ++e) {
            needs[e].expert  = e;
            needs[e].lasting = false; // what decoding uses stays
        }
        store.begin_pass();
        store.request(store.layer_of_il[l.il], needs);
        l.filled = true;
        for (int32_t e = 0; e < l.n_expert && l.filled; ++e) {
            l.filled = upload(l, e, l.whole_slot + e, true);
        }
        ggml_backend_synchronize(devices[l.device].backend);
        store.end_pass();
        for (int32_t e = 0; e < l.n_expert && l.filled; ++e) {
            l.experts[e].slot = l.whole_slot + e;
            count.resident_bytes += pools[l.pool].slot_bytes;
        }
    }
    count.resident_bytes_peak = std::max(count.resident_bytes_peak, count.resident_bytes);
}

//
// slots
//

void mobile_slots::list(mobile_device_layer & l, int32_t expert) {
    mobile_device_expert & x = l.experts[expert];
    if (!x.listed && x.slot >= 0) {
        l.evictable.emplace(x.key, expert);
        x.listed = true;
    }
}

void mobile_slots::unpin_all() {
    for (int32_t expert : pinned) {
        list(layers[current], expert);
    }
    pinned.clear();
    fetches.clear();
}

void mobile_slots::release(mobile_device_layer & l, int32_t expert) {
    mobile_device_expert & x = l.experts[expert];
    if (x.listed) {
        l.evictable.erase({ x.key, expert });
        x.listed = false;
    }
    pools[l.pool].free.push_back(x.slot);
    x.slot = -1;
    count.resident_bytes -= pools[l.pool].slot_bytes;
}

void mobile_slots::evict(int32_t layer, int32_t expert) {
    mobile_device_layer  & l = layers[layer];
    mobile_device_expert & x = l.experts[expert];
    const mobile_pool    & p = pools[l.pool];

    count.n_evictions++;
    if (x.fresh) {
        count.n_wasted++;
        count.bytes_wasted += p.slot_bytes;
    }
    if (params.poison) {
        for (member m : MEMBERS) {
            if (p.slots.*m) {
                const size_t size = (p.slots.*m)->nb[expert_dim(m)];
                const std::vector<uint8_t> garbage(size, POISON);
                ggml_backend_tensor_set_async(devices[p.device].backend, p.slots.*m, garbage.data(), x.slot*size, size);
            }
        }
        ggml_backend_synchronize(devices[p.device].backend);
    }
    release(l, expert);
}

// a slot for an expert of `layer` whose key is `key`. gated: only if the key is larger than the victim's by a
// margin. false: there is none
bool mobile_slots::take_slot(int32_t layer, double key, bool gated, int32_t & slot) {
    mobile_device_layer & l = layers[layer];
    mobile_pool         & p = pools[l.pool];
    const auto eviction = (enum mobile_eviction) params.eviction;

    if (p.free.empty()) {
        int32_t victim = -1;
        double  least  = INFINITY;
        for (size_t i = 0; i < layers.size(); ++i) {
            if (layers[i].pool == l.pool && !layers[i].evictable.empty()) {
                const double k = layers[i].evictable.begin()->first + ((int32_t) i > layer ? mobile_policy_unvisited(eviction) : 0.0);
                if (k < least) {
                    least  = k;
                    victim = (int32_t) i;
                }
            }
        }
        if (victim < 0 || (gated && key <= least + mobile_policy_step(eviction))) {
            return false;
        }
        evict(victim, layers[victim].evictable.begin()->second);
    }
    slot = p.free.back();
    p.free.pop_back();
    count.resident_bytes += p.slot_bytes;
    count.resident_bytes_peak = std::max(count.resident_bytes_peak, count.resident_bytes);
    return true;
}

// queues the copies on the computing stream. false: some bytes are not in host memory, or not what the file says
bool mobile_slots::upload(mobile_device_layer & l, int32_t expert, int32_t slot, bool wait) {
    const mobile_pool & p = pools[l.pool];

    const char * data[MEMBERS.size()] = {};
    for (size_t i = 0; i < MEMBERS.size(); ++i) {
        const member m = MEMBERS[i];
        if (const ggml_tensor * t = l.host.*m) {
            data[i] = is_weight(m) ? ggml_expert_data(t, expert, wait) : (const char *) t->data + expert*t->nb[expert_dim(m)];
            if (!data[i]) {
                return false;
            }
        }
    }
    if (!store.plain && !store.error().empty()) {
        return false;
    }
    for (size_t i = 0; i < MEMBERS.size(); ++i) {
        if (ggml_tensor * t = p.slots.*MEMBERS[i]) {
            const size_t size = t->nb[expert_dim(MEMBERS[i])];
            ggml_backend_tensor_set_async(devices[p.device].backend, t, data[i], slot*size, size);
        }
    }
    count.bytes_uploaded += p.slot_bytes;
    return true;
}

//
// passes
//

void mobile_slots::assign(int32_t il, const std::vector<mobile_need> & needs, std::vector<int32_t> & slot, std::vector<mobile_need> & missing) {
    const auto eviction = (enum mobile_eviction) params.eviction;

    unpin_all();
    on_cpu.clear();
    current = layer_of_il[il];
    mobile_device_layer & l = layers[current];

    slot.assign(l.n_expert, -1);
    missing.clear();
    for (const mobile_need & need : needs) {
        mobile_device_expert & x = l.experts[need.expert];
        if (x.listed) {
            l.evictable.erase({ x.key, need.expert });
            x.listed = false;
        }
        const double before = x.last_use;
        x.n_uses  += need.n_tokens;
        x.last_use = need.time;
        x.key      = mobile_policy_key(eviction, x.n_uses, x.last_use);
        if (x.slot >= 0) {
            count.n_hits++;
            x.fresh = false;
            slot[need.expert] = x.slot;
            pinned.push_back(need.expert);
        } else {
            count.n_misses++;
            missing.push_back(need);
            on_cpu.emplace_back(before, need.expert);
        }
    }
    if (params.miss != MOBILE_MISS_FETCH) {
        count.n_cpu += missing.size();
        return;
    }
    on_cpu.clear();
    for (const mobile_need & need : missing) {
        mobile_device_expert & x = l.experts[need.expert];
        int32_t s = -1;
        if (take_slot(current, x.key, false, s)) {
            x.slot = s;
            slot[need.expert] = s;
            pinned.push_back(need.expert);
            fetches.push_back(need.expert);
        } else {
            count.n_cpu++;
        }
    }
}

void mobile_slots::fetch(std::vector<int32_t> & slot) {
    if (fetches.empty()) {
        return;
    }
    mobile_device_layer & l = layers[current];
    const int64_t start = ggml_time_us();
    for (int32_t expert : fetches) {
        mobile_device_expert & x = l.experts[expert];
        if (upload(l, expert, x.slot, true)) {
            count.n_fetched++;
            continue;
        }
        // the pass has failed; nothing of it may stay
        slot[expert] = -1;
        release(l, expert);
        pinned.erase(std::find(pinned.begin(), pinned.end(), expert));
    }
    fetches.clear();
    count.upload_us += ggml_time_us() - start;
}

void mobile_slots::admit() {
    if (on_cpu.empty() || params.n_uploads <= 0) {
        return;
    }
    mobile_device_layer & l = layers[current];
    const int64_t start = ggml_time_us();
    int32_t n = 0;
    for (const auto & [before, expert] : on_cpu) {
        mobile_device_expert & x = l.experts[expert];
        const bool again = x.last_use - before <= ADMIT_WINDOW;
        int32_t slot = -1;
        if (x.slot >= 0 || n >= params.n_uploads || (pools[l.pool].free.empty() && !again) || !take_slot(current, x.key, true, slot)) {
            continue;
        }
        x.slot = slot;
        if (!upload(l, expert, slot, false)) {
            release(l, expert);
            continue;
        }
        x.fresh = true;
        list(l, expert);
        count.n_admitted++;
        count.bytes_uploaded_background += pools[l.pool].slot_bytes;
        n++;
    }
    on_cpu.clear();
    count.upload_us += ggml_time_us() - start;
}

void mobile_slots::end_pass() {
    if (current >= 0) {
        unpin_all();
    }
    on_cpu.clear();
}

void mobile_slots::reset_counters() {
    const uint64_t resident = count.resident_bytes;
    count = {};
    count.resident_bytes      = resident;
    count.resident_bytes_peak = resident;
}
