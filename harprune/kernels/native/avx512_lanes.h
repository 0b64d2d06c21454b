/* SPDX-License-Identifier: Apache-2.0 */
INLINE signs signs_of(vec v) {
    return (signs)_mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
}
INLINE vec keep(vec v, signs bits) { return (vec)_mm512_maskz_mov_ps(bits, (__m512)v); }
INLINE vec larger(vec a, vec b) { /* of two that differ in kind the instruction takes b */
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q);
    return (vec)_mm512_mask_mov_ps(_mm512_max_ps((__m512)a, (__m512)b), nan, (__m512)a);
}
INLINE vec rectified(vec v) { return (vec)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v); }
INLINE vec joined(vec a, vec b, int64_t k) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i from = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)k));
    return (vec)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
}
INLINE vec every_second(vec a, vec b, int first) {
    const __m512i evens =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i from = _mm512_add_epi32(evens, _mm512_set1_epi32(first));
    return (vec)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
}
INLINE vec every_second_group(vec a, vec b, int first, const int P) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i within = _mm512_and_si512(lanes, _mm512_set1_epi32(P - 1));
    const __m512i from = _mm512_add_epi32(_mm512_sub_epi32(_mm512_add_epi32(lanes, lanes), within),
                                          _mm512_set1_epi32(first * P));
    return (vec)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
}
INLINE vec interleaved(vec a, vec b, int half, const int P) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i within = _mm512_and_si512(lanes, _mm512_set1_epi32(P - 1));
    const __m512i odd = _mm512_and_si512(lanes, _mm512_set1_epi32(P));
    /* Half of what precedes the pair of groups, and from b (16 on) its second one. */
    const __m512i before = _mm512_srli_epi32(_mm512_sub_epi32(_mm512_sub_epi32(lanes, within), odd), 1);
    const __m512i from_b = _mm512_mullo_epi32(odd, _mm512_set1_epi32(16 / P));
    const __m512i from = _mm512_add_epi32(_mm512_add_epi32(before, within),
                                          _mm512_add_epi32(from_b, _mm512_set1_epi32(half * 8)));
    return (vec)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
}
/* By way of an integer register: loads of whole vectors are what the kernels wait for, and one that
 * spreads a number takes the place of one. */
INLINE vec all_from(const real *p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    __asm__("" : "+r"(bits));
    return (vec)_mm512_set1_epi32(bits);
}
