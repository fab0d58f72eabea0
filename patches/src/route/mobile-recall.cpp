#include "route/mobile-recall.h"

#include "llama-batch.h"

#include <algorithm>

void mobile_recall::begin_pass(const llama_ubatch & ubatch) {
    tokens.clear();
    if (ubatch.token) {
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

void mobile_recall::tell(mobile_store & store) const {
    std::vector<mobile_store_part> parts;
    for (int32_t id : tokens) {
        const auto found = last.find(id);
        for (size_t i = 0; found != last.end() && i < found->second.size(); ++i) {
            const mobile_store_layer layer = store.layer_of(mobile_model_layer((int64_t) i/n_used));
            for (int32_t s = 0; s < store.n_segments && found->second[i] != NONE && !layer.is_none(); ++s) {
                parts.push_back(store.store_part_of(layer, store.part_of(found->second[i], s)));
            }
        }
    }
    store.expect(parts);
}
