/* SPDX-License-Identifier: Apache-2.0 */
INLINE signs signs_of(vec v) {
    return (signs)_mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
}
INLINE vec keep(vec v, signs bits) { return (vec)_mm512_maskz_mov_ps(bits, (__m512)v); }
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
