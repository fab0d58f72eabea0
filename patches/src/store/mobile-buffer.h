// mobile-buffer.h - host buffers whose tensors are not read from the file where they are loaded.
//
// Mechanism: a type of ours takes tensors from the loader; what they hold is made when somebody reads them. The CPU
// backend computes on such a buffer by the addresses in it, or by a resolver (ggml/ggml-expert.h).
// Invariant: fill() and written() throw nothing, since the frames around them are C's.
// Limits: nothing can be stored in one.

#pragma once

#include "ggml-backend-impl.h"

#include <cstddef>
#include <memory>

struct mobile_buffer {
    mobile_buffer(void * base, size_t size) : base(base), size(size) {}
    virtual ~mobile_buffer(); // unmaps

    // copies [offset, offset + n) of a tensor to data, for whoever reads it as a tensor
    virtual void fill(const ggml_tensor * tensor, void * data, size_t offset, size_t n) noexcept = 0;
    // somebody wrote to a tensor, in vain
    virtual void written(const ggml_tensor * tensor) noexcept = 0;

    void * const base; // as much address space as the tensors take; NULL: there is none
    const size_t size;
};

struct mobile_buffer_kind {
    const char * name;
    std::unique_ptr<mobile_buffer> (*make)(size_t size); // size: whole pages
};

// kind: lives as long as the type
ggml_backend_buffer_type mobile_buffer_type_of(const mobile_buffer_kind * kind);

// the buffer of a tensor that lies in one of ours
mobile_buffer & mobile_buffer_of(const ggml_tensor * tensor);
