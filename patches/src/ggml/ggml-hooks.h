// ggml-hooks.h - what the CPU backend's sources call of ours.

#pragma once

#include "ggml-expert.h"
#include "ggml-precise.h"
