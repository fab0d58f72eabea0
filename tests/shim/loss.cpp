// mobile-loss.cpp for ctypes: the ladder on one token
#include "route/mobile-loss.cpp"

#include <cstring>

extern "C" {
    mobile_loss_params loss_defaults() { return mobile_loss_defaults(); }
    int    loss_is_on       (const mobile_loss_params * p) { return mobile_loss_is_on(*p); }
    int    loss_reads_scores(const mobile_loss_params * p) { return mobile_loss_reads_scores(*p); }
    double loss_entropy     (const float * weights, int k) { return mobile_loss_entropy(weights, k); }
    double loss_logit       (int kind, float score) { return mobile_score_logit((enum mobile_score) kind, score); }

    // buddies: [n_expert][n]. there: [n_expert], NULL: whole experts. times: when each was displaced last, changed. partial: [k]
    // counts: the sums' integers in their order, n_partial last.
    // returns how many displaced experts are in displaced [k][2]: expert, again
    int loss_apply(const mobile_loss_params * params, int k, int n_expert, const uint8_t * resident, const float * there, const int32_t * buddies, const float * shares, int n_buddies,
            float tau, int kind, double missing_share, double * times, int32_t * ids, float * weights, const float * probs, const float * scores, double time,
            uint8_t * partial, uint64_t * counts, double * moved, int32_t * displaced) {
        mobile_buddies b;
        b.n   = n_buddies;
        b.tau = tau;
        b.experts.assign(buddies, buddies + n_expert*n_buddies);
        b.shares .assign(shares,  shares  + n_expert*n_buddies);

        mobile_loss_layer layer;
        layer.params        = params;
        layer.k             = k;
        layer.n_expert      = n_expert;
        layer.resident      = resident;
        layer.there         = there;
        layer.buddies       = &b;
        layer.kind          = (enum mobile_score) kind;
        layer.missing_share = missing_share;
        layer.displaced     = times;

        mobile_loss_token token;
        token.ids     = ids;
        token.weights = weights;
        token.partial = partial;
        token.probs   = probs;
        token.scores  = scores;
        token.time    = time;

        mobile_loss_sums sums;
        std::vector<mobile_loss_displaced> found;
        mobile_loss_apply(layer, token, sums, found);
        memcpy(counts, &sums, 6*sizeof(uint64_t));
        counts[6] = sums.n_partial;
        *moved = sums.moved_weight;
        for (size_t i = 0; i < found.size(); ++i) {
            displaced[2*i]     = found[i].expert;
            displaced[2*i + 1] = found[i].again;
        }
        return (int) found.size();
    }

    // tokens that are computed together. ids, weights: [n_tokens][k]; ids are changed
    void loss_apply_together(const mobile_loss_params * params, int n_tokens, int k, int n_expert, const uint8_t * resident, int32_t * ids, float * weights,
            uint64_t * n_missing, uint64_t * n_dropped, double * moved) {
        mobile_loss_layer layer;
        layer.params   = params;
        layer.k        = k;
        layer.n_expert = n_expert;
        layer.resident = resident;

        std::vector<mobile_loss_token> tokens(n_tokens);
        for (int i = 0; i < n_tokens; ++i) {
            tokens[i].ids     = ids     + i*k;
            tokens[i].weights = weights + i*k;
        }
        mobile_loss_sums sums;
        mobile_loss_apply_together(layer, tokens, sums);
        *n_missing = sums.n_missing;
        *n_dropped = sums.n_dropped;
        *moved     = sums.moved_weight;
    }
}
