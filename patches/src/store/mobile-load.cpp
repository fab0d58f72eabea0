#include "store/mobile-load.h"

#include "ggml/ggml-expert.h"
#include "mobile-error.h"
#include "store/mobile-buffer.h"
#include "store/mobile-tag.h"
#include "store/mobile-zeros.h"

#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <regex>
#include <vector>

// merged gate_up, gate, up and down of the routed experts; not biases, scales or shared experts
static const char * EXPERT_PATTERN = "^blk\\.[0-9]+\\.ffn_(gate_up|up|gate|down)_exps\\.weight$";

// what else has a row per expert, and is used where the experts are
static const char * EXPERT_SMALL_PATTERN = "^blk\\.[0-9]+\\.ffn_(gate_up|up|gate|down)_exps\\.(bias|scale)$";

// what a tensor in our buffer knows; its address stands in the tensor's tag
struct mobile_tensor {
    mobile_store *     store = nullptr;
    mobile_store_layer layer;
    int32_t            piece = -1;
};

// of the load that runs on this thread
struct mobile_loading {
    bool                                          pending = false;
    bool                                          mark    = false; // all experts in ordinary buffers
    bool                                          zeros   = false; // all weights are zeros
    mobile_load_params                            params  = {};
    std::vector<llama_model_tensor_buft_override> overrides;
};

static thread_local mobile_loading g_loading;

void mobile_load_set_pending(const mobile_load_params * params) {
    g_loading.pending = params != nullptr;
    if (params) {
        g_loading.params = *params;
    }
}

void mobile_load_set_zeros(bool on) {
    g_loading.zeros = on;
}

//
// buffer type
//

struct mobile_expert_buffer : mobile_buffer {
    mobile_expert_buffer(size_t size, const mobile_load_params & params) :
        mobile_buffer(mobile_reserve(size), size), store(std::make_unique<mobile_store>(params)) {}

    void fill   (const ggml_tensor * tensor, void * data, size_t offset, size_t n) noexcept override;
    void written(const ggml_tensor * tensor) noexcept override;

    std::unique_ptr<mobile_store> store;
    std::deque<mobile_tensor>     tensors;
};

static mobile_expert_buffer & buffer_of(const ggml_tensor * tensor) {
    return static_cast<mobile_expert_buffer &>(mobile_buffer_of(tensor));
}

static mobile_store & store_of(const ggml_tensor * tensor) {
    return *buffer_of(tensor).store;
}

// NULL: the tag is gone, and passes fail
static const mobile_tensor * tensor_record(const ggml_tensor * tensor) {
    const auto * record = (const mobile_tensor *) mobile_tag_address(tensor, MOBILE_TAG_STORED);
    if (!record) {
        store_of(tensor).fail_for_good(std::string(tensor->name) + ": its op_params were written to, which hold where its experts are");
    }
    return record;
}

static void set_tag(ggml_tensor * tensor, enum mobile_tag_kind kind, const void * address) {
    if (!mobile_tag_set(tensor, kind, address)) {
        mobile_throw(MOBILE_ERR_INTERNAL, std::string(tensor->name) + ": ggml uses a weight's op_params, where this engine keeps a tag of its own");
    }
}

// a tensor in our buffer has a row, as ggml says an expert, for each part: mobile_layout_split() has seen to that
static mobile_part part_of_row(int64_t expert) {
    return mobile_part(expert);
}

// through the store. whoever gets a copy cannot be told that it is not what the file holds: all passes are, from then on
void mobile_expert_buffer::fill(const ggml_tensor * tensor, void * data, size_t offset, size_t n) noexcept {
    const mobile_tensor * record = tensor_record(tensor);
    if (!record) {
        memset(data, 0, n);
        return;
    }
    try {
        while (n > 0) {
            const size_t skip = offset%tensor->nb[2];
            const size_t size = std::min(n, tensor->nb[2] - skip);
            mobile_need need;
            need.part    = part_of_row(offset/tensor->nb[2]);
            need.lasting = false;
            record->store->request(record->layer, { need });
            const char * bytes = record->store->resolve(record->layer, record->piece, need.part, true);
            if (bytes == record->store->resolve_failed()) {
                mobile_throw(MOBILE_ERR_IO, record->store->error());
            }
            memcpy(data, bytes + skip, size);
            record->store->end_pass();
            data    = (char *) data + size;
            offset += size;
            n      -= size;
        }
    } catch (...) {
        mobile_fail_caught();
        memset(data, 0, n);
        record->store->fail_for_good(std::string(tensor->name) + ": it was copied, and could not be read: " + mobile_last_error());
    }
}

void mobile_expert_buffer::written(const ggml_tensor * tensor) noexcept {
    store->fail_for_good(std::string(tensor->name) + ": somebody wrote to it, and experts in the store are read-only");
}

static std::unique_ptr<mobile_buffer> make_buffer(size_t size) {
    return std::make_unique<mobile_expert_buffer>(size, g_loading.params);
}

static const char * resolve_expert(const ggml_tensor * w, int64_t expert, const char * stock, bool wait);
static void         settle_expert (const ggml_tensor * w);
static bool         owns_expert   (const ggml_tensor * w);

static ggml_backend_buffer_type_t mobile_buffer_type() {
    static const mobile_buffer_kind kind = { "experts", make_buffer };
    static ggml_backend_buffer_type type = [] {
        static const ggml_expert_resolver resolver = { resolve_expert, settle_expert, owns_expert };
        ggml_expert_set_resolver(&resolver);
        return mobile_buffer_type_of(&kind);
    }();
    return &type;
}

// host memory for experts that devices are filled from: as the file has them, never repacked, in memory that a
// device reads fast where there is such
static ggml_backend_buffer_type_t host_buffer_type() {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU && ggml_backend_dev_host_buffer_type(dev)) {
            return ggml_backend_dev_host_buffer_type(dev);
        }
    }
    // a copy, since the loader takes the CPU's own type to mean "any that the CPU can use"
    static ggml_backend_buffer_type plain = *ggml_backend_cpu_buffer_type();
    return &plain;
}

static const char * resolve_expert(const ggml_tensor * w, int64_t expert, const char * stock, bool wait) {
    if (!w->buffer || ggml_backend_buffer_get_type(w->buffer) != mobile_buffer_type()) {
        return stock;
    }
    const mobile_tensor * record = tensor_record(w);
    if (!record) {
        return store_of(w).resolve_failed();
    }
    return record->store->resolve(record->layer, record->piece, part_of_row(expert), wait);
}

static void settle_expert(const ggml_tensor * w) {
    if (w->buffer && ggml_backend_buffer_get_type(w->buffer) == mobile_buffer_type()) {
        store_of(w).settle();
    }
}

static bool owns_expert(const ggml_tensor * w) {
    return w->buffer && ggml_backend_buffer_get_type(w->buffer) == mobile_buffer_type();
}

//
// loading
//

const llama_model_tensor_buft_override * mobile_load_begin(const llama_model_tensor_buft_override * overrides) {
    g_loading.mark = false;
    mobile_fail(MOBILE_OK, "");
    if (g_loading.zeros) {
        g_loading.mark      = true;
        g_loading.overrides = { { MOBILE_EVERY_TENSOR, mobile_zeros_type() }, { nullptr, nullptr } };
        return g_loading.overrides.data();
    }
    if (!g_loading.pending) {
        return overrides;
    }
    g_loading.pending = false;
    g_loading.mark = g_loading.params.budget_bytes == 0;
    if (g_loading.mark && !g_loading.params.on_host) {
        return overrides;
    }

    // the user's own overrides come first
    g_loading.overrides.clear();
    for (const auto * o = overrides; o && o->pattern; ++o) {
        g_loading.overrides.push_back(*o);
    }
    g_loading.overrides.push_back({ EXPERT_PATTERN, g_loading.mark ? host_buffer_type() : mobile_buffer_type() });
    g_loading.overrides.push_back({ EXPERT_SMALL_PATTERN, ggml_backend_cpu_buffer_type() });
    g_loading.overrides.push_back({ nullptr, nullptr });
    return g_loading.overrides.data();
}

// the order in which build_moe_ffn uses a layer's tensors
static int piece_order(const char * name) {
    static const char * order[] = { "ffn_gate_up_exps", "ffn_up_exps", "ffn_gate_exps", "ffn_down_exps" };
    for (int i = 0; i < 4; ++i) {
        if (strstr(name, order[i])) {
            return i;
        }
    }
    return 4;
}

static mobile_model_layer layer_number(const char * name) {
    int il = -1;
    sscanf(name, "blk.%d.", &il);
    return mobile_model_layer(il);
}

// by layer, then in the order of use
static std::vector<ggml_tensor *> sorted_by_use(std::vector<ggml_tensor *> tensors) {
    std::stable_sort(tensors.begin(), tensors.end(), [](const ggml_tensor * a, const ggml_tensor * b) {
        const mobile_model_layer la = layer_number(a->name);
        const mobile_model_layer lb = layer_number(b->name);
        return la != lb ? la < lb : piece_order(a->name) < piece_order(b->name);
    });
    return tensors;
}

// whether this load puts experts into a store
static bool has_store(const llama_model_loader & ml) {
    for (const auto * o = ml.tensor_buft_overrides; o && o->pattern; ++o) {
        if (o->buft == mobile_buffer_type()) {
            return true;
        }
    }
    return false;
}

// where a tensor's experts lie; file: index into the loader's files
static mobile_by<mobile_part, mobile_range> ranges_of(const llama_model_loader & ml, const ggml_tensor * t) {
    if (const mobile_parts * parts = mobile_layout_find(ml, t->name)) {
        return parts->ranges;
    }
    const auto & weight = ml.require_weight(t->name);
    mobile_by<mobile_part, mobile_range> ranges;
    for (int64_t e = 0; e < t->ne[2]; ++e) {
        ranges.push_back({ weight.idx, weight.offs + e*t->nb[2], t->nb[2] });
    }
    return ranges;
}

bool mobile_load_tensors(llama_model_loader & ml, ggml_context * ctx, llama_progress_callback progress, void * progress_data) {
    const std::regex pattern(EXPERT_PATTERN);
    std::vector<ggml_tensor *> tensors;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (g_loading.mark && std::regex_search(t->name, pattern)) {
            set_tag(t, MOBILE_TAG_ROUTED, nullptr);
        }
        if (t->buffer && ggml_backend_buffer_get_type(t->buffer) == mobile_buffer_type()) {
            tensors.push_back(t);
        }
    }
    if (g_loading.zeros) {
        return true;
    }
    if (tensors.empty()) {
        return false;
    }
    if (ml.use_mmap) {
        mobile_throw(MOBILE_ERR_ARGUMENT, "an expert budget needs a load without mmap (use_mmap = false)");
    }
    tensors = sorted_by_use(std::move(tensors));

    mobile_expert_buffer & buffer = buffer_of(tensors[0]);
    mobile_store & store = *buffer.store;

    store.n_segments = ml.mobile ? ml.mobile->n_segments : 1;

    std::string err;
    std::vector<int> file_of(ml.files.size(), -1);
    for (ggml_tensor * t : tensors) {
        if (store.n_segments > 1 && !mobile_layout_find(ml, t->name)) {
            mobile_throw(MOBILE_ERR_ARGUMENT, std::string(t->name) + ": some experts are in segments and these are not");
        }
        mobile_layout_split(ml, t);
        mobile_by<mobile_part, mobile_range> ranges = ranges_of(ml, t);
        for (mobile_range & range : ranges) {
            int & file = file_of.at(range.file);
            if (file < 0) {
                file = store.add_file(ml.files[range.file]->file_id(), err);
                if (file < 0) {
                    mobile_throw(MOBILE_ERR_IO, err);
                }
            }
            range.file = (uint16_t) file;
        }
        if (!store.add_piece(layer_number(t->name), t->name, ranges, err)) {
            mobile_throw(MOBILE_ERR_IO, err);
        }
        const mobile_store_layer layer = store.layer_of(layer_number(t->name));
        buffer.tensors.push_back({ &store, layer, store.layers[layer].n_pieces - 1 });
        set_tag(t, MOBILE_TAG_STORED, &buffer.tensors.back());
        ml.size_done += ggml_nbytes(t);
    }

    const float done = (float) (ml.size_done - store.expert_bytes)/(float) ml.size_data;
    const float part = (float) store.expert_bytes/(float) ml.size_data;
    const int32_t status = store.start([&](float f) { return !progress || progress(done + f*part, progress_data); }, err);
    if (status != MOBILE_OK) {
        mobile_throw((enum mobile_status) status, err);
    }
    if (progress && ml.size_done >= ml.size_data) {
        progress(1.0f, progress_data);
    }
    return true;
}

bool mobile_load_tensor(llama_model_loader & ml, ggml_tensor * tensor) {
    if (mobile_layout_find(ml, tensor->name) && ml.mobile->n_segments > 1 && has_store(ml)) {
        mobile_throw(MOBILE_ERR_ARGUMENT, std::string(tensor->name) + ": a tensor override keeps it from the expert store, where the other segments go");
    }
    return mobile_layout_load(ml, tensor);
}

std::shared_ptr<mobile_store> mobile_store_of(const llama_model & model) {
    std::vector<ggml_tensor *> marked;
    for (const auto & [name, tensor] : model.tensors_by_name) {
        if (tensor->buffer && ggml_backend_buffer_get_type(tensor->buffer) == mobile_buffer_type()) {
            return { std::shared_ptr<void>(), &store_of(tensor) };
        }
        if (mobile_tag_is(tensor, MOBILE_TAG_ROUTED)) {
            marked.push_back(tensor);
        }
    }
    if (marked.empty()) {
        return nullptr;
    }
    auto store = std::make_shared<mobile_store>(mobile_store_default_params());
    std::string err;
    for (const ggml_tensor * t : sorted_by_use(std::move(marked))) {
        const mobile_by<mobile_part, mobile_range> sizes(t->ne[2], mobile_range { 0, 0, t->nb[2] });
        if (!store->add_piece(layer_number(t->name), t->name, sizes, err)) {
            return nullptr; // no layout that a store could hold: the model runs without the route op
        }
    }
    store->start_plain();
    return store;
}
