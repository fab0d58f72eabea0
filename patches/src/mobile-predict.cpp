#include "mobile-predict.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// how much a new pass moves what passes of its kind usually take
static constexpr double USUAL_STEP = 1.0/16;

// transitions: what an expert's share in its layer weighs against what was counted, in tokens; and how much of
// a share that all the experts before have in common is taken back for each after the first
static constexpr float PRIOR_TOKENS = 2.0f;
static constexpr float PRIOR_COMMON = 0.5f;

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
// routers
//

// the CPU's buffers of repacked weights cannot be read back
static bool is_readable(ggml_backend_buffer_t buffer) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buffer));
    return dev && ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU;
}

// values of t as float32: its own memory where it is that on the host, else a copy in `own`
static const float * float_values(const ggml_tensor * t, std::vector<float> & own) {
    if (!t) {
        return nullptr;
    }
    const bool on_host = t->data && t->buffer && ggml_backend_buffer_is_host(t->buffer);
    if (on_host && t->type == GGML_TYPE_F32) {
        return (const float *) t->data;
    }
    if (!t->buffer || (!on_host && !is_readable(t->buffer))) {
        return nullptr;
    }
    const ggml_type_traits * traits = ggml_get_type_traits(t->type);
    if (t->type != GGML_TYPE_F32 && !traits->to_float) {
        return nullptr;
    }
    std::vector<uint8_t> bytes(ggml_nbytes(t));
    ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
    own.resize(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        std::copy_n((const float *) bytes.data(), own.size(), own.data());
    } else {
        traits->to_float(bytes.data(), own.data(), (int64_t) own.size());
    }
    return own.data();
}

void mobile_predictor::load_routers() {
    if (routers_loaded) {
        return;
    }
    routers_loaded = true;
    routers.resize(store->layers.size());
    for (size_t i = 0; i < store->layers.size(); ++i) {
        const mobile_layer & l = store->layers[i];
        if (l.il >= (int32_t) model.layers.size()) {
            continue;
        }
        const auto & layer = model.layers[l.il];
        const ggml_tensor * w = layer.ffn_gate_inp;
        router & r = routers[i];
        // gemma 4 scales what the router sees by a weight of its own
        if (w && !layer.ffn_gate_inp_s && w->ne[1] == l.n_expert/store->n_segments && ggml_is_contiguous(w)) {
            n_embd_router = w->ne[0];
            r.weight = float_values(w, r.own[0]);
            r.bias   = float_values(layer.ffn_gate_inp_b, r.own[1]);
            r.select = float_values(layer.ffn_exp_probs_b, r.own[2]);
        }
    }
}

static float dot(const float * a, const float * b, int64_t n) {
    float sum[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            sum[j] += a[i + j]*b[i + j];
        }
    }
    float rest = 0.0f;
    for (; i < n; ++i) {
        rest += a[i]*b[i];
    }
    return std::accumulate(sum, sum + 16, rest);
}

void mobile_predictor::score_by_router(const task & t, int64_t token, std::vector<float> & scores) const {
    const router & r = routers[t.layer];
    const int64_t n_embd = (int64_t) t.cur.size()/t.n_tokens;
    const float * cur = t.cur.data() + token*n_embd;

    for (size_t e = 0; e < scores.size(); ++e) {
        scores[e] = dot(r.weight + e*n_embd, cur, n_embd) + (r.bias ? r.bias[e] : 0.0f);
    }
    if (r.select) {
        const float largest = *std::max_element(scores.begin(), scores.end());
        float sum = 0.0f;
        for (float s : scores) {
            sum += std::exp(s - largest);
        }
        for (size_t e = 0; e < scores.size(); ++e) {
            switch (gating) {
                case LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX:       scores[e] = std::exp(scores[e] - largest)/sum;        break;
                case LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID:       scores[e] = 1.0f/(1.0f + std::exp(-scores[e]));       break;
                case LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS: scores[e] = std::sqrt(std::log1p(std::exp(scores[e]))); break;
                default: break;
            }
            scores[e] += r.select[e];
        }
    }
}

//
// transitions
//

// with the lock
void mobile_predictor::score_by_transitions(const task & t, int64_t token, std::vector<float> & scores) const {
    const int64_t n_used = (int64_t) t.ids.size()/t.n_tokens;
    const auto & table = following[t.layer];

    std::fill(scores.begin(), scores.end(), 0.0f);
    if (table.empty()) {
        return;
    }
    int n = 0;
    for (int64_t rank = 0; rank < n_used; ++rank) {
        const int32_t id = t.ids[token*n_used + rank];
        if (id < 0) {
            continue;
        }
        const float     total = uses[t.layer - 1][id] + PRIOR_TOKENS;
        const uint16_t * row  = table.data() + (size_t) id*scores.size();
        for (size_t e = 0; e < scores.size(); ++e) {
            const float share = (uses[t.layer][e] + 0.05f)/(n_counted + 1.0f);
            scores[e] += std::log((row[e] + PRIOR_TOKENS*share)/total) - (n > 0 ? PRIOR_COMMON*std::log(share) : 0.0f);
        }
        n++;
    }
}

// tokens of which a layer's ids [n_tokens][n_used] are known, as are those of the layer before
void mobile_predictor::count(int32_t layer, const std::vector<int32_t> & ids, int64_t n_tokens) {
    const int64_t n_used   = (int64_t) ids.size()/n_tokens;
    const size_t  n_expert = store->layers[layer].n_expert/store->n_segments;

    std::lock_guard<std::mutex> lock(mutex);
    if (following.empty()) {
        following.resize(store->layers.size());
        uses.resize(store->layers.size());
    }
    uses[layer].resize(n_expert, 0.0f);
    for (int32_t id : ids) {
        if (id >= 0) {
            uses[layer][id] += 1.0f;
        }
    }
    n_counted += layer == 0 ? (float) n_tokens : 0.0f;
    if (layer == 0 || before_layer != layer - 1 || before.size() % n_tokens != 0) {
        return;
    }
    const int64_t n_before = (int64_t) before.size()/n_tokens;
    auto & table = following[layer];
    table.resize((store->layers[layer - 1].n_expert/store->n_segments)*n_expert, 0);
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t a = 0; a < n_before; ++a) {
            const int32_t from = before[t*n_before + a];
            for (int64_t b = 0; from >= 0 && b < n_used; ++b) {
                const int32_t to = ids[t*n_used + b];
                uint16_t & n = table[from*n_expert + (size_t) std::max(to, 0)];
                n += to >= 0 && n < UINT16_MAX;
            }
        }
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

bool mobile_predictor::begin_masked() {
    if (mode == MOBILE_PREFETCH_OFF || store->all_resident) {
        return false;
    }
    rerun     = true;
    masked_on = mode == MOBILE_PREFETCH_ON || masked_trial.on();
    return masked_on;
}

void mobile_predictor::begin_pass(int64_t n, int32_t k_used) {
    n_tokens = n;
    k        = k_used;
    next_on  = mode != MOBILE_PREFETCH_OFF && !store->all_resident && n <= N_TOKENS_MAX && (mode == MOBILE_PREFETCH_ON || next_trial.on());
    before_layer = -1;
    if (next_on) {
        start();
        std::lock_guard<std::mutex> lock(mutex);
        for (auto & ids : guessed) {
            ids.clear();
        }
    }
    start_us = ggml_time_us();
}

void mobile_predictor::end_pass(bool ok) {
    const double us = (double) std::max<int64_t>(ggml_time_us() - start_us, 1);
    const bool was_rerun = rerun;
    rerun = false;
    if (!ok || n_tokens > N_TOKENS_MAX || mode == MOBILE_PREFETCH_OFF || store->all_resident) {
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
    if (was_rerun && !next_trial.deciding()) {
        masked_trial.add(us/u);
    }
    next_trial.add(us/u);
}

void mobile_predictor::add_layer(int32_t layer, const std::vector<int32_t> & routed, int64_t n, const float * cur, int64_t n_embd,
        size_t cur_stride, const std::vector<uint8_t> & on_device, double now) {
    if (mode == MOBILE_PREFETCH_OFF || store->all_resident) {
        return;
    }
    const int64_t n_used = (int64_t) routed.size()/n;
    if (by_router && !cur && n <= N_TOKENS_MAX && asked == MOBILE_PREDICT_AUTO) {
        by_router = false; // the router has another input
    }
    if (!by_router) {
        count(layer, routed, n);
    }
    if (next_on && n <= N_TOKENS_MAX) {
        std::lock_guard<std::mutex> lock(mutex);
        for (int32_t id : guessed[layer]) {
            n_predicted++;
            n_right += std::find(routed.begin(), routed.end(), id) != routed.end();
        }
        const int32_t next = layer + 1;
        if (next < (int32_t) store->layers.size() && (by_router ? cur && routers[next].weight && n_embd == n_embd_router : true)) {
            pending.layer    = next;
            pending.seq      = store->sequence();
            pending.now      = now;
            pending.n_tokens = n;
            pending.k        = (int32_t) (k > 0 ? std::min<int64_t>(k, n_used) : n_used);
            pending.by_router = by_router;
            pending.cur.clear();
            for (int64_t t = 0; by_router && t < n; ++t) {
                pending.cur.insert(pending.cur.end(), cur + t*cur_stride, cur + t*cur_stride + n_embd);
            }
            pending.ids = routed;
            pending.on_device = on_device;
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
    for (size_t i = 0; i < store->layers.size(); ++i) {
        uses[i].resize(store->layers[i].n_expert/store->n_segments, 0.0f);
    }
    thread = std::thread(&mobile_predictor::run, this);
}

// experts of the task's layer, best first, of each token as many as it will use
void mobile_predictor::guess(const task & t, std::vector<int32_t> & ids) {
    std::vector<float>   scores(store->layers[t.layer].n_expert/store->n_segments);
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

void mobile_predictor::run() {
    std::unique_lock<std::mutex> lock(mutex);
    task t;
    std::vector<int32_t> ids;
    std::vector<int32_t> parts;
    for (;;) {
        cv.wait(lock, [&] { return stop || pending.layer >= 0; });
        if (stop) {
            return;
        }
        std::swap(t, pending);
        pending.layer = -1;
        lock.unlock();

        guess(t, ids);
        parts.clear();
        for (int32_t id : ids) {
            for (int32_t s = 0; s < store->n_segments; ++s) {
                const int32_t part = id*store->n_segments + s;
                if (t.on_device.empty() || !t.on_device[part]) {
                    parts.push_back(part);
                }
            }
        }
        store->hint(t.layer, parts.data(), parts.size(), t.now, t.seq);

        lock.lock();
        if (store->sequence() == t.seq) {
            guessed[t.layer] = ids;
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
    c.next_on      = mode == MOBILE_PREFETCH_ON || (mode == MOBILE_PREFETCH_AUTO && next_trial.on());
    c.masked_on    = mode == MOBILE_PREFETCH_ON || (mode == MOBILE_PREFETCH_AUTO && masked_trial.on());
    c.next_permille   = (int32_t) std::lround(1000.0*next_trial.ratio());
    c.masked_permille = (int32_t) std::lround(1000.0*masked_trial.ratio());
}

void mobile_predictor::reset_counters() {
    base        = store->counters_ahead();
    n_predicted = 0;
    n_right     = 0;
    n_passes    = 0;
    n_passes_on = 0;
}
