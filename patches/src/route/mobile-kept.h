// mobile-kept.h - which of a token's experts a pass with fewer of them keeps, and what divides their weights.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

// ranks of weights [n], the k that are kept before the others. ranked: they come in descending order of score
inline std::vector<int64_t> mobile_kept_order(const float * weights, int64_t n, bool ranked) {
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), (int64_t) 0);
    if (!ranked) {
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
    }
    return order;
}

// of a token whose kept weights sum to sum_kept, what they are divided by: the mass of the `mass` heaviest; 0: their own
inline float mobile_kept_divisor(const float * weights, int64_t n, float sum_kept, int32_t mass) {
    if (mass <= 0) {
        return sum_kept;
    }
    const int64_t n_mass = std::min((int64_t) mass, n);
    std::vector<float> sorted(weights, weights + n);
    std::partial_sort(sorted.begin(), sorted.begin() + n_mass, sorted.end(), std::greater<float>());
    float sum = 0.0f;
    for (int64_t i = 0; i < n_mass; ++i) {
        sum += sorted[i];
    }
    return std::max(sum_kept, sum);
}
