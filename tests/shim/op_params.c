// op_params.c - preloaded into a process under test: a ggml that uses op_params where this engine keeps its tags.
//
// $PLANTED says which: "custom": ggml_custom_4d() keeps the function elsewhere; "weight": an expert's weight has
// something in its op_params when it is made; "none": nothing, until op_params_scribble(). Linux, glibc.

#define _GNU_SOURCE

#include "ggml.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct ggml_tensor * g_weight; // the expert tensor that was named last

// ggml's own function: its library is not in the scope that RTLD_NEXT searches
static void * real_function(const char * name) {
    char path[4096];
    snprintf(path, sizeof(path), "%s/libggml-base.so", getenv("LLAMA_CPP_LIB_PATH"));
    return dlsym(dlopen(path, RTLD_NOLOAD | RTLD_LAZY), name);
}

static bool is_planted(const char * what) {
    const char * planted = getenv("PLANTED");
    return planted && strcmp(planted, what) == 0;
}

struct ggml_tensor * ggml_custom_4d(struct ggml_context * ctx, enum ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3,
        struct ggml_tensor ** args, int n_args, ggml_custom_op_t fun, int n_tasks, void * userdata) {
    struct ggml_tensor * (*real)(struct ggml_context *, enum ggml_type, int64_t, int64_t, int64_t, int64_t,
        struct ggml_tensor **, int, ggml_custom_op_t, int, void *) = real_function("ggml_custom_4d");
    struct ggml_tensor * t = real(ctx, type, ne0, ne1, ne2, ne3, args, n_args, fun, n_tasks, userdata);
    if (is_planted("custom")) {
        memmove((char *) t->op_params + 8, t->op_params, 24);
        memset(t->op_params, 0, 8);
    }
    return t;
}

struct ggml_tensor * ggml_set_name(struct ggml_tensor * tensor, const char * name) {
    struct ggml_tensor * (*real)(struct ggml_tensor *, const char *) = real_function("ggml_set_name");
    if (strstr(name, "_exps.weight") && tensor->op == GGML_OP_NONE) {
        g_weight = tensor;
        if (is_planted("weight")) {
            tensor->op_params[0] = 1;
        }
    }
    return real(tensor, name);
}

void op_params_scribble(void) {
    g_weight->op_params[0] = 7;
}
