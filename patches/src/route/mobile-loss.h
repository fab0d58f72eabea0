// mobile-loss.h - the ladder of lossy rules: what becomes of an expert that a token asks for and that is missing.
//
// Mechanism: one token in one layer, after the router's top-k and before anything is read. Missing is what would have to be
// moved first: read from the file, or uploaded to a device that fetches its misses. Rules in rising order: `prior` chooses
// anew, then each missing expert is dropped, left out, or replaced by one that is there; what no rule takes is read. Of
// tokens that are computed together, as a prompt's, `prompt_drop` drops an expert for all of them before. An id
// of -1 means "not computed"; whether the kept weights take over the sum is the model's affair (the route op's).
// Invariants: with every threshold at 0 ids and weights are untouched; the `keep` heaviest of a token are never touched; a
// token's experts stay distinct; nothing here waits or asks for memory beyond its own scratch.
// Sources: BuddyMoE arXiv 2511.10054, Cache-Prior arXiv 2412.00099, SMoE arXiv 2508.18983 (live).

#pragma once

#include "mobile.h"

#include <cstdint>
#include <vector>

// what a layer's scores are, to get the router's logits back
enum mobile_score : int32_t {
    MOBILE_SCORE_LOGIT,    // as they are
    MOBILE_SCORE_SOFTMAX,
    MOBILE_SCORE_SIGMOID,
    MOBILE_SCORE_SOFTPLUS, // the root of the softplus
};

// the router's logit of a score; of a softmax up to a constant
double mobile_score_logit(enum mobile_score kind, float score);
// what weights are proportional to
double mobile_score_mass (enum mobile_score kind, float score);

// the experts that may stand in for others of one layer
struct mobile_buddies {
    int32_t              n = 0;    // of each expert
    std::vector<int32_t> experts;  // [n_expert][n] the best first; -1: no more
    std::vector<float>   shares;   // [n_expert][n] q(j|i)
    float                tau = 1.0f; // the layer's own threshold of the entropy
};

// one layer in one pass
struct mobile_loss_layer {
    const mobile_loss_params * params = nullptr;
    int32_t k        = 0;                        // the model's top-k
    int32_t n_expert = 0;
    const uint8_t * resident = nullptr;          // [n_expert]
    const float * there = nullptr;               // [n_expert] share of its segments that are; NULL: no part of an expert runs
    const mobile_buddies * buddies = nullptr;    // for MOBILE_SUBSTITUTE_BUDDY
    enum mobile_score kind = MOBILE_SCORE_LOGIT; // of probs
    double missing_share = 0.0;                  // of the distinct experts that its tokens ask for
    double * displaced = nullptr;                // [n_expert] when each was displaced last, in tokens; changed
};

// one token of it
struct mobile_loss_token {
    int32_t * ids     = nullptr;       // [k] -1: not computed; changed
    float   * weights = nullptr;       // [k] of the top-k, those not computed as well; only `prior` changes them
    uint8_t * partial = nullptr;       // [k] 1: only with the segments that are there; changed if layer.there is set
    const float * probs  = nullptr;    // [n_expert] of which the weights were made; NULL: not connected
    const float * scores = nullptr;    // [n_expert] by which the top-k was chosen: probs, or those with a bias, -inf
                                       // where a whole group is out
    double    time = 0.0;              // in tokens
    int32_t   index = -1;              // in the batch of the decode; -1: not known
};

// what was displaced for one token
struct mobile_loss_displaced {
    int32_t expert = -1;
    bool    again  = false; // for the second time within params.again_tokens
};

// sums over tokens and layers
struct mobile_loss_sums {
    uint64_t n_layers      = 0; // (token, layer) pairs
    uint64_t n_missing     = 0; // experts asked for that were missing, the heaviest included
    uint64_t n_dropped     = 0;
    uint64_t n_left_out    = 0; // by little_on_miss
    uint64_t n_substituted = 0;
    uint64_t n_again       = 0; // that little_on_miss had read at the second request
    double   moved_weight  = 0.0; // share of a token's weight that was dropped, left out or substituted, summed over layers
    uint64_t n_partial     = 0;
};

// every rule off
mobile_loss_params mobile_loss_defaults();
// whether params can change anything
bool mobile_loss_is_on       (const mobile_loss_params & params);
// ... and look at the router's scores
bool mobile_loss_reads_scores(const mobile_loss_params & params);

// entropy of a token's weights over ln k: 1 where all are alike, 0 for one expert
double mobile_loss_entropy(const float * weights, int32_t k);

// applies prompt_drop to tokens that are computed together; one alone is left as it is
void mobile_loss_apply_together(const mobile_loss_layer & layer, const std::vector<mobile_loss_token> & tokens, mobile_loss_sums & sums);
// applies the other rules to a token. displaced: appended to
void mobile_loss_apply(const mobile_loss_layer & layer, const mobile_loss_token & token, mobile_loss_sums & sums, std::vector<mobile_loss_displaced> & displaced);
