// throwing_new.cpp - preloaded into a process under test: memory is refused, or something else is thrown, where libllama
// asks for memory on this thread.
//
// throwing_new_arm() chooses what is thrown by the allocations of this thread from now on. Linux, glibc.

#include <cstdlib>
#include <new>
#include <stdexcept>

static thread_local int g_mode = 0; // 0: nothing, 1: std::bad_alloc, 2: std::logic_error, 3: an int
static thread_local int g_n    = 0; // thrown since the last throwing_new_arm

extern "C" int throwing_new_arm(int mode) {
    const int n = g_n;
    g_mode = mode;
    g_n    = 0;
    return n;
}

void * operator new(std::size_t size) {
    if (g_mode != 0) {
        const int mode = g_mode;
        g_mode = 0; // what is thrown asks for memory as well
        g_n++;
        switch (mode) {
            case 1: throw std::bad_alloc();
            case 2: throw std::logic_error("planted");
            default: throw 3;
        }
    }
    void * p = std::malloc(size > 0 ? size : 1);
    if (!p) {
        throw std::bad_alloc();
    }
    return p;
}

void operator delete(void * p) noexcept { std::free(p); }
void operator delete(void * p, std::size_t) noexcept { std::free(p); }
