// planted_reads.h - the reads of a store under test: slow, failing, throwing or held back, and written down.
//
// The operating system's part of the store is the real one; only mobile_file_read() goes through here.

#pragma once

#include <cstdint>
#include <vector>

// each one in so many reads; 0: none
void planted_reads_set(uint32_t delayed, uint32_t failed, uint32_t thrown, uint64_t seed);
// reads that failed or threw so far
uint64_t planted_reads_n_faults();

// from now on reads are written down, and wait for planted_reads_allow()
void planted_reads_hold();
// lets so many more go on; < 0: all
void planted_reads_allow(int n);
// returns once so many have begun
void planted_reads_wait(int n);
// offsets, in the order in which the reads began
std::vector<uint64_t> planted_reads_log();
