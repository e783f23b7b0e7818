// Vectors of 8 rows: AVX2, with or without 256-bit VNNI.
#include <immintrin.h>
typedef __m256i Ints;
typedef __m256 Floats;
INLINE Ints load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store(void* p, Ints v) { _mm256_storeu_si256((__m256i*)p, v); }
INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Ints zero() { return _mm256_setzero_si256(); }
INLINE Floats zero_floats() { return _mm256_setzero_ps(); }
INLINE Ints broadcast(const void* p) {
#ifdef __SANITIZE_ADDRESS__  // which does not see what assembly reads
  return _mm256_set1_epi32(*(const int32_t*)p);
#else
  Ints v;
  asm("vpbroadcastd %1, %0" : "=x"(v) : "m"(*(const int32_t*)p));
  return v;
#endif
}
INLINE Floats broadcast_float(const float* p) { return _mm256_set1_ps(*p); }
INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
INLINE Floats to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Ints bytes_to_ints(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE Ints bytes_to_halves(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
INLINE Floats half_floats(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
template <int BITS> INLINE Ints right(Ints v) { return _mm256_srli_epi16(v, BITS); }
template <int BITS> INLINE Ints left(Ints v) { return _mm256_slli_epi16(v, BITS); }
template <int BYTE> INLINE Ints keep(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi32(BYTE * 0x01010101)); }
template <int BYTE> INLINE Ints select(Ints a, Ints b) {
  const Ints m = _mm256_set1_epi32(BYTE * 0x01010101);
  return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
}
#ifdef __AVXVNNI__
INLINE void dot(Ints& acc, Ints codes, Ints x) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(x)); }
INLINE void dot_halves(Ints& acc, Ints a, Ints b) { asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }
#else
INLINE void dot_halves(Ints& acc, Ints a, Ints b) { acc = add(acc, _mm256_madd_epi16(a, b)); }
// Sums of two products, in halves: they saturate, so `codes` stays below 128 (see `dot_signed`).
INLINE Ints products(Ints codes, Ints x) { return _mm256_maddubs_epi16(codes, x); }
// Assembly, or gcc adds many products in another order, and spills them until then.
INLINE void add_products(Ints& halves, Ints codes, Ints x) {
  Ints both;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(halves), "=&x"(both) : "x"(codes), "x"(x));
}
INLINE Ints pairs(Ints halves) { return _mm256_madd_epi16(halves, _mm256_set1_epi16(1)); }
// codes of 8 bits, value + 128: |value| <= 127 times x with its sign
INLINE void dot_signed(Ints& acc, Ints codes, Ints x) {
  const Ints value = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  Ints both = products(_mm256_abs_epi8(value), _mm256_sign_epi8(x, value));
  asm("vpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "+x"(both) : "x"(_mm256_set1_epi16(1)));
}
#endif
