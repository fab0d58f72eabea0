#include "device/mobile-rpc.h"

#include "mobile-error.h"

#include "ggml-backend.h"
#include "llama-context.h"

#include <string>

typedef const char * (*rpc_loss_fn)(ggml_backend_t backend);
typedef bool (*rpc_last_loss_fn)(char * text, size_t size);

static thread_local std::string rpc_text;

// ggml's way to functions that only one backend has
static void * rpc_function(ggml_backend_t backend, const char * name) {
    ggml_backend_dev_t dev = ggml_backend_get_device(backend);
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg ? ggml_backend_reg_get_proc_address(reg, name) : nullptr;
}

static const char * loss_of(struct llama_context * ctx) {
    ggml_backend_sched_t sched = ctx ? ctx->get_sched() : nullptr;
    const int n_backends = sched ? ggml_backend_sched_get_n_backends(sched) : 0;
    for (int i = 0; i < n_backends; i++) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        rpc_loss_fn loss = (rpc_loss_fn) rpc_function(backend, "ggml_backend_rpc_loss");
        if (loss == nullptr) {
            continue;
        }
        ggml_backend_synchronize(backend);
        if (const char * text = loss(backend)) {
            rpc_text = text;
            return rpc_text.c_str();
        }
    }
    return nullptr;
}

const char * mobile_rpc_error(struct llama_context * ctx) {
    // a server that cannot be asked about is no server that is there
    return mobile_guard_or("the RPC servers could not be asked whether they are there", [&] { return loss_of(ctx); });
}

const char * mobile_rpc_last_loss(void) {
    return mobile_guard_or((const char *) nullptr, [&]() -> const char * {
        ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
        rpc_last_loss_fn last = reg ? (rpc_last_loss_fn) ggml_backend_reg_get_proc_address(reg, "ggml_rpc_last_loss") : nullptr;
        char text[512];
        if (last == nullptr || !last(text, sizeof(text))) {
            return nullptr;
        }
        rpc_text = text;
        return rpc_text.c_str();
    });
}

void mobile_rpc_clear_loss(void) {
    mobile_rpc_last_loss(); // reading forgets
}
