// mobile-error.h - the text behind mobile_last_error(), one per thread.

#pragma once

#include "mobile.h"

#include <string>

// sets this thread's text and returns status
enum mobile_status mobile_fail(enum mobile_status status, const std::string & text);
