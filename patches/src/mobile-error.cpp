#include "mobile-error.h"

#include <stdexcept>

static thread_local std::string g_last_error;

enum mobile_status mobile_fail(enum mobile_status status, const std::string & text) {
    g_last_error = text;
    return status;
}

void mobile_throw(enum mobile_status status, const std::string & text) {
    mobile_fail(status, text);
    throw std::runtime_error(text);
}

const char * mobile_last_error(void) {
    return g_last_error.c_str();
}
