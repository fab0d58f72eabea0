// mobile-slots.h - the device tier: routed experts in slots of device memory, under one byte budget.
//
// Mechanism: each device that holds layers with routed experts has a pool per expert shape: tensors like the
// model's own expert tensors with n_slots instead of n_expert rows, shared by the layers of that shape. Placement
// CACHE: the route op asks assign() which experts of a layer are in slots; their ids become slot numbers for the
// hot chain on the device, the others are computed on the CPU as ever. A miss is uploaded before use (fetch), or
// computed on the CPU and uploaded later if it has earned a slot (cpu): if what the slot would save until those
// uses are forgotten, against what it holds now, is more than the upload costs, both measured. Placement LAYERS: whole
// layers lie in contiguous slots, and their graph is the stock graph on views of the pool.
// Uploads ahead (mobile-slots-ahead.cpp): hints of experts that layers yet to come will probably need. What tokens of a
// draft asked for last is expected of them (mobile-slots-guesses.cpp): it stays where it is there, and nothing is uploaded.
// The first K slots of a pool are zero for ever: rank i of a token points at slot i when its expert is elsewhere,
// and gets zeros. They are K, not one, since some kernels take no expert twice for one token.
// What is called an expert in this class is a part (mobile-ids.h).
// Invariants: an expert is in one state (mobile_slot_state), and move() alone changes it; a slot is named in a graph
// only after its upload was queued on the stream that computes, or is complete; a slot that the running layer uses is
// not evicted; what a failed read gave never stays in a slot.
// Limits: used by the thread that decodes, but for the map; experts with LoRA adapters, and layers that call
// build_moe_ffn twice, are computed without slots.

#pragma once

#include "device/mobile-experts.h"
#include "device/mobile-slot-map.h"
#include "device/mobile-upload.h"
#include "mobile-ids.h"
#include "mobile.h"
#include "store/mobile-former.h"
#include "store/mobile-store.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

//   NONE ── miss, uploaded before use ──► FETCHING ──► IN_USE ──► IDLE ──► NONE (evicted)
//     ├──── miss, computed on the CPU, earned a slot ──► SENDING ──► IDLE
//     └──── hint ──► SENDING_AHEAD ──► AWAITED ──► IDLE        (the layer begins; IN_USE if it needs it)
//                         └── the layer begins before it is there ──► SENDING
//   IDLE ── hinted or expected of a layer yet to come ──► AWAITED
//   FETCHING, SENDING, SENDING_AHEAD ── its upload failed ──► NONE
enum mobile_slot_state : uint8_t {
    MOBILE_SLOT_NONE,          // in no slot
    MOBILE_SLOT_FETCHING,      // the running layer uses it, and its upload is yet to be queued on the computing stream
    MOBILE_SLOT_IN_USE,        // the running layer uses it
    MOBILE_SLOT_SENDING,       // its upload beside the computation is on its way
    MOBILE_SLOT_SENDING_AHEAD, // the same, hinted, and its layer is yet to come in this pass
    MOBILE_SLOT_AWAITED,       // there, hinted or expected, and its layer is yet to come: it stays
    MOBILE_SLOT_IDLE,          // there, and in its layer's evictable set
    MOBILE_SLOT_WHOLE,         // there with all of its layer: it stays
};

// why it was uploaded, until its first use
enum mobile_slot_reason : uint8_t {
    MOBILE_SLOT_USED,
    MOBILE_SLOT_EARNED,
    MOBILE_SLOT_HINTED,
};

// one expert of a layer with a pool
struct mobile_device_expert {
    enum mobile_slot_state  state  = MOBILE_SLOT_NONE;
    enum mobile_slot_reason reason = MOBILE_SLOT_USED;
    int32_t  slot     = -1;      // -1: none
    uint64_t upload   = 0;       // number of its last upload because of a hint
    uint64_t n_uses   = 0;
    double   last_use = -1e9;    // in tokens
    double   lately   = 0.0;     // uses, at last_use; a use counts 1/e after so many tokens as lately_at() says
    double   key      = 0.0;     // set_key() alone changes it while it is IDLE
    int32_t  former   = -1;      // in mobile_slots::former; -1: no pass that is kept has asked for it

    bool is_sending() const { return state == MOBILE_SLOT_SENDING || state == MOBILE_SLOT_SENDING_AHEAD; }
    // in its slot, or there before anything computes with it
    bool is_there  () const { return slot >= 0 && !is_sending(); }
    // `lately` at a time in tokens
    double lately_at(double now) const;
};

struct mobile_device_layer {
    mobile_model_layer il;
    mobile_store_layer in_store;
    int32_t device   = -1;
    int32_t pool     = -1;
    int32_t n_expert = 0;       // as the store counts them
    int32_t n_held   = 0;       // of them in slots, or on their way there
    int32_t whole_slot = -1;    // of its part 0 in placement LAYERS; -1: it does not fit
    bool    filled   = false;   // ... and all its experts are there
    mobile_experts host;
    mobile_experts whole;       // views of the pool, if whole_slot >= 0
    mobile_by<mobile_part, mobile_device_expert> experts;
    std::set<std::pair<double, mobile_part>, mobile_goes_first<mobile_part>> evictable; // (key, part) of those that are IDLE

    int32_t slot_in_whole(mobile_part part) const { return whole_slot + part.n; }
};

struct mobile_pool {
    int32_t  device     = -1;
    int32_t  n_layers   = 0;
    int64_t  n_expert   = 0;    // of all its layers
    uint64_t slot_bytes = 0;
    int32_t  n_zero     = 0;    // slots that are always zero
    int32_t  step       = 1;    // whole layers begin at multiples of so many slots, where a tensor may begin
    int32_t  n_slots    = 0;    // those included
    mobile_experts slots;
    std::vector<int32_t> free;
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
};

// an expert that a layer will probably need
struct mobile_slot_hint {
    mobile_slots_layer layer;
    mobile_part        part;
    double             now      = 0.0;   // evicts only what was used before, in tokens
    bool               expected = false; // it stays only while no hint wants the room
};

struct mobile_device {
    ggml_backend_dev_t dev     = nullptr;
    ggml_backend_t     backend = nullptr; // the one that computes
    uint64_t expert_bytes = 0;
    uint64_t pool_bytes   = 0;
    int32_t  n_layers     = 0;
    uint64_t slot_bytes   = 0;            // the largest
    double   upload_us    = 0.0;          // of one expert that is waited for, measured when the slots were made
    bool     is_async     = false;        // copies may go on when a call that queued them returned
    double   stall_us     = 0.0;          // how long one in the background holds up the computation, likewise
    std::unique_ptr<mobile_uploader> uploader; // NULL: uploads run on the computing stream
};

class mobile_slots {
public:
    // n_used: ids per token and layer, as the store counts experts. map: shows what is in the slots, and outlives this
    mobile_slots(const mobile_device_params & params, mobile_store & store, mobile_slot_map & map, int32_t n_used);

    ~mobile_slots();

    mobile_slots(const mobile_slots &) = delete;
    mobile_slots & operator=(const mobile_slots &) = delete;

    // set-up

    void add_layer(mobile_model_layer il, const mobile_experts & host, ggml_backend_dev_t dev, ggml_backend_t backend);
    // takes the memory. MOBILE_ERR_BUDGET, MOBILE_ERR_MEMORY: err says why, and the object is of no use
    int32_t start(std::string & err);

    // empties the slots where their contents change, and fills them for LAYERS
    void set_placement(enum mobile_placement placement);
    void set_miss     (enum mobile_miss miss) { params.miss = miss; }
    // as mobile_store::set_split, of the slots; by the model's layers
    void set_split    (const mobile_by<mobile_model_layer, int32_t> & kept, const mobile_by<mobile_model_layer, double> & shares);

    enum mobile_miss      miss       () const { return (enum mobile_miss) params.miss; }
    enum mobile_placement placement  () const { return (enum mobile_placement) params.placement; }
    int32_t               n_batch_max() const { return params.n_batch_max; }
    int32_t               n_layers   () const { return (int32_t) layers.size(); }

    const std::vector<mobile_device> & all_devices() const { return devices; }
    // slots of a device that can hold an expert
    int32_t n_slots_of(int32_t device) const;

    // the layer's tensors on the host; NULL: it has no pool
    const mobile_experts * host_layer (mobile_model_layer il) const;
    // whether a graph of n_tokens has a hot chain at layer il
    bool                   is_cached  (mobile_model_layer il, int64_t n_tokens) const;
    // the layer's tensors if it lies in slots as a whole, else NULL
    const mobile_experts * whole_layer(mobile_model_layer il) const;
    const mobile_experts * slots_of   (mobile_model_layer il) const;
    // whether it needs no host memory
    bool                   is_there   (mobile_model_layer il, mobile_part part) const;

    // for the route op

    // uploads what the layer before computed on the CPU and has earned a slot. call while the store still pins it
    void admit();
    // decides where each need is computed, asks the host tier for what is in no slot, and uploads what is worth it. slot
    // becomes where each part is, or -1. returns how many the CPU computes
    int32_t assign(mobile_model_layer il, const std::vector<mobile_need> & needs, mobile_by<mobile_part, int32_t> & slot);
    // needs of a layer that lies in slots as a whole
    void add_whole_hits(size_t n_needs) { count.n_hits += n_needs; }
    // of the running layer's cold chain: so many experts in so much time
    void add_cpu_time(int32_t n_experts, uint64_t us);
    // makes background uploads that are complete visible. throws mobile_error, when it has, if one failed
    void collect();
    // unpins; forgets what the layer before missed, and hints
    void end_pass();
    // as of mobile_store
    void keep_uses  (bool on, bool goes_on);
    void settle_uses(const mobile_uses_of & used);
    // whether some layer's experts have not all a slot
    bool is_short() const;
    // before a pass of n_tokens: layer il will probably ask for these. layers in their order
    void expect(mobile_model_layer il, const std::vector<mobile_part> & parts, int32_t n_tokens);

    // uploads ahead of need, in placement CACHE

    // whether there is a use for hints. forced: even where a right one costs more than it saves
    bool takes_hints(bool forced) const;
    // experts that a layer of the running pass, or of the next one, will probably need, best first
    void hint(mobile_model_layer il, const std::vector<mobile_part> & parts, double now);
    // before the next pass: the devices have finished the last one
    void begin_hints();
    // uploads what was hinted, as far as there is room and time
    void run_ahead();

    const mobile_device_counters & counters() const { return count; }
    void reset_counters();

    const int32_t n_used; // ids per token in the graph

private:
    struct former_use : mobile_former_use {
        mobile_slots_layer layer;
        mobile_part        part;
        double             lately = 0.0;
    };

    mobile_slots_layer          layer_of(mobile_model_layer il) const { return index_of.has(il) ? index_of[il] : mobile_slots_layer(); }
    const mobile_device_layer * find    (mobile_model_layer il) const;

    // pools
    const mobile_experts & like(size_t pool) const; // experts of one of its layers
    int32_t  n_for_all   (size_t pool) const;
    int32_t  n_in_reach  (size_t pool, int32_t n) const;
    bool     split_pool  (size_t pool);
    bool     alloc_pool  (mobile_pool & pool, const mobile_experts & like, std::string & err);
    void     measure_link(mobile_pool & pool);
    void     poison      (const mobile_pool & pool, int32_t slot, int32_t n);
    void     empty       ();
    void     fill_layers ();

    // slots
    void     move        (mobile_device_layer & l, mobile_part part, enum mobile_slot_state state);
    void     set_key     (mobile_device_layer & l, mobile_part part, double key);
    double   rank        (mobile_slots_layer layer, mobile_part part, double time) const;
    bool     may_leave   (const mobile_device_layer & l, const mobile_device_expert & candidate, mobile_slots_layer victim, mobile_part leaves) const;
    mobile_slots_layer find_victim(int32_t pool, mobile_slots_layer layer, double & key) const;
    int32_t  take_free   (mobile_pool & pool);
    bool     take_slot   (mobile_slots_layer layer, int32_t & slot, const mobile_device_expert * candidate);
    bool     is_earned   (const mobile_device_layer & l, const mobile_device_expert & x, const mobile_device_expert * victim) const;
    void     evict       (mobile_slots_layer layer, mobile_part part);
    void     release     (mobile_device_layer & l, mobile_part part);
    void     unpin_all   ();
    bool     parts_of    (const mobile_device_layer & l, mobile_part part, int32_t slot, bool wait, std::vector<mobile_upload_part> & pieces);
    bool     upload      (mobile_device_layer & l, mobile_part part, int32_t slot, bool wait);
    size_t   n_to_fetch  (const mobile_device_layer & l) const;
    void     keep_use    (const mobile_need & need);
    void     choose      (const std::vector<mobile_need> & needs, mobile_by<mobile_part, int32_t> & slot);
    int32_t  fetch       (mobile_by<mobile_part, int32_t> & slot);
    double   miss_us     (const mobile_device & d) const;

    // ahead
    bool     is_in_time  (const mobile_slot_hint & h);
    bool     take_ahead  (const mobile_slot_hint & h);
    bool     upload_ahead(const mobile_slot_hint & h);
    int32_t  n_held      (int32_t pool) const;
    bool     may_hold    (const mobile_pool & p) const;
    void     keep        (mobile_slots_layer layer, mobile_part part);
    bool     let_expected_go(int32_t pool);
    void     begin_layer (const std::vector<mobile_need> & needs);
    double   wait_ahead  (const mobile_device_layer & l, const mobile_device_expert & x);
    void     use_ahead   (const mobile_device_layer & l, double waited_us);
    void     waste_ahead (const mobile_device_layer & l, mobile_device_expert & x);
    void     settle_ahead(mobile_slots_layer layer);
    void     end_hints   ();

    mobile_device_params params;
    mobile_store       & store;
    mobile_slot_map    & map;

    std::vector<mobile_device> devices;
    mobile_by<mobile_slots_layer, mobile_device_layer> layers; // ascending il
    mobile_by<mobile_model_layer, mobile_slots_layer>  index_of;
    std::vector<mobile_pool>   pools;
    mobile_split<mobile_slots_layer> split;
    enum mobile_placement            contents = MOBILE_PLACEMENT_HOST; // what the slots were filled for
    mobile_device_counters           count = {};

    // the running layer
    mobile_slots_layer       current;
    std::vector<mobile_part> running;         // its needs, in their order: NONE are computed on the CPU
    std::vector<mobile_need> missing;         // those in no slot when it began
    std::vector<mobile_part> fetches;         // and of them those to upload at once, the ones worth most first
    bool                     to_admit = false; // those have not been offered a slot yet
    bool                     sending  = false; // a computing stream may still be reading this layer's uploads
    std::vector<mobile_upload> arrived;       // since the last look
    double                   cpu_us_per_expert = 0.0; // moving average; 0: not measured yet
    int64_t                  n_cpu_chains      = 0;   // that it was measured on

    std::vector<former_use> former; // of the passes that are kept
    bool keeps_former = false;

    // ahead of it
    std::vector<mobile_slot_hint> hints; // those without a slot yet, ascending layer
    std::vector<mobile_slot_hint> held;  // AWAITED, or on their way because of a hint
    mobile_slots_layer reached; // the layer that this pass has come to
    int32_t n_reserved = 0;    // slots that a layer of it may need
    int64_t left_us    = 0;    // when its route op was done
    double  backlog_us = 0.0;  // for which its uploads kept the link busy from then on
    double  gap_us     = 0.0;  // from there to the next layer's, moving average; 0: not measured
};
