#include "route/mobile-loss.h"

#include <algorithm>
#include <cmath>
#include <numeric>

mobile_loss_params mobile_loss_defaults() {
    mobile_loss_params p = {};
    p.again_tokens    = 8;
    p.keep            = 2;
    p.substitutes_max = 3;
    p.tau             = 0.95f;
    p.beta            = 0.6f;
    p.margin          = 0.25f;
    p.prior          = 0.15f;
    p.admit           = 1;
    return p;
}

double mobile_score_logit(enum mobile_score kind, float score) {
    const double p = score;
    switch (kind) {
        case MOBILE_SCORE_LOGIT:    return p;
        case MOBILE_SCORE_SOFTMAX:  return std::log(p);
        case MOBILE_SCORE_SIGMOID:  return std::log(p/(1.0 - p));
        case MOBILE_SCORE_SOFTPLUS: return std::log(std::expm1(p*p));
    }
    return p;
}

double mobile_score_mass(enum mobile_score kind, float score) {
    return kind == MOBILE_SCORE_LOGIT ? std::exp((double) score) : (double) score;
}

bool mobile_loss_is_on(const mobile_loss_params & p) {
    const bool gated = p.substitutes_max > 0 && p.beta > 0.0f && p.tau < 1.0f;
    switch (p.substitute) {
        case MOBILE_SUBSTITUTE_BUDDY:
        case MOBILE_SUBSTITUTE_RANDOM: if (gated) return true; break;
        case MOBILE_SUBSTITUTE_LIVE:   if (p.substitutes_max > 0 && p.margin > 0.0f) return true; break;
        case MOBILE_SUBSTITUTE_PRIOR:  if (p.prior > 0.0f) return true; break;
        default: break;
    }
    return p.drop > 0.0f || p.little_on_miss > 0 || p.prompt_drop > 0.0f || p.partial > 0.0f;
}

bool mobile_loss_reads_scores(const mobile_loss_params & p) {
    return mobile_loss_is_on(p) && (p.substitute == MOBILE_SUBSTITUTE_LIVE || p.substitute == MOBILE_SUBSTITUTE_PRIOR ||
        (p.substitute == MOBILE_SUBSTITUTE_BUDDY && p.eta != 0.0f));
}

double mobile_loss_entropy(const float * weights, int32_t k) {
    double sum = 0.0;
    for (int32_t i = 0; i < k; ++i) {
        sum += weights[i];
    }
    double entropy = 0.0;
    for (int32_t i = 0; i < k && sum > 0.0; ++i) {
        const double p = weights[i]/sum;
        entropy -= p > 0.0 ? p*std::log(p) : 0.0;
    }
    return k > 1 ? std::min(entropy/std::log((double) k), 1.0) : 0.0;
}

namespace {

class ladder {
public:
    ladder(const mobile_loss_layer & layer, const mobile_loss_token & token, mobile_loss_sums & sums, std::vector<mobile_loss_displaced> & displaced) :
        layer(layer), token(token), sums(sums), displaced(displaced), params(*layer.params), k(layer.k),
        asked(token.weights, token.weights + layer.k), order(layer.k) {
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return asked[a] > asked[b]; });
        sum = std::accumulate(asked.begin(), asked.end(), 0.0);
    }

    void run() {
        sums.n_layers++;
        for (int32_t slot : order) {
            sums.n_missing += is_missing(slot);
        }
        if (params.substitute == MOBILE_SUBSTITUTE_PRIOR && params.prior > 0.0f) {
            choose_anew();
        }
        const bool substitutes = may_substitute();
        int32_t n = 0;
        // the lightest first
        for (int32_t rank = k - 1; rank >= params.keep; --rank) {
            const int32_t slot = order[rank];
            if (!is_missing(slot)) {
                continue;
            }
            if (is_enough(token.ids[slot])) {
                compute_part(slot);
            } else if (share(slot) < params.drop/k) {
                displace(slot, -1, sums.n_dropped);
            } else if (params.little_on_miss > 0 && rank >= params.little_on_miss) {
                if (is_again(token.ids[slot])) {
                    sums.n_again++;
                } else {
                    displace(slot, -1, sums.n_left_out);
                }
            } else if (substitutes && n < params.substitutes_max) {
                const int32_t other = stand_in(slot);
                if (other >= 0) {
                    displace(slot, other, sums.n_substituted);
                    n++;
                }
            }
        }
    }

private:
    const mobile_loss_layer & layer;
    const mobile_loss_token & token;
    mobile_loss_sums & sums;
    std::vector<mobile_loss_displaced> & displaced;
    const mobile_loss_params & params;
    const int32_t k;
    const std::vector<float> asked;  // [k] weights, before anything is changed
    std::vector<int32_t>     order;  // [k] slots, the heaviest first
    double sum = 0.0;

    bool is_missing(int32_t slot) const { return token.ids[slot] >= 0 && !layer.resident[token.ids[slot]]; }
    double share   (int32_t slot) const { return sum > 0.0 ? asked[slot]/sum : 1.0; }

    bool is_again(int32_t expert) const {
        const double ago = token.time - layer.displaced[expert];
        return ago > 0.0 && ago <= params.again_tokens;
    }

    bool is_used(int32_t expert) const { return std::find(token.ids, token.ids + k, expert) != token.ids + k; }
    bool is_free(int32_t expert) const { return expert >= 0 && layer.resident[expert] && !is_used(expert); }

    void displace(int32_t slot, int32_t other, uint64_t & count) {
        const int32_t expert = token.ids[slot];
        displaced.push_back({ expert, is_again(expert) });
        layer.displaced[expert] = token.time;
        sums.moved_weight += share(slot);
        token.ids[slot] = other;
        count++;
    }

    // whether its segments that are there stand for all of it
    bool is_enough(int32_t expert) const { return layer.there && params.partial > 0.0f && layer.there[expert] >= params.partial; }

    void compute_part(int32_t slot) {
        const int32_t expert = token.ids[slot];
        displaced.push_back({ expert, is_again(expert) });
        layer.displaced[expert] = token.time;
        sums.moved_weight += share(slot)*(1.0 - layer.there[expert]);
        token.partial[slot] = 1;
        sums.n_partial++;
    }

    bool may_substitute() const {
        switch (params.substitute) {
            case MOBILE_SUBSTITUTE_LIVE:
                return params.margin > 0.0f;
            case MOBILE_SUBSTITUTE_BUDDY:
            case MOBILE_SUBSTITUTE_RANDOM: {
                const double tau = params.tau < 0.0f ? (layer.buddies ? layer.buddies->tau : 1.0) : params.tau;
                return mobile_loss_entropy(asked.data(), k) > tau && layer.missing_share < params.beta;
            }
            default:
                return false;
        }
    }

    // the expert to compute in the place of a slot's; -1: none
    int32_t stand_in(int32_t slot) const {
        switch (params.substitute) {
            case MOBILE_SUBSTITUTE_BUDDY:  return buddy(token.ids[slot]);
            case MOBILE_SUBSTITUTE_LIVE:   return live (token.ids[slot]);
            case MOBILE_SUBSTITUTE_RANDOM: return any  (token.ids[slot]);
            default: return -1;
        }
    }

    int32_t buddy(int32_t expert) const {
        const mobile_buddies & b = *layer.buddies;
        double mean = 0.0, deviation = 0.0;
        if (params.eta != 0.0f) {
            standardise(mean, deviation);
        }
        int32_t best = -1;
        double  most = 0.0;
        for (int32_t i = 0; i < b.n; ++i) {
            const int32_t other = b.experts[(size_t) expert*b.n + i];
            if (!is_free(other)) {
                continue;
            }
            const double z = params.eta != 0.0f && deviation > 0.0 ? (mobile_score_logit(layer.kind, token.probs[other]) - mean)/deviation : 0.0;
            const double psi = b.shares[(size_t) expert*b.n + i]*(1.0 + params.eta*z);
            if (best < 0 || psi > most) {
                best = other;
                most = psi;
            }
        }
        return best;
    }

    // of the router's logits
    void standardise(double & mean, double & deviation) const {
        double squares = 0.0;
        int32_t n = 0;
        for (int32_t e = 0; e < layer.n_expert; ++e) {
            const double logit = mobile_score_logit(layer.kind, token.probs[e]);
            if (std::isfinite(logit)) {
                mean    += logit;
                squares += logit*logit;
                n++;
            }
        }
        mean /= std::max(n, 1);
        deviation = std::sqrt(std::max(squares/std::max(n, 1) - mean*mean, 0.0));
    }

    int32_t live(int32_t expert) const {
        int32_t best = -1;
        for (int32_t e = 0; e < layer.n_expert; ++e) {
            if (is_free(e) && std::isfinite(token.scores[e]) && (best < 0 || token.scores[e] > token.scores[best])) {
                best = e;
            }
        }
        return best >= 0 && is_near(best, expert) ? best : -1;
    }

    // whether the router likes it nearly as much, by margin of the other's probability. with a bias by what it chooses by
    bool is_near(int32_t expert, int32_t other) const {
        const double p = mobile_score_mass(layer.kind, token.probs[other]);
        if (token.scores == token.probs) {
            return mobile_score_mass(layer.kind, token.probs[expert]) >= (1.0 - params.margin)*p;
        }
        return token.scores[expert] >= token.scores[other] - params.margin*p;
    }

    // the control of an experiment: the same choice again for the same token and expert
    int32_t any(int32_t expert) const {
        std::vector<int32_t> free;
        for (int32_t e = 0; e < layer.n_expert; ++e) {
            if (is_free(e)) {
                free.push_back(e);
            }
        }
        uint64_t x = ((uint64_t) token.time + 1)*0x9e3779b97f4a7c15u + (uint64_t) (expert + 1)*0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 30))*0x94d049bb133111ebu;
        return free.empty() ? -1 : free[(x ^ (x >> 31)) % free.size()];
    }

    // Cache-Prior: the top-k of scores that favour residents; of the weights the true scores decide
    void choose_anew() {
        const bool biased = token.scores != token.probs;
        std::vector<double> z(layer.n_expert);
        double low = INFINITY, high = -INFINITY;
        for (int32_t e = 0; e < layer.n_expert; ++e) {
            z[e] = biased ? token.scores[e] : mobile_score_logit(layer.kind, token.probs[e]);
            if (std::isfinite(z[e])) {
                low  = std::min(low,  z[e]);
                high = std::max(high, z[e]);
            }
        }
        std::vector<int32_t> slots; // that may change, the lightest first
        for (int32_t rank = k - 1; rank >= params.keep; --rank) {
            if (token.ids[order[rank]] >= 0) {
                slots.push_back(order[rank]);
            }
        }
        std::vector<int32_t> before;
        for (int32_t slot : slots) {
            before.push_back(token.ids[slot]);
        }
        std::vector<int32_t> found;
        for (int32_t e = 0; e < layer.n_expert; ++e) {
            const bool stays = is_used(e) && std::find(before.begin(), before.end(), e) == before.end();
            if (!stays && std::isfinite(z[e])) {
                z[e] += layer.resident[e] ? params.prior*(high - low) : 0.0;
                found.push_back(e);
            }
        }
        // of equals the router's own choice first
        std::stable_sort(found.begin(), found.end(), [&](int32_t a, int32_t b) {
            return z[a] != z[b] ? z[a] > z[b] : is_used(a) > is_used(b);
        });
        found.resize(std::min(found.size(), slots.size()));

        std::vector<int32_t> fresh;
        for (int32_t e : found) {
            if (!is_used(e)) {
                fresh.push_back(e);
            }
        }
        const int32_t heaviest = order[0];
        const double  unit     = asked[heaviest]/mobile_score_mass(layer.kind, token.probs[token.ids[heaviest]]);
        for (size_t i = 0, next = 0; i < slots.size() && next < fresh.size(); ++i) {
            if (std::find(found.begin(), found.end(), before[i]) == found.end()) {
                const int32_t other = fresh[next++];
                displace(slots[i], other, sums.n_substituted);
                token.weights[slots[i]] = (float) (unit*mobile_score_mass(layer.kind, token.probs[other]));
            }
        }
    }
};

} // namespace

void mobile_loss_apply_together(const mobile_loss_layer & layer, const std::vector<mobile_loss_token> & tokens, mobile_loss_sums & sums) {
    const mobile_loss_params & p = *layer.params;
    if (p.prompt_drop <= 0.0f || tokens.size() < 2) {
        return;
    }
    const int32_t k = layer.k;
    std::vector<double>  weight(layer.n_expert, 0.0);
    std::vector<uint8_t> kept  (layer.n_expert, 0);
    std::vector<int32_t> order (k);
    double sum = 0.0;
    for (const mobile_loss_token & token : tokens) {
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return token.weights[a] > token.weights[b]; });
        for (int32_t rank = 0; rank < k; ++rank) {
            const int32_t expert = token.ids[order[rank]];
            if (expert >= 0) {
                weight[expert] += token.weights[order[rank]];
                sum            += token.weights[order[rank]];
                kept  [expert] |= rank < p.keep;
            }
        }
    }
    for (const mobile_loss_token & token : tokens) {
        const double of_token = std::accumulate(token.weights, token.weights + k, 0.0);
        for (int32_t slot = 0; slot < k; ++slot) {
            const int32_t expert = token.ids[slot];
            if (expert >= 0 && !layer.resident[expert] && !kept[expert] && weight[expert] < p.prompt_drop*sum) {
                sums.n_missing++; // no longer asked for where the others are counted
                sums.n_dropped++;
                sums.moved_weight += of_token > 0.0 ? token.weights[slot]/of_token : 0.0;
                token.ids[slot] = -1;
            }
        }
    }
}

void mobile_loss_apply(const mobile_loss_layer & layer, const mobile_loss_token & token, mobile_loss_sums & sums, std::vector<mobile_loss_displaced> & displaced) {
    ladder(layer, token, sums, displaced).run();
}
