#include "store/mobile-zeros.h"

#include "store/mobile-buffer.h"
#include "store/mobile-os.h"

#include <cstring>

struct mobile_zeros_buffer : mobile_buffer {
    using mobile_buffer::mobile_buffer;

    void fill(const ggml_tensor * tensor, void * data, size_t offset, size_t n) noexcept override {
        GGML_UNUSED(tensor);
        GGML_UNUSED(offset);
        memset(data, 0, n);
    }

    void written(const ggml_tensor * tensor) noexcept override {
        GGML_UNUSED(tensor);
    }
};

static std::unique_ptr<mobile_buffer> make(size_t size) {
    return std::make_unique<mobile_zeros_buffer>(mobile_zeros(size), size);
}

ggml_backend_buffer_type_t mobile_zeros_type() {
    static const mobile_buffer_kind kind = { "zeros", make };
    static ggml_backend_buffer_type type = mobile_buffer_type_of(&kind);
    return &type;
}
