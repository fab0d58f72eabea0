// mobile.h - the C API that mobile-gguf adds to libllama.
//
// Mechanism: a model loaded while load parameters are pending keeps its routed experts in an
// expert store (read from the GGUF on demand, evicted under one byte budget) instead of in an
// ordinary buffer; every context of such a model routes through one custom op per MoE layer.
// Invariant: residency changes when bytes are read, never what is computed. The only calls that
// change outputs are the ones that say so (fewer experts, replay, loss).
// Limits: one decode at a time per model; calls on a context are made by the thread that decodes, but for those that
// say "by any thread".
//
// Files may hold every expert as a tensor of its own, or in S segments (mobile.segments). Calls that take or
// return expert numbers mean the model's experts, whatever the file; the store counts segments: with S segments in
// the store a use of an expert is S needs (n_hits, n_misses, n_evictions, n_prefetched) of a share of its bytes.
//
// Errors are returned as enum mobile_status, with a text in mobile_last_error(). Nothing here
// prints, aborts or throws.

#pragma once

#include "llama.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOBILE_ABI_VERSION 8

enum mobile_status {
    MOBILE_OK           =  0,
    MOBILE_ERR_ARGUMENT = -1, // a value out of range; nothing was changed
    MOBILE_ERR_STATE    = -2, // the call does not fit the model (e.g. it has no experts)
    MOBILE_ERR_BUDGET   = -3, // the budget is below the smallest legal one
    MOBILE_ERR_IO       = -4, // a read failed or came back short; the text names file, layer, expert
    MOBILE_ERR_MEMORY   = -5, // the operating system refused memory
    MOBILE_ERR_INTERNAL = -6, // a driver, or a fault of ours, threw something: the text says what
};

enum mobile_eviction {
    MOBILE_EVICTION_LRU    = 0, // least recently used
    MOBILE_EVICTION_MOEPIC = 1, // smallest mu * rho^(nu/omega), arXiv 2509.08342
    MOBILE_EVICTION_DECAY  = 2, // the same with a short memory, nu counted in visits of the expert's own layer
};

enum mobile_io {
    MOBILE_IO_AUTO     = 0, // unbuffered where the file system allows it, else buffered
    MOBILE_IO_DIRECT   = 1, // unbuffered or fail
    MOBILE_IO_BUFFERED = 2, // through the page cache, dropped after each read
};

enum mobile_residency {
    MOBILE_NOT_RESIDENT = 0,
    MOBILE_LOADING      = 1,
    MOBILE_RESIDENT     = 2,
};

// set before a load
struct mobile_load_params {
    uint64_t budget_bytes; // host tier: expert bytes in memory at any time; 0: all experts, as the stock loader
                           // puts them there
    int32_t  n_io_threads; // > 0
    int32_t  eviction;     // enum mobile_eviction
    int32_t  io;           // enum mobile_io
    int32_t  on_host;      // 1: routed experts stay in host memory, in the file's layout, even where other
                           // weights go to a device. what a device tier needs
    int32_t  prefault;     // 1: idle I/O threads make slots' memory present before it is needed, up to the budget,
                           // where the system can (Linux 5.14)
    int32_t  n_at_once;    // > 0: a budget is legal that holds so many experts, or segments, of a layer; a pass that asks
                           // one for more fails. 0: all of a layer, which a prompt asks for
};

struct mobile_model_info {
    uint64_t expert_bytes;     // all routed experts, as they stand in the file
    uint64_t budget_bytes;     // in force
    uint64_t budget_min_bytes; // smallest legal budget: the largest layer's experts
    uint64_t budget_all_bytes; // budget at which every expert is resident (a little over expert_bytes: alignment)
    int32_t  n_layer;          // of the model
    int32_t  n_layer_moe;      // layers with routed experts
    int32_t  n_expert;
    int32_t  n_expert_used;    // top-k
    int32_t  direct_io;        // 1: reads are unbuffered
    int32_t  eviction;         // enum mobile_eviction
};

// all fields count from the last reset, but for resident_bytes
struct mobile_counters {
    uint64_t n_tokens;            // tokens computed, each pass counted
    uint64_t n_tokens_little;     // of these, with fewer than top-k experts
    uint64_t n_hits;              // routed (layer, expert) needs found resident or already being read
    uint64_t n_misses;            // ... that had to be read
    uint64_t n_evictions;
    uint64_t n_prefetched;        // experts read ahead of need
    uint64_t n_prefetch_hits;     // of these, needed before they were evicted
    uint64_t bytes_read;          // from the file, alignment included
    uint64_t bytes_read_demand;   // of these, for misses
    uint64_t bytes_routed;        // expert bytes that the routed experts amount to
    uint64_t stall_us;            // wall time in which the computation waited for reads
    uint64_t resident_bytes;      // now
    uint64_t resident_bytes_peak; // highest since the last reset
};

LLAMA_API int32_t      mobile_abi_version(void);
LLAMA_API const char * mobile_last_error (void); // of this thread; "" if none

LLAMA_API struct mobile_load_params mobile_load_default_params(void);

// the next model load on this thread takes params and clears them, whether it succeeds or not;
// NULL takes them back. the load itself must not map the file (use_mmap = false)
LLAMA_API int32_t mobile_load_set_params(const struct mobile_load_params * params);

// MOBILE_ERR_STATE if the model has no expert store: it is dense, or was loaded without load parameters
LLAMA_API int32_t mobile_model_get_info(const struct llama_model * model, struct mobile_model_info * info);

// segments in which the store holds each expert; 1: whole, as also when all experts are in ordinary buffers.
// < 0: an error, as of mobile_model_get_info
LLAMA_API int32_t mobile_model_get_n_segments(const struct llama_model * model);

// by any thread. an expert in segments is as resident as its least resident segment.
// state: [n_layer * n_expert] enum mobile_residency, row-major by layer; dense layers are all 0
LLAMA_API int32_t mobile_model_get_residency(const struct llama_model * model, uint8_t * state, size_t n_state);

// changes outputs. every token from the next decode on uses at most k routed experts, weights
// renormalised where the model renormalises its top-k. k = 0 or k >= top-k: all (exact)
LLAMA_API int32_t mobile_set_n_expert_used(struct llama_context * ctx, int32_t k);

// changes outputs. the same per token, for the next decode only. k: [n_tokens], in batch order
LLAMA_API int32_t mobile_set_batch_n_expert_used(struct llama_context * ctx, const int32_t * k, int32_t n_tokens);

// changes outputs. of a token that runs with fewer experts the kept weights are divided by the mass of its k heaviest, and
// not by their own: k = top-k leaves them as the model has them. k = 0: by their own
LLAMA_API int32_t mobile_set_mass(struct llama_context * ctx, int32_t k);

// changes outputs of tokens that run with exactly k experts, fewer than the top-k, while it is on: of what the routed experts
// of a layer give them each channel is multiplied by scale and shift is added. all others have the bits that they have without.
// scale, shift: [n_layer][n_embd]; NULL, both: none. MOBILE_ERR_STATE if some layer's experts are computed twice. a device hands
// each layer's sum to the CPU from then on, and may round otherwise
LLAMA_API int32_t mobile_set_correction(struct llama_context * ctx, int32_t k, const float * scale, const float * shift, int32_t n_layer, int32_t n_embd);
// whether it applies from the next decode on; a new context's does not
LLAMA_API int32_t mobile_set_corrected(struct llama_context * ctx, bool on);

// starts reading, in layer order, the experts that the last little pass left out (ranks k+1..K):
// hints for a run of the same position with all experts. returns how many experts or segments are not there yet and
// were hinted, < 0: error; they are read as far as the disk has nothing else to do. with a device tier those in host
// memory are uploaded as well, if the mode says so
LLAMA_API int32_t mobile_prefetch_masked(struct llama_context * ctx);

// what is moved ahead of need: experts that a little pass left out (mobile_prefetch_masked), and into a device's slots the
// next layer's as they are predicted. changes when bytes are moved, never outputs
enum mobile_prefetch {
    MOBILE_PREFETCH_OFF  = 0,
    MOBILE_PREFETCH_ON   = 1,
    MOBILE_PREFETCH_AUTO = 2, // uploads: each of the two while it is measured to shorten passes
};

enum mobile_predict {
    MOBILE_PREDICT_AUTO        = 0, // by the router where there is one
    MOBILE_PREDICT_ROUTER      = 1, // the next layer's router on this layer's FFN input
    MOBILE_PREDICT_TRANSITIONS = 2, // which experts followed which so far
};

// from the last mobile_reset_counters on, but for n_unused and what is said to be so now
struct mobile_prefetch_counters {
    uint64_t n_predicted;  // experts that were predicted for the next layer
    uint64_t n_right;      // of these, routed to
    uint64_t n_queued;     // experts read because of a little pass
    uint64_t n_used;       // of these, needed before they were evicted
    uint64_t n_wasted;     // of these, evicted without a use
    uint64_t n_unused;     // of these, resident now without a use yet
    uint64_t bytes_early;  // had arrived when they were needed
    uint64_t bytes_wasted; // of n_wasted
    uint64_t saved_us;     // bytes_early times the stall that a byte read on demand cost: an estimate
    uint64_t n_passes;     // of up to 8 tokens, with a device tier that takes predictions
    uint64_t n_passes_on;  // of these, with predictions
    int32_t  mode;         // enum mobile_prefetch, now
    int32_t  by_router;    // now; 0: by transitions
    int32_t  next_on;      // predictions are uploaded, now
    int32_t  masked_on;    // and what little passes left out
    int32_t  next_permille;   // time of passes with predictions over passes without, as measured last; 0: not yet
    int32_t  masked_permille; // the same for what little passes left out
};

// a new context has MOBILE_PREFETCH_OFF
LLAMA_API int32_t mobile_set_prefetch (struct llama_context * ctx, int32_t mode);
// MOBILE_ERR_STATE if the model has no plain router
LLAMA_API int32_t mobile_set_predictor(struct llama_context * ctx, int32_t predictor);
LLAMA_API int32_t mobile_get_prefetch_counters(const struct llama_context * ctx, struct mobile_prefetch_counters * counters);

LLAMA_API int32_t mobile_get_counters  (const struct llama_context * ctx, struct mobile_counters * counters);
LLAMA_API int32_t mobile_reset_counters(struct llama_context * ctx);

// the warm set: experts that are worth having before anything asks for them. changes when bytes are read, never outputs.
// experts [n][2]: layer and expert, the most worthy first

// the experts that tokens of answers used on ctx so far, the most used first. fills at most n; returns how many there are
LLAMA_API int32_t mobile_get_worth(const struct llama_context * ctx, int32_t * experts, int32_t n);
// reads them in their order while there is nothing else to read, as far as the budget has room: nothing is evicted for
// them. in place of those of an earlier call; n = 0 ends it. returns how many experts or segments are not there yet
LLAMA_API int32_t mobile_warm(struct llama_context * ctx, const int32_t * experts, int32_t n);

// since the model was loaded; experts or segments. in no field of mobile_counters, but for resident_bytes
struct mobile_warm_counters {
    uint64_t n_read;     // for the warm set, also those on their way
    uint64_t n_used;     // of these, needed before they were evicted
    uint64_t n_wasted;   // of these, gone without a use
    uint64_t n_left;     // not begun yet
    uint64_t bytes_read; // alignment included
};

LLAMA_API int32_t mobile_get_warm_counters(const struct llama_context * ctx, struct mobile_warm_counters * counters);

// which segments of an expert are kept before others, in host memory or in the slots of devices (MoEpic, arXiv 2509.08342).
// changes when bytes move, never what is computed. kept: [n_layer] the so many leading segments of an expert that rank by the
// eviction policy, 1 to the model's segments; the others come for a use, and are the first to go. shares: [n_layer] of the
// budget, which a layer that fills more gives way by, a little; 0: no wish. NULL and NULL: all segments, no wishes.
// MOBILE_ERR_STATE for slots that there are not
LLAMA_API int32_t mobile_set_split(struct llama_context * ctx, bool on_device, const int32_t * kept, const float * shares, int32_t n_layer);

// text of the error that made the last decode on ctx fail inside the expert store; "" if it did not
LLAMA_API const char * mobile_context_error(const struct llama_context * ctx);

// records every routed (token, layer, rank) as CSV:
// turn,phase,step,layer,slot,expert,weight,residency,expert_bytes (phase 0: a batch, 1: a single token).
// path is replaced; mobile_trace_stop reports a failed write
LLAMA_API int32_t mobile_trace_start(struct llama_context * ctx, const char * path);
LLAMA_API int32_t mobile_trace_stop (struct llama_context * ctx);

#define MOBILE_ROUTED_MAX 65536 // entries that are kept

// one routed (token, layer, rank), by the model's numbers
struct mobile_routed {
    int32_t step;   // of the token: counts the tokens that ctx computed
    int32_t layer;
    int32_t expert;
    int32_t missed; // 1: its bytes had to be read; 0: they were in memory, in a device's slot, or on their way
};

// records them in memory while on, from the next layer that runs on. by any thread, and so are reads
LLAMA_API int32_t mobile_routed_watch(struct llama_context * ctx, bool on);
// copies up to n entries from number since on (UINT64_MAX: none) and returns how many, < 0: error. next: the number to
// go on from; n_lost: how many from since on were overwritten before they were read
LLAMA_API int32_t mobile_routed_read (const struct llama_context * ctx, uint64_t since, struct mobile_routed * routed, int32_t n, uint64_t * next, uint64_t * n_lost);

// changes outputs. expert ids come from ids: [n_steps][n_layer][k] instead of from the router, for
// the token at position p from step p % n_steps; k must be the model's top-k. NULL ends it
LLAMA_API int32_t mobile_set_replay(struct llama_context * ctx, const int32_t * ids, int32_t n_steps, int32_t n_layer, int32_t k);

//
// the ladder: what becomes of an expert that a token asks for and that is missing, which is one that would have to be read
// from the file first, or uploaded to a device that fetches its misses. changes outputs
//

enum mobile_substitute {
    MOBILE_SUBSTITUTE_OFF    = 0,
    MOBILE_SUBSTITUTE_BUDDY  = 1, // the resident expert that goes most often with it: BuddyMoE, arXiv 2511.10054
    MOBILE_SUBSTITUTE_LIVE   = 2, // the resident expert that the router likes best now
    MOBILE_SUBSTITUTE_PRIOR  = 3, // the router's choice among scores that favour residents: arXiv 2412.00099
    MOBILE_SUBSTITUTE_RANDOM = 4, // any resident expert, behind the buddies' gates: the control of an experiment
};

struct mobile_loss_params {
    float   drop;            // a missing expert whose share of its token's weight is below drop/top-k is not computed; 0: off
    int32_t little_on_miss;  // of a token's experts, by weight, all but so many are computed only if they are resident; 0: off
    int32_t again_tokens;    // ... unless asked for again within so many tokens
    int32_t substitute;      // enum mobile_substitute
    int32_t keep;            // the so many heaviest of a token are always computed as they are
    int32_t substitutes_max; // rho: buddies of a token in a layer
    float   tau;             // buddies only where the entropy of the token's weights over ln k is above; < 0: each layer's own
    float   beta;            // ... and the share of missing experts in the layer is below
    float   eta;             // weight of the router's standardised logit beside q(j|i)
    float   margin;          // live: with at least 1 - margin of the missing one's probability; 0: off
    float   prior;           // prior: lambda, what residents gain, as a share of the range of the router's logits; 0: off
    int32_t admit;           // displaced experts that are read while the disk is idle: so many a layer and token at most
    float   prompt_drop;     // of tokens computed together, a missing expert whose share of all their weight in the layer is below it is not computed; 0: off
    float   partial;         // a missing expert of which at least this share of its segments is there is computed with these
                             // alone; 0: off
};

LLAMA_API struct mobile_loss_params mobile_loss_default_params(void); // every rule off, the other values as published

// the rules, from the next decode on; NULL: none. MOBILE_ERR_STATE if the buddies that they need have not been set, or a
// replay takes the place of scores that they need
LLAMA_API int32_t mobile_set_loss(struct llama_context * ctx, const struct mobile_loss_params * params);
// whether tokens from the next decode on may lose by them; a new context's may not
LLAMA_API int32_t mobile_set_lossy(struct llama_context * ctx, bool on);
// the same per token, for the next decode only. lossy: [n_tokens] 0 or 1, in batch order
LLAMA_API int32_t mobile_set_batch_lossy(struct llama_context * ctx, const int32_t * lossy, int32_t n_tokens);
// experts, shares: [n_layer][n_expert][n], the best first; -1: no more. tau: [n_layer]
LLAMA_API int32_t mobile_set_buddies(struct llama_context * ctx, const int32_t * experts, const float * shares, const float * tau, int32_t n_layer, int32_t n_expert, int32_t n);
// for experiments: the rules take these experts for resident, whatever is. resident: [n_layer * n_expert] 0 or 1, or as many
// for each segment, [n_layer * n_expert * segments]; NULL ends it
LLAMA_API int32_t mobile_set_loss_residency(struct llama_context * ctx, const uint8_t * resident, size_t n_resident);

// since the last reset, sums over layers and over tokens that might lose; experts, not segments
struct mobile_loss_counters {
    uint64_t n_layers;      // (token, layer) pairs
    uint64_t n_missing;     // experts asked for that were missing. of these,
    uint64_t n_dropped;
    uint64_t n_left_out;    // by little_on_miss
    uint64_t n_substituted;
    uint64_t n_again;       // read by little_on_miss because they were asked for again
    uint64_t n_admitted;    // displaced ones, or their segments, that were read while the disk was idle
    uint64_t n_admit_left;  // that are waiting for it now
    uint64_t bytes_admitted;
    double   moved_weight;  // dropped, left out or substituted, as shares of their tokens' weights; of those computed in part
                            // the share of their segments that was left out
    uint64_t n_partial;     // of n_missing, computed with the segments that were there
};

LLAMA_API int32_t mobile_get_loss_counters(const struct llama_context * ctx, struct mobile_loss_counters * counters);
// of token i of the last decode's batch alone; prompt_drop and what is read while the disk is idle are no token's
LLAMA_API int32_t mobile_get_token_loss(const struct llama_context * ctx, int32_t i, struct mobile_loss_counters * counters);

// changes outputs. F16 and BF16 matrices are multiplied by float32 activations on the CPU, not by activations
// rounded to 16 bits: for all models of the process, slower, and only to be changed while nothing decodes.
// MOBILE_ERR_STATE before a model is loaded
LLAMA_API int32_t mobile_set_precise(bool on);

// which tokens of the passes to come are of the text
enum mobile_guessed {
    MOBILE_GUESSED_NONE   = 0, // all
    MOBILE_GUESSED_DRAFT  = 1, // those that mobile_refuse() does not name before the next pass
    MOBILE_GUESSED_SOURCE = 2, // none: they are run for a draft. what they ask for counts until the draft has been run
};

// changes which expert leaves, never outputs
LLAMA_API int32_t mobile_set_guessed(struct llama_context * ctx, int32_t guessed);

// tokens of the last decode, by their places in its batch, are none of the text. what only they asked for counts as unused
// and leaves memory, and a device's slots, first; the others count as single tokens do. never changes outputs.
// MOBILE_ERR_ARGUMENT: that decode has no such token
LLAMA_API int32_t mobile_refuse(struct llama_context * ctx, const int32_t * tokens, int32_t n);

// each token of the passes to come has the bits that it has in a pass of its own: the CPU uses the kernels of a single row
// for all. nothing is promised of devices, and of memories that keep a state instead of rows
LLAMA_API int32_t mobile_set_row_exact(struct llama_context * ctx, bool on);

// llama.cpp's calls, for whoever cannot catch what they throw or survive what they abort on: what they assert of their
// arguments is checked first (MOBILE_ERR_ARGUMENT). the count that they return is in n, also where n_max is too small
LLAMA_API int32_t mobile_tokenize(const struct llama_vocab * vocab, const char * text, int32_t n_text, llama_token * tokens, int32_t n_max, bool add_special, bool parse_special, int32_t * n);
LLAMA_API int32_t mobile_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * buffer, int32_t n_max, bool special, int32_t * n);
// result: what llama_decode returned
LLAMA_API int32_t mobile_decode(struct llama_context * ctx, struct llama_batch batch, int32_t * result);
// MOBILE_ERR_STATE if there are no logits at i, or some are no numbers
LLAMA_API int32_t mobile_sample(struct llama_sampler * sampler, struct llama_context * ctx, int32_t i, llama_token * token);
// the same among ids [n_ids] only, which the others do not compete with, as if their logits were -inf
LLAMA_API int32_t mobile_sample_among(struct llama_sampler * sampler, struct llama_context * ctx, int32_t i, const llama_token * ids, int32_t n_ids, llama_token * token);

// loads a file on the CPU with zeros for weights, which are not read, tokenises, and runs a prompt and a token. for a
// process of its own: a file whose header llama.cpp aborts on ends it. an error is one that a load would report
LLAMA_API int32_t mobile_try_file(const char * path);

// what compute buffers of contexts of a file take on the CPU: nothing is allocated for weights or run. contexts [n][3]:
// tokens of context, of a micro-batch, and whether flash attention is on. n_bytes [n][2]: as llama.cpp reserves them, for
// logits of all tokens of a micro-batch, and what of it is used where only the last one's are asked for. for a process
// of its own, as above
LLAMA_API int32_t mobile_measure_file(const char * path, const uint32_t * contexts, int32_t n, uint64_t * n_bytes);

//
// device tier: some routed experts in slots of a device's memory as well, under a byte budget of its own.
// changes where experts are computed, so results differ as far as devices do
//

enum mobile_miss {
    MOBILE_MISS_AUTO  = 0, // whichever was measured to take less time
    MOBILE_MISS_FETCH = 1, // uploaded, then computed on the device
    MOBILE_MISS_CPU   = 2, // computed on the CPU; uploaded later if they have earned a slot
};

enum mobile_placement {
    MOBILE_PLACEMENT_HOST   = 0, // nothing in the slots is used
    MOBILE_PLACEMENT_CACHE  = 1, // a cache of experts of all layers
    MOBILE_PLACEMENT_LAYERS = 2, // all experts of as many layers as fit; no cache
};

struct mobile_device_params {
    uint64_t budget_bytes; // slots on all devices together, among them K per device and expert shape that are always zero
    int32_t  miss;         // enum mobile_miss
    int32_t  placement;    // enum mobile_placement
    int32_t  eviction;     // enum mobile_eviction
    int32_t  n_batch_max;  // passes of more tokens compute without the slots. 1 to 128
    int32_t  n_uploads;    // background uploads in flight; 0: none, misses computed on the CPU are never uploaded
    int32_t  poison;       // to find errors. 1: slots without an expert hold garbage, and uploads count as free;
                           // 2: and uploads in the background take their time
    int32_t  reserved[2];  // 0
};

struct mobile_device_info {
    char     name[64];
    char     description[128];
    uint64_t free_bytes;   // now, by the driver
    uint64_t total_bytes;
    uint64_t pool_bytes;   // taken for slots
    uint64_t expert_bytes; // of the layers on this device
    int32_t  n_layers;     // with routed experts
    int32_t  n_slots;      // that can hold an expert
    int32_t  is_gpu;
    int32_t  is_async;
    double   upload_us;    // of one expert, measured at the start: one that is waited for,
    double   stall_us;     // and how long one in the background holds up the computation. 0 before a start
};

// count passes of up to n_batch_max tokens in which the cache was used. n_hits + n_misses are the needs; those of
// n_misses are also counted as needs of the host tier
struct mobile_device_counters {
    uint64_t n_hits;
    uint64_t n_misses;
    uint64_t n_fetched;                 // misses uploaded before use
    uint64_t n_cpu;                     // misses computed on the CPU
    uint64_t n_admitted;                // uploads of what the CPU computed
    uint64_t n_evictions;
    uint64_t n_wasted;                  // evicted without a use since they were uploaded
    uint64_t bytes_uploaded;            // all uploads
    uint64_t bytes_uploaded_background; // of these, of what the CPU computed
    uint64_t bytes_wasted;
    uint64_t upload_us;                 // wall time in which the computation waited for uploads
    uint64_t cpu_us;                    // wall time of computing misses on the CPU
    uint64_t resident_bytes;            // now
    uint64_t resident_bytes_peak;
    uint64_t n_ahead;                   // uploads because of hints; of these,
    uint64_t n_ahead_used;              // needed before they were evicted,
    uint64_t n_ahead_wasted;            // gone without a use,
    uint64_t n_ahead_unused;            // in slots now without a use yet, whenever they were uploaded
    uint64_t n_ahead_dropped;           // hints of experts that would have come too late, were not in host memory, or
                                        // were worth less than what lies in the slots
    uint64_t bytes_uploaded_ahead;
    uint64_t bytes_ahead_wasted;
    uint64_t ahead_saved_us;            // n_ahead_used times what a miss costs, less what was still waited for: an estimate
};

LLAMA_API struct mobile_device_params mobile_device_default_params(void);

// takes memory for slots on every device that holds layers with routed experts. MOBILE_ERR_STATE if there is none,
// or the experts are not on the host; MOBILE_ERR_BUDGET and MOBILE_ERR_MEMORY leave ctx as it was
LLAMA_API int32_t mobile_device_start(struct llama_context * ctx, const struct mobile_device_params * params);
// gives the memory back; MOBILE_OK if there is none
LLAMA_API int32_t mobile_device_stop(struct llama_context * ctx);

// between decodes. a change between CACHE and LAYERS empties the slots
LLAMA_API int32_t mobile_device_set_placement(struct llama_context * ctx, int32_t placement);
LLAMA_API int32_t mobile_device_set_miss(struct llama_context * ctx, int32_t miss);

// devices that hold layers with routed experts, in the order of the layers; before a start as well. < 0: error
LLAMA_API int32_t mobile_device_count(const struct llama_context * ctx);
LLAMA_API int32_t mobile_device_get_info(const struct llama_context * ctx, int32_t i, struct mobile_device_info * info);

// zero before a start; mobile_reset_counters resets them
LLAMA_API int32_t mobile_device_get_counters(const struct llama_context * ctx, struct mobile_device_counters * counters);

// by any thread. state: [n_layer * n_expert] enum mobile_residency in slots, row-major by layer; all 0 before a start
LLAMA_API int32_t mobile_device_get_residency(const struct llama_context * ctx, uint8_t * state, size_t n_state);

//
// observation: what a model computes with, for calibration. changes no outputs. works for every model,
// with and without an expert store; memory is 4 bytes per input row element and matrix, and 8 bytes per routed
// expert until mobile_observe_clear_routes
//

enum mobile_observe {
    MOBILE_OBSERVE_ROUTES  = 1, // routed ids and weights
    MOBILE_OBSERVE_NEURONS = 2, // squares of what the routed experts' down projections are multiplied with
    MOBILE_OBSERVE_INPUTS  = 4, // ... and every other weight of a layer, and the output weight
    MOBILE_OBSERVE_LITTLE  = 8, // what routed experts sum to, and what fewer of them would
};

// sums over all rows since the start; by matrix: an expert of a stacked tensor is one
struct mobile_observed_input {
    const char    * name;    // of the weight, as in the (stacked) file
    int64_t         n_row;   // length of an input row
    int64_t         n_mat;
    int64_t         n_count; // n_mat for experts, else 1: all matrices have seen as many rows
    const float   * sum2;    // [n_mat][n_row] squares
    const int64_t * counts;  // [n_count] rows
};

// one layer in one ubatch, in the order of computation
struct mobile_observed_route {
    int32_t         layer;
    int32_t         n_used;
    int32_t         n_tokens; // of the last layer: only tokens with an output
    int32_t         reserved;
    const int32_t * ids;      // [n_tokens][n_used] experts, whole ones where they are in segments; -1: skipped
    const float   * weights;  // [n_tokens][n_used]
};

// by channel [n_embd], sums over the tokens of passes with all experts
struct mobile_observed_little {
    int32_t        layer;
    int32_t        way;      // which of those that were asked for
    int64_t        n_embd;
    int64_t        n_tokens;
    const double * big;      // of what the layer's routed experts sum to,
    const double * big2;     // squares of it,
    const double * little;   // of what it would be with fewer of them, as mobile_set_n_expert_used and mobile_set_mass have it,
    const double * little2;  // and squares of that
};

// what: a sum of enum mobile_observe. MOBILE_ERR_STATE if ctx is observed or has an evaluation callback;
// stop before the context is freed
LLAMA_API int32_t mobile_observe_start(struct llama_context * ctx, int32_t what);
LLAMA_API int32_t mobile_observe_stop (struct llama_context * ctx); // drops what was gathered

// how many there are, < 0: error. what get returns is valid until the next decode, clear or stop; inputs are
// ordered by name. MOBILE_ERR_STATE if ctx is not observed, or something could not be
LLAMA_API int32_t mobile_observe_n_inputs (const struct llama_context * ctx);
LLAMA_API int32_t mobile_observe_get_input(const struct llama_context * ctx, int32_t i, struct mobile_observed_input * input);
LLAMA_API int32_t mobile_observe_n_routes (const struct llama_context * ctx);
LLAMA_API int32_t mobile_observe_get_route(const struct llama_context * ctx, int32_t i, struct mobile_observed_route * route);
LLAMA_API int32_t mobile_observe_clear_routes(struct llama_context * ctx);

// with MOBILE_OBSERVE_LITTLE, before the first decode: the ways of having fewer experts, [n] each their number and the mass that
// their weights are divided by. MOBILE_ERR_STATE without an expert store, or with slots of a device
LLAMA_API int32_t mobile_observe_set_little(struct llama_context * ctx, const int32_t * k, const int32_t * mass, int32_t n);
// as those of inputs, ordered by layer and way. no layer whose experts are computed twice, or weighted before they are
LLAMA_API int32_t mobile_observe_n_little(const struct llama_context * ctx);
LLAMA_API int32_t mobile_observe_get_little(const struct llama_context * ctx, int32_t i, struct mobile_observed_little * little);

#ifdef __cplusplus
}
#endif
