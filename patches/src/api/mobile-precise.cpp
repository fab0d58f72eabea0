#include "mobile-error.h"
#include "mobile.h"

#include "ggml/ggml-precise.h"

int32_t mobile_set_precise(bool on) {
    return mobile_guard([&] {
        if (!ggml_precise_set(on)) {
            return mobile_fail(MOBILE_ERR_STATE, "there is no CPU backend yet: load a model first");
        }
        return MOBILE_OK;
    });
}
