// The activation quantizer: one scale a token or a group, codes rounded half to even. Bit for bit the
// definition in ir/reference.py: divisions are divisions, and a transform rounds where it does.
// Vectors are the compiler's, of 16 floats, in whatever registers there are.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
constexpr int LANES = 16;

template <class V> INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V> INLINE void store(void* p, V v) { memcpy(p, &v, sizeof v); }
template <class To, class From> INLINE To bits_of(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

INLINE Floats widen(Type type, const uint16_t* p) {
  if (type == BFLOAT16) return bits_of<Floats>(__builtin_convertvector(load<Halves>(p), Words) << 16);
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(p));
#else
  Floats v;
  for (int i = 0; i < LANES; i++) v[i] = from_float16(p[i]);
  return v;
#endif
}

// What is left of a number that was stored in `type`.
INLINE Floats round_to(Type type, Floats v) {
  if (type == BFLOAT16) {
    const Words bits = bits_of<Words>(v), up = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    return v == v ? bits_of<Floats>(up) : v;
  }
  if (type == FLOAT16) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, 0));
#else
    for (int i = 0; i < LANES; i++) v[i] = from_float16(to_float16(v[i]));
#endif
  }
  return v;
}

// x [k] as floats y [padded], zeros behind.
static void read(Type type, const void* x, long k, float* y, long padded) {
  long i = 0;
  if (type == FLOAT32) {
    memcpy(y, x, k * 4);
    i = k;
  } else {
    for (; i + LANES <= k; i += LANES) store(y + i, widen(type, (const uint16_t*)x + i));
    for (; i < k; i++) y[i] = load_as(type, x, i);
  }
  memset(y + i, 0, (padded - i) * 4);
}

// One round of butterflies between lanes `HALF` apart.
template <int HALF> INLINE Floats within(Floats v) {
  Ints from, sign;
  for (int i = 0; i < LANES; i++) from[i] = i ^ HALF, sign[i] = i & HALF ? INT32_MIN : 0;
#ifdef __clang__
  Floats other;
  for (int i = 0; i < LANES; i++) other[i] = v[i ^ HALF];
#else
  const Floats other = __builtin_shuffle(v, from);
#endif
  return other + bits_of<Floats>(bits_of<Ints>(v) ^ sign);
}

// The orthonormal Hadamard transform in blocks; sums in pairs, neighbours first.
static void hadamard(float* y, long padded, long block, Type type) {
  const float norm = (float)(1 / __builtin_sqrt((double)block));
  for (long i = 0; i < padded; i += LANES) {
    Floats v = load<Floats>(y + i);
    if (block > 1) v = within<1>(v);
    if (block > 2) v = within<2>(v);
    if (block > 4) v = within<4>(v);
    if (block > 8) v = within<8>(v);
    store(y + i, v);
  }
  for (long half = LANES; half < block; half *= 2)
    for (long i = 0; i < padded; i += 2 * half)
      for (long j = i; j < i + half; j += LANES) {
        const Floats a = load<Floats>(y + j), b = load<Floats>(y + j + half);
        store(y + j, a + b);
        store(y + j + half, a - b);
      }
  for (long i = 0; i < padded; i += LANES) store(y + i, round_to(type, load<Floats>(y + i) * norm));
}

// The largest magnitude; as integers, so that NaN is the largest of all.
INLINE Ints larger(Ints most, const float* y) {
  const Ints v = load<Ints>(y) & 0x7fffffff;
  return v > most ? v : most;
}
static float largest(const float* y, long count) {
  Ints most = {}, other = {};
  long i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) {
    most = larger(most, y + i);
    other = larger(other, y + i + LANES);
  }
  for (; i < count; i += LANES) most = larger(most, y + i);
  most = most > other ? most : other;
  int32_t all = 0;
  for (int j = 0; j < LANES; j++) all = std::max(all, most[j]);
  return from_bits((uint32_t)all);
}

static float scale_of(float most) {
  const float scale = most / 127;
  return scale == 0 ? 1 : scale;  // zeros, and subnormals that divide to zero
}

// Codes of `count` numbers of one scale; returns their sum.
static int32_t encode(const float* y, long count, float scale, int8_t* codes) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  const Floats high = Floats{} + 127.0f;
  Ints sum = {};
  for (long i = 0; i < count; i += LANES) {
    Floats v = load<Floats>(y + i) / scale;
    v = v > high ? high : v;
    v = v < -high ? -high : v;
    v = (v + magic) - magic;
    const Ints q = v == v ? __builtin_convertvector(v == v ? v : Floats{}, Ints) : Ints{};
    sum += q;
    store(codes + i, __builtin_convertvector(q, Bytes));
  }
  int32_t all = 0;
  for (int j = 0; j < LANES; j++) all += sum[j];
  return all;
}

struct Quantizer {  // what does not change from call to call
  int64_t k, groups, group;
  int32_t type, per_group, block;
};

static thread_local Buffer row;

extern "C" __attribute__((visibility("default"))) void mixllm_quantize(const Quantizer* quantizer, const void* x,
                                                                       int64_t stride, int8_t* codes, float* scales,
                                                                       int32_t* sums, int64_t tokens, int32_t threads) {
  const Quantizer& q = *quantizer;
  const Type type = (Type)q.type;
  const long padded = q.groups * q.group, size = type == FLOAT32 ? 4 : 2;
  threads = (int32_t)std::max<int64_t>(1, std::min<int64_t>(threads, tokens * padded / 16384));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < tokens; m++) {
    float* y = (float*)row.reserve(padded * 4);
    read(type, (const uint8_t*)x + m * stride * size, q.k, y, padded);
    if (q.block) hadamard(y, (q.k + LANES - 1) / LANES * LANES, q.block, type);
    float scale = q.per_group ? 0 : scale_of(largest(y, padded));
    if (!q.per_group) scales[m] = scale;
    for (long g = 0; g < q.groups; g++) {
      const float* part = y + g * q.group;
      if (q.per_group) scales[m * q.groups + g] = scale = scale_of(largest(part, q.group));
      sums[m * q.groups + g] = encode(part, q.group, scale, codes + m * padded + g * q.group);
    }
  }
}
