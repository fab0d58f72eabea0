// store_stress.cpp - the expert store by itself: short layers, slow and failing reads, all its threads at once.
//
//   store_stress SESSIONS SEED PATIENCE FILE
//
// A session is a store with a budget, I/O threads and computing threads by chance, and some passes over it; another
// thread gives hints and warm sets and asks what the others may ask, as a predictor and a screen do. Passes and
// sessions end in the middle as well. What a thread computes from is held against the file's bytes; a pass that failed
// must have had a failed read, and one that did not must have had right bytes only.

#include "planted_reads.h"
#include "planted_store.h"
#include "stress.h"
#include "stress_barrier.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

static constexpr uint64_t STEP = 61; // between two bytes that are looked at

// one shape, two shapes, and pieces of several reads
static const std::vector<std::vector<planted_layer>> MODELS = {
    std::vector<planted_layer>(6, { { 5000, 5000, 3001 }, 12 }),
    { { { 5000, 5000, 3001 }, 12 }, { { 9000, 4500 }, 10 }, { { 5000, 5000, 3001 }, 12 }, { { 9000, 4500 }, 10 } },
    std::vector<planted_layer>(2, { { 700000, 300000 }, 5 }),
};

static mobile_load_params params_of(stress_dice & dice, uint64_t budget) {
    mobile_load_params params = mobile_store_default_params();
    params.budget_bytes = budget;
    params.n_io_threads = 1 + (int32_t) dice.below(4);
    params.eviction     = (int32_t) dice.below(3);
    params.prefault     = (int32_t) dice.below(2);
    params.io           = dice.one_in(3) ? MOBILE_IO_BUFFERED : MOBILE_IO_AUTO;
    return params;
}

// a budget between the smallest and all; 0 now and then
static uint64_t budget_of(stress_dice & dice, const std::vector<planted_layer> & layers) {
    uint64_t all = 0, least = 0;
    for (const planted_layer & layer : layers) {
        uint64_t part = 0;
        for (uint64_t size : layer.piece_sizes) {
            part += mobile_round_up(size + 4095, 4096);
        }
        part  = mobile_round_up(part, 4096)*layer.n_parts;
        all  += part;
        least = std::max(least, part);
    }
    return dice.one_in(8) ? 0 : least + dice.next() % (all - least);
}

class session {
public:
    session(stress_dice & dice, const std::vector<planted_layer> & layers, int fd, stress_watch & watch)
        : layers(layers), watch(watch), dice(dice.next()), store(params_of(dice, budget_of(dice, layers))),
          offsets(planted_layers(store, fd, layers)), n_threads(1 + (int) dice.below(8)), n_passes(1 + (int) dice.below(40)) {}

    void run() {
        const uint64_t n_faults = planted_reads_n_faults();
        const int cancelled_at  = dice.one_in(3) ? 1 + (int) dice.below((uint32_t) layers.size()) : 0;
        int n_told = 0;
        std::string err;
        const int32_t status = store.start([&](float) { return ++n_told != cancelled_at; }, err);
        const bool cancelled = n_told > 0 && n_told == cancelled_at;
        if (status != MOBILE_OK) {
            if (!(cancelled && status == MOBILE_ERR_STATE) && !(status == MOBILE_ERR_IO && planted_reads_n_faults() > n_faults)) {
                stress_fail("a load ended with %d: %s", status, err.c_str());
            }
            return;
        }
        faults_before[0] = faults_before[1] = planted_reads_n_faults();
        barrier = stress_barrier_new(n_threads);
        std::thread other([this] { look_on(); });
        std::vector<std::thread> threads;
        for (int i = 1; i < n_threads; ++i) {
            threads.emplace_back([this, i] { compute(i); });
        }
        compute(0);
        for (std::thread & thread : threads) {
            thread.join();
        }
        done = true;
        other.join();
        stress_barrier_free(barrier);
        check_counters();
        if (dice.one_in(2)) {
            wait_for_warm();
        } else {
            store.warm(parts_by_chance(dice)); // and closed in the middle of it
        }
    }

private:
    // between two barriers the first thread alone; what it writes is plain
    void plan() {
        if (layer.n == 0) {
            stopped = pass == n_passes;
            if (stopped) {
                return;
            }
            store.begin_pass();
            batch = dice.one_in(6);
        }
        const int n_parts = layers[layer.n].n_parts;
        needs.clear();
        if (batch) {
            needs = store.all_needs(layer, false);
        } else {
            std::vector<int> order(n_parts);
            for (int i = 0; i < n_parts; ++i) {
                order[i] = i;
            }
            for (int i = 0; i < 4; ++i) {
                std::swap(order[i], order[i + std::min(dice.below(n_parts - i), dice.below(n_parts - i))]);
                mobile_need need;
                need.part     = mobile_part(order[i]);
                need.n_tokens = 1;
                need.time     = pass;
                needs.push_back(need);
            }
        }
        hold_one();
        store.request(layer, needs);
        const mobile_store_layer next = layer + 1;
        if (batch && store.layers.has(next)) {
            store.read_ahead(next);
        }
    }

    // as one who copies an expert for a device does
    void hold_one() {
        const mobile_part part((int64_t) dice.below(layers[layer.n].n_parts));
        if (!store.hold(layer, part)) {
            return;
        }
        for (int p = 0; p < (int) layers[layer.n].piece_sizes.size(); ++p) {
            const char * data = store.resolve(layer, p, part, false);
            if (!data) {
                stress_fail("a held expert is not there");
            }
            check(data, p, part);
        }
        store.let_go(layer, part);
    }

    void go_on() {
        watch.move();
        const bool last = !store.layers.has(layer + 1);
        if (!last && !dice.one_in(60)) {
            ++layer;
            return;
        }
        const bool ok = store.end_pass();
        if (ok ? saw_failed.load() : planted_reads_n_faults() == faults_before[0]) {
            stress_fail("pass %d: %s", pass, ok ? "it computed from what could not be read" : store.error().c_str());
        }
        saw_failed       = false;
        faults_before[0] = faults_before[1];
        faults_before[1] = planted_reads_n_faults();
        layer = mobile_store_layer(0);
        pass++;
    }

    void compute(int me) {
        stress_dice own(1000*(uint64_t) n_passes + me);
        for (;;) {
            if (me == 0) {
                plan();
            }
            stress_barrier_pass(barrier);
            if (stopped) {
                return;
            }
            const int n_pieces = (int) layers[layer.n].piece_sizes.size();
            for (int p = 0; p < n_pieces; ++p) {
                compute_piece(me, p);
                if (own.one_in(4)) {
                    stress_delay(own);
                }
                stress_barrier_pass(barrier);
            }
            if (me == 0) {
                go_on();
            }
        }
    }

    // those that are there first, as the kernel's walk does
    void compute_piece(int me, int piece) {
        std::vector<mobile_part> left;
        for (size_t i = me; i < needs.size(); i += n_threads) {
            if (const char * data = store.resolve(layer, piece, needs[i].part, false)) {
                check(data, piece, needs[i].part);
            } else {
                left.push_back(needs[i].part);
            }
        }
        for (mobile_part part : left) {
            const char * data = store.resolve(layer, piece, part, true);
            if (data == store.resolve_failed()) {
                saw_failed = true;
            } else {
                check(data, piece, part);
            }
        }
        store.settle();
    }

    void check(const char * data, int piece, mobile_part part) const {
        const planted_layer & l = layers[layer.n];
        const uint64_t offset = offsets[layer.n][part.n*l.piece_sizes.size() + piece];
        const uint64_t size   = l.piece_sizes[piece];
        for (uint64_t n = 0; n < size + STEP - 1; n += STEP) {
            const uint64_t i = std::min(n, size - 1); // the last one, too
            if ((uint8_t) data[i] != planted_byte(offset + i)) {
                stress_fail("layer %d, part %d, piece %d: byte %llu is wrong", layer.n, part.n, piece, (unsigned long long) i);
            }
        }
    }

    std::vector<mobile_store_part> parts_by_chance(stress_dice & own) const {
        std::vector<mobile_store_part> parts;
        for (mobile_store_layer l(0); store.layers.has(l); ++l) {
            for (mobile_part part(0); part.n < store.layers[l].n_parts; ++part) {
                if (own.one_in(2)) {
                    parts.push_back(store.store_part_of(l, part));
                }
            }
        }
        return parts;
    }

    // what may be called by any thread
    void look_on() {
        stress_dice own(7*(uint64_t) n_passes);
        while (!done) {
            const mobile_store_layer l((int64_t) own.below((uint32_t) layers.size()));
            const mobile_part        part((int64_t) own.below(layers[l.n].n_parts));
            switch (own.below(6)) {
                case 0: store.warm(parts_by_chance(own)); break;
                case 1: store.hint(l, { part, mobile_part(0) }, 1e9); break;
                case 2: store.residency_of_model(l, part.n); break;
                case 3: store.missing_of_model(l, part.n); break;
                case 4: check_counters(); break;
                case 5: std::this_thread::sleep_for(std::chrono::microseconds(own.below(500))); break;
            }
        }
    }

    void check_counters() {
        const mobile_counters       c = store.counters();
        const mobile_ahead_counters a = store.counters_ahead();
        const mobile_warm_counters  w = store.counters_warm();
        if (c.resident_bytes > store.budget_bytes || c.resident_bytes_peak > store.budget_bytes) {
            stress_fail("%llu bytes in a budget of %llu", (unsigned long long) c.resident_bytes_peak, (unsigned long long) store.budget_bytes);
        }
        if (a.n_used + a.n_wasted > a.n_queued || w.n_used + w.n_wasted > w.n_read) {
            stress_fail("more was used than was read ahead");
        }
    }

    // all of it is read, or has found no slot
    void wait_for_warm() {
        while (store.counters_warm().n_left > 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        watch.move();
    }

    const std::vector<planted_layer> & layers;
    stress_watch   & watch;
    stress_dice      dice;
    mobile_store     store;
    const std::vector<std::vector<uint64_t>> offsets;
    const int        n_threads;
    const int        n_passes;
    stress_barrier * barrier = nullptr;

    std::vector<mobile_need> needs;
    mobile_store_layer layer { 0 };
    int  pass    = 0;
    bool batch   = false;
    bool stopped = false;
    uint64_t faults_before[2] = {}; // when this pass and the one before it began: reads ahead outlive a pass
    std::atomic<bool> saw_failed = false;
    std::atomic<bool> done       = false;
};

int main(int argc, char ** argv) {
    if (argc != 5) {
        stress_fail("usage: store_stress SESSIONS SEED PATIENCE FILE");
    }
    const uint64_t seed = strtoull(argv[2], nullptr, 10);
    stress_watch watch("the store", atoi(argv[3]));
    stress_dice dice(seed);
    std::vector<int> files;
    for (size_t i = 0; i < MODELS.size(); ++i) {
        files.push_back(planted_file(argv[4] + std::to_string(i), MODELS[i]));
    }
    for (int i = 0; i < atoi(argv[1]); ++i) {
        const size_t m = dice.below(MODELS.size());
        const bool faults = dice.one_in(2);
        planted_reads_set(1 + dice.below(8), faults ? 40 + dice.below(100) : 0, faults && dice.one_in(2) ? 100 : 0, seed*1000003 + i);
        session(dice, MODELS[m], files[m], watch).run();
        watch.move();
    }
    planted_reads_set(0, 0, 0, seed);
    for (int fd : files) {
        close(fd);
    }
    printf("ok, %llu reads failed\n", (unsigned long long) planted_reads_n_faults());
    return 0;
}
