#include "store/mobile-zeros.h"

#include "store/mobile-os.h"

#include "ggml-backend-impl.h"

#include <cstring>

struct zeros {
    void * base = nullptr;
    size_t size = 0;
};

static void buffer_free(ggml_backend_buffer_t buffer) {
    auto * z = (zeros *) buffer->context;
    mobile_unmap(z->base, z->size);
    delete z;
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((zeros *) buffer->context)->base;
}

static void buffer_set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_UNUSED(buffer);
    GGML_UNUSED(tensor);
    GGML_UNUSED(data);
    GGML_UNUSED(offset);
    GGML_UNUSED(size);
}

static void buffer_get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    GGML_UNUSED(buffer);
    GGML_UNUSED(tensor);
    GGML_UNUSED(offset);
    memset(data, 0, size);
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    GGML_UNUSED(buffer);
    GGML_UNUSED(value);
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    const size_t n = size > mobile_page_size() ? size : mobile_page_size();
    void * base = mobile_zeros(n);
    if (!base) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = buffer_free;
    iface.get_base    = buffer_get_base;
    iface.set_tensor  = buffer_set_tensor;
    iface.get_tensor  = buffer_get_tensor;
    iface.clear       = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, new zeros { base, n }, size);
}

static const char * get_name(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return "zeros";
}

static size_t get_alignment(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return 64;
}

static bool is_host(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return true; // the CPU backend computes on it
}

ggml_backend_buffer_type_t mobile_zeros_type() {
    static ggml_backend_buffer_type buft = [] {
        ggml_backend_buffer_type b = {};
        b.iface.get_name      = get_name;
        b.iface.alloc_buffer  = alloc_buffer;
        b.iface.get_alignment = get_alignment;
        b.iface.is_host       = is_host;
        b.device              = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        return b;
    }();
    return &buft;
}
