#include "route/mobile-context.h"

#include "route/mobile-hooks.h"
#include "store/mobile-load.h"

#include "llama-batch.h"
#include "llama-model.h"

#include <algorithm>
#include <map>

mobile_context::mobile_context(const llama_model & model, std::shared_ptr<mobile_store> s) :
    store(std::move(s)),
    n_layer((int32_t) model.hparams.n_layer()),
    n_expert_used((int32_t) model.hparams.n_expert_used()),
    rules(n_layer, n_expert_used),
    usage(*store),
    recall(n_expert_used),
    // layers behind n_layer (next-token prediction) route as well
    routes(std::max(n_layer, store->end_of_layers().n)),
    predictor(model, store),
    slot_map(n_layer, store->n_parts_max, store->n_segments),
    loss(store->layers.size(), store->n_expert_max()) {
    for (mobile_model_layer il(0); routes.has(il); ++il) {
        routes[il].ctx = this;
        routes[il].il  = il;
    }
}

std::shared_ptr<mobile_context> mobile_context_new(const llama_model & model) {
    std::shared_ptr<mobile_store> store = mobile_store_of(model);
    return store ? std::make_shared<mobile_context>(model, std::move(store)) : nullptr;
}

// which tokens are of answers, and not of prompts
static void find_single(mobile_pass & pass, const llama_ubatch & ubatch) {
    const auto text_of    = [&](size_t i) { return ubatch.seq_id ? ubatch.seq_id[i][0] : 0; };
    const auto has_output = [&](size_t i) { return ubatch.output && ubatch.output[i]; };

    struct counts { int64_t n = 0, n_outputs = 0; };
    std::map<llama_seq_id, counts> of_text;
    for (size_t i = 0; i < ubatch.n_tokens; ++i) {
        counts & text = of_text[text_of(i)];
        text.n++;
        text.n_outputs += has_output(i);
    }
    pass.single.resize(ubatch.n_tokens);
    for (size_t i = 0; i < ubatch.n_tokens; ++i) {
        const counts & text = of_text[text_of(i)];
        pass.single[i] = text.n == text.n_outputs && text.n <= MOBILE_LASTING_TOKENS + 1; // the last token, and drafts
    }
}

static void begin_guesses(mobile_context & ctx, const llama_ubatch & ubatch) {
    mobile_guesses & guesses = ctx.guesses;
    const bool goes_on = guesses.goes_on();
    if (guesses.is_kept()) {
        ctx.pass.time = guesses.end(); // what is of no text has taken no time
    }
    if (!goes_on && guesses.is_open()) {
        guesses.settle(*ctx.store, ctx.slots.get());
    }
    guesses.begin_pass(ubatch, ctx.pass.time, ctx.worth);
    if (!ctx.is_aside) {
        ctx.store->keep_uses(guesses.is_kept(), goes_on);
    }
    if (ctx.slots) {
        ctx.slots->keep_uses(guesses.is_kept(), goes_on);
    }
}

static void begin(mobile_context & ctx, const llama_ubatch & ubatch) {
    mobile_pass & pass = ctx.pass;
    const size_t n_tokens = ubatch.n_tokens;

    ctx.rules.begin_pass(ubatch, pass.k, pass.lossy);
    pass.pos  .assign(n_tokens, 0);
    pass.index.assign(n_tokens, -1);
    pass.outputs.clear();
    pass.mapped = true;
    for (size_t i = 0; i < n_tokens; ++i) {
        if (ubatch.pos) {
            pass.pos[i] = ubatch.pos[i];
        }
        if (ubatch.output && ubatch.output[i]) {
            pass.outputs.push_back((int32_t) i);
        }
        if (ubatch.data && i < ubatch.data->batch_idxs.size()) {
            pass.index[i] = ubatch.data->batch_idxs[i];
        }
    }
    find_single(pass, ubatch);
    ctx.loss.begin_pass(pass.index);
    ctx.usage.add_tokens(n_tokens, std::count_if(pass.k.begin(), pass.k.end(), [&](int32_t k) { return ctx.rules.is_little(k); }));
    ctx.trace.begin_pass(n_tokens);
    ctx.store->begin_pass(std::max(1, (int32_t) std::count(pass.single.begin(), pass.single.end(), 1)));
    begin_guesses(ctx, ubatch);
    ctx.recall.begin_pass(ubatch, !ctx.store->all_resident || (ctx.slots && ctx.slots->is_short()));
    if (ctx.guesses.is_draft()) {
        ctx.recall.tell(*ctx.store, ctx.slots.get());
    }
    ctx.predictor.begin_pass((int64_t) n_tokens, pass.k[0], mobile_route_takes_hints(ctx));
}

void mobile_ubatch_begin(mobile_context * ctx, const llama_ubatch & ubatch) {
    if (!ctx) {
        return;
    }
    ctx->error.clear();
    ctx->guard([&] { begin(*ctx, ubatch); });
}

// false: ctx.error says why
static bool end(mobile_context & ctx) {
    const size_t n_tokens = ctx.pass.n_tokens();
    if (ctx.slots) {
        ctx.guard([&] { ctx.slots->admit(); }); // of the last layer
        ctx.slots->end_pass();
    }
    ctx.pass.time  += (double) n_tokens;
    ctx.pass.n_run += (int64_t) n_tokens;
    ctx.trace.end_pass(n_tokens);

    const bool is_read = ctx.store->end_pass();
    ctx.predictor.end_pass(is_read && ctx.error.empty());
    const std::string unguessed = ctx.predictor.take_error();
    if (!ctx.error.empty()) {
        return false;
    }
    if (!is_read) {
        ctx.error = "expert read failed: " + ctx.store->error();
        return false;
    }
    if (!unguessed.empty()) {
        ctx.error = "guessing the next layer's experts failed: " + unguessed;
        return false;
    }
    if (!ctx.pass.mapped && (!ctx.pass.is_uniform() || ctx.rules.is_replay())) {
        ctx.error = "this model computes a part of the batch in some layer: per-token expert counts cannot be told apart";
        return false;
    }
    return true;
}

enum ggml_status mobile_ubatch_end(mobile_context * ctx, enum ggml_status status) {
    if (!ctx) {
        return status;
    }
    bool ok = false;
    ctx->guard([&] { ok = end(*ctx); });
    ctx->rules.end_pass(ok);
    return ok ? status : GGML_STATUS_FAILED;
}
