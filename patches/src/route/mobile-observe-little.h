// mobile-observe-little.h - what the routed experts of each layer sum to, beside what fewer of them would: for corrections.
//
// Mechanism: mobile-observe.h shows every layer's weighted experts. A pass with all of them holds what a little one would give
// as well, since each expert is a row of its own: the kept rows, times what keeping them does to weights. So both are of
// the same inputs, those of an exact pass.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

struct ggml_tensor;
struct mobile_context;

// of one layer and one way of having fewer experts, by channel
struct mobile_little_sums {
    int64_t n_tokens = 0;
    std::vector<double> big, big2, little, little2; // [n_embd] sums, and of squares
};

class mobile_little_observer {
public:
    struct way {
        int32_t k;
        int32_t mass;
    };

    void ask(const mobile_context * context, std::vector<way> && of) {
        ctx  = context;
        ways = std::move(of);
    }

    bool wants(const ggml_tensor * t) const;
    // experts, weights: where t and its weights lie on the host
    void add(const ggml_tensor * t, const char * experts, const char * weights);

    std::map<std::pair<int32_t, int32_t>, mobile_little_sums> sums; // by layer and way

private:
    const mobile_context * ctx = nullptr; // NULL: nothing was asked for
    std::vector<way> ways;
};
