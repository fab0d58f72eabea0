#include "route/mobile-recall.h"

#include "llama-batch.h"

#include <algorithm>

void mobile_recall::begin_pass(const llama_ubatch & ubatch, bool is_of_use) {
    tokens.clear();
    if (ubatch.token && is_of_use) {
        tokens.assign(ubatch.token, ubatch.token + ubatch.n_tokens);
    }
    if (last.size() + tokens.size() > N_TOKENS_MAX) {
        last.clear();
    }
}

void mobile_recall::add(mobile_model_layer il, int32_t token, const int32_t * ids) {
    if (tokens.empty()) {
        return;
    }
    std::vector<uint16_t> & experts = last[tokens[token]];
    if (experts.size() < (size_t) (il.n + 1)*n_used) {
        experts.resize((size_t) (il.n + 1)*n_used, NONE);
    }
    std::copy(ids, ids + n_used, experts.begin() + (size_t) il.n*n_used);
}

void mobile_recall::tell(mobile_store & store, mobile_slots * slots) const {
    std::vector<const std::vector<uint16_t> *> asked; // by the pass's tokens
    size_t n = 0;
    for (int32_t id : tokens) {
        const auto found = last.find(id);
        if (found != last.end()) {
            asked.push_back(&found->second);
            n = std::max(n, found->second.size());
        }
    }
    std::vector<mobile_store_part> in_store;
    std::vector<mobile_part>       parts; // of a layer
    for (mobile_model_layer il(0); (size_t) il.n*n_used < n; ++il) {
        parts.clear();
        for (const std::vector<uint16_t> * experts : asked) {
            for (size_t i = (size_t) il.n*n_used; i < std::min(experts->size(), (size_t) (il.n + 1)*n_used); ++i) {
                for (int32_t s = 0; s < store.n_segments && (*experts)[i] != NONE; ++s) {
                    parts.push_back(store.part_of((*experts)[i], s));
                }
            }
        }
        const mobile_store_layer layer = store.layer_of(il);
        for (size_t i = 0; i < parts.size() && !layer.is_none() && !store.all_resident; ++i) {
            in_store.push_back(store.store_part_of(layer, parts[i]));
        }
        if (slots) {
            slots->expect(il, parts, (int32_t) tokens.size());
        }
    }
    store.expect(in_store);
}
