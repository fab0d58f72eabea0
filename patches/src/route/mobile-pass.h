// mobile-pass.h - the tokens of the running ubatch, as the route op of each layer sees them.

#pragma once

#include <cstdint>
#include <vector>

// more tokens than this of a text at once pass through the cache: only the last of them count as uses, the others'
// experts go first
static constexpr int64_t MOBILE_LASTING_TOKENS = 8;

struct mobile_pass {
    std::vector<int32_t> k;       // [n_tokens] experts per token; 0: all
    std::vector<int32_t> lossy;   // [n_tokens] 1: it may lose by missing experts
    std::vector<int32_t> pos;     // [n_tokens]
    std::vector<int32_t> index;   // [n_tokens] in the batch of the decode; -1: not known
    std::vector<uint8_t> single;  // [n_tokens] 1: of an answer, as its last token and drafts behind it are: all that is
                                  // here of its text has an output, and is no more than a few tokens
    std::vector<int32_t> outputs; // tokens with an output, ascending: what the last layer keeps
    double  time  = 0.0;          // of its first token, in tokens of texts since the context began
    int64_t n_run = 0;            // tokens that the context has computed before it, those that are of no text too
    bool   mapped = true;         // every layer's tokens could be told apart

    size_t n_tokens() const { return k.size(); }

    // which token a layer's column is: the last layer computes only tokens with an output
    int32_t token_of(int64_t column, int64_t n_columns) {
        if (n_columns == (int64_t) k.size()) {
            return (int32_t) column;
        }
        if (n_columns == (int64_t) outputs.size()) {
            return outputs[column];
        }
        mapped = false;
        return 0;
    }

    bool is_uniform() const {
        for (size_t i = 0; i < k.size(); ++i) {
            if (k[i] != k[0] || lossy[i] != lossy[0]) {
                return false;
            }
        }
        return true;
    }
};
