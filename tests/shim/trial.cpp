// mobile-trial.h for ctypes: one trial after another, fed with costs
#include "route/mobile-trial.h"

static mobile_trial trial;

extern "C" {
    void     trial_reset()            { trial = mobile_trial(); }
    int      trial_on()               { return trial.on(); }
    int      trial_deciding()         { return trial.deciding(); }
    void     trial_add(double cost)   { trial.add(cost); }
    double   trial_ratio()            { return trial.ratio(); }
    unsigned trial_n_decisions()      { return (unsigned) trial.n_decisions(); }
}
