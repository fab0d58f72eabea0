#include "device/mobile-experts.h"

#include "ggml-cpp.h"

#include <cstring>

bool mobile_is_weight(mobile_member m) {
    return m == &mobile_experts::gate_up || m == &mobile_experts::up || m == &mobile_experts::gate || m == &mobile_experts::down;
}

int mobile_expert_dim(mobile_member m) {
    const bool is_scale = m == &mobile_experts::up_s || m == &mobile_experts::gate_s || m == &mobile_experts::down_s;
    return mobile_is_weight(m) ? 2 : is_scale ? 0 : 1;
}

uint64_t mobile_bytes_per_expert(const mobile_experts & experts) {
    uint64_t bytes = 0;
    for (mobile_member m : MOBILE_MEMBERS) {
        bytes += experts.*m ? (experts.*m)->nb[mobile_expert_dim(m)] : 0;
    }
    return bytes;
}

bool mobile_same_shape(const mobile_experts & a, const mobile_experts & b) {
    for (mobile_member m : MOBILE_MEMBERS) {
        const ggml_tensor * x = a.*m;
        const ggml_tensor * y = b.*m;
        if (!x != !y) {
            return false;
        }
        for (int d = 0; x && d < mobile_expert_dim(m); ++d) {
            if (x->ne[d] != y->ne[d]) {
                return false;
            }
        }
        if (x && x->type != y->type) {
            return false;
        }
    }
    return true;
}

bool mobile_experts_on_kernels(const mobile_experts & experts, ggml_backend_dev_t dev, int64_t n, int64_t n_used, const void * down_params) {
    ggml_init_params init = {};
    init.mem_size = ggml_tensor_overhead()*4*MOBILE_MEMBERS.size();
    init.no_alloc = true;
    ggml_context_ptr ctx(ggml_init(init));
    for (mobile_member m : MOBILE_MEMBERS) {
        const ggml_tensor * t = experts.*m;
        if (!t || !mobile_is_weight(m)) {
            continue;
        }
        const bool is_down = m == &mobile_experts::down;
        ggml_tensor * matrices = ggml_new_tensor_3d(ctx.get(), t->type, t->ne[0], t->ne[1], n);
        ggml_tensor * cur      = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, t->ne[0], is_down ? n_used : 1, 1);
        ggml_tensor * ids      = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_used, 1);
        ggml_tensor * op       = ggml_mul_mat_id(ctx.get(), matrices, cur, ids);
        if (is_down && down_params) {
            memcpy(op->op_params, down_params, sizeof(op->op_params));
        }
        if (ggml_nelements(matrices)/ggml_blck_size(t->type) > INT32_MAX || !ggml_backend_dev_supports_op(dev, op)) {
            return false;
        }
    }
    return true;
}

bool mobile_experts_on_host(const mobile_experts & experts) {
    if (!experts.down || !(experts.up || experts.gate_up)) {
        return false;
    }
    const int64_t n_expert = experts.down->ne[2];
    for (mobile_member m : MOBILE_MEMBERS) {
        const ggml_tensor * t = experts.*m;
        if (!t) {
            continue;
        }
        const int d = mobile_expert_dim(m);
        if (t->op != GGML_OP_NONE || !t->buffer || !ggml_backend_buffer_is_host(t->buffer) || t->ne[d] != n_expert || !ggml_is_contiguous(t) ||
            (int64_t) t->nb[d]*n_expert != (int64_t) ggml_nbytes(t)) {
            return false;
        }
    }
    return true;
}
