// ggml-copies.h - what a split takes from other backends, and waits for once.
//
// Mechanism: the scheduler copies a split's inputs one by one and waits for each. Between the host and a device with a
// queue, copies go into the queue instead: those to the host are waited for together, before the split runs; those to the
// device are not waited for where the next split on the host waits for the device anyway.
// Invariant: the host's memory is not written before every copy that reads it is done: by the queue's own order, by
// flush(), or because a split's uploads were waited for. Nothing is in a queue when the splits are done.
// Limits: one copy of the graph; backends whose buffers are their device's own. Others are copied as before.

#pragma once

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"

#include <vector>

class ggml_copies {
public:
    explicit ggml_copies(int n_backends) : uploads(n_backends), downloads(n_backends) {}

    static ggml_backend_buffer_t buffer_of(const ggml_tensor * t) {
        return t->view_src ? t->view_src->buffer : t->buffer;
    }

    // true: done, or in a queue. ids are the backends' places in the scheduler
    bool copy(ggml_backend_t from, int from_id, ggml_backend_t to, int to_id, const ggml_tensor * src, ggml_tensor * dst) {
        if (ggml_backend_buffer_is_host(buffer_of(dst))) {
            flush(from_id);
            if (!from->iface.get_tensor_async || !is_own(from, src)) {
                flush(-1);
                return false;
            }
            ggml_backend_tensor_get_async(from, src, dst->data, 0, ggml_nbytes(src));
            downloads[from_id] = from;
            return true;
        }
        if (!to->iface.set_tensor_async || !is_own(to, dst) || !ggml_backend_buffer_is_host(buffer_of(src)) || from->iface.synchronize) {
            return false;
        }
        ggml_backend_tensor_set_async(to, dst, src->data, 0, ggml_nbytes(src));
        uploads[to_id] = to;
        return true;
    }

    // the split's inputs are in their queues. is_waited_for: by the next split on the host, before it writes anything
    void begin_split(int id, bool is_waited_for) {
        for (size_t i = 0; i < downloads.size(); ++i) {
            wait(downloads[i], (int) i);
        }
        if (!is_waited_for) {
            wait(uploads[id], id);
        }
    }

    // the host's memory is about to be written otherwise than by the queue of `but`; -1: of none
    void flush(int but) {
        for (size_t i = 0; i < uploads.size(); ++i) {
            if ((int) i != but) {
                wait(uploads[i], (int) i);
            }
        }
    }

private:
    std::vector<ggml_backend_t> uploads;   // NULL: nothing that reads the host's memory is in the queue
    std::vector<ggml_backend_t> downloads; // NULL: nothing that writes to it

    // whether the tensor lies in memory of the backend's device that its queue may copy
    static bool is_own(ggml_backend_t backend, const ggml_tensor * t) {
        return buffer_of(t)->buft == ggml_backend_get_default_buffer_type(backend) && !ggml_backend_buffer_is_host(buffer_of(t));
    }

    void wait(ggml_backend_t backend, int id) {
        if (backend) {
            ggml_backend_synchronize(backend);
            uploads[id]   = nullptr;
            downloads[id] = nullptr;
        }
    }
};
