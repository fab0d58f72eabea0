#include "ggml-idle.h"

#include <stddef.h>

// set before any graph that needs it runs; never reset
static ggml_idle_t g_is_idle = NULL;

void ggml_idle_set(ggml_idle_t is_idle) {
    g_is_idle = is_idle;
}

bool ggml_idle(struct ggml_cgraph * split) {
    return g_is_idle && g_is_idle(split);
}
