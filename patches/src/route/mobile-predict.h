// mobile-predict.h - which experts the next layer will need, guessed while this layer is computed.
//
// Mechanism: the route op of a layer hands over the FFN's input and the ids that it routed. A thread of its own
// guesses the next layer's top-k of it; a device tier fetches the guesses by take(), to upload what is in host memory.
// The guess is the next layer's own router on this layer's FFN input, where the model has a plain
// router; else P(expert of the next layer | experts of this one), counted on the tokens seen so far.
// Whether uploads ahead shorten the passes is measured (mobile-trial.h), for each source: they are on only while they do.
// Invariant: changes when bytes are moved, never what is computed. What is thrown while guessing fails a pass, as a read does.
// Limits: passes of up to N_TOKENS_MAX tokens; nothing is guessed for the first layer, nothing without a device tier.

#pragma once

#include "store/mobile-store.h"
#include "route/mobile-trial.h"
#include "mobile.h"

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

struct llama_model;

struct mobile_guess {
    mobile_store_layer       layer;
    double                   now = 0.0;
    std::vector<mobile_part> parts; // best first
};

class mobile_predictor {
public:
    static constexpr int64_t N_TOKENS_MAX = 8;

    // model and store live longer
    mobile_predictor(const llama_model & model, std::shared_ptr<mobile_store> store);
    ~mobile_predictor();

    mobile_predictor(const mobile_predictor &) = delete;
    mobile_predictor & operator=(const mobile_predictor &) = delete;

    // by the thread that decodes

    void set_mode(enum mobile_prefetch mode);
    // false: the model has no router that could be used so
    bool set_predictor(enum mobile_predict predictor);
    // ids do not come from the router: its guesses would be about other ids
    void set_replay(bool on);

    // around a pass; k: experts that each of its tokens uses at most. device: there is a device tier that takes hints
    void begin_pass(int64_t n_tokens, int32_t k, bool device);
    void end_pass  (bool ok);
    // what was thrown while guessing since the last call; "": nothing
    std::string take_error();

    // a layer of the store, whose needs it has been told. routed: [n_tokens][n_used], the model's experts, -1: skipped.
    // cur: n_embd values of each token, NULL: the router has another input; stride in elements
    void add_layer(mobile_store_layer layer, const std::vector<int32_t> & routed, int64_t n_tokens, const float * cur, int64_t n_embd,
        size_t cur_stride, double now);

    // guesses since the last call, of this pass
    std::vector<mobile_guess> take();

    // before the pass that runs what a little pass left out; whether that is to be uploaded ahead
    bool begin_masked(bool device);

    bool is_off() const { return mode == MOBILE_PREFETCH_OFF; }
    bool forced() const { return mode == MOBILE_PREFETCH_ON; }

    void get_counters(mobile_prefetch_counters & c) const;
    void reset_counters();

private:
    // a layer's router in float32, as [n_expert][n_embd] rows
    struct router {
        const float *      weight = nullptr; // NULL: none that can be used
        const float *      bias   = nullptr;
        const float *      select = nullptr; // added after the gating function, for the choice only
        std::vector<float> own[3];           // what those point to where the tensor is not float32 on the host
    };

    struct task {
        mobile_store_layer layer; // that is guessed; none: there is nothing to do
        uint64_t pass  = 0;
        double   now   = 0.0;
        int64_t  n_tokens = 0;
        int32_t  k        = 0;
        bool     by_router = false;
        std::vector<float>   cur; // [n_tokens][n_embd]
        std::vector<int32_t> ids; // [n_tokens][n_used] of the layer before
    };

    bool is_idle() const { return is_off() || !takes; }
    bool is_on(const mobile_trial & trial) const;
    void start();
    void load_routers();
    void run();
    void serve(std::unique_lock<std::mutex> & lock);
    void guess(const task & t, std::vector<int32_t> & ids);
    void score_by_router     (const task & t, int64_t token, std::vector<float> & scores) const;
    void score_by_transitions(const task & t, int64_t token, std::vector<float> & scores) const;
    void count(mobile_store_layer layer, const std::vector<int32_t> & ids, int64_t n_tokens);

    const llama_model &           model;
    std::shared_ptr<mobile_store> store;
    mobile_by<mobile_store_layer, router> routers;
    bool    routers_loaded = false;
    int64_t n_embd_router  = 0;
    int32_t gating         = 0;             // enum llama_expert_gating_func_type

    enum mobile_prefetch mode     = MOBILE_PREFETCH_OFF;
    enum mobile_predict  asked    = MOBILE_PREDICT_AUTO;
    bool                 replayed = false;
    bool                 by_router = false; // what is in use

    // of the running pass
    bool    takes     = false; // there is a device tier that takes hints
    bool    next_on   = false;
    uint64_t pass     = 0;  // its number; guarded by mutex
    mobile_store_layer reached; // the last layer whose needs are known; guarded by mutex
    bool    rerun     = false; // it runs what a little pass left out
    int64_t n_tokens  = 0;
    int32_t k         = 0;
    int64_t start_us  = 0;
    std::vector<int32_t> before;  // ids of the layer before, [n_tokens][n_used]
    mobile_store_layer   before_layer;

    mobile_trial next_trial;
    mobile_trial masked_trial;
    double       usual[N_TOKENS_MAX][2][2] = {}; // us of a pass of the kind, a running mean. [n_tokens - 1][little][rerun]

    // transitions, guarded by mutex: tokens routed to j in a layer after i in the one before, and to i
    mobile_by<mobile_store_layer, std::vector<uint16_t>> following; // [n_expert_before * n_expert]; empty: nothing counted
    mobile_by<mobile_store_layer, std::vector<float>>    uses;      // [n_expert]
    float                                                n_counted = 0.0f;

    mutable std::mutex      mutex;
    std::condition_variable cv;
    task                    pending;
    bool                    stop = false;
    char                    thrown[256] = ""; // guarded by mutex
    std::thread             thread;

    // of the thread that guesses
    task                     running;
    std::vector<int32_t>     running_ids;
    std::vector<mobile_part> running_parts;

    mobile_by<mobile_store_layer, std::vector<int32_t>> guessed; // of this pass, guarded by mutex
    std::vector<mobile_guess>                           taken;   // what take() returns next, guarded by mutex

    // counters, of this context since the last reset
    uint64_t n_predicted = 0;
    uint64_t n_right     = 0;
    uint64_t n_passes    = 0;
    uint64_t n_passes_on = 0;
    mobile_ahead_counters base;
};
