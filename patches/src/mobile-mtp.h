// mobile-mtp.h - drafts by a model's own block for multi-token prediction (NextN, MTP): a part of the C API, beside mobile.h.
//
// Mechanism: a model that was loaded with llama_model_params.load_mtp has such blocks behind its layers. A context of type
// LLAMA_CONTEXT_TYPE_MTP, with the model's own one as ctx_other, runs them: from a token, and the state that the model was left
// in at the token before it, come the logits of the next token, and a state for the token after. llama-ext.h has these calls in
// C++, and calls such states nextn embeddings.
// Invariant: a block's experts are the store's like any layer's; its passes are no part of the text, take back no use of it,
// and are as old as the text is.
// Limits: what llama.cpp asserts of a model's blocks ends the process: mobile_mtp_try_file() is for a child.

#pragma once

#include "llama.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// whether the passes to come leave states beside logits, of each token or only of those that have logits. of the model's own
// context: its last layer is computed for the tokens that have them, so that the last digits of a prompt's logits may change
LLAMA_API int32_t mobile_mtp_set_states(struct llama_context * ctx, bool on, bool only_outputs);

// of the last decode. first, n: tokens in the order of its batch. states: [n][llama_model_n_embd_out()]
LLAMA_API int32_t mobile_mtp_get_states(struct llama_context * ctx, int32_t first, int32_t n, float * states);

// llama_decode() of tokens with a state each: batch.token and batch.embd, [n_tokens][llama_model_n_embd_out()]. block: which of
// llama_model_n_layer_nextn(). *result is what llama_decode() returned
LLAMA_API int32_t mobile_mtp_decode(struct llama_context * ctx, struct llama_batch batch, int32_t block, int32_t * result);

// as mobile_try_file() (mobile.h), and runs the file's blocks. MOBILE_ERR_STATE: it has none, or this llama.cpp has no graph of them
LLAMA_API int32_t mobile_mtp_try_file(const char * path);

#ifdef __cplusplus
}
#endif
