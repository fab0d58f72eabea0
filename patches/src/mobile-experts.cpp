#include "mobile-experts.h"

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
