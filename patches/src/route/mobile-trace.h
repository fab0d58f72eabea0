// mobile-trace.h - every routed (token, layer, rank) as a line of CSV.
//
// Limits: by the thread that decodes; a write that fails is reported by stop().

#pragma once

#include "mobile-ids.h"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>

class mobile_trace {
public:
    mobile_trace() = default;
    ~mobile_trace();

    mobile_trace(const mobile_trace &) = delete;
    mobile_trace & operator=(const mobile_trace &) = delete;

    bool is_on() const { return file != nullptr; }

    // throw mobile_error
    void start(const std::string & path);
    void stop();

    // around a ubatch
    void begin_pass(size_t n_tokens);
    void end_pass  (size_t n_tokens) { step += (int64_t) n_tokens; }

    // token: of the ubatch. bytes: of the file, that a use would have to read now. is_stored: the layer is the store's
    void add(mobile_model_layer il, int32_t token, int64_t rank, int32_t expert, float weight, bool is_stored, uint64_t bytes);

private:
    FILE *  file  = nullptr;
    int32_t turn  = -1;
    int32_t phase = 0; // 0: a batch, 1: a single token
    int64_t step  = 0; // of the ubatch's first token
};
