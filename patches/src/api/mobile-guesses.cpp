// mobile-guesses.cpp - tokens that may turn out to be none of the text: a part of the C API.

#include "api/mobile-context-of.h"

int32_t mobile_set_guessed(struct llama_context * ctx, int32_t guessed) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(guessed >= MOBILE_GUESSED_NONE && guessed <= MOBILE_GUESSED_SOURCE, "unknown kind of passes");
        m.guesses.kind = (enum mobile_guessed) guessed;
        return MOBILE_OK;
    });
}

int32_t mobile_refuse(struct llama_context * ctx, const int32_t * tokens, int32_t n) {
    return mobile_guard([&] {
        mobile_context & m = mobile_context_of(ctx);
        mobile_require(n >= 0 && (tokens || n == 0), "tokens must be their places in the last batch");
        mobile_require(m.guesses.refuse(tokens, n), "the last pass has no such token, or was not to keep what its tokens asked for");
        m.guesses.settle(*m.store, m.slots.get());
        return MOBILE_OK;
    });
}
