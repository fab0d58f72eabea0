#include "mobile-store.h"

#include "ggml.h"

#include <algorithm>
#include <cstring>

// reads are split so that one large piece keeps several I/O threads busy
static constexpr uint64_t CHUNK_BYTES = 512*1024;

// keys of transient experts lie below every other, the newest lowest: a long batch passes through few
// slots, and its first layers stay for the next batch
static constexpr double TRANSIENT_KEY = -1e15;

// how many experts of a layer are tried for one that may go
static constexpr int VICTIM_SCAN = 8;

// how much staler, in tokens, an expert must be for its slot to change shape
static constexpr double RESHAPE_TOKENS = 64.0;

static uint64_t round_up(uint64_t n, uint64_t to) {
    return (n + to - 1)/to*to;
}

mobile_store::mobile_store(const mobile_load_params & params) : params(params) {
}

mobile_store::~mobile_store() {
    {
        locked lock(mutex);
        stop = true;
    }
    cv_work.notify_all();
    for (auto & t : io_threads) {
        t.join();
    }
    for (auto & c : classes) {
        mobile_unmap(c.arena, c.n_slots*c.slot_bytes);
    }
    mobile_unmap((void *) zeros, zeros_size);
    for (auto & f : files) {
        mobile_file_close(f);
    }
}

int mobile_store::add_file(int fd, std::string & err) {
    mobile_file file;
    if (!mobile_file_open(file, fd, (enum mobile_io) params.io, err)) {
        return -1;
    }
    files.push_back(file);
    return (int) files.size() - 1;
}

bool mobile_store::add_piece(int il, const std::string & name, std::vector<mobile_range> ranges, std::string & err) {
    if (il < 0 || ranges.empty()) {
        err = name + ": no layer number or no experts";
        return false;
    }
    for (size_t e = 0; e < ranges.size(); ++e) {
        const mobile_range & r = ranges[e];
        if (files.empty()) {
            continue;
        }
        const mobile_file & f = files.at(r.file);
        if (r.size == 0 || r.offset > f.size || r.size > f.size - r.offset) {
            err = f.name + ": " + name + ", expert " + std::to_string(e) + " lies outside the file; it is truncated or corrupt";
            return false;
        }
        if (r.size != ranges[0].size) {
            err = f.name + ": " + name + ": experts of different sizes";
            return false;
        }
    }
    if ((int) layer_of_il.size() <= il) {
        layer_of_il.resize(il + 1, -1);
    }
    if (layer_of_il[il] < 0) {
        layer_of_il[il] = (int32_t) layers.size();
        layers.emplace_back();
        layers.back().il       = il;
        layers.back().n_expert = (int32_t) ranges.size();
    }
    mobile_layer & l = layers[layer_of_il[il]];
    if (l.n_pieces == MOBILE_MAX_PIECES || (size_t) l.n_expert != ranges.size()) {
        err = name + ": does not fit the other expert tensors of layer " + std::to_string(il);
        return false;
    }
    // [expert][piece]: widen by one piece
    std::vector<mobile_range> all((size_t) l.n_expert*(l.n_pieces + 1));
    for (int e = 0; e < l.n_expert; ++e) {
        for (int p = 0; p < l.n_pieces; ++p) {
            all[(size_t) e*(l.n_pieces + 1) + p] = l.ranges[(size_t) e*l.n_pieces + p];
        }
        all[(size_t) e*(l.n_pieces + 1) + l.n_pieces] = ranges[e];
        expert_bytes += ranges[e].size;
    }
    l.ranges = std::move(all);
    l.piece_name[l.n_pieces++] = name;
    return true;
}

bool mobile_store::direct_io() const {
    return !files.empty() && std::all_of(files.begin(), files.end(), [](const mobile_file & f) { return f.direct; });
}

// slot classes and what budgets mean, for reads aligned to `align`
void mobile_store::lay_out(uint32_t align) {
    for (auto & l : layers) {
        mobile_slot_class c;
        c.n_pieces = l.n_pieces;
        for (int p = 0; p < l.n_pieces; ++p) {
            c.piece_size[p] = l.ranges[p].size;
        }
        auto it = std::find_if(classes.begin(), classes.end(), [&](const mobile_slot_class & o) {
            return o.n_pieces == c.n_pieces && std::equal(c.piece_size, c.piece_size + MOBILE_MAX_PIECES, o.piece_size);
        });
        if (it == classes.end()) {
            for (int p = 0; p < c.n_pieces; ++p) {
                c.piece_offset[p] = c.slot_bytes;
                // a range starts anywhere within its first block
                c.slot_bytes += round_up(c.piece_size[p] + align - 1, align);
            }
            it = classes.insert(classes.end(), c);
        }
        l.cls   = (int32_t) (it - classes.begin());
        l.first = (uint32_t) n_experts;
        it->n_experts += l.n_expert;
        n_experts     += l.n_expert;
        n_expert_max   = std::max(n_expert_max, l.n_expert);
    }
    if (classes.size() > 1) {
        // slots change class by giving their pages back
        for (auto & c : classes) {
            c.slot_bytes = round_up(c.slot_bytes, mobile_page_size());
        }
    }
    for (const auto & l : layers) {
        const uint64_t bytes = l.n_expert*classes[l.cls].slot_bytes;
        budget_min_bytes  = std::max(budget_min_bytes, bytes);
        budget_all_bytes += bytes;
    }
}

void mobile_store::start_plain() {
    lay_out(4096); // a budget that is legal by these figures is legal on every file system
    budget_bytes = budget_all_bytes;
    all_resident = true;
    plain        = true;
    committed    = expert_bytes;
    count.resident_bytes_peak = committed;
}

int32_t mobile_store::start(const std::function<bool(float)> & progress, std::string & err) {
    uint32_t align = 512;
    for (const auto & f : files) {
        align = std::max(align, f.align);
    }
    lay_out(align);

    budget_bytes = params.budget_bytes == 0 ? budget_all_bytes : std::min(params.budget_bytes, budget_all_bytes);
    all_resident = budget_bytes == budget_all_bytes;
    if (budget_bytes < budget_min_bytes) {
        err = "an expert budget of " + std::to_string(budget_bytes) + " bytes is below the smallest that can work, " +
            std::to_string(budget_min_bytes) + " bytes: all " + std::to_string(n_expert_max) +
            " experts of one layer, which a prompt needs at once";
        return MOBILE_ERR_BUDGET;
    }
    if (layers.empty()) {
        return MOBILE_OK;
    }

    experts = std::make_unique<mobile_expert[]>(n_experts);
    evictable.resize(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        for (int e = 0; e < layers[i].n_expert; ++e) {
            experts[layers[i].first + e].layer = (int32_t) i;
        }
    }
    for (auto & c : classes) {
        c.n_slots = std::min(c.n_experts, budget_bytes/c.slot_bytes);
        c.arena   = (char *) mobile_map(c.n_slots*c.slot_bytes, classes.size() == 1);
        if (!c.arena) {
            err = "no address space for " + std::to_string(c.n_slots*c.slot_bytes) + " bytes of experts";
            c.n_slots = 0;
            return MOBILE_ERR_MEMORY;
        }
        for (int p = 0; p < c.n_pieces; ++p) {
            zeros_size = std::max(zeros_size, c.piece_size[p]);
        }
    }
    zeros = (const char *) mobile_zeros(zeros_size);
    if (!zeros) {
        err = "no address space for expert zeros";
        return MOBILE_ERR_MEMORY;
    }

    for (int i = 0; i < params.n_io_threads; ++i) {
        io_threads.emplace_back(&mobile_store::io_main, this);
    }

    if (all_resident) {
        for (size_t i = 0; i < layers.size(); ++i) {
            if (progress && !progress((float) i/layers.size())) {
                err = "cancelled";
                return MOBILE_ERR_STATE;
            }
            std::vector<mobile_need> needs(layers[i].n_expert);
            for (int e = 0; e < layers[i].n_expert; ++e) {
                needs[e].expert = e;
            }
            request((int32_t) i, needs);
            for (int e = 0; e < layers[i].n_expert; ++e) {
                for (int p = 0; p < layers[i].n_pieces; ++p) {
                    resolve((int32_t) i, p, e, true);
                }
            }
            if (!end_pass()) {
                err = error();
                return MOBILE_ERR_IO;
            }
        }
        locked lock(mutex);
        const uint64_t peak = count.resident_bytes_peak;
        count = {};
        count.resident_bytes_peak = peak;
    }
    return MOBILE_OK;
}

uint64_t mobile_store::expert_bytes_of(const mobile_layer & l) const {
    const mobile_slot_class & c = classes[l.cls];
    return c.piece_size[0] + c.piece_size[1] + c.piece_size[2];
}

const mobile_range & mobile_store::range_of(uint32_t expert, int piece) const {
    const mobile_layer & l = layers[experts[expert].layer];
    return l.ranges[(size_t) (expert - l.first)*l.n_pieces + piece];
}

uint32_t mobile_store::n_chunks(const mobile_range & range) const {
    const uint64_t head = range.offset % files[range.file].align;
    return (uint32_t) ((head + range.size + CHUNK_BYTES - 1)/CHUNK_BYTES);
}

//
// slots
//

void mobile_store::list(uint32_t expert) {
    mobile_expert & x = experts[expert];
    if (!x.listed && !all_resident) {
        evictable[x.layer].insert({ x.key, expert });
        x.listed = true;
    }
}

void mobile_store::unlist(uint32_t expert) {
    mobile_expert & x = experts[expert];
    if (x.listed) {
        evictable[x.layer].erase({ x.key, expert });
        x.listed = false;
    }
}

void mobile_store::release_slot(mobile_expert & x) {
    for (auto & s : x.piece_state) {
        s.store(MOBILE_PIECE_ABSENT, std::memory_order_relaxed);
    }
    classes[layers[x.layer].cls].free.push_back(x.slot);
    n_transient -= x.transient;
    x.state      = MOBILE_NOT_RESIDENT;
    x.slot       = -1;
    x.data       = nullptr;
    x.transient  = false;
    x.prefetched = false;
    x.failed     = false;
}

void mobile_store::evict(uint32_t expert) {
    unlist(expert);
    release_slot(experts[expert]);
    count.n_evictions++;
}

bool mobile_store::may_go(const mobile_expert & x, int32_t layer, slot_use use, double now) const {
    switch (use) {
        case SLOT_DEMAND:
            return true;
        case SLOT_AHEAD:
            // not what is being read ahead itself, and of what single tokens use up to two layers' worth
            return x.layer != layer &&
                (x.transient || (n_transient < 2*(uint64_t) n_expert_max && budget_bytes >= 4*budget_min_bytes));
        case SLOT_PREFETCH:
            return x.last_use < now;
    }
    return false;
}

// the expert to evict for a slot of a layer; -1: none that may go
int64_t mobile_store::find_victim(int32_t layer, slot_use use, double now) const {
    const auto   eviction = (enum mobile_eviction) params.eviction;
    const double step     = mobile_policy_step(eviction);

    // the smallest key among slots of the right shape, and among the others
    int64_t best     [2] = { -1, -1 };
    double  best_key [2] = { 0.0, 0.0 };
    for (int32_t l = 0; l < (int32_t) layers.size(); ++l) {
        const int other = layers[l].cls != layers[layer].cls;
        int n = 0;
        for (auto it = evictable[l].begin(); it != evictable[l].end() && n < VICTIM_SCAN; ++it, ++n) {
            const mobile_expert & x = experts[it->second];
            if (may_go(x, layer, use, now)) {
                const double key = it->first + (l > layer && !x.transient ? mobile_policy_unvisited(eviction) : 0.0);
                if (best[other] < 0 || key < best_key[other]) {
                    best    [other] = it->second;
                    best_key[other] = key;
                }
                break;
            }
        }
    }
    // changing a slot's shape means fresh pages: only for an expert that is clearly staler
    const bool reshape = best[0] < 0 || (best[1] >= 0 && best_key[1] + RESHAPE_TOKENS*step < best_key[0]);
    return reshape ? best[1] : best[0];
}

bool mobile_store::take_slot(locked & lock, int32_t layer, slot_use use, double now, int32_t & slot) {
    mobile_slot_class & c = classes[layers[layer].cls];
    for (;;) {
        if (!c.free.empty()) {
            slot = c.free.back();
            c.free.pop_back();
            return true;
        }
        if (committed + c.slot_bytes <= budget_bytes && (!c.spare.empty() || c.n_fresh < c.n_slots)) {
            if (!c.spare.empty()) {
                slot = c.spare.back();
                c.spare.pop_back();
            } else {
                slot = (int32_t) c.n_fresh++;
            }
            committed += c.slot_bytes;
            count.resident_bytes_peak = std::max(count.resident_bytes_peak, committed);
            return true;
        }
        // a free slot of another shape: its pages become budget
        auto other = std::find_if(classes.begin(), classes.end(), [](const mobile_slot_class & o) { return !o.free.empty(); });
        if (other != classes.end()) {
            const int32_t s = other->free.back();
            other->free.pop_back();
            other->spare.push_back(s);
            mobile_discard(other->arena + (uint64_t) s*other->slot_bytes, other->slot_bytes);
            committed -= other->slot_bytes;
            continue;
        }
        const int64_t victim = find_victim(layer, use, now);
        if (victim >= 0) {
            evict((uint32_t) victim);
            continue;
        }
        if (use != SLOT_DEMAND) {
            return false;
        }
        if (n_in_flight == 0) {
            return false;
        }
        // what is being read ahead can be evicted once it has arrived
        cv_done.wait(lock);
    }
}

//
// reads
//

void mobile_store::begin_load(uint32_t expert, int32_t slot, bool ahead) {
    mobile_expert & x = experts[expert];
    const mobile_layer & l = layers[x.layer];
    const mobile_slot_class & c = classes[l.cls];

    x.slot      = slot;
    x.data      = c.arena + (uint64_t) slot*c.slot_bytes;
    x.state     = MOBILE_LOADING;
    x.failed    = false;
    x.ahead     = ahead;
    x.prefetched = ahead;
    x.n_pending = 0;
    for (int p = 0; p < l.n_pieces; ++p) {
        x.piece_pending[p] = n_chunks(range_of(expert, p));
        x.n_pending += x.piece_pending[p];
        x.piece_state[p].store(MOBILE_PIECE_LOADING, std::memory_order_release);
    }
    n_in_flight++;
}

void mobile_store::queue_reads(const std::vector<uint32_t> & loads, std::deque<item> & queue) {
    if (loads.empty()) {
        return;
    }
    // piece by piece: the computation of a layer's first tensor starts while the others are on their way
    for (uint16_t p = 0; p < MOBILE_MAX_PIECES; ++p) {
        for (uint32_t expert : loads) {
            if (p < layers[experts[expert].layer].n_pieces) {
                for (uint32_t chunk = 0; chunk < experts[expert].piece_pending[p]; ++chunk) {
                    queue.push_back({ expert, p, chunk });
                }
            }
        }
    }
}

// moves queued reads of these experts from read-ahead to demand
void mobile_store::promote(const std::vector<uint32_t> & wanted) {
    if (wanted.empty() || ahead.empty()) {
        return;
    }
    const std::set<uint32_t> set(wanted.begin(), wanted.end());
    auto moved = std::stable_partition(ahead.begin(), ahead.end(), [&](const item & it) { return set.count(it.expert) == 0; });
    demand.insert(demand.end(), moved, ahead.end());
    ahead.erase(moved, ahead.end());
}

// takes one read from the queues and does it without the lock; false: there is none
bool mobile_store::run_one(locked & lock, bool demand_only) {
    std::deque<item> & queue = !demand.empty() ? demand : ahead;
    if (queue.empty() || (demand_only && demand.empty())) {
        return false;
    }
    const item it = queue.front();
    queue.pop_front();

    const mobile_expert & x = experts[it.expert];
    const mobile_range  & r = range_of(it.expert, it.piece);
    const mobile_file   & f = files[r.file];

    const uint64_t offset = r.offset - r.offset % f.align + it.chunk*CHUNK_BYTES;
    const uint64_t size   = std::min(CHUNK_BYTES, r.offset + r.size - offset);
    char * dst = x.data + classes[layers[x.layer].cls].piece_offset[it.piece] + it.chunk*CHUNK_BYTES;

    lock.unlock();
    uint64_t  n_read = 0;
    const int status = mobile_file_read(f, offset, size, dst, n_read);
    lock.lock();

    finish(it, status, n_read, size, offset);
    return true;
}

std::string mobile_store::describe(uint32_t expert, int piece) const {
    const mobile_layer & l = layers[experts[expert].layer];
    return files[range_of(expert, piece).file].name + ": layer " + std::to_string(l.il) + ", expert " +
        std::to_string(expert - l.first) + " (" + l.piece_name[piece] + ")";
}

void mobile_store::finish(const item & it, int status, uint64_t n_read, uint64_t n_wanted, uint64_t offset) {
    mobile_expert & x = experts[it.expert];
    const mobile_file & f = files[range_of(it.expert, it.piece).file];

    const uint64_t bytes = f.direct ? round_up(n_read, f.align) : n_read;
    count.bytes_read += bytes;
    if (!x.ahead) {
        count.bytes_read_demand += bytes;
    }

    const bool ok = status == 0 && n_read == n_wanted;
    if (!ok) {
        x.failed = true;
        // a failed read ahead is no error: it is tried again when the expert is needed
        if (x.pinned && error_text.empty()) {
            error_text = describe(it.expert, it.piece) + ": " +
                (status != 0 ? std::string(strerror(status)) : "only " + std::to_string(n_read) + " of " + std::to_string(n_wanted) + " bytes") +
                " at offset " + std::to_string(offset) +
                (status != 0 ? "" : "; the file has become shorter since it was loaded");
        }
    }
    x.n_pending--;
    if (--x.piece_pending[it.piece] == 0) {
        x.piece_state[it.piece].store(x.failed ? MOBILE_PIECE_FAILED : MOBILE_PIECE_READY, std::memory_order_release);
    }
    if (x.n_pending == 0) {
        n_in_flight--;
        x.state = MOBILE_RESIDENT;
        if (!x.pinned) {
            if (x.failed) {
                release_slot(x);
            } else {
                list(it.expert);
            }
        }
    }
    cv_done.notify_all();
}

// without the lock, so that the woken threads need not wait for it
void mobile_store::wake_io(size_t n_loads) {
    if (n_loads > 0) {
        cv_work.notify_all();
    }
}

void mobile_store::io_main() {
    locked lock(mutex);
    while (!stop) {
        if (!run_one(lock, false)) {
            cv_work.wait(lock);
        }
    }
}

//
// a pass
//

void mobile_store::begin_pass() {
    locked lock(mutex);
    error_text.clear();
}

void mobile_store::unpin_all() {
    for (uint32_t expert : pinned) {
        mobile_expert & x = experts[expert];
        x.pinned = false;
        if (x.state == MOBILE_RESIDENT) {
            if (x.failed) {
                release_slot(x);
            } else {
                list(expert);
            }
        }
    }
    pinned.clear();
}

bool mobile_store::end_pass() {
    locked lock(mutex);
    unpin_all();
    cv_done.notify_all();
    return error_text.empty();
}

// gives x a new key; it is not listed
void mobile_store::use(mobile_expert & x, const mobile_need & need) {
    const bool transient = need.lasting ? false : x.transient || x.state == MOBILE_NOT_RESIDENT;

    n_transient += (int) transient - (int) x.transient;
    x.transient  = transient;
    if (need.lasting) {
        x.n_uses  += need.n_tokens;
        x.last_use = need.time;
        x.key      = mobile_policy_key((enum mobile_eviction) params.eviction, x.n_uses, x.last_use);
    } else if (transient) {
        x.key = TRANSIENT_KEY - (double) ++transient_seq;
    }
}

void mobile_store::request(int32_t layer, const std::vector<mobile_need> & needs) {
    const mobile_layer & l = layers[layer];

    locked lock(mutex);
    count.bytes_routed += needs.size()*(expert_bytes_of(l));
    if (plain || (all_resident && experts[l.first].state == MOBILE_RESIDENT)) {
        count.n_hits += needs.size();
        return;
    }
    unpin_all();

    std::vector<uint32_t> misses;
    std::vector<uint32_t> on_their_way;
    for (const auto & need : needs) {
        const uint32_t expert = l.first + need.expert;
        mobile_expert & x = experts[expert];
        unlist(expert);
        use(x, need);
        x.pinned = true;
        pinned.push_back(expert);
        if (x.state == MOBILE_NOT_RESIDENT) {
            count.n_misses++;
            misses.push_back(expert);
            continue;
        }
        count.n_hits++;
        if (x.prefetched) {
            count.n_prefetch_hits++;
            x.prefetched = false;
        }
        if (x.state == MOBILE_LOADING) {
            on_their_way.push_back(expert);
        }
    }
    promote(on_their_way);
    for (uint32_t expert : misses) {
        int32_t slot = -1;
        // the budget holds a layer, and only this one is pinned
        GGML_ASSERT(take_slot(lock, layer, SLOT_DEMAND, 0.0, slot));
        begin_load(expert, slot, false);
    }
    queue_reads(misses, demand);
    lock.unlock();
    wake_io(misses.size());
}

void mobile_store::read_ahead(int32_t layer) {
    const mobile_layer & l = layers[layer];

    locked lock(mutex);
    if (all_resident) {
        return;
    }
    std::vector<uint32_t> loads;
    for (int e = 0; e < l.n_expert; ++e) {
        mobile_expert & x = experts[l.first + e];
        int32_t slot = -1;
        if (x.state != MOBILE_NOT_RESIDENT) {
            continue;
        }
        if (!take_slot(lock, layer, SLOT_AHEAD, 0.0, slot)) {
            break;
        }
        mobile_need need;
        need.lasting = false;
        use(x, need);
        begin_load(l.first + e, slot, true);
        loads.push_back(l.first + e);
    }
    count.n_prefetched += loads.size();
    queue_reads(loads, ahead);
    lock.unlock();
    wake_io(loads.size());
}

int32_t mobile_store::prefetch(int32_t layer, const int32_t * ids, size_t n_ids, double now) {
    const mobile_layer & l = layers[layer];

    locked lock(mutex);
    if (all_resident) {
        return 0;
    }
    std::vector<uint32_t> loads;
    for (size_t i = 0; i < n_ids; ++i) {
        const uint32_t expert = l.first + ids[i];
        mobile_expert & x = experts[expert];
        int32_t slot = -1;
        if (x.state != MOBILE_NOT_RESIDENT) {
            continue;
        }
        if (!take_slot(lock, layer, SLOT_PREFETCH, now, slot)) {
            break;
        }
        x.last_use   = now;
        x.key        = mobile_policy_key((enum mobile_eviction) params.eviction, std::max<uint64_t>(x.n_uses, 1), now);
        begin_load(expert, slot, true);
        loads.push_back(expert);
    }
    count.n_prefetched += loads.size();
    queue_reads(loads, ahead);
    lock.unlock();
    wake_io(loads.size());
    return (int32_t) loads.size();
}

const char * mobile_store::resolve(int32_t layer, int32_t piece, int64_t expert, bool wait) {
    const mobile_layer & l = layers[layer];
    const uint32_t id = l.first + (uint32_t) expert;
    mobile_expert & x = experts[id];

    auto address = [&]() {
        const mobile_range & r = range_of(id, piece);
        return x.data + classes[l.cls].piece_offset[piece] + r.offset % files[r.file].align;
    };

    uint32_t state = x.piece_state[piece].load(std::memory_order_acquire);
    if (state == MOBILE_PIECE_READY) {
        return address();
    }
    if (!wait) {
        return nullptr;
    }

    locked lock(mutex);
    if (n_waiting++ == 0) {
        stall_start = ggml_time_us();
    }
    if (x.state == MOBILE_NOT_RESIDENT && !x.pinned) {
        // not requested by the route op: a graph of somebody else's. load it as a need of this layer
        int32_t slot = -1;
        if (take_slot(lock, layer, SLOT_DEMAND, 0.0, slot)) {
            x.pinned = true;
            pinned.push_back(id);
            count.n_misses++;
            begin_load(id, slot, false);
            queue_reads({ id }, demand);
            wake_io(1);
        } else {
            error_text = "layer " + std::to_string(l.il) + ": more experts are needed at once than the budget holds";
            x.piece_state[piece].store(MOBILE_PIECE_FAILED, std::memory_order_release);
        }
    }
    while ((state = x.piece_state[piece].load(std::memory_order_acquire)) < MOBILE_PIECE_READY) {
        if (!run_one(lock, true)) {
            cv_done.wait(lock);
        }
    }
    if (--n_waiting == 0) {
        count.stall_us += ggml_time_us() - stall_start;
        cv_done.notify_all();
    }
    if (state == MOBILE_PIECE_READY) {
        return address();
    }
    if (error_text.empty()) {
        // it was read ahead, and failed before this pass asked for it
        error_text = describe(id, piece) + ": a read ahead of need failed";
    }
    return zeros;
}

void mobile_store::settle() {
    if (n_waiting.load(std::memory_order_relaxed) > 0) {
        locked lock(mutex);
        cv_done.wait(lock, [&] { return n_waiting.load(std::memory_order_relaxed) == 0; });
    }
}

//
// what others see
//

std::string mobile_store::error() {
    locked lock(mutex);
    return error_text;
}

mobile_counters mobile_store::counters() {
    locked lock(mutex);
    mobile_counters c = count;
    c.resident_bytes = committed;
    return c;
}

void mobile_store::reset_peak() {
    locked lock(mutex);
    count.resident_bytes_peak = committed;
}

uint8_t mobile_store::residency(int32_t layer, int32_t expert) {
    locked lock(mutex);
    return plain ? MOBILE_RESIDENT : experts[layers[layer].first + expert].state;
}
