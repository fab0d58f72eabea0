// mobile-load.h - how expert tensors get into the store instead of into memory; the loader's hooks.
//
// Mechanism: load parameters pending on this thread add one entry to the loader's tensor buffer type
// overrides. The entry sends routed expert tensors to a buffer type of ours, which reserves address
// space; the loader's copy loop then hands those tensors over here, with their place in the file,
// instead of reading them.
// Invariant: a load without pending parameters takes none of these paths.
// If the parameters ask for all experts, they are loaded by the stock code into ordinary buffers, repacked if
// the processor likes that, and are only marked, so that contexts know to build the route op.
// Limits: host-side CPU kernels read the tensors (through ggml_expert_data); the file is not mapped.

#pragma once

#include "mobile.h"
#include "store/mobile-layout.h"
#include "store/mobile-store.h"

#include <memory>
#include <string>

struct ggml_context;
struct llama_model;
struct llama_model_loader;

// for the loader's constructor: takes this thread's pending parameters, returns the overrides to use
const llama_model_tensor_buft_override * mobile_load_begin(const llama_model_tensor_buft_override * overrides);

// for the loader's copy loop: true if ctx holds expert tensors, which are now the store's. throws
// std::runtime_error with the reason if they cannot be
bool mobile_load_tensors(llama_model_loader & ml, ggml_context * ctx, llama_progress_callback progress, void * progress_data);

// for the loader's copy loop: true if the tensor was put together from its parts
bool mobile_load_tensor(llama_model_loader & ml, ggml_tensor * tensor);

// the model's store, which lives as long as the model; for experts in ordinary buffers a new one, which only
// counts. NULL if the model is dense or was loaded without parameters
std::shared_ptr<mobile_store> mobile_store_of(const llama_model & model);

// for the C API
void mobile_load_set_pending(const mobile_load_params * params);
// loads of this thread read no weights while on: mobile-zeros.h
void mobile_load_set_zeros(bool on);
