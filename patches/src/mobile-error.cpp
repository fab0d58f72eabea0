#include "mobile-error.h"

static thread_local std::string g_last_error;

enum mobile_status mobile_fail(enum mobile_status status, const std::string & text) {
    g_last_error = text;
    return status;
}

const char * mobile_last_error(void) {
    return g_last_error.c_str();
}
