#include "mobile-error.h"

#include <cstdio>

static thread_local char g_last_error[2048]; // fixed: out of memory is reported here as well

enum mobile_status mobile_fail(enum mobile_status status, const char * text) noexcept {
    snprintf(g_last_error, sizeof(g_last_error), "%s", text);
    return status;
}

void mobile_throw(enum mobile_status status, const std::string & text) {
    mobile_fail(status, text);
    throw mobile_error(status, text);
}

enum mobile_status mobile_fail_caught() noexcept {
    try {
        throw;
    } catch (const mobile_error & e) {
        return mobile_fail(e.status, e.what());
    } catch (const std::bad_alloc &) {
        return mobile_fail(MOBILE_ERR_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return mobile_fail(MOBILE_ERR_INTERNAL, e.what());
    } catch (...) {
        return mobile_fail(MOBILE_ERR_INTERNAL, "something was thrown that says nothing");
    }
}

const char * mobile_last_error(void) {
    return g_last_error;
}
