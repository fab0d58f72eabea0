// mobile-store-reads.cpp - the read queues, and the threads that serve them.

#include "store/mobile-store.h"

#include "mobile-error.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

// reads are split so that one large piece keeps several I/O threads busy
static constexpr uint64_t CHUNK_BYTES = 512*1024;

uint32_t mobile_store::n_chunks(const mobile_range & range) const {
    const uint64_t head = range.offset % files[range.file].align;
    return (uint32_t) ((head + range.size + CHUNK_BYTES - 1)/CHUNK_BYTES);
}

void mobile_store::begin_load(mobile_store_part part, int32_t slot, bool ahead) {
    mobile_expert & x = experts[part];
    const mobile_layer & l = layers[x.layer];
    const mobile_slot_class & c = classes[l.cls];

    x.slot      = slot;
    x.data      = c.arena + (uint64_t) slot*c.slot_bytes;
    x.state     = MOBILE_LOADING;
    x.failed    = false;
    x.unread    = 0;
    x.lost      = 0;
    x.ahead     = ahead;
    x.prefetched = ahead;
    x.n_pending = 0;
    for (int p = 0; p < l.n_pieces; ++p) {
        x.piece_pending[p] = n_chunks(range_of(part, p));
        x.n_pending += x.piece_pending[p];
        x.piece_state[p].store(MOBILE_PIECE_LOADING, std::memory_order_release);
    }
    n_in_flight++;
    n_held[x.layer]++;
}

void mobile_store::queue_reads(const std::vector<mobile_store_part> & loads, std::deque<item> & queue) {
    if (loads.empty()) {
        return;
    }
    // piece by piece: the computation of a layer's first tensor starts while the others are on their way
    for (uint16_t p = 0; p < MOBILE_MAX_PIECES; ++p) {
        for (mobile_store_part part : loads) {
            if (p < layers[layer_of_part(part)].n_pieces) {
                for (uint32_t chunk = 0; chunk < experts[part].piece_pending[p]; ++chunk) {
                    queue.push_back({ part, p, chunk });
                }
            }
        }
    }
}

// moves queued reads of these experts from those ahead of need to demand
void mobile_store::promote(const std::vector<mobile_store_part> & wanted) {
    if (wanted.empty()) {
        return;
    }
    const std::set<mobile_store_part> set(wanted.begin(), wanted.end());
    for (std::deque<item> * queue : { &ahead, &warm_reads }) {
        auto moved = std::stable_partition(queue->begin(), queue->end(), [&](const item & it) { return set.count(it.part) == 0; });
        demand.insert(demand.end(), moved, queue->end());
        queue->erase(moved, queue->end());
    }
}

// of a piece nothing is queued or under way, and what was read of it is not all
void mobile_store::read_again(mobile_store_part part, uint16_t piece) {
    mobile_expert & x = experts[part];
    const uint32_t n = n_chunks(range_of(part, piece));

    x.unread &= ~(1u << piece);
    x.lost   &= ~(1u << piece);
    x.failed  = x.unread != 0;
    x.n_pending += n;
    x.piece_pending[piece] = n;
    x.piece_state[piece].store(MOBILE_PIECE_LOADING, std::memory_order_release);
    for (uint32_t chunk = 0; chunk < n; ++chunk) {
        demand.push_back({ part, piece, chunk });
    }
}

// a pass asks for what is being read: what failed of it before is no failure of the pass
void mobile_store::forgive(mobile_store_part part) {
    mobile_expert & x = experts[part];
    x.lost = 0;
    for (uint16_t p = 0; p < layers[x.layer].n_pieces; ++p) {
        if (x.piece_state[p].load(std::memory_order_relaxed) == MOBILE_PIECE_FAILED) {
            read_again(part, p);
        }
    }
}

// a read under way. where it throws, the lock is taken again first
class mobile_store::running {
public:
    running(mobile_store & store, locked & lock, bool demanded, bool warm) : store(store), lock(lock), demanded(demanded), warm(warm) {
        store.n_running++;
        store.n_demand_running += demanded;
        store.n_warm_running   += warm;
    }

    ~running() {
        if (!lock.owns_lock()) {
            lock.lock();
        }
        store.n_running--;
        store.n_demand_running -= demanded;
        store.n_warm_running   -= warm;
    }

private:
    mobile_store & store;
    locked       & lock;
    const bool     demanded;
    const bool     warm;
};

// the first that has something to do in the order of their classes; NULL: none
std::deque<mobile_store::item> * mobile_store::next_queue(locked & lock, bool demand_only) {
    if (n_catching > 0) {
        return nullptr;
    }
    if (!demand.empty()) {
        return &demand;
    }
    if (demand_only) {
        return nullptr;
    }
    if (!ahead.empty() || begin_hint(lock)) {
        return &ahead;
    }
    return is_idle() && (!warm_reads.empty() || begin_admit(lock) || begin_warm(lock)) ? &warm_reads : nullptr;
}

// takes one read from the queues and does it without the lock; false: there is none
bool mobile_store::run_one(locked & lock, bool demand_only) {
    std::deque<item> * const queue = next_queue(lock, demand_only);
    if (!queue) {
        return false;
    }
    const bool demanded = queue == &demand;
    const item it = queue->front();
    queue->pop_front();

    const mobile_expert & x = experts[it.part];
    const bool asked = x.pinned;
    const mobile_range  & r = range_of(it.part, it.piece);
    const mobile_file   & f = files[r.file];

    const uint64_t offset = r.offset - r.offset % f.align + it.chunk*CHUNK_BYTES;
    const uint64_t size   = std::min(CHUNK_BYTES, r.offset + r.size - offset);
    char * dst = x.data + classes[layers[x.layer].cls].piece_offset[it.piece] + it.chunk*CHUNK_BYTES;

    uint64_t n_read = 0;
    int      status = 0;
    {
        running scope(*this, lock, demanded, queue == &warm_reads);
        lock.unlock();
        status = mobile_file_read(f, offset, size, dst, n_read);
        lock.lock();
    }
    ahead_count.bytes_demanded += demanded ? n_read : 0;
    if (demanded) {
        wake_io(hints.size() + n_idle_work());
    }
    finish(it, asked, status, n_read, size, offset);
    return true;
}

std::string mobile_store::describe(mobile_store_part part, int piece) const {
    const mobile_layer & l = layers[layer_of_part(part)];
    return files[range_of(part, piece).file].name + ": layer " + std::to_string(l.il.n) + ", " +
        mobile_part_name(part_in_layer(part), n_segments) + " (" + l.piece_name[piece] + ")";
}

void mobile_store::finish(const item & it, bool asked, int status, uint64_t n_read, uint64_t n_wanted, uint64_t offset) {
    mobile_expert & x = experts[it.part];
    const mobile_file & f = files[range_of(it.part, it.piece).file];

    const uint64_t bytes = f.direct ? mobile_round_up(n_read, f.align) : n_read;
    if (x.warm) {
        warm_count.bytes_read += bytes; // no answer's
    } else {
        count.bytes_read += bytes;
        if (!x.ahead) {
            count.bytes_read_demand += bytes;
        }
    }

    const bool ok = status == 0 && n_read == n_wanted;
    const uint8_t bit = (uint8_t) (1u << it.piece);
    if (!ok) {
        x.failed  = true;
        x.unread |= bit;
        x.lost   |= asked ? bit : 0;
    }
    x.n_pending--;
    if (--x.piece_pending[it.piece] == 0) {
        if (x.pinned && (x.unread & bit) && !(x.lost & bit)) {
            read_again(it.part, it.piece); // it was asked for after the read that failed had begun
        } else {
            x.piece_state[it.piece].store(x.unread & bit ? MOBILE_PIECE_FAILED : MOBILE_PIECE_READY, std::memory_order_release);
        }
    }
    if (x.n_pending == 0) {
        n_in_flight--;
        warm_in_flight -= x.warm ? classes[layers[x.layer].cls].slot_bytes : 0;
        x.state = MOBILE_RESIDENT;
    }
    cv_done.notify_all();

    // what follows asks for memory, so it comes last
    if (x.n_pending == 0 && !x.pinned) {
        if (x.failed) {
            release_slot(x);
        } else {
            list(it.part);
        }
    }
    // a failed read ahead is no error: it is tried again when the expert is needed
    if (!ok && asked && x.pinned && error_text.empty()) {
        error_text = describe(it.part, it.piece) + ": " +
            (status != 0 ? std::string(strerror(status)) : "only " + std::to_string(n_read) + " of " + std::to_string(n_wanted) + " bytes") +
            " at offset " + std::to_string(offset) +
            (status != 0 ? "" : "; the file has become shorter since it was loaded");
    }
}

// in a catch block. what was thrown may have left reads that nobody does, so all that are not done fail: nobody waits for
// them in vain, and a pass fails with the text
void mobile_store::catch_thrown(locked & lock) noexcept {
    mobile_fail_caught();
    if (!lock.owns_lock()) {
        lock.lock();
    }
    if (thrown[0] == 0) {
        snprintf(thrown, sizeof(thrown), "%s", mobile_last_error());
    }
    demand.clear();
    ahead.clear();
    hints.clear();
    admits.clear();
    warm_parts.clear();
    warm_reads.clear();
    n_catching++;
    cv_done.wait(lock, [&] { return n_running == 0; });
    n_catching--;
    demand.clear(); // and what those under way have added
    ahead.clear();
    admits.clear();
    warm_parts.clear();
    warm_reads.clear();
    for (mobile_expert & x : experts) {
        if (x.state != MOBILE_LOADING) {
            continue;
        }
        for (int p = 0; p < layers[x.layer].n_pieces; ++p) {
            if (x.piece_pending[p] > 0) {
                x.piece_state[p].store(MOBILE_PIECE_FAILED, std::memory_order_release);
            }
            x.piece_pending[p] = 0;
        }
        x.n_pending = 0;
        x.failed    = true;
        x.state     = MOBILE_RESIDENT;
        n_in_flight--;
        warm_in_flight -= x.warm ? classes[layers[x.layer].cls].slot_bytes : 0;
        if (!x.pinned) {
            release_slot(x);
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
        try {
            if (!run_one(lock, false) && !prefault_some(lock)) {
                cv_work.wait(lock);
            }
        } catch (...) {
            catch_thrown(lock);
        }
    }
}
