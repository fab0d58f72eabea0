// mobile-store.h - the host tier: routed experts in memory under one byte budget.
//
// Mechanism: every (layer, expert) knows its byte ranges in the GGUF, one piece per tensor (gate, up,
// down, or gate_up, down). A miss takes a slot, evicting the expert with the smallest retention key if
// there is no free one, and queues a read per piece, in the order in which the layer uses the pieces;
// I/O threads serve the queue, and a computing thread that has to wait serves it too instead of
// spinning. Slots are recycled with their pages, since fresh pages on every miss would cost more than
// half the read bandwidth.
// Invariants: slots in use never exceed the budget; a piece is computed from only when all its bytes
// have arrived; a pinned expert is not evicted; reads ahead never evict what single tokens use, beyond
// two layers' worth; the warm set evicts nothing, an admission only what was used less; what is thrown in the middle of it, in whatever thread, is a failed read (catch_thrown).
// What is called an expert in this class is a part (mobile-ids.h): a whole expert, or one of its segments; what
// `of_model` stands in the name of takes the model's experts.
// Limits: one graph computation at a time; a layer's experts all fit (checked at load).

#pragma once

#include "mobile-ids.h"
#include "mobile.h"
#include "store/mobile-former.h"
#include "store/mobile-os.h"
#include "store/mobile-split.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

constexpr int MOBILE_MAX_PIECES = 3;

// "expert 3", or "expert 3, segment 1"
std::string mobile_part_name(mobile_part part, int32_t n_segments);

inline uint64_t mobile_round_up(uint64_t n, uint64_t to) {
    return (n + to - 1)/to*to;
}

// where a piece's bytes lie
struct mobile_range {
    uint16_t file   = 0;
    uint64_t offset = 0;
    uint64_t size   = 0;
};

enum mobile_piece_state : uint32_t {
    MOBILE_PIECE_ABSENT  = 0,
    MOBILE_PIECE_LOADING = 1,
    MOBILE_PIECE_READY   = 2,
    MOBILE_PIECE_FAILED  = 3,
};

// fields are guarded by mobile_store::mutex, but for piece_state and data: a thread that reads
// MOBILE_PIECE_READY (acquire) of a pinned expert may use data without the lock
struct mobile_expert {
    std::atomic<uint32_t> piece_state[MOBILE_MAX_PIECES]; // enum mobile_piece_state
    char *   data       = nullptr; // its slot; NULL: none
    int32_t  slot       = -1;
    mobile_store_layer layer;
    uint32_t n_pending  = 0;       // chunks queued or being read
    uint32_t piece_pending[MOBILE_MAX_PIECES] = {};
    uint8_t  state      = MOBILE_NOT_RESIDENT;
    bool     pinned     = false;
    bool     transient  = false;   // came for a batch; goes first
    bool     ahead      = false;   // its slot was taken to read ahead
    bool     prefetched = false;   // read ahead and not needed yet
    bool     hinted     = false;   // ... because of a hint
    bool     warm       = false;   // read for the warm set
    bool     warm_unused = false;  // ... and not needed yet
    bool     failed     = false;   // a read of it failed
    uint8_t  unread     = 0;       // pieces, as bits, of which a read failed
    uint8_t  lost       = 0;       // ... that was begun when a pass had asked for it: it is not tried again
    bool     expected   = false;   // by a layer that this pass has yet to reach
    bool     listed     = false;   // stands in its layer's set in mobile_store::evictable, under `key`
    uint64_t n_uses     = 0;
    double   last_use   = 0.0;
    double   key        = 0.0;
    double   own_use    = 0.0;     // what last_use and key were before a hint
    double   own_key    = 0.0;
    int32_t  former     = -1;      // in mobile_store::former; -1: no pass that is kept has asked for it

    mobile_expert() {
        for (auto & s : piece_state) {
            s.store(MOBILE_PIECE_ABSENT, std::memory_order_relaxed);
        }
    }
};

struct mobile_layer {
    mobile_model_layer il;
    int32_t  n_parts  = 0;
    int32_t  n_pieces = 0;
    int32_t  cls      = -1; // slot class
    mobile_store_part first; // its part 0
    std::string piece_name[MOBILE_MAX_PIECES]; // in the order of use
    std::vector<mobile_range> ranges;          // [n_parts * n_pieces]
};

// layers whose experts have the same piece sizes share slots
struct mobile_slot_class {
    uint64_t piece_size  [MOBILE_MAX_PIECES] = {};
    uint64_t piece_offset[MOBILE_MAX_PIECES] = {}; // in the slot
    int32_t  n_pieces   = 0;
    uint64_t slot_bytes = 0;
    uint64_t n_experts  = 0;
    char *   arena      = nullptr;
    uint64_t n_slots    = 0;      // that the arena has room for
    uint64_t n_fresh    = 0;      // slots below this index have been used
    uint64_t n_present  = 0;      // slots below this index, and not below n_fresh, have pages ahead of their use
    std::vector<int32_t> free;    // with their pages
    std::vector<int32_t> spare;   // without pages
};

// a need of the current layer, distinct parts
struct mobile_need {
    mobile_part part;
    uint32_t n_tokens = 0;
    double   time     = 0.0;  // of the last token that routes to it, in tokens
    bool     lasting  = true; // counts as a use; false: a long batch passing through
};

// reads made of hints, since the store began. n_queued = n_used + n_wasted + those that are there unused
struct mobile_ahead_counters {
    uint64_t n_queued     = 0;
    uint64_t n_used       = 0;
    uint64_t n_wasted     = 0; // gone without a use
    uint64_t bytes_early  = 0; // of those used: had arrived when they were needed
    uint64_t bytes_wasted = 0;
    uint64_t bytes_demanded = 0; // read while something waited or was about to
    uint64_t stall_us     = 0;   // of the computation, for whatever
};

// displaced experts that were read while the disk was idle, since the store began
struct mobile_admit_counters {
    uint64_t n_read = 0;
    uint64_t n_left = 0; // waiting now
    uint64_t bytes  = 0; // in the file, of n_read
};

// what a load without other wishes uses
mobile_load_params mobile_store_default_params();

class mobile_store {
public:
    explicit mobile_store(const mobile_load_params & params);
    ~mobile_store();

    mobile_store(const mobile_store &) = delete;
    mobile_store & operator=(const mobile_store &) = delete;

    // set-up, by the loading thread

    // returns the file's index, or -1: err
    int add_file(int fd, std::string & err);
    // adds a piece to layer il: one range per part, without a file only its size. call in the order in which
    // the graph uses the pieces.
    // false: err says what is wrong with it
    bool add_piece(mobile_model_layer il, const std::string & name, const mobile_by<mobile_part, mobile_range> & ranges, std::string & err);
    // lays out the slots, checks the budget, starts the I/O threads and, if everything fits, reads
    // everything. progress is called with 0..1 and may return false to cancel
    int32_t start(const std::function<bool(float)> & progress, std::string & err);
    // instead of start(): the experts lie in ordinary buffers, in the form that suits the kernels best.
    // the store counts what is routed and holds nothing
    void start_plain();

    // read-only after start()
    mobile_by<mobile_store_layer, mobile_layer> layers; // with experts, ascending il
    mobile_load_params        params;
    uint64_t expert_bytes     = 0;
    uint64_t budget_bytes     = 0;
    uint64_t budget_min_bytes = 0;
    uint64_t budget_all_bytes = 0;
    int32_t  n_parts_max      = 0;           // of one layer
    int32_t  n_segments       = 1;           // set before start()
    bool     all_resident     = false;       // nothing is ever evicted
    bool     plain            = false;       // nothing is in slots either: start_plain()

    bool     direct_io() const;
    uint64_t expert_bytes_of(const mobile_layer & layer) const; // bytes of one part in the file
    // one for each part of a layer, in their order
    std::vector<mobile_need> all_needs(mobile_store_layer layer, bool lasting) const;

    // from one number space to another

    mobile_store_layer layer_of   (mobile_model_layer il) const; // none: dense, or not of this model
    mobile_model_layer model_layer(mobile_store_layer layer) const { return layers[layer].il; }
    mobile_part        part_of    (int32_t expert, int32_t segment) const { return mobile_part_of(expert, segment, n_segments); }

    mobile_model_layer end_of_layers() const { return store_layer_of.next(); } // one past the last with experts
    int32_t            n_expert_of(mobile_store_layer layer) const { return layers[layer].n_parts/n_segments; }
    int32_t            n_expert_max() const { return n_parts_max/n_segments; }
    mobile_store_part  store_part_of(mobile_store_layer layer, mobile_part part) const { return layers[layer].first + part.n; }

    // for one computation at a time

    // forgets the last error, but for one that is for good. n_tokens: those of answers in it, or 1
    void begin_pass(int32_t n_tokens = 1);
    int32_t tokens_of_pass() const { return n_pass_tokens; }
    // every pass from now on fails with this text
    void fail_for_good(const std::string & text);
    // pins the needs of a layer and queues reads of those that are missing; returns before they arrive.
    // unpins the layer before
    void request(mobile_store_layer layer, const std::vector<mobile_need> & needs);
    // queues reads of a layer that is needed soon, as far as slots can be had without evicting what
    // single tokens use
    void read_ahead(mobile_store_layer layer);
    // experts that a layer will need in the next pass: they are read when there is nothing else to read, until
    // the layer asks for what it does need or the next pass is over. now: evicts only what was used before that,
    // in tokens. returns how many are not there. by any thread
    int32_t hint(mobile_store_layer layer, const std::vector<mobile_part> & parts, double now);
    // experts worth having, the most worthy first: read while there is nothing else to read, until no slot is free. in
    // place of those named before. returns how many are not there. by any thread
    int32_t warm(const std::vector<mobile_store_part> & parts);
    // which of a layer's parts are there or on their way
    void get_resident(mobile_store_layer layer, mobile_by<mobile_part, uint8_t> & resident);
    // from now on these segments of experts are kept before others. kept, shares: [layers]; shares: of the budget that a layer
    // fills before it gives way, 0: no wish. empty: all segments, no wishes
    void set_split(mobile_by<mobile_store_layer, int32_t> && kept, const mobile_by<mobile_store_layer, double> & shares);
    // parts that a token asked for and that are not computed, at a time in tokens: they count as used. admits: they are read
    // while there is nothing else to read, if what would go for them was used less
    void displace(mobile_store_layer layer, const std::vector<mobile_part> & parts, double time, bool admits);
    // whether the next pass keeps what the use of a part was before it, for settle_uses(). goes_on: before the passes that
    // were kept before it
    void keep_uses(bool on, bool goes_on);
    // of the parts that the passes asked for that are kept: how many of the uses are none
    void settle_uses(const mobile_uses_of & used);
    // what the running pass will probably ask for: what of it is there goes after everything else, until its layer is reached
    // or the pass is over
    void expect(const std::vector<mobile_store_part> & parts);
    // unpins the last layer; false: a read failed in this pass, error() says which
    bool end_pass();

    // an expert that no layer of this pass has asked for stays where it is until let_go(), which comes before the next
    // request. false: it is not all there
    bool hold  (mobile_store_layer layer, mobile_part part);
    void let_go(mobile_store_layer layer, mobile_part part);

    // address of a piece; see ggml_expert_resolver. NULL: not there, and not waited for. throws nothing: the frames around
    // it are C
    const char * resolve(mobile_store_layer layer, int32_t piece, mobile_part part, bool wait);
    // what a piece reads as that could not be read
    const char * resolve_failed() const { return zeros; }

    // sleeps while another thread waits in resolve()
    void settle();

    std::string     error();
    mobile_counters counters();
    mobile_ahead_counters counters_ahead();
    mobile_warm_counters  counters_warm();
    mobile_admit_counters counters_admit();
    void            reset_peak();
    // an expert in segments is as resident as its least resident segment
    uint8_t         residency_of_model(mobile_store_layer layer, int32_t expert);
    // bytes of the file that a use of it would have to read now
    uint64_t        missing_of_model  (mobile_store_layer layer, int32_t expert);

private:
    struct item {
        mobile_store_part part;
        uint16_t piece;
        uint32_t chunk;
    };

    enum slot_use { SLOT_DEMAND, SLOT_AHEAD, SLOT_PREFETCH, SLOT_WARM, SLOT_ADMIT };

    struct hinted {
        mobile_store_part part;
        double   now;
    };

    struct former_use : mobile_former_use {
        mobile_store_part part;
        bool transient = false;
    };

    using locked = std::unique_lock<std::mutex>;

    class running;

    void lay_out(uint32_t align);

    mobile_store_layer layer_of_part(mobile_store_part part) const { return experts[part].layer; }
    mobile_part        part_in_layer(mobile_store_part part) const { return mobile_part(part - layers[layer_of_part(part)].first); }

    const mobile_range & range_of(mobile_store_part part, int piece) const;
    uint32_t n_chunks(const mobile_range & range) const;

    // makes the next slots' memory present, without the lock; false: there is nothing to do, or another thread does it
    bool prefault_some(locked & lock);
    // of memory that nobody uses yet as much as the budget lacks
    void give_back_prefaulted();
    bool take_slot   (locked & lock, mobile_store_layer layer, slot_use use, double now, int32_t & slot);
    bool take_memory (mobile_slot_class & c, int32_t & slot);
    mobile_store_part find_victim(mobile_store_layer layer, slot_use use, double now) const;
    bool    may_go     (const mobile_expert & x, mobile_store_layer layer, slot_use use, double now) const;
    void no_slot     (mobile_store_part part);
    void evict       (mobile_store_part part);
    void release_slot(mobile_expert & x);
    void list        (mobile_store_part part);
    void unlist      (mobile_store_part part);
    void unpin_all   ();
    bool forget_expected();
    void forget_expected(mobile_store_layer layer);
    void use         (mobile_expert & x, const mobile_need & need);
    void keep_use    (mobile_store_part part, const mobile_need & need);
    double rank      (const mobile_expert & x, mobile_part part, double time) const;
    double transient_key();
    void begin_load  (mobile_store_part part, int32_t slot, bool ahead);
    void queue_reads (const std::vector<mobile_store_part> & parts, std::deque<item> & queue);
    void promote     (const std::vector<mobile_store_part> & parts);
    void read_again  (mobile_store_part part, uint16_t piece);
    void forgive     (mobile_store_part part);
    bool run_one     (locked & lock, bool demand_only);
    std::deque<item> * next_queue(locked & lock, bool demand_only);
    bool begin_hint  (locked & lock);
    bool is_idle     () const;
    // whether a read that nobody waits for may begin: a pass that has asked for the expert reads it itself, once it has a slot
    static bool may_begin(const mobile_expert & x) { return x.state == MOBILE_NOT_RESIDENT && !x.pinned; }
    bool begin_warm  (locked & lock);
    bool begin_admit (locked & lock);
    size_t n_idle_work() const;
    void use_hint    (mobile_store_part part);
    void waste_hint  (mobile_expert & x);
    void settle_hints(mobile_store_layer layer);
    void drop_hints  ();
    void finish      (const item & it, bool asked, int status, uint64_t n_read, uint64_t n_wanted, uint64_t offset);
    std::string describe(mobile_store_part part, int piece) const; // for error texts
    void wake_io     (size_t n_loads);
    void io_main     ();
    void ask         (locked & lock, mobile_store_layer layer, const std::vector<mobile_need> & needs);
    void ask_ahead   (locked & lock, mobile_store_layer layer);
    bool arrives     (locked & lock, mobile_store_layer layer, int32_t piece, mobile_store_part part);
    void catch_thrown(locked & lock) noexcept;

    mobile_by<mobile_model_layer, mobile_store_layer> store_layer_of;
    std::vector<mobile_file>                    files;
    std::vector<mobile_slot_class>              classes;
    mobile_by<mobile_store_part, mobile_expert> experts; // none if plain
    const char *                                zeros = nullptr; // what a failed piece reads as; its results are thrown away
    uint64_t                                    zeros_size = 0;

    std::mutex              mutex;
    std::condition_variable cv_work; // I/O threads: the queues are not empty, or stop
    std::condition_variable cv_done; // computing threads: a piece arrived or failed, or nobody waits any more
    std::deque<item>        demand;  // served first
    std::deque<item>        ahead;
    std::deque<hinted>      hints;     // served after these
    std::vector<mobile_store_part> hinted_reads; // of layers yet to come, read because of hints
    uint32_t                n_running        = 0; // reads under way
    uint32_t                n_demand_running = 0; // of these, of misses
    std::deque<mobile_store_part> warm_parts; // to be read, served last
    std::deque<item>        warm_reads;       // of those that have a slot, and of admitted ones
    std::deque<mobile_store_part> admits;     // to be read before them
    size_t                  n_warm           = 0; // that warm() was given
    uint32_t                n_warm_running   = 0; // of n_running
    uint64_t                warm_in_flight   = 0; // bytes of slots of those being loaded
    bool                    in_pass          = false;
    int32_t                 n_pass_tokens    = 1;
    bool                    stop = false;
    std::vector<std::thread> io_threads;

    using by_key = std::set<std::pair<double, mobile_store_part>, mobile_goes_first<mobile_store_part>>;
    mobile_by<mobile_store_layer, by_key> evictable; // resident, not pinned
    mobile_by<mobile_store_layer, uint64_t> n_held;     // parts that hold a slot
    mobile_split<mobile_store_layer>        split;
    std::vector<mobile_store_part>        pinned;
    std::vector<former_use>               former; // of the passes that are kept
    bool     keeps_former = false;
    std::vector<mobile_store_part>        expected; // that were marked as such, some of them reached meanwhile
    uint64_t committed    = 0; // bytes of slots with pages
    uint64_t prefaulted   = 0; // ... of slots that nobody has used yet
    bool     can_prefault = false;
    bool     prefaulting  = false;
    bool     huge_pages   = false;
    uint32_t n_slow_in_a_row = 0;
    uint64_t n_transient  = 0; // experts that hold a slot and are transient
    uint64_t n_in_flight  = 0; // experts being loaded
    uint64_t transient_seq = 0;
    std::atomic<int32_t> n_waiting = 0; // computing threads that wait in resolve(); changed under the lock
    int64_t  stall_start  = 0;
    std::string error_text;
    std::string error_for_good;
    uint32_t    n_catching  = 0; // threads in catch_thrown(): no read begins, and no pass asks for anything
    char        thrown[256] = ""; // in no string, which might throw: what was, until a pass has failed of it
    mobile_counters count = {};
    mobile_ahead_counters ahead_count;
    mobile_warm_counters  warm_count = {};
    mobile_admit_counters admit_count;
};
