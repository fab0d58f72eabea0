// mobile-upload.h - background uploads of experts into a device's slots.
//
// Mechanism: one thread per device with a backend instance of its own, which is a stream of its own. The thread
// that decodes hands over a slot and the bytes; it asks later which uploads are done.
// Invariants: an upload is done only when its backend has been synchronised, so its slot can be named in a graph
// then and not before; the bytes are copied to a staging block (pinned where the device offers that) unless they
// stay where they are as long as the model does; every upload comes back, and one that threw comes back failed.
// Limits: at most n_blocks uploads at a time; what does not fit is not taken.

#pragma once

#include "mobile-ids.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// one tensor's part of an expert
struct mobile_upload_part {
    ggml_tensor * tensor = nullptr;
    const char  * data   = nullptr;
    size_t        offset = 0;       // in the tensor
    size_t        size   = 0;
};

struct mobile_upload {
    mobile_slots_layer layer; // of who queued it
    mobile_part        part;
    int32_t            block  = -1;
    bool               failed = false;
    std::vector<mobile_upload_part> parts;
};

class mobile_uploader {
public:
    // false: the device has no second stream. block_bytes: of the largest upload. late: for tests, see mobile.h
    bool start(ggml_backend_dev_t dev, int32_t n_blocks, size_t block_bytes, bool late);
    ~mobile_uploader();

    // by the thread that decodes

    bool has_room() const { return !free_blocks.empty(); }
    // call if there is room. stays: part.data is valid as long as the model is. returns its number
    uint64_t queue(mobile_upload upload, bool stays);
    // uploads: those done since the last call. false: some failed, error() says why
    bool done(std::vector<mobile_upload> & uploads);
    std::string error();
    // waits until nothing is in flight; done() has yet to be called
    void drain();
    // the same for what was queued up to and with number n: uploads are done in their order
    void wait(uint64_t n);
    size_t in_flight();

private:
    void run();
    void send(const mobile_upload & upload);

    ggml_backend_ptr        backend;
    ggml_backend_buffer_ptr buffer; // staging
    char *                  staging     = nullptr;
    size_t                  block_bytes = 0;
    bool                    late        = false;
    int                     n_sent      = 0; // of the uploader's thread
    std::vector<int32_t>    free_blocks; // of the thread that decodes

    std::mutex                 mutex;
    std::condition_variable    cv;
    std::deque<mobile_upload>  queued;
    std::vector<mobile_upload> finished;
    size_t                     n_in_flight = 0;
    uint64_t                   n_done      = 0;
    uint64_t                   n_queued    = 0; // of the thread that decodes
    bool                       stop = false;
    char                       thrown[256] = ""; // by the last that failed
    std::thread                thread;
};
