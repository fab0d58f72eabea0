#include "ggml-expert.h"

#include "ggml-impl.h"

#include <stddef.h>

// set when the first store is made, before any graph that needs it runs; never reset
static const struct ggml_expert_resolver * g_resolver = NULL;

void ggml_expert_set_resolver(const struct ggml_expert_resolver * resolver) {
    g_resolver = resolver;
}

static bool is_elsewhere(const struct ggml_tensor * w) {
    return g_resolver && g_resolver->owns(w);
}

const char * ggml_expert_data(const struct ggml_tensor * w, int64_t expert, bool wait) {
    const char * stock = (const char *) w->data + expert*w->nb[2];

    return g_resolver ? g_resolver->data(w, expert, stock, wait) : stock;
}

int ggml_expert_walk_first(struct ggml_expert_walk * walk, const struct ggml_tensor * w, const int64_t * n_rows) {
    walk->data   = NULL;
    walk->w      = w;
    walk->n_rows = n_rows;
    walk->next   = 0;
    walk->waits  = is_elsewhere(w);
    if (walk->waits) {
        GGML_ASSERT(w->ne[2] <= GGML_EXPERT_MAX); // refused when it was loaded
        memset(walk->done, 0, w->ne[2]);
    }
    return ggml_expert_walk_next(walk);
}

int ggml_expert_walk_next(struct ggml_expert_walk * walk) {
    const int64_t n   = walk->w->ne[2];
    const int64_t end = walk->waits ? 2*n : n;

    while (walk->next < end) {
        const bool    wait   = walk->next >= n;
        const int64_t expert = walk->next++ - (wait ? n : 0);
        if (walk->n_rows[expert] == 0 || (wait && walk->done[expert])) {
            continue;
        }
        // experts of other tensors are always there
        walk->data = ggml_expert_data(walk->w, expert, wait);
        if (!walk->data) {
            continue;
        }
        if (walk->waits) {
            walk->done[expert] = 1;
        }
        return (int) expert;
    }
    if (walk->waits) {
        g_resolver->settle(walk->w);
    }
    return -1;
}

bool ggml_expert_skip(int32_t id, void * dst, const void * src, int64_t n) {
    if (id >= 0) {
        return false;
    }
    if (src) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        memset(dst, 0, n*sizeof(float));
    }
    return true;
}

static bool is_used(const struct ggml_tensor * w, const uint32_t * used) {
    for (int64_t e = 0; e < w->ne[2]; ++e) {
        if (ggml_bitset_get(used, e)) {
            return true;
        }
    }
    return false;
}

bool ggml_expert_copy(ggml_backend_t backend, const struct ggml_tensor * w, struct ggml_tensor * copy, const uint32_t * used) {
    const size_t size = w->nb[2];

    if (!is_elsewhere(w)) {
        return used && !is_used(w, used);
    }
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
    return true;
}
