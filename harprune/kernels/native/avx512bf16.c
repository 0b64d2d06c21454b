/* SPDX-License-Identifier: Apache-2.0 */
/* AVX-512 with dot products of bf16 pairs. */
#include "blocks.h"
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#endif
#include <immintrin.h>
#define real float
#define V 16
#define TILE 16
#define NAME "avx512_bf16"
#define TABLE harprune_avx512_bf16
#define signs uint16_t
#define LANE_HEADER "avx512bf16_lanes.h"
#include "blocks.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
