#include "planted_store.h"

#include "stress.h"

#include <fcntl.h>

#if defined(_WIN32)
#include <io.h>
#define fsync _commit
#else
#define O_BINARY 0
#endif

static uint64_t bytes_of(const std::vector<planted_layer> & layers) {
    uint64_t bytes = PLANTED_START;
    for (const planted_layer & layer : layers) {
        for (uint64_t size : layer.piece_sizes) {
            bytes += size*layer.n_parts;
        }
    }
    return bytes;
}

int planted_file(const std::string & path, const std::vector<planted_layer> & layers) {
    std::vector<uint8_t> bytes(bytes_of(layers));
    for (uint64_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = planted_byte(i);
    }
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_BINARY, 0600);
    if (fd < 0 || write(fd, bytes.data(), bytes.size()) != (ssize_t) bytes.size() || fsync(fd) != 0) {
        stress_fail("%s cannot be written", path.c_str());
    }
    return fd;
}

std::vector<std::vector<uint64_t>> planted_layers(mobile_store & store, int fd, const std::vector<planted_layer> & layers) {
    std::string err;
    const int file = store.add_file(fd, err);
    if (file < 0) {
        stress_fail("%s", err.c_str());
    }
    uint64_t next = PLANTED_START;
    std::vector<std::vector<uint64_t>> offsets;
    for (const planted_layer & layer : layers) {
        const mobile_model_layer il((int64_t) offsets.size() + 1); // layer 0 of the model is dense
        const size_t n_pieces = layer.piece_sizes.size();
        offsets.emplace_back(n_pieces*layer.n_parts);
        for (size_t p = 0; p < n_pieces; ++p) {
            mobile_by<mobile_part, mobile_range> ranges;
            for (int part = 0; part < layer.n_parts; ++part) {
                ranges.push_back({ (uint16_t) file, next, layer.piece_sizes[p] });
                offsets.back()[part*n_pieces + p] = next;
                next += layer.piece_sizes[p];
            }
            if (!store.add_piece(il, "piece " + std::to_string(p), ranges, err)) {
                stress_fail("%s", err.c_str());
            }
        }
    }
    return offsets;
}
