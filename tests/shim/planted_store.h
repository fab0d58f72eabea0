// planted_store.h - a store over a file whose bytes are known, for the programs that look at the store alone.
//
// Byte `o` of the file is planted_byte(o). Experts lie one behind the other, off every alignment.

#pragma once

#include "store/mobile-store.h"

#include <cstdint>
#include <string>
#include <vector>

constexpr uint64_t PLANTED_START = 77; // in the file, of the first piece

inline uint8_t planted_byte(uint64_t offset) {
    const uint64_t z = (offset ^ (offset >> 13))*0x9e3779b97f4a7c15u;
    return (uint8_t) (z >> 56);
}

struct planted_layer {
    std::vector<uint64_t> piece_sizes;
    int n_parts;
};

// writes the file that these layers read, at least. returns its descriptor
int planted_file(const std::string & path, const std::vector<planted_layer> & layers);

// registers the layers; ends the program where the store refuses one. offsets: [layer][part*n_pieces + piece]
std::vector<std::vector<uint64_t>> planted_layers(mobile_store & store, int fd, const std::vector<planted_layer> & layers);
