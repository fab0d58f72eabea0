// mobile-context.h - what a llama_context has of ours: one member for each job, and the thread that each belongs to.
//
// All of it belongs to the thread that decodes, but for slot_map and ring, which any thread may read. The C API is called
// by that thread as well (mobile.h), so nothing else here is locked; store and predictor have threads and locks of their
// own.

#pragma once

#include "device/mobile-slot-map.h"
#include "device/mobile-slots.h"
#include "mobile-error.h"
#include "route/mobile-correction.h"
#include "route/mobile-graph.h"
#include "route/mobile-guesses.h"
#include "route/mobile-pass.h"
#include "route/mobile-predict.h"
#include "route/mobile-recall.h"
#include "route/mobile-ring.h"
#include "route/mobile-loss-state.h"
#include "route/mobile-route.h"
#include "route/mobile-rules.h"
#include "route/mobile-trace.h"
#include "route/mobile-usage.h"
#include "route/mobile-worth.h"
#include "store/mobile-store.h"

#include <memory>
#include <string>
#include <vector>

struct llama_model;

struct mobile_context {
    mobile_context(const llama_model & model, std::shared_ptr<mobile_store> store);

    const std::shared_ptr<mobile_store> store;
    const int32_t n_layer;       // of the model
    const int32_t n_expert_used; // top-k

    mobile_rules rules;  // what changes outputs
    mobile_correction correction; // and what makes up for it
    mobile_trace trace;
    mobile_ring  ring;
    mobile_usage usage;  // counters
    mobile_worth worth;
    mobile_guesses guesses;
    mobile_recall  recall;
    mobile_graph graph;
    mobile_pass  pass;   // the running ubatch
    std::string  error;  // what made the last one fail; "" if it did not
    bool is_aside = false; // its passes come between another context's, whose guesses they leave alone (mobile-mtp.h)

    mobile_by<mobile_model_layer, mobile_route> routes; // with those behind the model's own; the op's user data
    mobile_routing routing; // of the running layer

    mobile_predictor              predictor;
    mobile_slot_map               slot_map;
    mobile_route_loss             loss;
    std::unique_ptr<mobile_slots> slots; // the device tier; NULL: none

    // calls, where the frames around are C or llama.cpp's: what it throws makes the pass fail. false: it threw
    template <typename body> bool guard(body && call) noexcept {
        try {
            call();
            return true;
        } catch (...) {
            mobile_fail_caught();
            error = mobile_last_error();
            return false;
        }
    }
};
