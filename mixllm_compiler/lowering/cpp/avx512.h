// Vectors of 16 rows: AVX-512 with VNNI.
//
// The dot product and the broadcast are assembly: with intrinsics gcc 12 spills from 20 accumulators
// on, to two thirds of the speed.
#include <immintrin.h>
typedef __m512i Ints;
typedef __m512 Floats;
INLINE Ints load(const void* p) { return _mm512_loadu_si512(p); }
INLINE void store(void* p, Ints v) { _mm512_storeu_si512(p, v); }
INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Ints zero() { return _mm512_setzero_si512(); }
INLINE Floats zero_floats() { return _mm512_setzero_ps(); }
INLINE Ints broadcast(const void* p) {
#ifdef __SANITIZE_ADDRESS__  // which does not see what assembly reads
  return _mm512_set1_epi32(*(const int32_t*)p);
#else
  Ints v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*(const int32_t*)p));
  return v;
#endif
}
INLINE Floats broadcast_float(const float* p) { return _mm512_set1_ps(*p); }
// acc += the four products of unsigned codes and signed activations in each lane
INLINE void dot(Ints& acc, Ints codes, Ints x) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x)); }
// acc += the two products of signed halves in each lane
INLINE void dot_halves(Ints& acc, Ints a, Ints b) { asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
INLINE Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Ints bytes_to_ints(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE Ints bytes_to_halves(const uint8_t* p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Floats half_floats(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// table[index] of 16 entries
INLINE Ints look_up(Ints index, const int32_t* table) { return _mm512_permutexvar_epi32(index, load(table)); }
template <int BITS> INLINE Ints right(Ints v) { return _mm512_srli_epi16(v, BITS); }
template <int BITS> INLINE Ints left(Ints v) { return _mm512_slli_epi16(v, BITS); }
template <int BYTE> INLINE Ints keep(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi32(BYTE * 0x01010101)); }
// bits of `a` where BYTE has ones, else of `b`
template <int BYTE> INLINE Ints select(Ints a, Ints b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(BYTE * 0x01010101), a, b, 0xca);
}
