#include "mobile-mtp.h"

#include "api/mobile-context-of.h"

#include "mobile-error.h"

#include "llama-context.h"
#include "llama-ext.h"

#include <cstring>
#include <string>

int32_t mobile_mtp_set_states(struct llama_context * ctx, bool on, bool only_outputs) {
    return mobile_guard([&] {
        mobile_require(ctx, "states need a context");
        llama_set_embeddings_nextn(ctx, on, only_outputs);
        return MOBILE_OK;
    });
}

int32_t mobile_mtp_get_states(struct llama_context * ctx, int32_t first, int32_t n, float * states) {
    return mobile_guard([&] {
        mobile_require(ctx && states && first >= 0 && n >= 0, "states need a context, and room for them");
        const size_t n_embd = llama_model_n_embd_out(llama_get_model(ctx));
        for (int32_t i = 0; i < n; ++i) {
            const float * state = llama_get_embeddings_nextn_ith(ctx, first + i);
            if (!state) {
                mobile_throw(MOBILE_ERR_STATE, "the last decode left no state of its token " + std::to_string(first + i));
            }
            memcpy(states + i*n_embd, state, n_embd*sizeof(float));
        }
        return MOBILE_OK;
    });
}

// its passes come between those of the text, and count as made at the same time
static void go_along(struct llama_context & ctx) {
    mobile_context * own = ctx.get_cparams().mobile.get();
    if (!own) {
        return;
    }
    own->is_aside = true;
    const struct llama_context * other = llama_get_ctx_other(&ctx);
    if (other && other->get_cparams().mobile) {
        own->pass.time = other->get_cparams().mobile->pass.time;
    }
}

int32_t mobile_mtp_decode(struct llama_context * ctx, struct llama_batch batch, int32_t block, int32_t * result) {
    return mobile_guard([&] {
        mobile_require(ctx && result, "a decode needs a context");
        mobile_require(ctx->get_cparams().ctx_type == LLAMA_CONTEXT_TYPE_MTP, "this is no context of a block for multi-token prediction");
        const int32_t n = batch.n_tokens;
        mobile_require(n > 0 && batch.token && batch.embd && batch.pos, "a decode needs tokens, their states and their places");
        mobile_require(n <= (int32_t) llama_n_batch(ctx), "a batch of " + std::to_string(n) + " tokens is more than the context takes at once");
        const struct llama_model * model = llama_get_model(ctx);
        mobile_require(block >= 0 && block < llama_model_n_layer_nextn(model), "the model has no block " + std::to_string(block) + " for multi-token prediction");
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        const int32_t n_ctx   = (int32_t) llama_n_ctx(ctx);
        for (int32_t i = 0; i < n; ++i) {
            mobile_require(batch.token[i] >= 0 && batch.token[i] < n_vocab, "token " + std::to_string(batch.token[i]) + " is not in the vocabulary");
            mobile_require(batch.pos[i] >= 0 && batch.pos[i] < n_ctx, "a position lies beyond the context of " + std::to_string(n_ctx));
        }
        go_along(*ctx);
        llama_set_nextn_layer_offset(ctx, block);
        *result = llama_decode(ctx, batch);
        return MOBILE_OK;
    });
}
