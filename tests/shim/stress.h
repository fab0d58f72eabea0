// stress.h - what the stress programs share: chance that a seed repeats, delays, and a watch over threads that hang.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <thread>

#include <unistd.h>

// the program ends at once: what it would clean up may be what is broken
[[noreturn]] inline void stress_fail(const char * format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(nullptr);
    _exit(1);
}

// of one thread
class stress_dice {
public:
    explicit stress_dice(uint64_t seed) : state(seed*0x9e3779b97f4a7c15u + 1) {}

    uint64_t next() { // splitmix64
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27))*0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    uint32_t below(uint32_t n) { return (uint32_t) (next() % n); }
    bool one_in(uint32_t n) { return n > 0 && below(n) == 0; }

private:
    uint64_t state;
};

// mostly some work, sometimes a sleep that is longer than anybody polls
inline void stress_delay(stress_dice & dice) {
    if (dice.one_in(200)) {
        std::this_thread::sleep_for(std::chrono::microseconds(dice.below(2000)));
    } else if (dice.one_in(20)) {
        std::this_thread::sleep_for(std::chrono::microseconds(dice.below(100)));
    } else {
        volatile uint32_t sum = 0;
        for (uint32_t i = dice.below(300); i > 0; --i) {
            sum = sum + i;
        }
    }
}

// ends the program where nothing has moved for so many seconds
class stress_watch {
public:
    stress_watch(const char * what, int patience) : thread([this, what, patience] {
        uint64_t seen = moved;
        for (int ticks = 0; !stop; ) {
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
            const uint64_t now = moved;
            ticks = now == seen ? ticks + 1 : 0;
            seen  = now;
            if (ticks > 100*patience) {
                stress_fail("%s: nothing moves any more, after %llu steps", what, (unsigned long long) now);
            }
        }
    }) {}

    ~stress_watch() {
        stop = true;
        thread.join();
    }

    void move() { moved.fetch_add(1, std::memory_order_relaxed); } // orders nothing for those that are watched

private:
    std::atomic<uint64_t> moved = 0;
    std::atomic<bool>     stop  = false;
    std::thread           thread;
};
