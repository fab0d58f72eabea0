// mobile-os.h - what the expert store needs of the operating system: unbuffered positioned reads
// and address space whose pages come and go.
//
// Mechanism: a file is opened a second time, unbuffered where the file system allows it (O_DIRECT,
// F_NOCACHE, FILE_FLAG_NO_BUFFERING), so that expert bytes never pass through the page cache.
// Invariant: a read either delivers every byte asked for or reports how many came and why.
// Limits: thread-safe by having no state beyond the handle.

#pragma once

#include "mobile.h"

#include <cstddef>
#include <cstdint>
#include <string>

struct mobile_file {
    std::string name;
    uint64_t    size   = 0;
    uint32_t    align  = 512;   // of file offsets, sizes and memory for reads; a power of two
    bool        direct = false; // reads are unbuffered
    intptr_t    handle = -1;
};

// opens the file behind the C file descriptor fd again; false: err says why
bool mobile_file_open (mobile_file & file, int fd, enum mobile_io io, std::string & err);
void mobile_file_close(mobile_file & file);

// reads [offset, offset + size) to dst; offset and dst are multiples of file.align. the read may run
// on to the next multiple of file.align, so dst must have room for it. returns 0 or an errno value;
// n_read: bytes delivered, less than size at the end of the file
int mobile_file_read(const mobile_file & file, uint64_t offset, uint64_t size, void * dst, uint64_t & n_read);

// address space without memory behind it; touching it faults
void * mobile_reserve(size_t size);
// address space for zero-filled memory, of which mobile_take() has to be asked for what is touched
void * mobile_map    (size_t size);
// [addr, addr + size) of mobile_map() may be touched from now on, and memory comes page by page as it is. what was taken before
// stays as it is. false: the system has none left to promise, as one that counts what is promised may say (Windows)
bool   mobile_take   (void * addr, size_t size);
// what is touched from now on of [addr, addr + size) of mobile_map() comes in huge pages, or never does
void   mobile_huge_pages(void * addr, size_t size, bool on);
// readable zeros that take no memory
void * mobile_zeros  (size_t size);
// takes memory for [addr, addr + size) of mobile_map(), whose bytes stay as they are, also while others write there;
// both page-aligned. spent_us: this thread's processor time. false: the system cannot, or has none left
bool   mobile_prefault(void * addr, size_t size, int64_t & spent_us);
// gives the pages that lie wholly in [addr, addr + size) back; they are zero-filled when taken again
void   mobile_discard(void * addr, size_t size);
void   mobile_unmap  (void * addr, size_t size);

size_t mobile_page_size();
