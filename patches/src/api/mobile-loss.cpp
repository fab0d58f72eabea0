// mobile-loss.cpp - the ladder's part of the C API.

#include "api/mobile-context-of.h"

#include "mobile-error.h"
#include "route/mobile-loss.h"

#include "llama-context.h"

#include <cmath>

struct mobile_loss_params mobile_loss_default_params(void) {
    return mobile_loss_defaults();
}

static void check_within(float value, float low, float high, const char * name) {
    mobile_require(value >= low && value <= high, std::string(name) + " must be " + std::to_string(low) + " to " + std::to_string(high));
}

static void check(const struct mobile_loss_params & p, int32_t n_used) {
    check_within(p.drop,   0.0f, (float) n_used, "drop");
    check_within(p.tau,   -1.0f, 1.0f,           "tau");
    check_within(p.beta,   0.0f, INFINITY,       "beta");
    check_within(p.eta,    0.0f, INFINITY,       "eta");
    check_within(p.margin, 0.0f, 1.0f,           "margin");
    check_within(p.prior, 0.0f, 0.3f,           "prior"); // more of it makes fluent text that is wrong
    check_within(p.prompt_drop, 0.0f, 1.0f,      "prompt_drop");
    check_within(p.partial, 0.0f, 1.0f,         "partial");
    mobile_require(p.substitute >= MOBILE_SUBSTITUTE_OFF && p.substitute <= MOBILE_SUBSTITUTE_RANDOM, "unknown rule of substitution");
    mobile_require(p.little_on_miss >= 0 && p.again_tokens >= 0 && p.keep >= 0 && p.substitutes_max >= 0 && p.admit >= 0,
        "the ladder's counts must not be negative");
    mobile_require(p.keep > 0 || p.substitute != MOBILE_SUBSTITUTE_PRIOR, "prior keeps at least the heaviest expert of a token");
}

// after a change of what the op reads. a graph that differs in that alone keeps the allocator's plan of the last one, in
// which the scores' memory is used again before the op, so it is planned anew
static void connect_scores(struct llama_context & ctx, mobile_context & m, const mobile_loss_params & before) {
    try {
        mobile_plan_anew(ctx, m);
    } catch (const std::exception & e) {
        m.rules.set_loss(before);
        mobile_throw(MOBILE_ERR_MEMORY, std::string("no memory for a graph that keeps the router's scores: ") + e.what());
    }
}

int32_t mobile_set_loss(struct llama_context * ctx, const struct mobile_loss_params * params) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        const mobile_loss_params p = params ? *params : mobile_loss_defaults();
        check(p, m.n_expert_used);
        const bool by_buddies = mobile_loss_is_on(p) && (p.substitute == MOBILE_SUBSTITUTE_BUDDY || (p.substitute == MOBILE_SUBSTITUTE_RANDOM && p.tau < 0.0f));
        if (by_buddies && !m.rules.has_buddies()) {
            return mobile_fail(MOBILE_ERR_STATE, "buddies have not been set");
        }
        if (m.rules.is_replay() && mobile_loss_reads_scores(p)) {
            return mobile_fail(MOBILE_ERR_STATE, "a replay takes the place of the router's scores, which these rules choose by");
        }
        const mobile_loss_params before = m.rules.loss_params();
        const bool changes = mobile_loss_reads_scores(p) != m.rules.reads_scores();
        m.rules.set_loss(p);
        if (changes) {
            connect_scores(*ctx, m, before);
        }
        return MOBILE_OK;
    });
}

int32_t mobile_set_lossy(struct llama_context * ctx, bool on) {
    return mobile_guard([&] {
        mobile_context_of(ctx).rules.set_lossy(on);
        return MOBILE_OK;
    });
}

int32_t mobile_set_batch_lossy(struct llama_context * ctx, const int32_t * lossy, int32_t n_tokens) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(n_tokens > 0 && lossy, "lossy must have an entry per token");
        for (int32_t i = 0; i < n_tokens; ++i) {
            mobile_require(lossy[i] == 0 || lossy[i] == 1, "lossy must be 0 or 1");
        }
        m.rules.set_lossy(lossy, n_tokens);
        return MOBILE_OK;
    });
}

int32_t mobile_set_buddies(struct llama_context * ctx, const int32_t * experts, const float * shares, const float * tau, int32_t n_layer, int32_t n_expert, int32_t n) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(experts && shares && tau && n > 0 && n_layer == m.n_layer && n_expert == m.store->n_expert_max(),
            "buddies need [" + std::to_string(m.n_layer) + "][" + std::to_string(m.store->n_expert_max()) + "][n] experts and shares for this model");
        mobile_by<mobile_model_layer, mobile_buddies> lists(n_layer);
        const size_t size = (size_t) n_expert*n;
        for (int32_t row = 0; row < n_layer; ++row) {
            const size_t begin = row*size;
            mobile_buddies & b = lists[mobile_model_layer(row)];
            b.n   = n;
            b.tau = tau[row];
            b.experts.assign(experts + begin, experts + begin + size);
            b.shares .assign(shares  + begin, shares  + begin + size);
            for (size_t i = 0; i < size; ++i) {
                mobile_require(b.experts[i] >= -1 && b.experts[i] < n_expert && b.shares[i] >= 0.0f && std::isfinite(b.shares[i]),
                    "layer " + std::to_string(row) + " of this model cannot have buddy " + std::to_string(b.experts[i]));
            }
        }
        m.rules.set_buddies(std::move(lists));
        return MOBILE_OK;
    });
}

int32_t mobile_set_loss_residency(struct llama_context * ctx, const uint8_t * resident, size_t n_resident) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        const size_t n          = (size_t) m.n_layer*m.store->n_expert_max();
        const size_t n_segments = m.store->n_segments;
        mobile_require(!resident || n_resident == n || n_resident == n*n_segments, "resident must have n_layer * n_expert entries, or as many for each segment");
        std::vector<uint8_t> parts(resident ? n*n_segments : 0);
        for (size_t i = 0; i < parts.size(); ++i) {
            parts[i] = resident[n_resident == parts.size() ? i : i/n_segments];
        }
        m.rules.set_residency(std::move(parts));
        return MOBILE_OK;
    });
}

int32_t mobile_get_loss_counters(const struct llama_context * ctx, struct mobile_loss_counters * counters) {
    return mobile_guard([&] {
        const mobile_context & m = mobile_context_of(ctx);
        m.loss.get(*m.store, *counters);
        return MOBILE_OK;
    });
}

int32_t mobile_get_token_loss(const struct llama_context * ctx, int32_t i, struct mobile_loss_counters * counters) {
    return mobile_guard([&] {
        mobile_require(i >= 0, "a token of a batch has an index of at least 0");
        mobile_context_of(ctx).loss.get_of_token(i, *counters);
        return MOBILE_OK;
    });
}
