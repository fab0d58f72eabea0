// mobile-predict-score.cpp - the two guesses at a layer's experts: by its router, and by what followed what.

#include "route/mobile-predict.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// transitions: what an expert's share in its layer weighs against what was counted, in tokens; and how much of
// a share that all the experts before have in common is taken back for each after the first
static constexpr float PRIOR_TOKENS = 2.0f;
static constexpr float PRIOR_COMMON = 0.5f;

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
    for (mobile_store_layer layer(0); routers.has(layer); ++layer) {
        const size_t il = store->model_layer(layer).n;
        if (il >= model.layers.size()) {
            continue;
        }
        const auto & tensors = model.layers[il];
        const ggml_tensor * w = tensors.ffn_gate_inp;
        router & r = routers[layer];
        // gemma 4 scales what the router sees by a weight of its own
        if (w && !tensors.ffn_gate_inp_s && w->ne[1] == store->n_expert_of(layer) && ggml_is_contiguous(w)) {
            n_embd_router = w->ne[0];
            r.weight = float_values(w, r.own[0]);
            r.bias   = float_values(tensors.ffn_gate_inp_b, r.own[1]);
            r.select = float_values(tensors.ffn_exp_probs_b, r.own[2]);
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
void mobile_predictor::count(mobile_store_layer layer, const std::vector<int32_t> & ids, int64_t n_tokens) {
    const int64_t n_used   = (int64_t) ids.size()/n_tokens;
    const size_t  n_expert = store->n_expert_of(layer);

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
    n_counted += layer.n == 0 ? (float) n_tokens : 0.0f;
    if (layer.n == 0 || before_layer + 1 != layer || before.size() % n_tokens != 0) {
        return;
    }
    const int64_t n_before = (int64_t) before.size()/n_tokens;
    auto & table = following[layer];
    table.resize(store->n_expert_of(before_layer)*n_expert, 0);
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
