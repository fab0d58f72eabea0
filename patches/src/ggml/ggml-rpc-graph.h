// ggml-rpc-graph.h - a graph for an RPC server: its own nodes, and leaves.
//
// Mechanism: what a graph's nodes read is sent as a leaf (an address in a buffer, without an operation or
// sources) unless it is a node of the same graph. A scheduler's split reads copies, weights, caches and the
// results of earlier splits; all of them lie in the server's buffers by the time the split runs.
// Invariant: every id that the message names is in the message, as rpc_server::create_node wants it.

#pragma once

#include <unordered_set>

struct ggml_tensor;

class ggml_rpc_nodes {
public:
    ggml_rpc_nodes(ggml_tensor * const * nodes, size_t n) : members(nodes, nodes + n) {}

    bool has(const ggml_tensor * tensor) const { return members.count(tensor) > 0; }

private:
    std::unordered_set<const ggml_tensor *> members;
};

// the same data, computed by nobody; `serialized` is the rpc_tensor of ggml-rpc.cpp
template <typename serialized> serialized ggml_rpc_leaf(serialized tensor) {
    tensor.op = 0; // GGML_OP_NONE
    for (auto & id : tensor.src) {
        id = 0;
    }
    tensor.view_src  = 0;
    tensor.view_offs = 0;
    return tensor;
}
