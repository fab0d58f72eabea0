// mobile-trial.h - is a thing that costs nothing but time worth doing? measured, again and again.
//
// Mechanism: passes run with and without it in short windows, in the order off on on off, so that a steady drift
// (a cache that warms up) cancels. A round compares the two medians; rounds go on until their mean difference is
// clear, four at most. The winner then stays for a while, longer each time it wins again.
// Invariant: what is not clearly better than off at first stays off; a state is left only for a clear reason.
// Limits: costs must be comparable between passes (the caller divides by what a pass of the kind takes), and
// what changes faster than a round cannot be told from noise.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

class mobile_trial {
public:
    static constexpr int WINDOW   = 5;    // passes; the first only changes over
    static constexpr int ROUND    = 4*WINDOW;
    static constexpr int HOLD_MIN = 64;   // passes
    static constexpr int HOLD_MAX = 1024;

    // whether the next pass does it
    bool on() const {
        if (!probing) {
            return winner;
        }
        const int window = n_passes/WINDOW;
        return window == 1 || window == 2;
    }

    bool deciding() const { return probing; }

    // time of on over off in the last round; 0: none yet
    double ratio() const { return last_ratio; }
    // decisions made
    uint64_t n_decisions() const { return decisions; }

    // a pass as on() said has cost so much, > 0
    void add(double cost) {
        if (!probing) {
            if (++n_passes >= hold) {
                restart();
            }
            return;
        }
        if (n_passes % WINDOW != 0) {
            costs[on()].push_back(cost);
        }
        if (++n_passes < ROUND) {
            return;
        }
        last_ratio = median(costs[1])/median(costs[0]);
        sum       += std::log(last_ratio);
        n_rounds++;
        n_passes = 0;
        costs[0].clear();
        costs[1].clear();

        // by how much the mean must differ from none after so many rounds
        static constexpr double CLEAR[4] = { 0.10, 0.06, 0.04, 0.03 };
        const double mean = sum/n_rounds;
        if (std::fabs(mean) > CLEAR[n_rounds - 1]) {
            decide(mean < 0.0);
        } else if (n_rounds == 4) {
            decide(winner);
        }
    }

private:
    bool     probing    = true;
    bool     winner     = false;
    int      n_passes   = 0; // of this round, or of the hold
    int      n_rounds   = 0;
    int      hold       = HOLD_MIN/2;
    double   sum        = 0.0;
    double   last_ratio = 0.0;
    uint64_t decisions  = 0;
    std::vector<double> costs[2];

    static double median(std::vector<double> & v) {
        std::sort(v.begin(), v.end());
        const size_t n = v.size();
        return 0.5*(v[(n - 1)/2] + v[n/2]);
    }

    void restart() {
        probing  = true;
        n_passes = 0;
        n_rounds = 0;
        sum      = 0.0;
    }

    void decide(bool on) {
        hold     = on == winner || decisions == 0 ? std::min(2*hold, HOLD_MAX) : HOLD_MIN;
        winner   = on;
        probing  = false;
        n_passes = 0;
        decisions++;
    }
};
