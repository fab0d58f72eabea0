#include "route/mobile-trace.h"

#include "mobile-error.h"

#include "ggml.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

mobile_trace::~mobile_trace() {
    if (file) {
        fclose(file);
    }
}

void mobile_trace::start(const std::string & path) {
    if (file) {
        mobile_throw(MOBILE_ERR_STATE, "a trace is being recorded already");
    }
    file = ggml_fopen(path.c_str(), "wb"); // names are UTF-8, on Windows too
    if (!file) {
        mobile_throw(MOBILE_ERR_IO, path + ": " + strerror(errno));
    }
    turn = -1;
    step = 0;
    fprintf(file, "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n");
}

void mobile_trace::stop() {
    if (!file) {
        mobile_throw(MOBILE_ERR_STATE, "no trace is being recorded");
    }
    const bool failed = ferror(file) != 0;
    const bool closed = fclose(file) == 0;
    file = nullptr;
    if (failed || !closed) {
        mobile_throw(MOBILE_ERR_IO, "the trace could not be written in full: " + std::string(strerror(errno)));
    }
}

void mobile_trace::begin_pass(size_t n_tokens) {
    phase = n_tokens > 1 ? 0 : 1;
    if (file && n_tokens > 1) {
        turn++;
    }
    turn = std::max(turn, 0);
}

void mobile_trace::add(mobile_model_layer il, int32_t token, int64_t rank, int32_t expert, float weight, bool is_stored, uint64_t bytes) {
    fprintf(file, "%d,%d,%lld,%d,%d,%d,%g,%d,%llu\n", turn, phase, (long long) step + token, il.n, (int) rank, expert, weight,
        is_stored && bytes == 0 ? 1 : 0, (unsigned long long) bytes);
}
