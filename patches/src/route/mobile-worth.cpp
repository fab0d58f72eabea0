#include "route/mobile-worth.h"

#include <algorithm>
#include <iterator>

void mobile_worth::add(mobile_model_layer il, const int32_t * experts, int64_t n, double time) {
    if (!entries.has(il)) {
        entries.resize((size_t) il.n + 1);
    }
    std::vector<mobile_worth_entry> & layer = entries[il];
    for (int64_t i = 0; i < n; ++i) {
        const int32_t expert = experts[i];
        if (expert < 0) {
            continue;
        }
        if ((size_t) expert >= layer.size()) {
            layer.resize((size_t) expert + 1);
        }
        mobile_worth_entry & entry = layer[expert];
        entry.il       = il;
        entry.expert   = expert;
        entry.last_use = time;
        entry.n_uses++;
    }
}

std::vector<mobile_worth_entry> mobile_worth::ranked() const {
    std::vector<mobile_worth_entry> used;
    for (const auto & layer : entries) {
        std::copy_if(layer.begin(), layer.end(), std::back_inserter(used), [](const mobile_worth_entry & entry) { return entry.n_uses > 0; });
    }
    std::stable_sort(used.begin(), used.end(), [](const mobile_worth_entry & a, const mobile_worth_entry & b) {
        return a.n_uses != b.n_uses ? a.n_uses > b.n_uses : a.last_use > b.last_use;
    });
    return used;
}
