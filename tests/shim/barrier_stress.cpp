// barrier_stress.cpp - thousands of short layers between barriers: nobody is lost, and all see what all wrote.
//
//   barrier_stress LAYERS SEED PATIENCE
//
// Two teams run at once, as two models of a process do, of one thread and eight, two and seven, and so on. In a layer each
// thread writes a plain number, and between two barriers reads everybody's. Now and then the first one ends the
// computation in the middle, and the team begins anew.

#include "stress.h"
#include "stress_barrier.h"

#include <cstdlib>
#include <vector>

static constexpr int MOST_THREADS = 8;

struct team {
    team(int n_threads, int n_layers, uint64_t seed, stress_watch & watch)
        : n_threads(n_threads), n_layers(n_layers), seed(seed), watch(watch), barrier(stress_barrier_new(n_threads)) {}
    ~team() { stress_barrier_free(barrier); }

    team(const team &) = delete;
    team & operator=(const team &) = delete;

    void run() {
        while (layer < n_layers) {
            cancelled = false;
            std::vector<std::thread> threads;
            for (int i = 1; i < n_threads; ++i) {
                threads.emplace_back([this, i] { compute(i); });
            }
            compute(0);
            for (std::thread & thread : threads) {
                thread.join();
            }
        }
    }

private:
    void compute(int me) {
        stress_dice dice(seed + 1000*(uint64_t) layer + me);
        for (int own = layer; own < n_layers && !cancelled; ++own) {
            stress_delay(dice);
            written[me] = own*100 + me;
            stress_barrier_pass(barrier);
            for (int i = 0; i < n_threads; ++i) {
                if (written[i] != own*100 + i) {
                    stress_fail("layer %d: thread %d of %d sees %d of thread %d", own, me, n_threads, written[i], i);
                }
            }
            if (dice.one_in(8)) {
                stress_delay(dice);
            }
            if (me == 0) {
                layer     = own + 1;
                cancelled = dice.one_in(500);
                watch.move();
            }
            stress_barrier_pass(barrier);
        }
    }

    const int        n_threads;
    const int        n_layers;
    const uint64_t   seed;
    stress_watch   & watch;
    stress_barrier * barrier;

    // plain: the barriers order them
    int  written[MOST_THREADS] = {};
    int  layer     = 0;
    bool cancelled = false;
};

int main(int argc, char ** argv) {
    if (argc != 4) {
        stress_fail("usage: barrier_stress LAYERS SEED PATIENCE");
    }
    stress_watch watch("barriers", atoi(argv[3]));
    for (int n = MOST_THREADS; n > MOST_THREADS/2; --n) {
        team large(n, atoi(argv[1]), strtoull(argv[2], nullptr, 10), watch);
        team small(MOST_THREADS + 1 - n, atoi(argv[1]), strtoull(argv[2], nullptr, 10) + 1, watch);
        std::thread other([&] { small.run(); });
        large.run();
        other.join();
    }
    puts("ok");
    return 0;
}
