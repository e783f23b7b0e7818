// What all parts of a source share: the arguments of calls and kernels, and float conversions.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <atomic>
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
static inline int omp_get_num_threads() { return 1; }
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define FENCE asm volatile("" ::: "memory")

// Weights to ask for on the way.
struct Next {
  const uint8_t* at;
  long lines;  // in one turn of a kernel's loop
  inline __attribute__((always_inline)) void more() {
    for (long i = 0; i < lines; i++, at += 64) __builtin_prefetch(at);
  }
};

// Activations of T tokens as kernels read them; what the numbers are depends on the scheme.
struct Tile {
  const int8_t* codes;      // [K/4][T][4]
  const int32_t* halves;    // asym: -sum [groups][T] in 16 bits; two-level: sums in 16 bits, by pairs of groups
                            // [groups/2][T], or, per group, in the half of its offset [groups][T]
  const int32_t* minus128;  // -128 times sums, [groups][T], or of all groups [T]
  const int32_t* table;     // -z times sum for z = 0 ... 15, [groups][T][16]
  const float* scales;      // [groups][T], or [T]
  Next next;
};
typedef void (*Kernel)(const uint8_t* w, const Tile& tile, long groups, long steps, float* out);

enum Type { FLOAT32, BFLOAT16, FLOAT16, NONE };

INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
INLINE float from_bfloat16(uint16_t v) { return from_bits((uint32_t)v << 16); }
INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#if defined(__F16C__)
INLINE float from_float16(uint16_t v) { return _cvtsh_ss(v); }
INLINE uint16_t to_float16(float value) { return _cvtss_sh(value, 0); }
#else
INLINE float from_float16(uint16_t v) {
  const uint32_t sign = (uint32_t)(v & 0x8000) << 16, rest = v & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + 0x38000000));
  const float value = (float)rest * 0x1p-24f;  // subnormal
  return sign ? -value : value;
}
INLINE uint16_t to_float16(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (rest < 0x38800000) return sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000);  // units of 2^-24
  return sign | ((rest + 0xfff + (rest >> 13 & 1)) - 0x38000000) >> 13;
}
#endif
INLINE float load_as(Type type, const void* p, long i) {
  if (type == BFLOAT16) return from_bfloat16(((const uint16_t*)p)[i]);
  if (type == FLOAT16) return from_float16(((const uint16_t*)p)[i]);
  return ((const float*)p)[i];
}

// Ask for weights so long before they are read that a page's end does not stop the stream: the
// hardware's own prefetcher stops there. Up to 1.4 times as fast from memory, free elsewhere.
constexpr long AHEAD = 8192;
template <int LINES> INLINE void prefetch(const uint8_t* w) {
#pragma GCC unroll 64
  for (int i = 0; i < LINES; i++) __builtin_prefetch(w + AHEAD + 64 * i);
}

// Memory that a thread keeps for its next call, unless it is large.
class Buffer {
 public:
  uint8_t* reserve(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = (bytes + 4095) & ~(size_t)4095;
      data_ = (uint8_t*)aligned_alloc(4096, size_);
      if (!data_) abort();
    }
    return data_;
  }
  void trim() {
    if (size_ > KEPT) {
      free(data_);
      data_ = nullptr;
      size_ = 0;
    }
  }
  ~Buffer() { free(data_); }

 private:
  static constexpr size_t KEPT = 8 << 20;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};
