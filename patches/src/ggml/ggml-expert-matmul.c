// ggml-expert-matmul.c - the rows of a batch that want one expert, multiplied together.
//
// Mechanism: mul_mat_id computes each of an expert's rows by itself, and takes every block of weights apart again for
// each. Here the rows are copied together, and what stock mul_mat uses takes several of them at once: llamafile's tiles
// for weights as the file has them, the repacked kernels for matrices (gemm in place of gemv) for repacked ones.
// Invariant: for these types and instructions both add the same terms in the same order as they do for a single row, so
// the result is the same to the last bit (tests compare them).
// Limits: rows that share an expert (prompts, several sequences); types whose kernels round alike.

#include "ggml-cpu-impl.h"

#include "ggml-cpu.h"

#include <stdatomic.h>

#if defined(GGML_USE_LLAMAFILE) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(_MSC_VER)

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "llamafile/sgemm.h"

// in the stack of a computing thread
#define GATHERED_BYTES (64*1024)
#define MAX_ROWS       64
#define CHUNK          64 // rows of weights
#define INTERLEAVED    4  // rows of a repacked kernel for matrices
#define PIECE          8  // bytes of each of them in turn

static bool rounds_as_its_dot_product(enum ggml_type type) {
    return type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_Q8_0;
}

// those of the repacked types here that take a block of 32 with one scale a row
static bool rounds_as_one_row(enum ggml_type type) {
    return type == GGML_TYPE_Q4_0 || type == GGML_TYPE_IQ4_NL || type == GGML_TYPE_MXFP4;
}

// at: (place in the token's list, token)
static const char * quantized_row(const struct ggml_compute_params * params, const struct ggml_tensor * x, const int32_t * at) {
    return (const char *) params->wdata + (at[0] % x->ne[1] + at[1]*x->ne[1])*ggml_row_size(GGML_TYPE_Q8_0, x->ne[0]);
}

static float * result_row(const struct ggml_tensor * dst, const int32_t * at) {
    return (float *) ((char *) dst->data + at[0]*dst->nb[1] + at[1]*dst->nb[2]);
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
                memcpy(gathered + i*row_size, quantized_row(params, x, rows + 2*(first + i)), row_size);
            }
            held = first;
        }
        const bool done = n > 1 && llamafile_sgemm(&alone, m, n, w->ne[0]/ggml_blck_size(w->type),
            expert + row*w->nb[1], w->nb[1]/ggml_type_size(w->type), gathered, row_size/ggml_type_size(GGML_TYPE_Q8_0),
            result, CHUNK, w->type, GGML_TYPE_Q8_0, GGML_TYPE_F32);
        for (int64_t i = 0; i < n; ++i) {
            float * out = result_row(dst, rows + 2*(first + i)) + row;
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

typedef struct {
    ggml_half d[INTERLEAVED];
    int8_t    qs[INTERLEAVED*QK8_0];
} interleaved_block;

static void interleave(interleaved_block * out, const char * const * rows, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b) {
        for (int r = 0; r < INTERLEAVED; ++r) {
            const block_q8_0 * in = (const block_q8_0 *) rows[r] + b;
            out[b].d[r] = in->d;
            for (int piece = 0; piece < QK8_0/PIECE; ++piece) {
                memcpy(out[b].qs + (piece*INTERLEAVED + r)*PIECE, in->qs + piece*PIECE, PIECE);
            }
        }
    }
}

int64_t ggml_expert_matmul_repacked(
        const struct ggml_compute_params * params, struct ggml_tensor * dst, const char * expert, int64_t begin, int64_t end,
        int64_t n_rows, const int32_t * rows, ggml_expert_gemm gemm) {
    const struct ggml_tensor * w = dst->src[0];
    const struct ggml_tensor * x = dst->src[1];

    const size_t  row_size = ggml_row_size(GGML_TYPE_Q8_0, x->ne[0]); // the batch, as mul_mat_id has quantized it
    const int64_t most     = GATHERED_BYTES/row_size/INTERLEAVED*INTERLEAVED;
    const int64_t n_done   = n_rows % INTERLEAVED == INTERLEAVED - 1 ? n_rows : n_rows - n_rows % INTERLEAVED;

    if (n_done == 0 || most == 0 || !rounds_as_one_row(w->type)) {
        return 0;
    }

    _Alignas(64) char  gathered[GATHERED_BYTES];
    _Alignas(64) float result[MAX_ROWS*CHUNK];

    const int64_t n_window = MIN(most, MAX_ROWS);
    for (int64_t first = 0; first < n_done; first += n_window) {
        const int64_t n        = MIN(n_window, n_done - first);
        const int64_t n_padded = (n + INTERLEAVED - 1)/INTERLEAVED*INTERLEAVED;
        for (int64_t i = 0; i < n_padded; i += INTERLEAVED) {
            const char * together[INTERLEAVED];
            for (int r = 0; r < INTERLEAVED; ++r) {
                together[r] = quantized_row(params, x, rows + 2*(first + MIN(i + r, n - 1))); // one that is missing: the last again
            }
            interleave((interleaved_block *) (gathered + i*row_size), together, x->ne[0]/QK8_0);
        }
        for (int64_t row = begin; row < end; row += CHUNK) {
            const int64_t m = MIN(CHUNK, end - row);
            gemm(x->ne[0], result, CHUNK, expert + row*w->nb[1], gathered, n_padded, m);
            for (int64_t i = 0; i < n; ++i) {
                memcpy(result_row(dst, rows + 2*(first + i)) + row, result + i*CHUNK, m*sizeof(float));
            }
        }
    }
    return n_done;
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

int64_t ggml_expert_matmul_repacked(
        const struct ggml_compute_params * params, struct ggml_tensor * dst, const char * expert, int64_t begin, int64_t end,
        int64_t n_rows, const int32_t * rows, ggml_expert_gemm gemm) {
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    GGML_UNUSED(expert);
    GGML_UNUSED(begin);
    GGML_UNUSED(end);
    GGML_UNUSED(n_rows);
    GGML_UNUSED(rows);
    GGML_UNUSED(gemm);
    return 0;
}

#endif
