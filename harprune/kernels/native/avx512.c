/* SPDX-License-Identifier: Apache-2.0 */
/* Sixteen floats a vector: x86 with AVX-512. */
#include "blocks.h"
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#include <immintrin.h>
#define real float
#define V 16
#define TILE 16
#define NAME "avx512"
#define TABLE harprune_avx512
#define signs uint16_t
#define LANE_HEADER "avx512_lanes.h"
#include "blocks.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
