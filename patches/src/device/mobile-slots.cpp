#include "device/mobile-slots.h"

#include "ggml/ggml-expert.h"
#include "mobile-error.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>

// the past that says what is used next: uses lately are the uses to expect in as many tokens
static constexpr double WINDOW = 64.0;

// what the CPU takes for an expert: how many chains the least is taken of, how much a later one moves the average, and
// how many times the average one counts at most
static constexpr int64_t CHAINS_OF_THE_LEAST = 16;
static constexpr double  CPU_STEP            = 0.05;
static constexpr double  OUTLIER             = 4.0;

static constexpr uint8_t POISON = 0xff; // NaN as F16, BF16 and F32, and as the scales of quantised blocks

//
// slots
//

void mobile_slots::move(mobile_device_layer & l, mobile_part part, enum mobile_slot_state state) {
    mobile_device_expert & x = l.experts[part];
    if (x.state == state) {
        return;
    }
    if (x.state == MOBILE_SLOT_IDLE) {
        l.evictable.erase({ x.key, part });
    }
    l.n_held += (int32_t) (state != MOBILE_SLOT_NONE) - (int32_t) (x.state != MOBILE_SLOT_NONE);
    x.state = state;
    if (x.state == MOBILE_SLOT_IDLE) {
        l.evictable.emplace(x.key, part);
    }
    map.set(l.il, part, state == MOBILE_SLOT_NONE ? MOBILE_NOT_RESIDENT : x.is_sending() ? MOBILE_LOADING : MOBILE_RESIDENT);
}

void mobile_slots::set_key(mobile_device_layer & l, mobile_part part, double key) {
    const bool listed = l.evictable.erase({ l.experts[part].key, part }) > 0;
    l.experts[part].key = key;
    if (listed) {
        l.evictable.emplace(key, part);
    }
}

void mobile_slots::unpin_all() {
    for (mobile_part part : running) {
        const enum mobile_slot_state state = layers[current].experts[part].state;
        if (state == MOBILE_SLOT_IN_USE) {
            move(layers[current], part, MOBILE_SLOT_IDLE);
        } else if (state == MOBILE_SLOT_FETCHING) {
            release(layers[current], part); // something was thrown before its upload
        }
    }
    running.clear();
    to_admit = false;
}

void mobile_slots::release(mobile_device_layer & l, mobile_part part) {
    mobile_device_expert & x = l.experts[part];
    move(l, part, MOBILE_SLOT_NONE);
    pools[l.pool].free.push_back(x.slot);
    x.slot   = -1;
    x.reason = MOBILE_SLOT_USED;
    count.resident_bytes -= pools[l.pool].slot_bytes;
}

void mobile_slots::poison(const mobile_pool & p, int32_t slot, int32_t n) {
    for (mobile_member m : MOBILE_MEMBERS) {
        if (p.slots.*m) {
            const size_t size = (p.slots.*m)->nb[mobile_expert_dim(m)];
            const std::vector<uint8_t> garbage(n*size, POISON);
            ggml_backend_tensor_set_async(devices[p.device].backend, p.slots.*m, garbage.data(), slot*size, n*size);
            ggml_backend_synchronize(devices[p.device].backend); // before the garbage goes
        }
    }
}

void mobile_slots::evict(mobile_slots_layer layer, mobile_part part) {
    mobile_device_layer  & l = layers[layer];
    mobile_device_expert & x = l.experts[part];

    count.n_evictions++;
    if (x.reason != MOBILE_SLOT_USED) {
        count.n_wasted++;
        count.bytes_wasted += pools[l.pool].slot_bytes;
    }
    waste_ahead(l, x);
    if (params.poison) {
        poison(pools[l.pool], x.slot, 1);
    }
    release(l, part);
}

double mobile_device_expert::lately_at(double now) const {
    return lately*std::exp((last_use - now)/WINDOW);
}

// whether a slot for x saves more CPU time than its upload costs. what a slot saves is a use on the CPU for each use
// to expect, less those of the expert that would leave, and less one: reading an expert for its upload is
// as much work for the memory as computing it
bool mobile_slots::is_earned(const mobile_device_layer & l, const mobile_device_expert & x, const mobile_device_expert * victim) const {
    const double uses = x.lately - (victim ? victim->lately_at(x.last_use) + 1.0 : 0.0);
    return uses > 0.0 && (params.poison || uses*cpu_us_per_expert >= devices[l.device].stall_us);
}

// the layer whose first evictable expert has the smallest key, while the pass is at `layer`
mobile_slots_layer mobile_slots::find_victim(int32_t pool, mobile_slots_layer layer, double & key) const {
    const auto eviction = (enum mobile_eviction) params.eviction;

    mobile_slots_layer victim;
    key = INFINITY;
    for (mobile_slots_layer i(0); layers.has(i); ++i) {
        if (layers[i].pool == pool && !layers[i].evictable.empty()) {
            const double k = layers[i].evictable.begin()->first + split.lean(eviction, i, layers[i].n_held) + (i > layer ? mobile_policy_unvisited(eviction, store.tokens_of_pass()) : 0.0);
            if (k < key) {
                key    = k;
                victim = i;
            }
        }
    }
    return victim;
}

int32_t mobile_slots::take_free(mobile_pool & p) {
    const int32_t slot = p.free.back();
    p.free.pop_back();
    count.resident_bytes += p.slot_bytes;
    count.resident_bytes_peak = std::max(count.resident_bytes_peak, count.resident_bytes);
    return slot;
}

// a slot for an expert of `layer`. candidate: only if it has earned one. false: there is none
bool mobile_slots::take_slot(mobile_slots_layer layer, int32_t & slot, const mobile_device_expert * candidate) {
    mobile_device_layer & l = layers[layer];
    mobile_pool         & p = pools[l.pool];

    double key = 0.0;
    const mobile_slots_layer victim = p.free.empty() ? find_victim(l.pool, layer, key) : mobile_slots_layer();
    if (victim.is_none() && p.free.empty()) {
        return false;
    }
    const mobile_part leaves = victim.is_none() ? mobile_part() : layers[victim].evictable.begin()->second;
    if (candidate && !may_leave(l, *candidate, victim, leaves)) {
        return false;
    }
    if (!victim.is_none()) {
        evict(victim, leaves);
    }
    slot = take_free(p);
    return true;
}

// false: some bytes are not in host memory, or not what the file says
bool mobile_slots::parts_of(const mobile_device_layer & l, mobile_part part, int32_t slot, bool wait, std::vector<mobile_upload_part> & pieces) {
    const mobile_pool & p = pools[l.pool];

    pieces.clear();
    for (mobile_member m : MOBILE_MEMBERS) {
        if (const ggml_tensor * t = l.host.*m) {
            const size_t size = t->nb[mobile_expert_dim(m)];
            const char * data = mobile_is_weight(m) ? ggml_expert_data(t, part.n, wait) : (const char *) t->data + part.n*size;
            if (!data) {
                return false;
            }
            pieces.push_back({ p.slots.*m, data, slot*size, size });
        }
    }
    return store.plain || store.error().empty();
}

// queues the copies on the computing stream
bool mobile_slots::upload(mobile_device_layer & l, mobile_part part, int32_t slot, bool wait) {
    std::vector<mobile_upload_part> pieces;
    if (!parts_of(l, part, slot, wait, pieces)) {
        return false;
    }
    sending = sending || (devices[l.device].is_async && !store.plain);
    for (const auto & piece : pieces) {
        ggml_backend_tensor_set_async(devices[l.device].backend, piece.tensor, piece.data, piece.offset, piece.size);
    }
    count.bytes_uploaded += pools[l.pool].slot_bytes;
    return true;
}

void mobile_slots::collect() {
    std::string error;
    for (auto & d : devices) {
        if (!d.uploader) {
            continue;
        }
        if (!d.uploader->done(arrived)) {
            error = d.uploader->error();
        }
        for (const mobile_upload & done : arrived) {
            mobile_device_layer & l = layers[done.layer];
            const bool is_awaited = l.experts[done.part].state == MOBILE_SLOT_SENDING_AHEAD;
            if (done.failed) {
                evict(done.layer, done.part);
            } else {
                move(l, done.part, is_awaited ? MOBILE_SLOT_AWAITED : MOBILE_SLOT_IDLE);
            }
        }
    }
    if (!error.empty()) {
        mobile_throw(MOBILE_ERR_INTERNAL, error);
    }
}

//
// passes
//

// how many of a layer's misses to upload. uploads and the CPU work at the same time, so both should take equally long
size_t mobile_slots::n_to_fetch(const mobile_device_layer & l) const {
    if (params.miss != MOBILE_MISS_AUTO) {
        return params.miss == MOBILE_MISS_FETCH ? missing.size() : 0;
    }
    const double link = devices[l.device].upload_us;
    return link <= 0.0 ? 0 : (size_t) (missing.size()*cpu_us_per_expert/(cpu_us_per_expert + link));
}

void mobile_slots::add_cpu_time(int32_t n_experts, uint64_t us) {
    // a chain that lost the processor for a while says nothing of experts: at first the least counts, later none for much
    const double each = (double) us/std::max(n_experts, 1);
    if (n_cpu_chains++ < CHAINS_OF_THE_LEAST) {
        cpu_us_per_expert = cpu_us_per_expert == 0.0 ? each : std::min(cpu_us_per_expert, each);
    } else {
        cpu_us_per_expert += CPU_STEP*(std::min(each, OUTLIER*cpu_us_per_expert) - cpu_us_per_expert);
    }
    count.cpu_us += us;
}

int32_t mobile_slots::assign(mobile_model_layer il, const std::vector<mobile_need> & needs, mobile_by<mobile_part, int32_t> & slot) {
    collect();
    unpin_all();
    sending = false; // the device has computed the layer before
    current = layer_of(il);
    begin_layer(needs);
    choose(needs, slot);
    store.request(layers[current].in_store, missing);
    return (int32_t) missing.size() - fetch(slot);
}

// slots for the running layer: those its needs are in, and new ones for what is worth an upload
void mobile_slots::choose(const std::vector<mobile_need> & needs, mobile_by<mobile_part, int32_t> & slot) {
    mobile_device_layer & l = layers[current];

    slot.assign(l.n_expert, -1);
    missing.clear();
    fetches.clear();
    for (const mobile_need & need : needs) {
        mobile_device_expert & x = l.experts[need.part];
        const bool is_late = x.reason == MOBILE_SLOT_HINTED && x.is_sending() && params.miss == MOBILE_MISS_FETCH;
        const double waited_us = is_late ? wait_ahead(l, x) : 0.0;
        if (x.is_there()) {
            move(l, need.part, MOBILE_SLOT_IN_USE);
        }
        if (keeps_former) {
            keep_use(need);
        }
        x.lately   = x.lately_at(need.time) + need.n_tokens;
        x.n_uses  += need.n_tokens;
        x.last_use = need.time;
        x.key      = rank(current, need.part, x.last_use);
        running.push_back(need.part);
        if (x.state == MOBILE_SLOT_IN_USE) {
            count.n_hits++;
            if (x.reason == MOBILE_SLOT_HINTED) {
                use_ahead(l, waited_us);
            }
            x.reason = MOBILE_SLOT_USED;
            slot[need.part] = x.slot;
            continue;
        }
        count.n_misses++;
        missing.push_back(need);
        if (x.state == MOBILE_SLOT_NONE) {
            fetches.push_back(need.part);
        }
    }
    to_admit = !missing.empty();
    std::stable_sort(fetches.begin(), fetches.end(), [&](mobile_part a, mobile_part b) { return l.experts[a].key > l.experts[b].key; });
    size_t n = 0;
    for (const size_t n_max = std::min(n_to_fetch(l), fetches.size()); n < n_max; ++n) {
        mobile_device_expert & x = l.experts[fetches[n]];
        if (!take_slot(current, x.slot, nullptr)) {
            break;
        }
        slot[fetches[n]] = x.slot;
        move(l, fetches[n], MOBILE_SLOT_FETCHING);
    }
    fetches.resize(n);
    count.n_cpu += missing.size();
}

// uploads what choose() gave a slot to; the store has it requested. slot becomes -1 where a read failed. returns how many
int32_t mobile_slots::fetch(mobile_by<mobile_part, int32_t> & slot) {
    const int64_t start = ggml_time_us();
    left_us    = start;
    backlog_us = 0.0;
    if (fetches.empty()) {
        return 0;
    }
    mobile_device_layer & l = layers[current];
    int32_t n = 0;
    for (mobile_part part : fetches) {
        // with a choice, what is still being read is computed on the CPU, piece by piece as it arrives
        if (upload(l, part, l.experts[part].slot, params.miss == MOBILE_MISS_FETCH)) {
            move(l, part, MOBILE_SLOT_IN_USE);
            n++;
            continue;
        }
        slot[part] = -1;
        release(l, part);
    }
    count.n_fetched += n;
    count.n_cpu     -= n;
    left_us = ggml_time_us();
    count.upload_us += left_us - start;
    backlog_us = std::max(0.0, fetches.size()*devices[l.device].upload_us - (double) (left_us - start));
    return n;
}

void mobile_slots::admit() {
    if (!to_admit || params.n_uploads <= 0 || params.miss == MOBILE_MISS_FETCH) {
        return;
    }
    mobile_device_layer & l = layers[current];
    mobile_device       & d = devices[l.device];
    const int64_t start = ggml_time_us();
    collect();
    int32_t n = 0;
    for (mobile_part part : running) {
        mobile_device_expert & x = l.experts[part];
        const bool room = d.uploader ? d.uploader->has_room() : n < params.n_uploads;
        int32_t slot = -1;
        if (x.state != MOBILE_SLOT_NONE || !room || !take_slot(current, slot, &x)) {
            continue;
        }
        x.slot = slot;
        mobile_upload up;
        up.layer = current;
        up.part  = part;
        if (!(d.uploader ? parts_of(l, part, slot, false, up.parts) : upload(l, part, slot, false))) {
            release(l, part);
            continue;
        }
        x.reason = MOBILE_SLOT_EARNED;
        if (d.uploader) {
            move(l, part, MOBILE_SLOT_SENDING);
            d.uploader->queue(std::move(up), store.plain);
            count.bytes_uploaded += pools[l.pool].slot_bytes;
        } else {
            move(l, part, MOBILE_SLOT_IDLE);
        }
        count.n_admitted++;
        count.bytes_uploaded_background += pools[l.pool].slot_bytes;
        n++;
    }
    if (sending && n > 0 && !d.uploader) { // the store may give these bytes' slots away now
        ggml_backend_synchronize(d.backend);
    }
    to_admit = false;
    count.upload_us += ggml_time_us() - start;
}

void mobile_slots::end_pass() {
    if (!current.is_none()) {
        unpin_all();
        if (sending) { // most drivers have copied pageable memory by now; none has to
            ggml_backend_synchronize(devices[layers[current].device].backend);
        }
    }
    sending = false;
    end_hints();
}

void mobile_slots::reset_counters() {
    const uint64_t resident = count.resident_bytes;
    const uint64_t unused   = count.n_ahead_unused;
    count = {};
    count.n_ahead_unused      = unused;
    count.resident_bytes      = resident;
    count.resident_bytes_peak = resident;
}
