// mobile-error.h - the text behind mobile_last_error(), one per thread, and the one place where exceptions end.
//
// Invariant: nothing throws across the C API. Every exported function that does more than return a constant is the body
// of mobile_guard() or mobile_guard_or(); tests/patches/test_sources.py reads the sources for it.

#pragma once

#include "mobile.h"

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

// sets this thread's text, cut to what a fixed buffer holds, and returns status
enum mobile_status mobile_fail(enum mobile_status status, const char * text) noexcept;

inline enum mobile_status mobile_fail(enum mobile_status status, const std::string & text) noexcept {
    return mobile_fail(status, text.c_str());
}

// a failure with its status, for code that is called by llama.cpp or far below the C API
struct mobile_error : std::runtime_error {
    mobile_error(enum mobile_status status, const std::string & text) : std::runtime_error(text), status(status) {}

    const enum mobile_status status;
};

// sets this thread's text as well, since llama.cpp reports a failed load by NULL alone
[[noreturn]] void mobile_throw(enum mobile_status status, const std::string & text);

// for a catch block: status and text of what was thrown
enum mobile_status mobile_fail_caught() noexcept;

// calls what returns a status; what it throws becomes one
template <typename body> int32_t mobile_guard(body && call) noexcept {
    try {
        return (int32_t) std::forward<body>(call)();
    } catch (...) {
        return mobile_fail_caught();
    }
}

// the same for what returns something else
template <typename result, typename body> result mobile_guard_or(result fallback, body && call) noexcept {
    try {
        return std::forward<body>(call)();
    } catch (...) {
        mobile_fail_caught();
        return fallback;
    }
}

// throws MOBILE_ERR_ARGUMENT unless it holds
template <typename condition, typename text> void mobile_require(const condition & holds, const text & otherwise) {
    if (!holds) {
        mobile_throw(MOBILE_ERR_ARGUMENT, otherwise);
    }
}
