/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HARPRUNE_SMALL_H
#define HARPRUNE_SMALL_H

#ifdef __SSE2__
#include <immintrin.h>
#endif

/* Where a processor is slow on numbers below 1e-38 they count as zero; returns what was before. */
static inline unsigned flush_small(void) {
#ifdef __SSE2__
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
#else
    return 0;
#endif
}
static inline void restore_small(unsigned mode) {
#ifdef __SSE2__
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

#endif
