// mobile-layout.h - files in which every routed expert is a tensor of its own.
//
// Mechanism: when the loader has read its files' tables, tensors blk.L.ffn_X.E.weight are replaced by one entry
// blk.L.ffn_X_exps.weight of the shape that architectures ask for, and where each expert lies is kept aside.
// The expert store reads experts from there. Without it the stacked tensor is put together while it is loaded.
// Experts in S segments (mobile.segments) are S tensors e*S+s each, of n_ff/S neurons: the store keeps every
// segment as an expert of its own; in ordinary buffers they are joined again.
// Invariant: the stacked tensor has the bytes that a stacked file would hold (segments: the same neurons, in the
// order of the segments). A file without such tensors takes none of these paths.
// Limits: such files are not mapped. Segments and per-expert biases or scales exclude each other.

#pragma once

#include "store/mobile-store.h"

#include <map>
#include <string>
#include <vector>

struct ggml_tensor;
struct gguf_context;
struct llama_model_loader;

enum mobile_matrix {
    MOBILE_MATRIX_GATE_UP, // gate rows, then up rows
    MOBILE_MATRIX_UP,
    MOBILE_MATRIX_GATE,
    MOBILE_MATRIX_DOWN,
};

// where a stacked tensor's parts lie
struct mobile_parts {
    enum mobile_matrix        matrix;
    mobile_by<mobile_part, mobile_range> ranges; // file: index into the loader's files
};

struct mobile_layout {
    int32_t n_segments = 1;
    std::map<std::string, mobile_parts> tensors; // by the stacked tensor's name
};

// gguf_find_tensor for whoever goes through a file's tensors in order, which there are tens of thousands of: looks
// behind the tensor found last on this thread first
int64_t mobile_layout_tensor_index(const gguf_context * meta, const char * name);

// for the loader's constructor, when all tables are read. throws std::runtime_error with the reason if the file
// is newer than this code or its experts do not make up stacked tensors. load_mtp: whether the blocks behind the
// model's layers (multi-token prediction) are wanted; without it they take no memory
void mobile_layout_begin(llama_model_loader & ml, const std::string & fname, bool load_mtp);

// true if the tensor was put together from its parts
bool mobile_layout_load(llama_model_loader & ml, ggml_tensor * tensor);

// for whoever reads a weight by its place in the file: throws if it has no single place
void mobile_layout_require_stacked(const llama_model_loader & ml, const ggml_tensor * tensor);

// the parts of a stacked tensor; NULL: it lies in the file as it is
const mobile_parts * mobile_layout_find(const llama_model_loader & ml, const char * name);

// gives a stacked tensor's segments dimensions of their own: [n_embd, n_ff/S, E*S] or [n_ff/S, n_embd, E*S]
void mobile_layout_split(const llama_model_loader & ml, ggml_tensor * tensor);
