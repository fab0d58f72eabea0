#include "device/mobile-upload.h"

#include "mobile-error.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>

bool mobile_uploader::start(ggml_backend_dev_t dev, int32_t n_blocks, size_t bytes, bool is_late) {
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);
    if (!props.caps.async || n_blocks <= 0) {
        return false;
    }
    ggml_backend_buffer_type_t buft = ggml_backend_dev_host_buffer_type(dev);
    buffer.reset(ggml_backend_buft_alloc_buffer(buft ? buft : ggml_backend_cpu_buffer_type(), n_blocks*bytes));
    backend.reset(ggml_backend_dev_init(dev, nullptr));
    if (!backend || !buffer) {
        return false;
    }
    staging     = (char *) ggml_backend_buffer_get_base(buffer.get());
    block_bytes = bytes;
    late        = is_late;
    for (int32_t i = 0; i < n_blocks; ++i) {
        free_blocks.push_back(i);
    }
    finished.reserve(n_blocks); // coming back throws nothing
    thread = std::thread(&mobile_uploader::run, this);
    return true;
}

mobile_uploader::~mobile_uploader() {
    if (thread.joinable()) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            queued.clear();
            stop = true;
        }
        cv.notify_all();
        thread.join();
    }
}

uint64_t mobile_uploader::queue(mobile_upload upload, bool stays) {
    upload.block = free_blocks.back();
    free_blocks.pop_back();
    char * block = staging + upload.block*block_bytes;
    for (auto & part : upload.parts) {
        if (!stays) {
            memcpy(block, part.data, part.size);
            part.data = block;
            block    += part.size;
        }
    }
    {
        std::lock_guard<std::mutex> lock(mutex);
        queued.push_back(std::move(upload));
        n_in_flight++;
    }
    cv.notify_all();
    return ++n_queued;
}

bool mobile_uploader::done(std::vector<mobile_upload> & uploads) {
    uploads.clear();
    {
        std::lock_guard<std::mutex> lock(mutex);
        uploads.reserve(finished.capacity());
        uploads.swap(finished);
    }
    for (const auto & upload : uploads) {
        free_blocks.push_back(upload.block);
    }
    return std::none_of(uploads.begin(), uploads.end(), [](const mobile_upload & upload) { return upload.failed; });
}

std::string mobile_uploader::error() {
    std::lock_guard<std::mutex> lock(mutex);
    return thrown;
}

void mobile_uploader::drain() {
    std::unique_lock<std::mutex> lock(mutex);
    cv.wait(lock, [&] { return n_in_flight == 0; });
}

void mobile_uploader::wait(uint64_t n) {
    std::unique_lock<std::mutex> lock(mutex);
    cv.wait(lock, [&] { return n_done >= n; });
}

size_t mobile_uploader::in_flight() {
    std::lock_guard<std::mutex> lock(mutex);
    return n_in_flight;
}

void mobile_uploader::send(const mobile_upload & upload) {
    if (late) { // a few passes of a small model, another time each
        std::this_thread::sleep_for(std::chrono::milliseconds(n_sent++ * 7 % 30));
    }
    for (const auto & part : upload.parts) {
        ggml_backend_tensor_set_async(backend.get(), part.tensor, part.data, part.offset, part.size);
    }
    ggml_backend_synchronize(backend.get());
}

void mobile_uploader::run() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
        cv.wait(lock, [&] { return stop || !queued.empty(); });
        if (queued.empty()) {
            return;
        }
        mobile_upload upload = std::move(queued.front());
        queued.pop_front();
        lock.unlock();
        try {
            send(upload);
        } catch (...) {
            mobile_fail_caught();
            upload.failed = true;
        }
        lock.lock();
        if (upload.failed) {
            snprintf(thrown, sizeof(thrown), "%s: an upload of experts failed: %s", ggml_backend_name(backend.get()), mobile_last_error());
        }
        finished.push_back(std::move(upload));
        n_in_flight--;
        n_done++;
        cv.notify_all();
    }
}
