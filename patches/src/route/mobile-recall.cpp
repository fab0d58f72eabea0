#include "route/mobile-recall.h"

#include "llama-batch.h"

void mobile_recall::begin_pass(const llama_ubatch & ubatch) {
    tokens.clear();
    if (ubatch.token) {
        tokens.assign(ubatch.token, ubatch.token + ubatch.n_tokens);
    }
    if (last.size() + tokens.size() > N_TOKENS_MAX) {
        last.clear();
    }
}

void mobile_recall::add(mobile_model_layer il, int32_t token, const int32_t * ids, int64_t n_used) {
    if (tokens.empty()) {
        return;
    }
    routing & of_token = last[tokens[token]];
    if (!of_token.has(il)) {
        of_token.resize((size_t) il.n + 1);
    }
    of_token[il].assign(ids, ids + n_used);
}

void mobile_recall::tell(mobile_store & store) const {
    std::vector<mobile_store_part> parts;
    for (int32_t id : tokens) {
        const auto found = last.find(id);
        if (found == last.end()) {
            continue;
        }
        for (mobile_model_layer il(0); found->second.has(il); ++il) {
            const mobile_store_layer layer = store.layer_of(il);
            for (uint16_t expert : found->second[il]) {
                for (int32_t s = 0; s < store.n_segments && !layer.is_none(); ++s) {
                    parts.push_back(store.store_part_of(layer, store.part_of(expert, s)));
                }
            }
        }
    }
    store.expect(parts);
}
