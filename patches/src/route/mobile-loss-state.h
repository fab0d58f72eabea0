// mobile-loss-state.h - the ladder of lossy rules where it meets the route op, the store and a device's slots.
//
// Mechanism: before a layer's needs are collected the op hands over ids and weights of the tokens that may lose; what is
// there is asked of the store once, under its lock. What was displaced counts as asked for, and what is displaced for the
// second time within a few tokens is offered to the store, which reads it while the disk is idle.
// Limits: by the thread that decodes. A displaced expert is not uploaded to a device.

#pragma once

#include "mobile-ids.h"
#include "route/mobile-loss.h"
#include "store/mobile-store.h"

#include <cstdint>
#include <vector>

struct mobile_context;
struct mobile_route;

class mobile_route_loss {
public:
    mobile_route_loss(size_t n_layer, int32_t n_expert) : displaced_at(n_layer, std::vector<double>(n_expert, -1e15)) {}

    // a layer's tokens that may lose; their ids and weights change. on_device: parts in slots of a device are computed there
    // in_part: an expert may run with some of its segments
    void run(mobile_context & ctx, const mobile_route & route, mobile_store_layer layer, const std::vector<mobile_loss_token> & tokens, bool on_device, bool in_part);

    // of the last layer that ran here, as it was then
    bool is_there(mobile_part part) const { return parts[part] != 0; }

    // index: [n_tokens] of the ubatch, in the batch of the decode
    void begin_pass(const std::vector<int32_t> & index);

    void get           (mobile_store & store, mobile_loss_counters & counters) const;
    // of one token of the last decode; what tokens lose together, and what is read for later, is no token's
    void get_of_token  (int32_t index, mobile_loss_counters & counters) const;
    void reset_counters(mobile_store & store);

private:
    void   look    (mobile_context & ctx, const mobile_route & route, mobile_store_layer layer, bool on_device);
    double missing_share(const std::vector<mobile_loss_token> & tokens, int32_t k);
    void   admit   (mobile_context & ctx, mobile_store_layer layer, double time) const;

    mobile_by<mobile_store_layer, std::vector<double>> displaced_at; // [n_expert] in tokens
    mobile_loss_sums sums;
    std::vector<mobile_loss_sums> of_tokens; // of the last decode, by index in its batch
    mobile_admit_counters base; // the store's at the last reset

    // of the running layer
    mobile_by<mobile_part, uint8_t> parts;        // that are there
    std::vector<uint8_t> resident;                // [n_expert]
    std::vector<float>   there;                   // [n_expert] share of its segments
    std::vector<uint8_t> asked;                   // [n_expert]
    std::vector<mobile_loss_displaced> displaced; // of one token
};
