#include "ggml-expert.h"

#include <stddef.h>

// set when the first store is made, before any graph that needs it runs; never reset
static ggml_expert_resolver_t g_resolver = NULL;

void ggml_expert_set_resolver(ggml_expert_resolver_t resolver) {
    g_resolver = resolver;
}

const char * ggml_expert_data(const struct ggml_tensor * w, int64_t expert, bool wait) {
    const char * stock = (const char *) w->data + expert*w->nb[2];

    return g_resolver ? g_resolver(w, expert, stock, wait) : stock;
}
