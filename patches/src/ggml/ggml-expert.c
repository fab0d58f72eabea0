#include "ggml-expert.h"

#include "ggml-impl.h"

#include <stddef.h>

// set when the first store is made, before any graph that needs it runs; never reset
static const struct ggml_expert_resolver * g_resolver = NULL;

static int g_barrier_polls = 2000;

int ggml_expert_barrier_polls(void) {
    return g_barrier_polls;
}

void ggml_expert_set_barrier_polls(int n_polls) {
    g_barrier_polls = n_polls;
}

void ggml_expert_set_resolver(const struct ggml_expert_resolver * resolver) {
    g_resolver = resolver;
}

const char * ggml_expert_data(const struct ggml_tensor * w, int64_t expert, bool wait) {
    const char * stock = (const char *) w->data + expert*w->nb[2];

    return g_resolver ? g_resolver->data(w, expert, stock, wait) : stock;
}

void ggml_expert_settle(const struct ggml_tensor * w) {
    if (g_resolver) {
        g_resolver->settle(w);
    }
}

bool ggml_expert_is_elsewhere(const struct ggml_tensor * w) {
    return g_resolver && g_resolver->owns(w);
}

void ggml_expert_copy(ggml_backend_t backend, const struct ggml_tensor * w, struct ggml_tensor * copy, const uint32_t * used) {
    const size_t size = w->nb[2];

    for (int64_t e = 0; e < w->ne[2]; ++e) {
        if (used && !ggml_bitset_get(used, e)) {
            continue;
        }
        const char * data = ggml_expert_data(w, e, true);
        ggml_backend_tensor_set_async(backend, copy, data, e*size, size);
        if (e + 1 < w->ne[2]) {
            // some kernels read a little beyond an expert: no NaNs may stand there
            ggml_backend_tensor_set_async(backend, copy, data, (e + 1)*size, size < 512 ? size : 512);
        }
    }
}
