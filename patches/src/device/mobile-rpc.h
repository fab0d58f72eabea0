// mobile-rpc.h - what became of the RPC servers that contexts compute on.
//
// Invariant: a decode during which one of its servers was lost fails; see ggml-rpc-loss.h.
// Limits: the servers of a model are connected once, so after a loss the model must be loaded again.

#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// why a server of the context was lost; NULL while all are there, and at once for a context without any.
// waits for what the servers were asked to compute. the text is the calling thread's until its next call
LLAMA_API const char * mobile_rpc_error(struct llama_context * ctx);

// why a server of this process was last lost since mobile_rpc_clear_loss; NULL if none was
LLAMA_API const char * mobile_rpc_last_loss(void);
LLAMA_API void         mobile_rpc_clear_loss(void);

#ifdef __cplusplus
}
#endif
