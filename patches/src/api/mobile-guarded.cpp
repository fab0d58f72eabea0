// mobile-guarded.cpp - calls of llama.cpp that a request or a file can make throw or abort: what they assert is checked
// first, what they throw becomes a status.

#include "api/mobile-context-of.h"

#include "mobile-error.h"

#include "llama-context.h"
#include "llama-model.h"

#include <cmath>
#include <string>
#include <vector>

static void check_token(const struct llama_vocab * vocab, llama_token token) {
    const int32_t n = llama_vocab_n_tokens(vocab);
    if (token < 0 || token >= n) {
        mobile_throw(MOBILE_ERR_ARGUMENT, "token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(n));
    }
}

static void check_vocabulary(const struct llama_vocab * vocab) {
    mobile_require(llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE, "the model has no tokenizer: give it token ids, and take them");
}

// what the tokenizers assert of the tokens that they add
static void check_added(const struct llama_vocab * vocab) {
    const bool is_wpm = llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_WPM;
    const bool bos    = is_wpm || llama_vocab_get_add_bos(vocab);
    const bool sep    = is_wpm || llama_vocab_get_add_sep(vocab);
    if ((bos && llama_vocab_bos(vocab) == LLAMA_TOKEN_NULL) || (sep && llama_vocab_sep(vocab) == LLAMA_TOKEN_NULL) ||
        (llama_vocab_get_add_eos(vocab) && llama_vocab_eos(vocab) == LLAMA_TOKEN_NULL)) {
        mobile_throw(MOBILE_ERR_STATE, "the vocabulary adds a token to every text that it does not have");
    }
}

// llama.cpp answers with a count, negative where the room is too small, and INT32_MIN where no count can say it
static int32_t count(int32_t answer, int32_t * n) {
    if (answer == INT32_MIN) {
        return mobile_fail(MOBILE_ERR_ARGUMENT, "the text makes more tokens or bytes than can be counted");
    }
    *n = answer < 0 ? -answer : answer;
    return MOBILE_OK;
}

int32_t mobile_tokenize(const struct llama_vocab * vocab, const char * text, int32_t n_text, llama_token * tokens, int32_t n_max, bool add_special, bool parse_special, int32_t * n) {
    return mobile_guard([&] {
        mobile_require(vocab && text && n_text >= 0 && n_max >= 0 && (tokens || n_max == 0) && n, "tokenising needs a vocabulary, a text and room for its tokens");
        check_vocabulary(vocab);
        if (add_special) {
            check_added(vocab);
        }
        return count(llama_tokenize(vocab, text, n_text, tokens, n_max, add_special, parse_special), n);
    });
}

int32_t mobile_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * buffer, int32_t n_max, bool special, int32_t * n) {
    return mobile_guard([&] {
        mobile_require(vocab && buffer && n_max >= 0 && n, "a piece needs a vocabulary and room for its bytes");
        check_vocabulary(vocab);
        check_token(vocab, token);
        return count(llama_token_to_piece(vocab, token, buffer, n_max, 0, special), n);
    });
}

int32_t mobile_decode(struct llama_context * ctx, struct llama_batch batch, int32_t * result) {
    return mobile_guard([&] {
        mobile_require(ctx && result, "a decode needs a context");
        const int32_t n = batch.n_tokens;
        mobile_require(n > 0 && batch.token && !batch.embd, "a decode needs tokens");
        const bool causal = ctx->get_cparams().causal_attn;
        const int32_t n_max = (int32_t) (causal ? llama_n_batch(ctx) : llama_n_ubatch(ctx));
        mobile_require(n <= n_max, "a batch of " + std::to_string(n) + " tokens is more than the context takes at once, " + std::to_string(n_max));
        const struct llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
        const int64_t n_ctx = llama_n_ctx(ctx);
        for (int32_t i = 0; i < n; ++i) {
            check_token(vocab, batch.token[i]);
            mobile_require(!batch.pos || (batch.pos[i] >= 0 && batch.pos[i] < n_ctx), "a position lies beyond the context of " + std::to_string(n_ctx));
        }
        *result = llama_decode(ctx, batch);
        return MOBILE_OK;
    });
}

// the logits of output i, all of them numbers; +inf is none, -inf is a token that never comes
static const float * logits_of(struct llama_context * ctx, int32_t i, int32_t n) {
    const float * logits = llama_get_logits_ith(ctx, i);
    if (!logits) {
        mobile_throw(MOBILE_ERR_STATE, "there are no logits to sample from");
    }
    bool any = false;
    for (int32_t id = 0; id < n; ++id) {
        if (std::isnan(logits[id]) || logits[id] == INFINITY) {
            any = false;
            break;
        }
        any = any || logits[id] != -INFINITY;
    }
    if (!any) {
        mobile_throw(MOBILE_ERR_STATE, "the model computes no numbers (NaN or infinity): its weights or the numbers of its header are damaged");
    }
    return logits;
}

// as llama_sampler_sample, which asserts that something was chosen. ids [n_ids]; NULL: all of the vocabulary
static int32_t sample(struct llama_sampler * sampler, struct llama_context * ctx, int32_t i, const llama_token * ids, int32_t n_ids, llama_token * token) {
    const struct llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
    const int32_t n_vocab = llama_vocab_n_tokens(vocab);
    const float * logits  = logits_of(ctx, i, n_vocab);
    static thread_local std::vector<llama_token_data> candidates;
    candidates.resize(ids ? n_ids : n_vocab);
    for (int32_t k = 0; k < (int32_t) candidates.size(); ++k) {
        const llama_token id = ids ? ids[k] : k;
        check_token(vocab, id);
        candidates[k] = { id, logits[id], 0.0f };
    }
    llama_token_data_array array = { candidates.data(), candidates.size(), -1, false };
    llama_sampler_apply(sampler, &array);
    if (array.selected < 0 || array.selected >= (int64_t) array.size) {
        return mobile_fail(MOBILE_ERR_STATE, "the sampling settings leave no token to choose");
    }
    *token = array.data[array.selected].id;
    llama_sampler_accept(sampler, *token);
    return MOBILE_OK;
}

int32_t mobile_sample(struct llama_sampler * sampler, struct llama_context * ctx, int32_t i, llama_token * token) {
    return mobile_guard([&] {
        mobile_require(sampler && ctx && token, "sampling needs a sampler and a context");
        return sample(sampler, ctx, i, nullptr, 0, token);
    });
}

int32_t mobile_sample_among(struct llama_sampler * sampler, struct llama_context * ctx, int32_t i, const llama_token * ids, int32_t n_ids, llama_token * token) {
    return mobile_guard([&] {
        mobile_require(sampler && ctx && token, "sampling needs a sampler and a context");
        mobile_require(ids && n_ids > 0, "there are no tokens to choose among");
        return sample(sampler, ctx, i, ids, n_ids, token);
    });
}
