/* SPDX-License-Identifier: Apache-2.0 */
#include "avx512_lanes.h"
typedef __m512bh halves;
#define pairs pairs
INLINE halves pairs(vec first, vec second) {
    return _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
INLINE vec dot_pairs(vec total, halves left, halves right) {
    return (vec)_mm512_dpbf16_ps((__m512)total, left, right);
}
