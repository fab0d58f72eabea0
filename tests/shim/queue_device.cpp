// queue_device.cpp - a device whose queue runs as late as it may, for tests without a GPU.
//
// What is put into a backend's queue (copies to and from the device, graphs) is done when somebody waits for the backend,
// and not before. So who writes to host memory that a queued copy still has to read, or reads what is not there yet,
// is found each time, where a GPU would show it now and then. Copies without a queue are done at once, whatever is queued:
// a GPU gives them no order either. It computes by the CPU's kernels, in memory that calls itself the device's own.
//
// queue_device_register() makes it a GPU of this process.

#include "ggml-backend-impl.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

static constexpr size_t ALIGNMENT = 64;
static constexpr size_t TOTAL     = (size_t) 64 << 30;

static std::atomic<int64_t> g_n_waits { 0 };

static ggml_backend_buffer_type_t queue_buffer_type();
static ggml_backend_dev_t         queue_device();

//
// memory
//

static void buffer_free(ggml_backend_buffer_t buffer) {
    free(buffer->context);
}

static void * buffer_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
}

static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}

static void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
}

static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(buffer->context, value, buffer->size);
}

static const char * type_name(ggml_backend_buffer_type_t) {
    return "QUEUE";
}

static ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
    void * memory = aligned_alloc(ALIGNMENT, (size + 2*ALIGNMENT - 1)/ALIGNMENT*ALIGNMENT);
    if (!memory) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = buffer_free;
    iface.get_base      = buffer_base;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor    = buffer_set;
    iface.get_tensor    = buffer_get;
    iface.clear         = buffer_clear;
    return ggml_backend_buffer_init(type, iface, memory, size);
}

static size_t type_alignment(ggml_backend_buffer_type_t) {
    return ALIGNMENT;
}

static bool type_is_host(ggml_backend_buffer_type_t) {
    return false;
}

static ggml_backend_buffer_type_t queue_buffer_type() {
    static ggml_backend_buffer_type type = [] {
        ggml_backend_buffer_type t = {};
        t.iface.get_name      = type_name;
        t.iface.alloc_buffer  = type_alloc;
        t.iface.get_alignment = type_alignment;
        t.iface.is_host       = type_is_host;
        t.device              = queue_device();
        return t;
    }();
    return &type;
}

//
// the queue
//

struct queue {
    ggml_backend_t cpu = ggml_backend_cpu_init();
    std::vector<std::function<void()>> waiting;

    ~queue() { ggml_backend_free(cpu); }
};

static queue & queue_of(ggml_backend_t backend) {
    return *(queue *) backend->context;
}

// what a graph was when it was put into the queue: whoever put it there may build another in its place
class copied_graph {
public:
    explicit copied_graph(ggml_cgraph * graph) {
        nodes.reserve(ggml_graph_n_nodes(graph));
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            nodes.push_back(copy(ggml_graph_node(graph, i)));
        }
    }

    void compute(ggml_backend_t cpu) {
        ggml_init_params params = {};
        params.mem_size = ggml_graph_overhead_custom(nodes.size() + 1, false);
        params.no_alloc = true;
        ggml_context * ctx   = ggml_init(params);
        ggml_cgraph  * graph = ggml_new_graph_custom(ctx, nodes.size() + 1, false);
        for (ggml_tensor * node : nodes) {
            ggml_graph_add_node(graph, node);
        }
        GGML_ASSERT(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS);
        ggml_free(ctx);
    }

private:
    std::unordered_map<const ggml_tensor *, std::unique_ptr<ggml_tensor>> copies;
    std::vector<ggml_tensor *> nodes;

    ggml_tensor * copy(const ggml_tensor * t) {
        if (!t) {
            return nullptr;
        }
        auto found = copies.find(t);
        if (found == copies.end()) {
            found = copies.emplace(t, std::make_unique<ggml_tensor>(*t)).first;
            ggml_tensor * made = found->second.get();
            for (auto & src : made->src) {
                // what lies before is memory by now
                src = leaf(src);
            }
            made->view_src = leaf(made->view_src);
            return made;
        }
        return found->second.get();
    }

    ggml_tensor * leaf(const ggml_tensor * t) {
        if (!t) {
            return nullptr;
        }
        auto found = copies.find(t);
        if (found == copies.end()) {
            found = copies.emplace(t, std::make_unique<ggml_tensor>(*t)).first;
            for (auto & src : found->second->src) {
                src = nullptr;
            }
            found->second->view_src = nullptr;
        }
        return found->second.get();
    }
};

static const char * backend_name(ggml_backend_t) {
    return "QUEUE";
}

static void backend_synchronize(ggml_backend_t backend) {
    g_n_waits++;
    std::vector<std::function<void()>> now;
    now.swap(queue_of(backend).waiting);
    for (auto & task : now) {
        task();
    }
}

static void backend_free(ggml_backend_t backend) {
    backend_synchronize(backend);
    delete &queue_of(backend);
    delete backend;
}

static void backend_set(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    char * to = (char *) t->data + offset;
    queue_of(backend).waiting.push_back([=] { memcpy(to, data, size); });
}

static void backend_get(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    const char * from = (const char *) t->data + offset;
    queue_of(backend).waiting.push_back([=] { memcpy(data, from, size); });
}

static enum ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    queue & q = queue_of(backend);
    q.waiting.push_back([&q, copied = std::make_shared<copied_graph>(graph)] { copied->compute(q.cpu); });
    return GGML_STATUS_SUCCESS;
}

//
// the device
//

static const char * device_name(ggml_backend_dev_t) {
    return "QUEUE0";
}

static const char * device_description(ggml_backend_dev_t) {
    return "a queue that runs as late as it may";
}

static void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free  = TOTAL - ((size_t) 1 << 30);
    *total = TOTAL;
}

static enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = device_name(dev);
    props->description = device_description(dev);
    props->type        = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps.async  = true;
}

static ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 0x71, 0x75, 0x65, 0x75, 0x65 };
    ggml_backend_i iface = {};
    iface.get_name         = backend_name;
    iface.free             = backend_free;
    iface.set_tensor_async = backend_set;
    iface.get_tensor_async = backend_get;
    iface.synchronize      = backend_synchronize;
    iface.graph_compute    = backend_compute;
    return new ggml_backend { &guid, iface, dev, new queue() };
}

static ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) {
    return queue_buffer_type();
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    static ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return op->op != GGML_OP_CUSTOM && op->op != GGML_OP_MAP_CUSTOM1 && op->op != GGML_OP_MAP_CUSTOM2 && ggml_backend_dev_supports_op(cpu, op);
}

static bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
    return type == queue_buffer_type();
}

static const char * reg_name(ggml_backend_reg_t) {
    return "QUEUE";
}

static size_t reg_count(ggml_backend_reg_t) {
    return 1;
}

static ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t) {
    return queue_device();
}

static void * reg_proc(ggml_backend_reg_t, const char *) {
    return nullptr;
}

static ggml_backend_reg_t queue_reg() {
    static ggml_backend_reg reg = { GGML_BACKEND_API_VERSION, { reg_name, reg_count, reg_device, reg_proc }, nullptr };
    return &reg;
}

static ggml_backend_dev_t queue_device() {
    static ggml_backend_device device = [] {
        ggml_backend_device d = {};
        d.iface.get_name        = device_name;
        d.iface.get_description = device_description;
        d.iface.get_memory      = device_memory;
        d.iface.get_type        = device_type;
        d.iface.get_props       = device_props;
        d.iface.init_backend    = device_init;
        d.iface.get_buffer_type = device_buffer_type;
        d.iface.supports_op     = device_supports_op;
        d.iface.supports_buft   = device_supports_buft;
        d.reg                   = queue_reg();
        return d;
    }();
    return &device;
}

extern "C" void queue_device_register(void) {
    ggml_backend_register(queue_reg());
}

// a graph that adds x*2, computed by the host, to a sum on the device, for x = 1 and, before anybody waits, for x = 2: the
// host writes into memory that a copy to the device has been queued for. returns the sum, which is 6
extern "C" float queue_device_sum(void) {
    ggml_init_params params = {};
    params.mem_size = 64*ggml_tensor_overhead() + 2*ggml_graph_overhead();
    params.no_alloc = true;
    ggml_context * kept = ggml_init(params);
    ggml_context * ctx  = ggml_init(params);
    ggml_backend_t backends[] = { ggml_backend_dev_init(queue_device(), nullptr), ggml_backend_cpu_init() };
    ggml_backend_sched_t sched = ggml_backend_sched_new(backends, nullptr, 2, 64, false, false);

    ggml_tensor * sum = ggml_new_tensor_1d(kept, GGML_TYPE_F32, 64);
    ggml_backend_buffer_t memory = ggml_backend_alloc_ctx_tensors_from_buft(kept, queue_buffer_type());
    ggml_backend_buffer_clear(memory, 0);
    ggml_tensor * x = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 64);
    ggml_set_input(x);
    ggml_tensor * twice = ggml_scale(ctx, x, 2.0f);
    ggml_backend_sched_set_tensor_backend(sched, x, backends[1]);
    ggml_backend_sched_set_tensor_backend(sched, twice, backends[1]);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, ggml_add_inplace(ctx, sum, twice));
    GGML_ASSERT(ggml_backend_sched_alloc_graph(sched, graph));
    for (float value : { 1.0f, 2.0f }) {
        const std::vector<float> values(64, value);
        ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
        GGML_ASSERT(ggml_backend_sched_graph_compute_async(sched, graph) == GGML_STATUS_SUCCESS);
    }
    ggml_backend_sched_synchronize(sched);
    float found = 0.0f;
    ggml_backend_tensor_get(sum, &found, 0, sizeof(found));
    ggml_backend_sched_free(sched);
    ggml_backend_buffer_free(memory);
    ggml_backend_free(backends[0]);
    ggml_backend_free(backends[1]);
    ggml_free(ctx);
    ggml_free(kept);
    return found;
}

// how often somebody has waited for a queue since the process began
extern "C" int64_t queue_device_waits(void) {
    return g_n_waits;
}
