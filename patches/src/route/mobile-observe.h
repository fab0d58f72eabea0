// mobile-observe.h - what a model computes with while it runs: routed experts, and squares of weights' inputs.
//
// Mechanism: ggml's scheduler asks an evaluation callback before each node whether it wants to see it, and
// calls it again once the node is computed. While observing, that callback is ours: it reads the input and the
// ids of matrix multiplications with weights, and the router weights of each layer with experts.
// Invariant: changes when nodes are computed, never what; a context that is not observed pays nothing.
// Limits: the context has one evaluation callback, so one that the caller set refuses observation. Runs on the
// thread that decodes; on a device every tensor that is looked at is copied to the host first.

#pragma once

#include "mobile.h"
#include "route/mobile-observe-little.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct ggml_tensor;

// of one weight, by matrix: experts of a stacked tensor are matrices
struct mobile_input_sums {
    int64_t n_row = 0;             // length of an input row
    int64_t n_mat = 0;
    std::vector<float>   sum2;     // [n_mat][n_row] squares, summed over the rows that the matrix was used on
    std::vector<int64_t> counts;   // [n_mat] those rows
};

// one layer's routing in one ubatch
struct mobile_route_record {
    int32_t il       = -1;
    int32_t n_used   = 0;
    int32_t n_tokens = 0;
    std::vector<int32_t> ids;      // [n_tokens][n_used] whole experts that were computed with; -1: skipped
    std::vector<float>   weights;  // [n_tokens][n_used]
};

class mobile_observer {
public:
    explicit mobile_observer(int32_t what) : what(what) {}

    // ggml_backend_sched_eval_callback; user_data is the observer
    static bool eval(ggml_tensor * t, bool ask, void * user_data);

    const int32_t what;            // of enum mobile_observe
    std::map<std::string, mobile_input_sums> inputs; // by weight
    std::vector<mobile_route_record> routes;         // in the order of computation
    mobile_little_observer little;
    std::string error;             // what could not be observed; from then on nothing more is

private:
    bool wants  (const ggml_tensor * t) const;
    void observe(const ggml_tensor * t);

    void add_dense  (const ggml_tensor * t);
    void add_experts(const ggml_tensor * t);
    void add_route  (const ggml_tensor * t);
    void keep_weights(const ggml_tensor * t);

    mobile_input_sums & sums_of(const ggml_tensor * weight, int64_t n_row, int64_t n_mat, int64_t n_count);

    // of the layer that is being computed: weights [n_tokens][n_used] as far as they are known
    std::vector<float> weights;
    std::vector<char>  host_input; // copies of what lies on a device
    std::vector<char>  host_ids;
};
