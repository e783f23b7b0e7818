// Plain C++: any CPU. `unpack` writes the codes of one unit, [steps][64 rows][4].
template <int BITS, int T>
static void plain(const uint8_t* w, const Tile& tile, long groups, long steps, float* out) {
  constexpr bool TWO = FAMILY == TWO_LEVEL;
  const int8_t* x = tile.codes;
  uint32_t total[T][64];  // with one scale a token, two-level rows stay in integers; parts may wrap
  const uint8_t* offsets = w + 256;
  if (TWO) w += 256 + (BITS == 8 ? 0 : (groups + 1) / 2 * 128);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < 64; r++) {
      total[t][r] = INTEGER ? (uint32_t)tile.minus128[t] : 0;
      if (!INTEGER) out[t * 64 + r] = 0;
    }
  for (long g = 0; g < groups; g++) {
    const uint8_t* meta = w;
    w += TWO ? (BITS == 8 ? 0 : 64) : (BITS == 8 ? 128 : 192);
    int32_t sum[T][64];
    memset(sum, 0, sizeof sum);
    for (long s = 0; s < steps; s += Unit<BITS>::STEPS, w += Unit<BITS>::BYTES) {
      uint8_t codes[Unit<BITS>::STEPS * 256];
      Unit<BITS>::unpack(w, codes);
      for (int j = 0; j < Unit<BITS>::STEPS; j++)
        for (int t = 0; t < T; t++, x += 4)
          for (int r = 0; r < 64; r++) {
            const uint8_t* q = codes + j * 256 + r * 4;
            sum[t][r] += q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3];
          }
    }
    for (int t = 0; t < T; t++) {
      // The group's sum of activations: in which half it lies, see `Tile`.
      const int32_t halves = BITS == 8 ? 0 : tile.halves[INTEGER ? g / 2 * T + t : g * T + t];
      const int16_t part = TWO && g % 2 ? (int16_t)((uint32_t)halves >> 16) : (int16_t)halves;
      for (int r = 0; r < 64; r++) {
        int32_t v = sum[t][r];
        if (TWO && BITS != 8) v = v * meta[r] + part * offsets[g / 2 * 128 + 2 * r + g % 2];
        if (!TWO && BITS != 8) v += part * meta[128 + r];
        if (INTEGER) {
          total[t][r] += (uint32_t)v;
          continue;
        }
        if (TWO || BITS == 8) v += tile.minus128[g * T + t];
        float f = (float)v;
        if (!TWO) f *= from_float16(meta[2 * r] | meta[2 * r + 1] << 8);
        out[t * 64 + r] += PER_GROUP ? f * tile.scales[g * T + t] : f;
      }
    }
  }
  if (INTEGER) memcpy(out, total, sizeof total);
}
