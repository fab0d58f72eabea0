// mobile-slots-link.cpp - what an upload costs: the time of one that is waited for, and how long one in the
// background holds up the computation.

#include "device/mobile-slots.h"

#include "mobile-error.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <functional>

static constexpr int N_TRIES = 4; // the first also warms up; noise only adds, so the least counts

static double least_us(const std::function<double()> & measure) {
    double least = INFINITY;
    for (int i = 0; i < N_TRIES; ++i) {
        least = std::min(least, measure());
    }
    return least;
}

// zeros to a zero slot. a synchronised backend may still have bytes on their way (a socket's buffers), so every
// measurement ends with bytes that come back
void mobile_slots::measure_link(mobile_pool & p) {
    mobile_device & d = devices[p.device];
    const std::vector<char> zeros(p.slot_bytes);
    mobile_upload up;
    for (mobile_member m : MOBILE_MEMBERS) {
        if (ggml_tensor * t = p.slots.*m) {
            up.parts.push_back({ t, zeros.data(), 0, t->nb[mobile_expert_dim(m)] });
        }
    }
    const auto come_back = [&] {
        char byte = 0;
        ggml_backend_tensor_get_async(d.backend, up.parts.back().tensor, &byte, up.parts.back().size - 1, 1);
        ggml_backend_synchronize(d.backend);
    };
    const auto timed = [](const std::function<void()> & run) {
        const int64_t start = ggml_time_us();
        run();
        return (double) (ggml_time_us() - start);
    };

    const double round_trip = least_us([&] { return timed(come_back); });
    const double upload = least_us([&] {
        return timed([&] {
            for (const auto & part : up.parts) {
                ggml_backend_tensor_set_async(d.backend, part.tensor, part.data, part.offset, part.size);
            }
            come_back();
        });
    });
    d.upload_us = std::max(d.upload_us, upload - round_trip);

    if (!d.uploader) {
        d.stall_us = d.upload_us;
        return;
    }
    // round trips of the computing stream beside background uploads: what they take longer than alone
    const double stall = least_us([&] {
        int n_trips = 0;
        const double us = timed([&] {
            for (int i = 0; i < params.n_uploads; ++i) {
                d.uploader->queue(up, true);
            }
            do {
                come_back();
                n_trips++;
            } while (d.uploader->in_flight() > 0);
            come_back();
        });
        if (!d.uploader->done(arrived)) {
            mobile_throw(MOBILE_ERR_INTERNAL, d.uploader->error());
        }
        return (us - (n_trips + 1)*round_trip)/params.n_uploads;
    });
    d.stall_us = std::max(d.stall_us, stall);
}
