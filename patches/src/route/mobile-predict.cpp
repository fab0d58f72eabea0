#include "route/mobile-predict.h"

#include "mobile-error.h"

#include "llama-model.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

// how much a new pass moves what passes of its kind usually take
static constexpr double USUAL_STEP = 1.0/16;

mobile_predictor::mobile_predictor(const llama_model & model, std::shared_ptr<mobile_store> store) : model(model), store(std::move(store)) {
    gating = (int32_t) model.hparams.expert_gating_func;
}

mobile_predictor::~mobile_predictor() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        stop = true;
    }
    cv.notify_all();
    if (thread.joinable()) {
        thread.join();
    }
}

//
// by the thread that decodes
//

void mobile_predictor::set_mode(enum mobile_prefetch m) {
    if (mode != m) {
        next_trial   = mobile_trial();
        masked_trial = mobile_trial();
    }
    mode = m;
    set_predictor(asked);
}

bool mobile_predictor::set_predictor(enum mobile_predict predictor) {
    load_routers();
    // the first layer is not guessed
    const bool has_router = routers.size() > 1 && std::any_of(routers.begin() + 1, routers.end(), [](const router & r) { return r.weight != nullptr; });
    if (predictor == MOBILE_PREDICT_ROUTER && !has_router) {
        return false;
    }
    asked     = predictor;
    by_router = predictor == MOBILE_PREDICT_ROUTER || (predictor == MOBILE_PREDICT_AUTO && has_router && !replayed);
    return true;
}

void mobile_predictor::set_replay(bool on) {
    replayed = on;
    set_predictor(asked);
}

bool mobile_predictor::is_on(const mobile_trial & trial) const {
    return takes && (mode == MOBILE_PREFETCH_ON || (mode == MOBILE_PREFETCH_AUTO && trial.on()));
}

bool mobile_predictor::begin_masked(bool device) {
    takes = device;
    rerun = !is_idle();
    return is_on(masked_trial);
}

void mobile_predictor::begin_pass(int64_t n, int32_t k_used, bool device) {
    n_tokens = n;
    k        = k_used;
    takes    = device;
    next_on  = n <= N_TOKENS_MAX && is_on(next_trial);
    before_layer = mobile_store_layer();
    if (next_on) {
        start();
        std::lock_guard<std::mutex> lock(mutex);
        reached = mobile_store_layer();
        for (auto & ids : guessed) {
            ids.clear();
        }
        taken.clear();
        pass++;
    }
    start_us = ggml_time_us();
}

std::vector<mobile_guess> mobile_predictor::take() {
    std::vector<mobile_guess> guesses;
    if (next_on) {
        std::lock_guard<std::mutex> lock(mutex);
        guesses.swap(taken);
    }
    return guesses;
}

void mobile_predictor::end_pass(bool ok) {
    const double us = (double) std::max<int64_t>(ggml_time_us() - start_us, 1);
    const bool was_rerun = rerun;
    rerun = false;
    if (!ok || n_tokens > N_TOKENS_MAX || is_idle()) {
        return;
    }
    n_passes++;
    n_passes_on += next_on;

    double & u = usual[n_tokens - 1][k > 0][was_rerun];
    u = u > 0.0 ? u + USUAL_STEP*(us - u) : us;
    if (mode != MOBILE_PREFETCH_AUTO) {
        return;
    }
    // one at a time
    const bool deciding = next_trial.deciding();
    next_trial.add(us/u);
    if (was_rerun && !deciding) {
        masked_trial.add(us/u);
    }
}

std::string mobile_predictor::take_error() {
    if (!thread.joinable()) {
        return "";
    }
    std::lock_guard<std::mutex> lock(mutex);
    std::string text = thrown;
    thrown[0] = 0;
    return text;
}

void mobile_predictor::add_layer(mobile_store_layer layer, const std::vector<int32_t> & routed, int64_t n, const float * cur, int64_t n_embd,
        size_t cur_stride, double now) {
    if (is_idle()) {
        return;
    }
    const int64_t n_used = (int64_t) routed.size()/n;
    if (by_router && !cur && n <= N_TOKENS_MAX && asked == MOBILE_PREDICT_AUTO) {
        by_router = false; // the router has another input
    }
    if (!by_router) {
        count(layer, routed, n);
    }
    if (next_on) {
        std::lock_guard<std::mutex> lock(mutex);
        reached = layer;
        for (int32_t id : guessed[layer]) {
            n_predicted++;
            n_right += std::find(routed.begin(), routed.end(), id) != routed.end();
        }
        const mobile_store_layer next = layer + 1;
        // a block for multi-token prediction is no layer that comes next
        const bool has_next = store->layers.has(next) && store->model_layer(next).n < (int32_t) model.hparams.n_layer();
        if (has_next && (by_router ? cur && routers[next].weight && n_embd == n_embd_router : true)) {
            pending.layer    = next;
            pending.pass     = pass;
            pending.now      = now;
            pending.n_tokens = n;
            pending.k        = (int32_t) (k > 0 ? std::min<int64_t>(k, n_used) : n_used);
            pending.by_router = by_router;
            pending.cur.clear();
            for (int64_t t = 0; by_router && t < n; ++t) {
                pending.cur.insert(pending.cur.end(), cur + t*cur_stride, cur + t*cur_stride + n_embd);
            }
            pending.ids = routed;
            cv.notify_one();
        }
    }
    before       = routed;
    before_layer = layer;
}

//
// by the thread that guesses
//

void mobile_predictor::start() {
    if (thread.joinable()) {
        return;
    }
    guessed.resize(store->layers.size());
    following.resize(store->layers.size());
    uses.resize(store->layers.size());
    for (mobile_store_layer layer(0); uses.has(layer); ++layer) {
        uses[layer].resize(store->n_expert_of(layer), 0.0f);
    }
    thread = std::thread(&mobile_predictor::run, this);
}

// experts of the task's layer, best first, of each token as many as it will use
void mobile_predictor::guess(const task & t, std::vector<int32_t> & ids) {
    std::vector<float>   scores(store->n_expert_of(t.layer));
    std::vector<int32_t> order(scores.size());
    std::vector<int32_t> ranked; // [n_tokens][k]
    const size_t n = std::min<size_t>(t.k, order.size());

    for (int64_t token = 0; token < t.n_tokens; ++token) {
        if (t.by_router) {
            score_by_router(t, token, scores);
        } else {
            std::lock_guard<std::mutex> lock(mutex);
            score_by_transitions(t, token, scores);
        }
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
        ranked.insert(ranked.end(), order.begin(), order.begin() + n);
    }
    ids.clear();
    for (size_t rank = 0; rank < n; ++rank) {
        for (int64_t token = 0; token < t.n_tokens; ++token) {
            const int32_t id = ranked[token*n + rank];
            if (std::find(ids.begin(), ids.end(), id) == ids.end()) {
                ids.push_back(id);
            }
        }
    }
}

// the pending task, with the lock, and without it while it guesses
void mobile_predictor::serve(std::unique_lock<std::mutex> & lock) {
    task & t = running;
    std::swap(t, pending);
    pending.layer = mobile_store_layer();
    lock.unlock();

    guess(t, running_ids);
    std::vector<mobile_part> & parts = running_parts;
    parts.clear();
    for (int32_t id : running_ids) {
        for (int32_t s = 0; s < store->n_segments; ++s) {
            parts.push_back(store->part_of(id, s));
        }
    }
    lock.lock();
    if (t.pass != pass) {
        return;
    }
    taken.push_back({ t.layer, t.now, parts });
    if (reached + 1 == t.layer) { // in time
        guessed[t.layer] = running_ids;
    }
}

void mobile_predictor::run() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
        cv.wait(lock, [&] { return stop || !pending.layer.is_none(); });
        if (stop) {
            return;
        }
        try {
            serve(lock);
        } catch (...) {
            mobile_fail_caught();
            if (!lock.owns_lock()) {
                lock.lock();
            }
            snprintf(thrown, sizeof(thrown), "%s", mobile_last_error());
        }
    }
}

//
// counters
//

void mobile_predictor::get_counters(mobile_prefetch_counters & c) const {
    const mobile_ahead_counters now = store->counters_ahead();
    const uint64_t demanded = now.bytes_demanded - base.bytes_demanded;
    c = {};
    c.n_predicted  = n_predicted;
    c.n_right      = n_right;
    c.n_queued     = now.n_queued     - base.n_queued;
    c.n_used       = now.n_used       - base.n_used;
    c.n_wasted     = now.n_wasted     - base.n_wasted;
    c.n_unused     = now.n_queued - now.n_used - now.n_wasted;
    c.bytes_early  = now.bytes_early  - base.bytes_early;
    c.bytes_wasted = now.bytes_wasted - base.bytes_wasted;
    c.saved_us     = demanded == 0 ? 0 : (uint64_t) ((double) c.bytes_early*(now.stall_us - base.stall_us)/demanded);
    c.n_passes     = n_passes;
    c.n_passes_on  = n_passes_on;
    c.mode         = mode;
    c.by_router    = by_router;
    const auto permille = [](const mobile_trial & trial) { return (int32_t) std::lround(1000.0*trial.ratio()); };
    c.next_on         = is_on(next_trial);
    c.masked_on       = is_on(masked_trial);
    c.next_permille   = permille(next_trial);
    c.masked_permille = permille(masked_trial);
}

void mobile_predictor::reset_counters() {
    base        = store->counters_ahead();
    n_predicted = 0;
    n_right     = 0;
    n_passes    = 0;
    n_passes_on = 0;
}
