// mobile-error.h - the text behind mobile_last_error(), one per thread.

#pragma once

#include "mobile.h"

#include <string>

// sets this thread's text and returns status
enum mobile_status mobile_fail(enum mobile_status status, const std::string & text);

// the same, for code that llama.cpp's loader calls: throws std::runtime_error with the text
[[noreturn]] void mobile_throw(enum mobile_status status, const std::string & text);
