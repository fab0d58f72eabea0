// mobile-store-expect.cpp - what layers yet to come in a pass will probably ask for does not go for what others miss.

#include "store/mobile-store.h"

void mobile_store::expect(const std::vector<mobile_store_part> & parts) {
    locked lock(mutex);
    for (mobile_store_part part : parts) {
        mobile_expert & x = experts[part];
        if (!x.expected && x.state != MOBILE_NOT_RESIDENT) {
            x.expected = true;
            expected.push_back(part);
        }
    }
}

// false: there is none
bool mobile_store::forget_expected() {
    bool any = false;
    for (mobile_store_part part : expected) {
        any = any || experts[part].expected;
        experts[part].expected = false;
    }
    expected.clear();
    return any;
}

// the layer is reached
void mobile_store::forget_expected(mobile_store_layer layer) {
    const mobile_layer & l = layers[layer];
    for (mobile_store_part part = l.first; !expected.empty() && part < l.first + l.n_parts; ++part) {
        experts[part].expected = false;
    }
}
