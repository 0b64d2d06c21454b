/* SPDX-License-Identifier: Apache-2.0 */
/* Four floats a vector, in plain C: SSE2 on x86, NEON on ARM. */
#include "blocks.h"
#define real float
#define V 4
#ifdef __aarch64__
#define TILE 16
#define NAME "neon"
#else
#define TILE 8
#define NAME "plain"
#endif
#define TABLE harprune_plain
#define signs uint8_t
#define LANE_HEADER "plain_lanes.h"
#include "blocks.inc"
