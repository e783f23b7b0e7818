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
  float scales[64];      // two-level: S
  float bias[64];
};

static void gather(const Panel& panel, const uint8_t* blob, Type bias_type, const void* bias, Rows& rows) {
  rows.order = (const int32_t*)blob + panel.index * 64;
  if (FAMILY == TWO_LEVEL) memcpy(rows.scales, blob + panel.start, 256);
  if (bias_type != NONE)
    for (int r = 0; r < 64; r++) rows.bias[r] = rows.order[r] < 0 ? 0 : load_as(bias_type, bias, rows.order[r]);
}

// For two-level rows the order of these operations is part of their definition.
template <bool BIAS> static void scale(const float* out, const Rows& rows, float x_scale, float* y) {
  for (int r = 0; r < 64; r++) {
    float v;
    if (INTEGER) {
      int32_t sum;
      memcpy(&sum, out + r, 4);
      v = (float)sum * (rows.scales[r] * x_scale);
    } else if (FAMILY == TWO_LEVEL) {
      v = out[r] * rows.scales[r];
    } else {
      v = PER_GROUP ? out[r] : out[r] * x_scale;
    }
    y[r] = BIAS ? v + rows.bias[r] : v;
  }
}

#ifdef __AVX512F__
INLINE __m256i round_bfloat16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
// Whole lines of the output: each one permute of 32 neighbouring rows and one masked store.
template <Type TYPE> static void write_lines(const Panel& panel, const float* y, void* out) {
  for (int i = 0; i < panel.lines; i++) {
    const float* rows = y + panel.source[i] * 16;
    const __m512i place = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)panel.place[i]));
    const __m512 line = _mm512_permutex2var_ps(_mm512_loadu_ps(rows), place, _mm512_loadu_ps(rows + 16));
    const long at = panel.column + 16 * i;
    if (TYPE == FLOAT32) _mm512_mask_storeu_ps((float*)out + at, panel.mask[i], line);
    if (TYPE == BFLOAT16) _mm256_mask_storeu_epi16((uint16_t*)out + at, panel.mask[i], round_bfloat16(line));
    if (TYPE == FLOAT16) _mm256_mask_storeu_epi16((uint16_t*)out + at, panel.mask[i], _mm512_cvtps_ph(line, 0));
  }
}
#endif

template <Type TYPE> static void write(const Panel& panel, const Rows& rows, const float* y, void* out) {
#ifdef __AVX512F__
  if (panel.lines) return write_lines<TYPE>(panel, y, out);
#endif
  for (int r = 0; r < 64; r++) {
    const long at = rows.order[r];
    if (at < 0) break;  // padding is at the end
    if (TYPE == FLOAT32) ((float*)out)[at] = y[r];
    if (TYPE == BFLOAT16) ((uint16_t*)out)[at] = to_bfloat16(y[r]);
    if (TYPE == FLOAT16) ((uint16_t*)out)[at] = to_float16(y[r]);
  }
}

// Ask for the lines that a panel's tile will write, long before it does: a tenth of the time, else.
static void expect(const Panel& panel, int tokens, Type type, void* out, long m, long n) {
  const long size = type == FLOAT32 ? 4 : 2;
  for (int t = 0; t < tokens; t++) {
    const char* line = (const char*)out + ((m + t) * n + panel.column) * size;
    for (int i = 0; i < panel.lines; i++) __builtin_prefetch(line + 16 * i * size, 1);
  }
}

// Results [tokens][64] of a panel to rows `m` ... of the output [M, n].
static void finish(const Panel& panel, const Rows& rows, bool bias, const float* results, int tokens,
                   const float* x_scales, Type type, void* out, long m, long n) {
  alignas(64) float y[80];
  memset(y + 64, 0, 64);
  for (int t = 0; t < tokens; t++, results += 64, m++) {
    const float x_scale = PER_GROUP ? 1 : x_scales[t];
    if (bias) scale<true>(results, rows, x_scale, y);
    else scale<false>(results, rows, x_scale, y);
    if (type == FLOAT32) write<FLOAT32>(panel, rows, y, (float*)out + m * n);
    if (type == BFLOAT16) write<BFLOAT16>(panel, rows, y, (uint16_t*)out + m * n);
    if (type == FLOAT16) write<FLOAT16>(panel, rows, y, (uint16_t*)out + m * n);
  }
}
