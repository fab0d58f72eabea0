#include "ggml-expert.h"

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
