#include "route/mobile-observe-little.h"

#include "route/mobile-context.h"
#include "route/mobile-kept.h"

#include "ggml.h"

#include <cstdio>

// the layer whose experts t holds, weighted: [n_embd, K, T]; -1: none
static int32_t weighted_layer(const ggml_tensor * t) {
    int il = -1;
    // the input of experts that are weighted before them has the same name
    const bool is_weighted = t->op == GGML_OP_MUL && t->src[0]->op != GGML_OP_REPEAT && sscanf(t->name, "ffn_moe_weighted-%d", &il) == 1;
    return is_weighted && t->type == GGML_TYPE_F32 ? il : -1;
}

bool mobile_little_observer::wants(const ggml_tensor * t) const {
    const mobile_model_layer il(ctx ? weighted_layer(t) : -1);
    // of the model's own layers
    return il.n >= 0 && il.n < ctx->n_layer && ctx->routes[il].once && ctx->routes[il].n_used == t->ne[1];
}

void mobile_little_observer::add(const ggml_tensor * t, const char * experts, const char * weights) {
    const mobile_model_layer il(weighted_layer(t));
    const mobile_route & route = ctx->routes[il];
    const ggml_tensor  * w     = t->src[1]; // [1, K, T]
    const int64_t n_embd = t->ne[0];
    const int64_t n_used = t->ne[1];

    std::vector<float> own(n_used), big(n_embd), little(n_embd);
    for (int64_t token = 0; token < t->ne[2]; ++token) {
        float sum_all = 0.0f;
        for (int64_t rank = 0; rank < n_used; ++rank) {
            own[rank] = *(const float *) (weights + rank*w->nb[1] + token*w->nb[2]);
            sum_all  += own[rank];
        }
        const auto add_rank = [&](std::vector<float> & sum, int64_t rank) {
            const float * row = (const float *) (experts + rank*t->nb[1] + token*t->nb[2]);
            for (int64_t i = 0; i < n_embd; ++i) {
                sum[i] += row[i];
            }
        };
        big.assign(n_embd, 0.0f);
        for (int64_t rank = 0; rank < n_used; ++rank) {
            add_rank(big, rank);
        }
        const std::vector<int64_t> order = mobile_kept_order(own.data(), n_used, route.ranked);
        for (size_t number = 0; number < ways.size(); ++number) {
            const way & as = ways[number];
            mobile_little_sums & s = sums[{ il.n, (int32_t) number }];
            for (std::vector<double> * v : { &s.big, &s.big2, &s.little, &s.little2 }) {
                v->resize(n_embd);
            }
            float sum_kept = 0.0f;
            little.assign(n_embd, 0.0f);
            for (int64_t i = 0; i < as.k && i < n_used; ++i) {
                add_rank(little, order[i]);
                sum_kept += own[order[i]];
            }
            const bool takes_over = route.renormalise && as.k < n_used && sum_kept != 0.0f;
            const float factor = takes_over ? sum_all/mobile_kept_divisor(own.data(), n_used, sum_kept, as.mass) : 1.0f;
            for (int64_t i = 0; i < n_embd; ++i) {
                const double x = little[i]*factor;
                s.big    [i] += big[i];
                s.big2   [i] += (double) big[i]*big[i];
                s.little [i] += x;
                s.little2[i] += x*x;
            }
            s.n_tokens++;
        }
    }
}
