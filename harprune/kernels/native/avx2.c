/* SPDX-License-Identifier: Apache-2.0 */
/* Eight floats a vector: x86 with AVX2 and FMA. */
#include "blocks.h"
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>
#define real float
#define V 8
#define TILE 8
#define NAME "avx2"
#define TABLE harprune_avx2
#define signs uint8_t
#define LANE_HEADER "avx2_lanes.h"
#include "blocks.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
