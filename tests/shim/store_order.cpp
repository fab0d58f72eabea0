// store_order.cpp - the store for ctypes: a test says what is asked for, holds the reads back, and sees their order.
//
// One model: layers of experts alike, two pieces each of less than one read. One store at a time.

#include "planted_reads.h"
#include "planted_store.h"

#include <unistd.h>

#include <algorithm>
#include <memory>
#include <utility>

static constexpr uint64_t PIECE_BYTES = 6000;
static constexpr int      N_PIECES    = 2;

static std::unique_ptr<mobile_store>      g_store;
static std::vector<std::vector<uint64_t>> g_offsets;
static int    g_n_segments = 1;
static double g_time       = 0.0;

static std::vector<mobile_store_part> parts_of(const int * pairs, int n) {
    std::vector<mobile_store_part> parts;
    for (int i = 0; i < n; ++i) {
        parts.push_back(g_store->store_part_of(mobile_store_layer(pairs[2*i]), mobile_part(pairs[2*i + 1])));
    }
    return parts;
}

extern "C" {

// of experts of the stores that are opened from now on; what is called an expert here is a segment then
void order_segments(int n) { g_n_segments = n; }

// budget: in experts. returns enum mobile_status
int order_open(const char * path, int n_layers, int n_experts, int budget, int n_io_threads, int prefault) {
    const std::vector<planted_layer> layers(n_layers, { std::vector<uint64_t>(N_PIECES, PIECE_BYTES), n_experts });
    const int fd = planted_file(path, layers);
    mobile_load_params params = mobile_store_default_params();
    params.n_io_threads = n_io_threads;
    params.prefault     = prefault;
    params.budget_bytes = budget*N_PIECES*mobile_round_up(PIECE_BYTES + 511, 512);
    params.io           = MOBILE_IO_BUFFERED; // in blocks of 512 bytes
    g_store   = std::make_unique<mobile_store>(params);
    g_store->n_segments = g_n_segments;
    g_offsets = planted_layers(*g_store, fd, layers);
    close(fd);
    std::string err;
    planted_reads_hold();
    return g_store->start(nullptr, err);
}

void order_close() { g_store.reset(); }

int  order_warm(const int * pairs, int n) { return g_store->warm(parts_of(pairs, n)); }
// parts that were not computed, and are to be read while nothing else is
void order_displace(int layer, const int * experts, int n) {
    std::vector<mobile_part> parts;
    for (int i = 0; i < n; ++i) {
        parts.push_back(mobile_part(experts[i]));
    }
    g_store->displace(mobile_store_layer(layer), parts, g_time, true);
}

void order_begin_pass() { g_store->begin_pass(); }
int  order_end_pass()   { return g_store->end_pass(); }
void order_read_ahead(int layer) { g_store->read_ahead(mobile_store_layer(layer)); }

// of requests from now on, in tokens
void order_time(double time) { g_time = time; }

void order_split(const int * kept, const double * shares, int n_layers) {
    mobile_by<mobile_store_layer, int32_t> of_layer;
    mobile_by<mobile_store_layer, double>  share_of;
    for (int i = 0; i < n_layers; ++i) {
        of_layer.push_back(kept[i]);
        share_of.push_back(shares[i]);
    }
    g_store->set_split(std::move(of_layer), share_of);
}

int order_there(int layer, int expert) {
    mobile_by<mobile_part, uint8_t> there;
    g_store->get_resident(mobile_store_layer(layer), there);
    return there[mobile_part(expert)];
}

void order_request(int layer, const int * experts, int n) {
    std::vector<mobile_need> needs(n);
    for (int i = 0; i < n; ++i) {
        needs[i].part     = mobile_part(experts[i]);
        needs[i].n_tokens = 1;
        needs[i].time     = g_time;
    }
    g_store->request(mobile_store_layer(layer), needs);
}

// waits; 1: all its bytes are the file's, 0: it could not be read, -1: they are others
int order_resolve(int layer, int expert) {
    int right = 1;
    for (int p = 0; p < N_PIECES; ++p) {
        const char * data = g_store->resolve(mobile_store_layer(layer), p, mobile_part(expert), true);
        if (data == g_store->resolve_failed()) {
            right = std::min(right, 0);
            continue;
        }
        for (uint64_t i = 0; i < PIECE_BYTES; ++i) {
            if ((uint8_t) data[i] != planted_byte(g_offsets[layer][expert*N_PIECES + p] + i)) {
                return -1;
            }
        }
    }
    return right;
}

int order_residency(int layer, int expert) { return g_store->residency_of_model(mobile_store_layer(layer), expert); }
int order_warm_left() { return (int) g_store->counters_warm().n_left; }
int order_warm_read() { return (int) g_store->counters_warm().n_read; }

void order_fail(int every)  { planted_reads_set(0, every, 0, 1); }
void order_hold()           { planted_reads_hold(); }
void order_allow(int n)     { planted_reads_allow(n); }
void order_wait(int n)      { planted_reads_wait(n); }

// the reads so far, as layer*1000 + expert, in the order in which they began; returns how many there are
int order_log(int * read, int n) {
    const std::vector<uint64_t> log = planted_reads_log();
    for (int i = 0; i < (int) log.size() && i < n; ++i) {
        for (int layer = 0; layer < (int) g_offsets.size(); ++layer) {
            const auto & of_layer = g_offsets[layer];
            // buffered reads begin at most 511 bytes before their piece
            const auto it = std::find_if(of_layer.begin(), of_layer.end(), [&](uint64_t offset) { return offset >= log[i] && offset - log[i] < 512; });
            if (it != of_layer.end()) {
                read[i] = layer*1000 + (int) (it - of_layer.begin())/N_PIECES;
            }
        }
    }
    return (int) log.size();
}

}
