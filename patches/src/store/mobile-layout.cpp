#include "store/mobile-layout.h"

#include "mobile-error.h"

#include "llama-model-loader.h"

#include "ggml-backend.h"
#include "ggml/ggml-expert.h"
#include "gguf.h"

#include <algorithm>
#include <cstring>
#include <memory>

static constexpr uint32_t VERSION = 1;

// of the name of one expert's tensor, without ".weight"
struct expert_name {
    mobile_model_layer layer;
    mobile_part        part;
    enum mobile_matrix matrix = MOBILE_MATRIX_UP;
};

static const char * MATRIX_NAME[] = { "gate_up", "up", "gate", "down" };

// a number as it is printed: no sign, no leading zero, at most 6 digits. moves s behind it
static bool parse_number(const char *& s, int & n) {
    const char * start = s;
    n = 0;
    while (*s >= '0' && *s <= '9' && s - start < 6) {
        n = 10*n + (*s++ - '0');
    }
    return s > start && (*start != '0' || s == start + 1);
}

static bool parse_text(const char *& s, const char * text) {
    const size_t n = strlen(text);
    if (strncmp(s, text, n) != 0) {
        return false;
    }
    s += n;
    return true;
}

// blk.L.ffn_X.E.weight
static bool parse_name(const char * s, expert_name & name) {
    if (!parse_text(s, "blk.") || !parse_number(s, name.layer.n) || !parse_text(s, ".ffn_")) {
        return false;
    }
    for (int m = MOBILE_MATRIX_GATE_UP; m <= MOBILE_MATRIX_DOWN; ++m) {
        const char * rest = s;
        if (parse_text(rest, MATRIX_NAME[m]) && parse_text(rest, ".") && parse_number(rest, name.part.n) && strcmp(rest, ".weight") == 0) {
            name.matrix = (enum mobile_matrix) m;
            return true;
        }
    }
    return false;
}

static std::string stacked_name(mobile_model_layer layer, enum mobile_matrix matrix) {
    return "blk." + std::to_string(layer.n) + ".ffn_" + MATRIX_NAME[matrix] + "_exps.weight";
}

[[noreturn]] static void refuse(const std::string & fname, const std::string & why) {
    mobile_throw(MOBILE_ERR_ARGUMENT, fname + ": " + why);
}

// a metadata value that must be a u32 if it is there
static uint32_t metadata_u32(const gguf_context * meta, const std::string & fname, const char * key, uint32_t fallback) {
    const int64_t id = gguf_find_key(meta, key);
    if (id < 0) {
        return fallback;
    }
    if (gguf_get_kv_type(meta, id) != GGUF_TYPE_UINT32) {
        refuse(fname, std::string("metadata ") + key + " is not a 32-bit number");
    }
    return gguf_get_val_u32(meta, id);
}

// one of the model's own numbers; 0: the file does not say
static uint32_t metadata_of_model(const llama_model_loader & ml, const char * name) {
    const int64_t id = gguf_find_key(ml.metadata, (ml.arch_name + "." + name).c_str());
    return id >= 0 && gguf_get_kv_type(ml.metadata, id) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(ml.metadata, id) : 0;
}

int64_t mobile_layout_tensor_index(const gguf_context * meta, const char * name) {
    static thread_local int64_t next = 0;
    if (next >= gguf_get_n_tensors(meta) || strcmp(gguf_get_tensor_name(meta, next), name) != 0) {
        next = gguf_find_tensor(meta, name);
    }
    return next++; // -1: not found
}

//
// gathering
//

using weight_of_part = std::map<mobile_part, llama_model_loader::llama_tensor_weight>;

// the stacked entry for the parts of one matrix of a layer
static void gather(llama_model_loader & ml, const std::string & fname, ggml_context * ctx, mobile_model_layer layer, enum mobile_matrix matrix, const weight_of_part & weights) {
    const std::string name = stacked_name(layer, matrix);
    const std::string where = "layer " + std::to_string(layer.n) + ", ffn_" + MATRIX_NAME[matrix] + ": ";
    const int n_segments = ml.mobile->n_segments;

    if (ml.weights_map.count(name) > 0) {
        refuse(fname, where + "the experts are there twice, stacked and one by one");
    }
    const auto & [part_0, first] = *weights.begin();
    const ggml_tensor * t0 = first.tensor;
    mobile_part next(0);
    for (const auto & [part, weight] : weights) {
        if (part != next) {
            refuse(fname, where + mobile_part_name(next, n_segments) + " is missing");
        }
        const ggml_tensor * t = weight.tensor;
        if (t->type != t0->type || !ggml_are_same_shape(t, t0)) {
            refuse(fname, where + mobile_part_name(part, n_segments) + " has another type or shape than expert 0");
        }
        ++next;
    }
    const int n_parts = next.n;
    if (t0->ne[2] != 1 || t0->ne[3] != 1 || ggml_nelements(t0) == 0) {
        refuse(fname, where + "an expert is not a matrix");
    }
    if (matrix == MOBILE_MATRIX_GATE_UP && t0->ne[1] % 2 != 0) {
        refuse(fname, where + "not as many gate rows as up rows");
    }
    if (n_parts % n_segments != 0) {
        refuse(fname, where + mobile_part_name(next, n_segments) + " is missing");
    }
    const uint32_t n_expert = metadata_of_model(ml, "expert_count");
    if (n_expert > 0 && (uint32_t) (n_parts/n_segments) != n_expert) {
        refuse(fname, where + (n_parts/n_segments < (int) n_expert ? mobile_part_name(next, n_segments) + " is missing" :
            std::to_string(n_parts/n_segments) + " experts in a model of " + std::to_string(n_expert)));
    }
    if (n_parts > GGML_EXPERT_MAX) {
        refuse(fname, where + std::to_string(n_parts) + " experts and segments are more than this engine can route, " + std::to_string(GGML_EXPERT_MAX));
    }

    mobile_parts & parts = ml.mobile->tensors[name];
    parts.matrix = matrix;
    for (const auto & [part, weight] : weights) {
        parts.ranges.push_back({ weight.idx, weight.offs, ggml_nbytes(t0) });
    }
    const bool is_down = matrix == MOBILE_MATRIX_DOWN;
    ggml_tensor * stacked = ggml_new_tensor_3d(ctx, t0->type,
        t0->ne[0]*(is_down ? n_segments : 1), t0->ne[1]*(is_down ? 1 : n_segments), n_parts/n_segments);
    ggml_set_name(stacked, name.c_str());

    llama_model_loader::llama_tensor_weight weight = first;
    weight.tensor = stacked;
    ml.weights_map.emplace(name, weight);
}

// what goes with experts but cannot be cut into segments
static void refuse_with_segments(const llama_model_loader & ml, const std::string & fname) {
    for (const auto & it : ml.weights_map) {
        const size_t at = it.first.find("_exps.");
        if (at != std::string::npos && it.first.substr(at) != "_exps.weight") {
            refuse(fname, it.first + ": experts with biases or scales cannot be in segments");
        }
    }
}

// where llama.cpp forgets to leave out the feed-forward of the blocks that nothing runs: such a file becomes one
// without them, which it can load
static void drop_mtp_blocks(llama_model_loader & ml) {
    if (ml.arch_name != "step35" && ml.arch_name != "hy_v3") {
        return;
    }
    const uint32_t n_block = metadata_of_model(ml, "block_count");
    const uint32_t n_nextn = metadata_of_model(ml, "nextn_predict_layers");
    if (n_nextn == 0 || n_nextn >= n_block) {
        return;
    }
    for (auto it = ml.weights_map.begin(); it != ml.weights_map.end();) {
        const char * name = it->first.c_str();
        int block = -1;
        if (parse_text(name, "blk.") && parse_number(name, block) && block >= (int) (n_block - n_nextn)) {
            ml.n_elements -= ggml_nelements(it->second.tensor);
            ml.n_bytes    -= ggml_nbytes(it->second.tensor);
            it = ml.weights_map.erase(it);
        } else {
            ++it;
        }
    }
}

void mobile_layout_begin(llama_model_loader & ml, const std::string & fname, bool load_mtp) {
    if (ml.files.empty()) {
        return;
    }
    if (!load_mtp) {
        drop_mtp_blocks(ml);
    }
    const uint32_t version = metadata_u32(ml.metadata, fname, "mobile.version", VERSION);
    if (version > VERSION) {
        refuse(fname, "mobile.version " + std::to_string(version) + " is newer than this engine knows, " + std::to_string(VERSION) +
            ": update mobile-gguf");
    }
    const int64_t layout_id = gguf_find_key(ml.metadata, "mobile.layout");
    if (layout_id >= 0 && (gguf_get_kv_type(ml.metadata, layout_id) != GGUF_TYPE_STRING || strcmp(gguf_get_val_str(ml.metadata, layout_id), "per-expert") != 0)) {
        refuse(fname, "mobile.layout is not one that this engine knows: update mobile-gguf");
    }
    const uint32_t n_segments = metadata_u32(ml.metadata, fname, "mobile.segments", 1);
    if (n_segments < 1 || n_segments > GGML_EXPERT_MAX) {
        refuse(fname, "mobile.segments is " + std::to_string(n_segments));
    }

    std::map<std::pair<mobile_model_layer, enum mobile_matrix>, weight_of_part> found;
    for (auto it = ml.weights_map.begin(); it != ml.weights_map.end();) {
        expert_name name;
        if (it->first.rfind("mobile.", 0) == 0) { // ours, not the model's
            ml.n_elements -= ggml_nelements(it->second.tensor);
            ml.n_bytes    -= ggml_nbytes(it->second.tensor);
            it = ml.weights_map.erase(it);
        } else if (parse_name(it->first.c_str(), name)) {
            found[{ name.layer, name.matrix }].emplace(name.part, it->second);
            it = ml.weights_map.erase(it);
        } else {
            ++it;
        }
    }
    if (found.empty()) {
        if (n_segments > 1) {
            refuse(fname, "it has segments but no experts of their own");
        }
        return;
    }
    ml.mobile = std::make_shared<mobile_layout>();
    ml.mobile->n_segments = (int32_t) n_segments;
    ml.use_mmap = false;
    if (n_segments > 1) {
        refuse_with_segments(ml, fname);
    }

    ggml_init_params params = { ggml_tensor_overhead()*found.size(), nullptr, true };
    ggml_context * ctx = ggml_init(params);
    if (!ctx) {
        mobile_throw(MOBILE_ERR_MEMORY, "no memory for the tensor table");
    }
    ml.contexts.emplace_back(ctx);
    for (const auto & it : found) {
        gather(ml, fname, ctx, it.first.first, it.first.second, it.second);
    }
}

const mobile_parts * mobile_layout_find(const llama_model_loader & ml, const char * name) {
    if (!ml.mobile) {
        return nullptr;
    }
    const auto it = ml.mobile->tensors.find(name);
    return it == ml.mobile->tensors.end() ? nullptr : &it->second;
}

void mobile_layout_require_stacked(const llama_model_loader & ml, const ggml_tensor * tensor) {
    if (mobile_layout_find(ml, tensor->name)) {
        mobile_throw(MOBILE_ERR_ARGUMENT, std::string(tensor->name) + ": the file holds every expert by itself; export it to a stacked one first");
    }
}

//
// loading
//

static void read_range(llama_model_loader & ml, const mobile_range & range, size_t skip, size_t size, char * dst) {
    const auto & file = ml.files.at(range.file);
    file->seek(range.offset + skip, SEEK_SET);
    file->read_raw(dst, size);
}

// one expert from its segments: [n_rows, n_cols] with the segments' rows one after the other, or side by side
static void join_segments(llama_model_loader & ml, const mobile_parts & parts, const ggml_tensor * tensor, int32_t expert, std::vector<char> & segment, char * dst) {
    const int    n_segments = ml.mobile->n_segments;
    const size_t n_part     = tensor->nb[2]/n_segments;
    const size_t n_row      = tensor->nb[1]/n_segments;

    for (int s = 0; s < n_segments; ++s) {
        const mobile_range & range = parts.ranges[mobile_part_of(expert, s, n_segments)];
        switch (parts.matrix) {
            case MOBILE_MATRIX_GATE_UP:
                read_range(ml, range, 0,        n_part/2, dst + s*(n_part/2));
                read_range(ml, range, n_part/2, n_part/2, dst + tensor->nb[2]/2 + s*(n_part/2));
                break;
            case MOBILE_MATRIX_UP:
            case MOBILE_MATRIX_GATE:
                read_range(ml, range, 0, n_part, dst + s*n_part);
                break;
            case MOBILE_MATRIX_DOWN:
                segment.resize(n_part);
                read_range(ml, range, 0, n_part, segment.data());
                for (int64_t row = 0; row < tensor->ne[1]; ++row) {
                    memcpy(dst + row*tensor->nb[1] + s*n_row, segment.data() + row*n_row, n_row);
                }
                break;
        }
    }
}

bool mobile_layout_load(llama_model_loader & ml, ggml_tensor * tensor) {
    const mobile_parts * parts = mobile_layout_find(ml, tensor->name);
    if (!parts) {
        return false;
    }
    // buffers of another form (repacked, on a device) want the tensor whole
    const size_t n_bytes = ggml_nbytes(tensor);
    const bool   is_host = ggml_backend_buffer_is_host(tensor->buffer);
    std::unique_ptr<char[]> staging(is_host ? nullptr : new char[n_bytes]);
    char * dst = is_host ? (char *) tensor->data : staging.get();

    std::vector<char> segment;
    for (int32_t e = 0; e < (int32_t) tensor->ne[2]; ++e) {
        if (ml.mobile->n_segments > 1) {
            join_segments(ml, *parts, tensor, e, segment, dst + e*tensor->nb[2]);
        } else {
            read_range(ml, parts->ranges[mobile_part_of(e, 0, 1)], 0, tensor->nb[2], dst + e*tensor->nb[2]);
        }
    }
    if (ml.check_tensors && !ggml_validate_row_data(tensor->type, dst, n_bytes)) {
        mobile_throw(MOBILE_ERR_ARGUMENT, std::string(tensor->name) + ": invalid data in an expert");
    }
    if (!is_host) {
        ggml_backend_tensor_set(tensor, dst, 0, n_bytes);
    }
    ml.size_done += n_bytes;
    return true;
}

void mobile_layout_split(const llama_model_loader & ml, ggml_tensor * tensor) {
    const mobile_parts * parts = mobile_layout_find(ml, tensor->name);
    if (!parts || ml.mobile->n_segments == 1) {
        return;
    }
    const int n_segments = ml.mobile->n_segments;
    tensor->ne[parts->matrix == MOBILE_MATRIX_DOWN ? 0 : 1] /= n_segments;
    tensor->ne[2] *= n_segments;
    tensor->nb[1]  = ggml_row_size(tensor->type, tensor->ne[0]);
    tensor->nb[2]  = tensor->nb[1]*tensor->ne[1];
    tensor->nb[3]  = tensor->nb[2]*tensor->ne[2];
}
