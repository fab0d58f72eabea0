// ggml-expert-matmul.c - the rows of a batch that want one expert, multiplied together.
//
// Mechanism: mul_mat_id computes each of an expert's rows by itself, a dot product at a time, and takes every block of
// weights apart again for each. Here the rows are copied together, and llamafile's tiles, which stock mul_mat uses,
// take four rows of weights and several of activations at once.
// Invariant: for these types and instructions a tile adds the same terms in the same order as the dot product, so
// the result is the same to the last bit (a test compares them).
// Limits: rows that share an expert (prompts, several sequences); types whose tiles round as their dot products do.

#include "ggml-cpu-impl.h"

#include "ggml-cpu.h"

#include <stdatomic.h>

#if defined(GGML_USE_LLAMAFILE) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(_MSC_VER)

#include "llamafile/sgemm.h"

// in the stack of a computing thread
#define GATHERED_BYTES (64*1024)
#define MAX_ROWS       64
#define CHUNK          64 // rows of weights

static bool rounds_as_its_dot_product(enum ggml_type type) {
    return type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_Q8_0;
}

bool ggml_expert_matmul(
        const struct ggml_compute_params * params, struct ggml_tensor * dst, const char * expert,
        int64_t n_rows, const int32_t * rows, void * next_chunk) {
    const struct ggml_tensor * w = dst->src[0];
    const struct ggml_tensor * x = dst->src[1];

    const size_t row_size = ggml_row_size(GGML_TYPE_Q8_0, x->ne[0]); // the batch, as mul_mat_id has quantized it

    if (n_rows < 2 || params->use_ref || x->type != GGML_TYPE_F32 || !rounds_as_its_dot_product(w->type) || 2*row_size > GATHERED_BYTES) {
        return false;
    }

    const int64_t most     = GATHERED_BYTES/row_size;
    const int64_t n_window = MIN(MIN(most - most % 2, MAX_ROWS), n_rows);
    const int64_t n_chunks = (w->ne[1] + CHUNK - 1)/CHUNK;
    const int64_t n_jobs   = n_chunks*((n_rows + n_window - 1)/n_window);

    _Alignas(64) char  gathered[GATHERED_BYTES];
    _Alignas(64) float result[MAX_ROWS*CHUNK];

    struct ggml_compute_params alone = *params; // the tiles of one job are all of this thread
    alone.ith = 0;
    alone.nth = 1;

    int64_t held = -1; // the window in gathered
    // counts from nth, as mul_mat_id left it
    for (int64_t job = params->ith; job < n_jobs; job = atomic_fetch_add_explicit((atomic_int *) next_chunk, 1, memory_order_relaxed)) {
        const int64_t first = job/n_chunks*n_window;
        const int64_t n     = MIN(n_window, n_rows - first);
        const int64_t row   = job % n_chunks*CHUNK;
        const int64_t m     = MIN(CHUNK, w->ne[1] - row);

        if (held != first) {
            for (int64_t i = 0; i < n; ++i) {
                const int32_t * at = rows + 2*(first + i); // (place in the token's list, token)
                memcpy(gathered + i*row_size, (const char *) params->wdata + (at[0] % x->ne[1] + at[1]*x->ne[1])*row_size, row_size);
            }
            held = first;
        }
        const bool done = n > 1 && llamafile_sgemm(&alone, m, n, w->ne[0]/ggml_blck_size(w->type),
            expert + row*w->nb[1], w->nb[1]/ggml_type_size(w->type), gathered, row_size/ggml_type_size(GGML_TYPE_Q8_0),
            result, CHUNK, w->type, GGML_TYPE_Q8_0, GGML_TYPE_F32);
        for (int64_t i = 0; i < n; ++i) {
            const int32_t * at = rows + 2*(first + i);
            float * out = (float *) ((char *) dst->data + at[0]*dst->nb[1] + at[1]*dst->nb[2]) + row;
            if (done) {
                memcpy(out, result + i*CHUNK, m*sizeof(float));
                continue;
            }
            for (int64_t r = 0; r < m; ++r) { // a row that is left over
                ggml_get_type_traits_cpu(w->type)->vec_dot(w->ne[0], out + r, 0, expert + (row + r)*w->nb[1], 0, gathered + i*row_size, 0, 1);
            }
        }
    }
    return true;
}

#else

bool ggml_expert_matmul(
        const struct ggml_compute_params * params, struct ggml_tensor * dst, const char * expert,
        int64_t n_rows, const int32_t * rows, void * next_chunk) {
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    GGML_UNUSED(expert);
    GGML_UNUSED(n_rows);
    GGML_UNUSED(rows);
    GGML_UNUSED(next_chunk);
    return false;
}

#endif
