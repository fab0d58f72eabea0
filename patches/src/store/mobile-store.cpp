#include "store/mobile-store.h"

#include "ggml/ggml-expert.h"

#include "ggml.h"

#include <algorithm>
#include <cstring>

std::string mobile_part_name(mobile_part part, int32_t n_segments) {
    return "expert " + std::to_string(mobile_expert_of(part, n_segments)) +
        (n_segments > 1 ? ", segment " + std::to_string(mobile_segment_of(part, n_segments)) : "");
}

mobile_load_params mobile_store_default_params() {
    mobile_load_params params = {};
    params.budget_bytes = 0;
    params.n_io_threads = 4;
    params.eviction     = MOBILE_EVICTION_DECAY;
    params.io           = MOBILE_IO_AUTO;
    return params;
}

mobile_store::mobile_store(const mobile_load_params & params) : params(params) {
}

mobile_store::~mobile_store() {
    {
        locked lock(mutex);
        stop = true;
    }
    cv_work.notify_all();
    for (auto & t : io_threads) {
        t.join();
    }
    for (auto & c : classes) {
        mobile_unmap(c.arena, c.n_slots*c.slot_bytes);
    }
    mobile_unmap(const_cast<char *>(zeros), zeros_size);
    for (auto & f : files) {
        mobile_file_close(f);
    }
}

int mobile_store::add_file(int fd, std::string & err) {
    mobile_file file;
    if (!mobile_file_open(file, fd, (enum mobile_io) params.io, err)) {
        return -1;
    }
    files.push_back(file);
    return (int) files.size() - 1;
}

bool mobile_store::add_piece(mobile_model_layer il, const std::string & name, const mobile_by<mobile_part, mobile_range> & ranges, std::string & err) {
    if (il.is_none() || ranges.empty()) {
        err = name + ": no layer number or no experts";
        return false;
    }
    if (ranges.size() > GGML_EXPERT_MAX) {
        err = name + ": " + std::to_string(ranges.size()) + " experts and segments are more than this engine can route, " + std::to_string(GGML_EXPERT_MAX);
        return false;
    }
    const mobile_range & first = ranges[mobile_part(0)];
    for (mobile_part part(0); ranges.has(part); ++part) {
        const mobile_range & r = ranges[part];
        if (files.empty()) {
            continue;
        }
        const mobile_file & f = files.at(r.file);
        if (r.size == 0 || r.offset > f.size || r.size > f.size - r.offset) {
            err = f.name + ": " + name + ", " + mobile_part_name(part, n_segments) + " lies outside the file; it is truncated or corrupt";
            return false;
        }
        if (r.size != first.size) {
            err = f.name + ": " + name + ": experts of different sizes";
            return false;
        }
    }
    if (!store_layer_of.has(il)) {
        store_layer_of.resize(il.n + 1);
    }
    if (store_layer_of[il].is_none()) {
        store_layer_of[il] = layers.next();
        layers.push_back({});
        layers.back().il      = il;
        layers.back().n_parts = (int32_t) ranges.size();
    }
    mobile_layer & l = layers[store_layer_of[il]];
    if (l.n_pieces == MOBILE_MAX_PIECES || (size_t) l.n_parts != ranges.size()) {
        err = name + ": does not fit the other expert tensors of layer " + std::to_string(il.n);
        return false;
    }
    // [part][piece]: widen by one piece
    std::vector<mobile_range> all((size_t) l.n_parts*(l.n_pieces + 1));
    for (mobile_part part(0); ranges.has(part); ++part) {
        for (int p = 0; p < l.n_pieces; ++p) {
            all[(size_t) part.n*(l.n_pieces + 1) + p] = l.ranges[(size_t) part.n*l.n_pieces + p];
        }
        all[(size_t) part.n*(l.n_pieces + 1) + l.n_pieces] = ranges[part];
        expert_bytes += ranges[part].size;
    }
    l.ranges = std::move(all);
    l.piece_name[l.n_pieces++] = name;
    return true;
}

bool mobile_store::direct_io() const {
    return !files.empty() && std::all_of(files.begin(), files.end(), [](const mobile_file & f) { return f.direct; });
}

// slot classes and what budgets mean, for reads aligned to `align`
void mobile_store::lay_out(uint32_t align) {
    mobile_store_part first(0);
    for (auto & l : layers) {
        mobile_slot_class c;
        c.n_pieces = l.n_pieces;
        for (int p = 0; p < l.n_pieces; ++p) {
            c.piece_size[p] = l.ranges[p].size;
        }
        auto it = std::find_if(classes.begin(), classes.end(), [&](const mobile_slot_class & o) {
            return o.n_pieces == c.n_pieces && std::equal(c.piece_size, c.piece_size + MOBILE_MAX_PIECES, o.piece_size);
        });
        if (it == classes.end()) {
            for (int p = 0; p < c.n_pieces; ++p) {
                c.piece_offset[p] = c.slot_bytes;
                // a range starts anywhere within its first block
                c.slot_bytes += mobile_round_up(c.piece_size[p] + align - 1, align);
            }
            it = classes.insert(classes.end(), c);
        }
        l.cls   = (int32_t) (it - classes.begin());
        l.first = first;
        first   = first + l.n_parts;
        it->n_experts += l.n_parts;
        n_parts_max    = std::max(n_parts_max, l.n_parts);
    }
    if (classes.size() > 1) {
        // slots change class by giving their pages back
        for (auto & c : classes) {
            c.slot_bytes = mobile_round_up(c.slot_bytes, mobile_page_size());
        }
    }
    for (const auto & l : layers) {
        const uint64_t bytes = l.n_parts*classes[l.cls].slot_bytes;
        budget_min_bytes  = std::max(budget_min_bytes, bytes);
        budget_all_bytes += bytes;
    }
}

void mobile_store::start_plain() {
    lay_out(4096); // a budget that is legal by these figures is legal on every file system
    budget_bytes = budget_all_bytes;
    all_resident = true;
    plain        = true;
    committed    = expert_bytes;
    count.resident_bytes_peak = committed;
}

int32_t mobile_store::start(const std::function<bool(float)> & progress, std::string & err) {
    uint32_t align = 512;
    for (const auto & f : files) {
        align = std::max(align, f.align);
    }
    lay_out(align);

    budget_bytes = params.budget_bytes == 0 ? budget_all_bytes : std::min(params.budget_bytes, budget_all_bytes);
    all_resident = budget_bytes == budget_all_bytes;
    uint64_t least_bytes = 0;
    for (const auto & l : layers) {
        const int32_t n = params.n_at_once > 0 ? std::min(params.n_at_once, l.n_parts) : l.n_parts;
        least_bytes = std::max(least_bytes, n*classes[l.cls].slot_bytes);
    }
    if (budget_bytes < least_bytes) {
        err = "an expert budget of " + std::to_string(budget_bytes) + " bytes is below the smallest that can work, " +
            std::to_string(least_bytes) + " bytes: " +
            (params.n_at_once > 0 ? std::to_string(params.n_at_once) + " experts or segments" : "all " + std::to_string(n_expert_max()) + " experts") +
            " of one layer, which " + (params.n_at_once > 0 ? "a pass" : "a prompt") + " needs at once";
        return MOBILE_ERR_BUDGET;
    }
    if (layers.empty()) {
        return MOBILE_OK;
    }

    evictable.assign(layers.size(), by_key(mobile_goes_first<mobile_store_part>{ n_segments }));
    n_held.assign(layers.size(), 0);
    experts = decltype(experts)((layers.back().first + layers.back().n_parts).n);
    for (mobile_store_layer layer(0); layers.has(layer); ++layer) {
        for (mobile_part part(0); part.n < layers[layer].n_parts; ++part) {
            experts[store_part_of(layer, part)].layer = layer;
        }
    }
    huge_pages = classes.size() == 1;
    for (auto & c : classes) {
        c.n_slots = std::min(c.n_experts, budget_bytes/c.slot_bytes);
        c.arena   = (char *) mobile_map(c.n_slots*c.slot_bytes);
        if (!c.arena) {
            err = "no address space for " + std::to_string(c.n_slots*c.slot_bytes) + " bytes of experts";
            c.n_slots = 0;
            return MOBILE_ERR_MEMORY;
        }
        mobile_huge_pages(c.arena, c.n_slots*c.slot_bytes, huge_pages);
        c.free .reserve(c.n_slots); // giving a slot back throws nothing
        c.spare.reserve(c.n_slots);
        for (int p = 0; p < c.n_pieces; ++p) {
            zeros_size = std::max(zeros_size, c.piece_size[p]);
        }
    }
    can_prefault = params.prefault && !all_resident;
    zeros = (const char *) mobile_zeros(zeros_size);
    if (!zeros) {
        err = "no address space for expert zeros";
        return MOBILE_ERR_MEMORY;
    }

    for (int i = 0; i < params.n_io_threads; ++i) {
        io_threads.emplace_back(&mobile_store::io_main, this);
    }

    if (all_resident) {
        for (mobile_store_layer layer(0); layers.has(layer); ++layer) {
            if (progress && !progress((float) layer.n/layers.size())) {
                err = "cancelled";
                return MOBILE_ERR_STATE;
            }
            const std::vector<mobile_need> needs = all_needs(layer, true);
            request(layer, needs);
            for (const mobile_need & need : needs) {
                for (int p = 0; p < layers[layer].n_pieces; ++p) {
                    resolve(layer, p, need.part, true);
                }
            }
            if (!end_pass()) {
                err = error();
                return MOBILE_ERR_IO;
            }
        }
        locked lock(mutex);
        const uint64_t peak = count.resident_bytes_peak;
        count = {};
        count.resident_bytes_peak = peak;
    }
    return MOBILE_OK;
}

std::vector<mobile_need> mobile_store::all_needs(mobile_store_layer layer, bool lasting) const {
    std::vector<mobile_need> needs(layers[layer].n_parts);
    mobile_part part(0);
    for (mobile_need & need : needs) {
        need.part    = part;
        need.lasting = lasting;
        ++part;
    }
    return needs;
}

uint64_t mobile_store::expert_bytes_of(const mobile_layer & l) const {
    const mobile_slot_class & c = classes[l.cls];
    return c.piece_size[0] + c.piece_size[1] + c.piece_size[2];
}

const mobile_range & mobile_store::range_of(mobile_store_part part, int piece) const {
    const mobile_layer & l = layers[layer_of_part(part)];
    return l.ranges[(size_t) part_in_layer(part).n*l.n_pieces + piece];
}

mobile_store_layer mobile_store::layer_of(mobile_model_layer il) const {
    return store_layer_of.has(il) ? store_layer_of[il] : mobile_store_layer();
}

std::string mobile_store::error() {
    locked lock(mutex);
    return error_text.empty() ? thrown : error_text;
}

mobile_counters mobile_store::counters() {
    locked lock(mutex);
    mobile_counters c = count;
    c.resident_bytes = committed;
    return c;
}

void mobile_store::reset_peak() {
    locked lock(mutex);
    count.resident_bytes_peak = committed;
}

uint8_t mobile_store::residency_of_model(mobile_store_layer layer, int32_t expert) {
    locked lock(mutex);
    uint8_t state = MOBILE_RESIDENT;
    for (int s = 0; s < n_segments && !plain; ++s) {
        state = std::min(state, experts[store_part_of(layer, part_of(expert, s))].state);
    }
    return state;
}

uint64_t mobile_store::missing_of_model(mobile_store_layer layer, int32_t expert) {
    locked lock(mutex);
    uint64_t bytes = 0;
    for (int s = 0; s < n_segments && !plain; ++s) {
        const bool missing = experts[store_part_of(layer, part_of(expert, s))].state == MOBILE_NOT_RESIDENT;
        bytes += missing ? expert_bytes_of(layers[layer]) : 0;
    }
    return bytes;
}
