#include "store/mobile-buffer.h"

#include "store/mobile-os.h"

#include <algorithm>

static mobile_buffer * context_of(ggml_backend_buffer_t buffer) {
    return (mobile_buffer *) buffer->context;
}

static const mobile_buffer_kind * kind_of(ggml_backend_buffer_type_t buft) {
    return (const mobile_buffer_kind *) buft->context;
}

mobile_buffer::~mobile_buffer() {
    mobile_unmap(base, size);
}

mobile_buffer & mobile_buffer_of(const ggml_tensor * tensor) {
    return *context_of(tensor->buffer);
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    delete context_of(buffer);
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return context_of(buffer)->base;
}

static void buffer_get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    context_of(buffer)->fill(tensor, data, offset, size);
}

static void buffer_set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_UNUSED(data);
    GGML_UNUSED(offset);
    GGML_UNUSED(size);
    context_of(buffer)->written(tensor);
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    GGML_UNUSED(buffer);
    GGML_UNUSED(value);
}

static const char * type_get_name(ggml_backend_buffer_type_t buft) {
    return kind_of(buft)->name;
}

static ggml_backend_buffer_t type_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    std::unique_ptr<mobile_buffer> made = kind_of(buft)->make(std::max(size, mobile_page_size()));
    if (!made->base) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = buffer_free;
    iface.get_base    = buffer_get_base;
    iface.set_tensor  = buffer_set_tensor;
    iface.get_tensor  = buffer_get_tensor;
    iface.clear       = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, made.release(), size);
}

static size_t type_get_alignment(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return 64;
}

static bool type_is_host(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return true; // the CPU backend computes on it
}

ggml_backend_buffer_type mobile_buffer_type_of(const mobile_buffer_kind * kind) {
    ggml_backend_buffer_type type = {};
    type.iface.get_name      = type_get_name;
    type.iface.alloc_buffer  = type_alloc_buffer;
    type.iface.get_alignment = type_get_alignment;
    type.iface.is_host       = type_is_host;
    type.device              = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    type.context             = (void *) kind;
    return type;
}
