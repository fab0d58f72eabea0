// mobile-try.cpp - a trial of a file's header: all that llama.cpp does with a model, on weights that are zeros; and what
// its contexts' compute buffers take, by graphs that are made and never run.

#include "api/mobile-context-of.h"

#include "mobile-error.h"
#include "mobile-mtp.h"
#include "store/mobile-load.h"

#include "llama-context.h"
#include "llama-ext.h"

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

static const uint32_t N_CTX    = 64;
static const int32_t  N_PROMPT = 2; // a batch is another graph than a token is

// llama.cpp's own words, which it logs
static std::string g_errors;

static void keep_error(enum ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && g_errors.size() < 1000) {
        g_errors += text;
    }
}

[[noreturn]] static void fail(const std::string & what) {
    mobile_throw(MOBILE_ERR_STATE, g_errors.empty() ? what : g_errors);
}

using model_ptr   = std::unique_ptr<struct llama_model,   void (*)(struct llama_model *)>;
using context_ptr = std::unique_ptr<struct llama_context, void (*)(struct llama_context *)>;

static model_ptr load(const char * path, bool no_alloc, bool load_mtp = false) {
    ggml_backend_dev_t no_device[] = { nullptr };
    struct llama_model_params params = llama_model_default_params();
    params.no_alloc        = no_alloc;
    params.load_mtp        = load_mtp;
    params.devices         = no_device;
    params.n_gpu_layers    = 0;
    params.load_mode       = LLAMA_LOAD_MODE_NONE;
    params.use_extra_bufts = false;
    mobile_load_set_zeros(!no_alloc);
    model_ptr model(llama_model_load_from_file(path, params), llama_model_free);
    mobile_load_set_zeros(false);
    if (!model) {
        fail("it cannot be loaded");
    }
    return model;
}

static void try_vocabulary(const struct llama_vocab * vocab) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return;
    }
    static const char text[] = "Hello, \xc3\xa9\xe4\xb8\x96 \xf0\x9f\x98\x80 <|im_end|></s>\n\t 42";
    llama_token tokens[256];
    for (const bool special : { false, true }) {
        llama_tokenize(vocab, text, (int32_t) sizeof(text) - 1, tokens, 256, special, special);
    }
    char piece[256];
    const int32_t n = llama_vocab_n_tokens(vocab);
    for (int32_t id = 0; id < n; ++id) {
        llama_token_to_piece(vocab, id, piece, sizeof(piece), 0, true);
    }
}

// the first and the last id of the vocabulary among them
static void decode(struct llama_context * ctx, int32_t n_vocab, int32_t first, int32_t n) {
    std::vector<llama_token> tokens(n);
    for (int32_t i = 0; i < n; ++i) {
        tokens[i] = (llama_token) ((int64_t) (first + i)*(n_vocab - 1)/N_PROMPT % n_vocab);
    }
    const int32_t result = llama_decode(ctx, llama_batch_get_one(tokens.data(), n));
    if (result != 0) {
        fail("a decode returned " + std::to_string(result));
    }
}

static context_ptr make_context(struct llama_model * model, uint32_t n_ctx, uint32_t n_ubatch, enum llama_flash_attn_type flash_attn, struct llama_context * main = nullptr) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx;
    params.n_batch         = n_ubatch;
    params.n_ubatch        = n_ubatch;
    params.n_threads       = std::max(1, std::min(8, (int) std::thread::hardware_concurrency()/2));
    params.n_threads_batch = params.n_threads;
    params.flash_attn_type = flash_attn;
    params.no_perf         = true;
    params.ctx_other       = main;
    params.ctx_type        = main ? LLAMA_CONTEXT_TYPE_MTP : LLAMA_CONTEXT_TYPE_DEFAULT;
    context_ptr ctx(llama_init_from_model(model, params), llama_free);
    if (!ctx) {
        fail("no context can be made of it");
    }
    return ctx;
}

static void try_context(struct llama_model * model, enum llama_flash_attn_type flash_attn) {
    const context_ptr ctx = make_context(model, N_CTX, N_PROMPT, flash_attn);
    if (llama_model_has_encoder(model) && llama_model_has_decoder(model)) {
        return; // a decoder that wants what an encoder gave it
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_set_embeddings(ctx.get(), !llama_get_memory(ctx.get()));
    decode(ctx.get(), n_vocab, 1, N_PROMPT);
    if (llama_get_memory(ctx.get())) {
        decode(ctx.get(), n_vocab, 0, 1);
    }
    llama_synchronize(ctx.get());
}

int32_t mobile_try_file(const char * path) {
    return mobile_guard([&] {
        mobile_require(path, "a trial needs a file");
        llama_log_set(keep_error, nullptr);
        llama_backend_init();
        const model_ptr model = load(path, false);
        const struct llama_vocab * vocab = llama_model_get_vocab(model.get());
        mobile_require(llama_vocab_n_tokens(vocab) > 0, "it has no vocabulary");
        try_vocabulary(vocab);
        for (const auto flash_attn : { LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED }) {
            try_context(model.get(), flash_attn);
        }
        return MOBILE_OK;
    });
}

// whose graph is that of the block, and not the model's own
static bool has_block(struct llama_context & ctx) {
    llama_memory_context_ptr full = ctx.get_memory()->init_full();
    ggml_cgraph * graph = full ? ctx.graph_reserve(N_PROMPT, 1, N_PROMPT, full.get()) : nullptr;
    return graph && ggml_graph_get_tensor(graph, "mtp_h_input");
}

// a prompt and what follows, by each block
static void try_blocks(struct llama_model * model, enum llama_flash_attn_type flash_attn) {
    const context_ptr ctx = make_context(model, N_CTX, N_PROMPT, flash_attn);
    const context_ptr mtp = make_context(model, N_CTX, N_PROMPT, flash_attn, ctx.get());
    if (!llama_get_memory(mtp.get()) || !has_block(*mtp)) {
        fail("this llama.cpp does not run the blocks for multi-token prediction of such a model");
    }
    const size_t n_embd = llama_model_n_embd_out(model);
    llama_set_embeddings_nextn(ctx.get(), true, false);
    llama_set_embeddings_nextn(mtp.get(), true, true);
    decode(ctx.get(), llama_vocab_n_tokens(llama_model_get_vocab(model)), 0, N_PROMPT);
    llama_token tokens[N_PROMPT] = { 0, 0 };
    llama_pos   pos   [N_PROMPT] = { 0, 1 };
    int8_t      output[N_PROMPT] = { 0, 1 };
    std::vector<float> states(N_PROMPT*n_embd);
    const auto check = [](int32_t status, int32_t result) {
        if (status != MOBILE_OK || result != 0) {
            fail(status != MOBILE_OK ? mobile_last_error() : "a decode of a block returned " + std::to_string(result));
        }
    };
    for (int32_t block = 0; block < llama_model_n_layer_nextn(model); ++block) {
        int32_t result = 0;
        check(mobile_mtp_get_states(ctx.get(), 0, N_PROMPT, states.data()), 0);
        llama_memory_clear(llama_get_memory(mtp.get()), true);
        const struct llama_batch batch = { N_PROMPT, tokens, states.data(), pos, nullptr, nullptr, output };
        const int32_t status = mobile_mtp_decode(mtp.get(), batch, block, &result);
        check(status, result);
        check(mobile_mtp_get_states(mtp.get(), N_PROMPT - 1, 1, states.data()), 0);
    }
}

int32_t mobile_mtp_try_file(const char * path) {
    return mobile_guard([&] {
        mobile_require(path, "a trial needs a file");
        llama_log_set(keep_error, nullptr);
        llama_backend_init();
        const model_ptr model = load(path, false, true);
        if (llama_model_n_layer_nextn(model.get()) < 1) {
            fail("it has no blocks for multi-token prediction");
        }
        for (const auto flash_attn : { LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED }) {
            try_blocks(model.get(), flash_attn);
        }
        return MOBILE_OK;
    });
}

// of all tokens' logits, as a context reserves it, and with those of the last token alone, which is what a prompt writes to
static void measure_context(struct llama_model * model, const uint32_t * asked, uint64_t * n_bytes) {
    const auto flash_attn = asked[2] ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    const context_ptr ctx = make_context(model, asked[0], asked[1], flash_attn);
    n_bytes[0] = n_bytes[1] = 0;
    for (const auto & [buft, data] : llama_get_memory_breakdown(ctx.get())) {
        n_bytes[0] += data.compute;
    }
    llama_memory_context_ptr full = ctx->get_memory() ? ctx->get_memory()->init_full() : nullptr;
    std::vector<size_t> sizes(ggml_backend_sched_get_n_backends(ctx->get_sched()), 0);
    ctx->graph_reserve(std::min(llama_n_ctx(ctx.get()), llama_n_ubatch(ctx.get())), 1, 1, full.get(), true, sizes.data());
    for (const size_t size : sizes) {
        n_bytes[1] += size;
    }
}

int32_t mobile_measure_file(const char * path, const uint32_t * contexts, int32_t n, uint64_t * n_bytes) {
    return mobile_guard([&] {
        mobile_require(path && contexts && n_bytes && n >= 0, "a measurement needs a file, contexts and room for the answers");
        llama_log_set(keep_error, nullptr);
        llama_backend_init();
        const model_ptr model = load(path, true);
        for (int32_t i = 0; i < n; ++i) {
            measure_context(model.get(), contexts + 3*i, n_bytes + 2*i);
        }
        return MOBILE_OK;
    });
}
