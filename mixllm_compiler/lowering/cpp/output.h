// From a kernel's results to the output: the scales that are left, the bias, model order, type.

// One panel, in the order in which panels run; see layout.py.
struct Panel {
  int64_t start;
  int32_t bits, index, column, lines, unused[2];
  uint16_t mask[16];
  uint8_t source[16];
  uint8_t place[16][16];
  uint8_t rest[48];
};
static_assert(sizeof(Panel) == 384, "layout.py writes 384 bytes");

// What the rows of a panel have in common over all tokens.
struct Rows {
  const int32_t* order;  // output column of each row, -1 for padding
  float scales[64 + 16]; // two-level: S; lines may read past the last row
};

static void gather(const Panel& panel, const uint8_t* blob, Rows& rows) {
  rows.order = (const int32_t*)blob + panel.index * 64;
  if (FAMILY == TWO_LEVEL) memcpy(rows.scales, blob + panel.start, 256);
}

// Ask for what a panel begins with, while the one before it runs: nothing else is read by surprise.
static void announce(const Panel& panel, const uint8_t* blob) {
  const uint8_t* order = blob + panel.index * 256;
  for (int i = 0; i < 4; i++) __builtin_prefetch(order + 64 * i);
  for (int i = 0; i < AHEAD / 64; i++) __builtin_prefetch(blob + panel.start + 64 * i, 0, 2);
  for (int i = 0; i < 6; i++) __builtin_prefetch((const uint8_t*)(&panel + 1) + 64 * i);
}

// For two-level rows the order of these operations is part of their definition.
static void scale(const float* out, const Rows& rows, float x_scale, float* y) {
  for (int r = 0; r < 64; r++) {
    if (INTEGER) {
      int32_t sum;
      memcpy(&sum, out + r, 4);
      y[r] = (float)sum * (rows.scales[r] * x_scale);
    } else if (FAMILY == TWO_LEVEL) {
      y[r] = out[r] * rows.scales[r];
    } else {
      y[r] = PER_GROUP ? out[r] : out[r] * x_scale;
    }
  }
}

// Where the results of some tokens go: rows of `n` of the output, from the first token's on.
struct Output {
  Type type, bias_type;
  const void* bias;
  void* data;
  long n;
};

#ifdef __AVX512F__
INLINE __m256i round_bfloat16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
INLINE __m512 bias_line(const Output& to, long at, __mmask16 mask) {
  if (to.bias_type == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float*)to.bias + at);
  const __m256i v = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)to.bias + at);
  if (to.bias_type == FLOAT16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
INLINE __m512 permuted(const void* p, __m512i place) {
  return _mm512_permutex2var_ps(_mm512_loadu_ps(p), place, _mm512_loadu_ps((const float*)p + 16));
}
// Whole lines of the output: each one permute of 32 neighbouring rows and one masked store. What a
// permute takes from behind the last row is masked.
template <Type TYPE>
static void write_lines(const Panel& panel, const Rows& rows, const float* results, int tokens, const float* x_scales,
                        const Output& to) {
  for (int i = 0; i < panel.lines; i++) {
    const long at = panel.column + 16 * i, first = panel.source[i] * 16;
    const __mmask16 mask = panel.mask[i];
    const __m512i place = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)panel.place[i]));
    const __m512 bias = to.bias_type == NONE ? _mm512_setzero_ps() : bias_line(to, at, mask);
    const __m512 scales = FAMILY == TWO_LEVEL ? permuted(rows.scales + first, place) : _mm512_setzero_ps();
    for (long t = 0, cell = at; t < tokens; t++, cell += to.n) {
      __m512 line = permuted(results + t * 64 + first, place);
      if (INTEGER) line = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(line)), _mm512_mul_ps(scales, _mm512_set1_ps(x_scales[t])));
      else if (FAMILY == TWO_LEVEL) line = _mm512_mul_ps(line, scales);
      else if (!PER_GROUP) line = _mm512_mul_ps(line, _mm512_set1_ps(x_scales[t]));
      if (to.bias_type != NONE) line = _mm512_add_ps(line, bias);
      if (TYPE == FLOAT32) _mm512_mask_storeu_ps((float*)to.data + cell, mask, line);
      if (TYPE == BFLOAT16) _mm256_mask_storeu_epi16((uint16_t*)to.data + cell, mask, round_bfloat16(line));
      if (TYPE == FLOAT16) _mm256_mask_storeu_epi16((uint16_t*)to.data + cell, mask, _mm512_cvtps_ph(line, 0));
    }
  }
}
#endif

template <Type TYPE>
static void write(const Panel& panel, const Rows& rows, const float* results, int tokens, const float* x_scales,
                  const Output& to) {
#ifdef __AVX512F__
  if (panel.lines) return write_lines<TYPE>(panel, rows, results, tokens, x_scales, to);
#endif
  alignas(64) float y[TOKENS * 64];
  for (int t = 0; t < tokens; t++) scale(results + t * 64, rows, PER_GROUP ? 1 : x_scales[t], y + t * 64);
  for (int r = 0; r < 64 && rows.order[r] >= 0; r++) {  // padding is at the end
    const float bias = to.bias_type == NONE ? 0 : load_as(to.bias_type, to.bias, rows.order[r]);
    for (long t = 0, cell = rows.order[r]; t < tokens; t++, cell += to.n) {
      const float v = to.bias_type == NONE ? y[t * 64 + r] : y[t * 64 + r] + bias;
      if (TYPE == FLOAT32) ((float*)to.data)[cell] = v;
      if (TYPE == BFLOAT16) ((uint16_t*)to.data)[cell] = to_bfloat16(v);
      if (TYPE == FLOAT16) ((uint16_t*)to.data)[cell] = to_float16(v);
    }
  }
}

// Ask for the lines that a panel's tile will write, long before it does: a tenth of the time, else.
static void expect(const Panel& panel, int tokens, const Output& to) {
  const long size = to.type == FLOAT32 ? 4 : 2;
  for (int t = 0; t < tokens; t++) {
    const char* line = (const char*)to.data + (t * to.n + panel.column) * size;
    for (int i = 0; i < panel.lines; i++) __builtin_prefetch(line + 16 * i * size, 1);
  }
}

// Results [tokens][64] of a panel, and 16 floats behind them, to their places.
static void finish(const Panel& panel, const Rows& rows, const float* results, int tokens, const float* x_scales,
                   const Output& to) {
  if (to.type == FLOAT32) write<FLOAT32>(panel, rows, results, tokens, x_scales, to);
  if (to.type == BFLOAT16) write<BFLOAT16>(panel, rows, results, tokens, x_scales, to);
  if (to.type == FLOAT16) write<FLOAT16>(panel, rows, results, tokens, x_scales, to);
}
