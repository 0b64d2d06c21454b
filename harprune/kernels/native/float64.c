/* SPDX-License-Identifier: Apache-2.0 */
/* The plain path in double precision: for tests of exactness, and for double models. */
#include "blocks.h"
#define real double
#define V 2
#define TILE 8
#define NAME "float64"
#define TABLE harprune_float64
#define signs uint8_t
#define LANE_HEADER "plain_lanes.h"
#include "blocks.inc"
