// From stored codes to panels: eight codes of a row at a time spread to bytes, then gathered in lanes.

// Eight codes of `bits` bits, little-endian, to the eight bytes of a word: three rounds of halving.
INLINE uint64_t spread(uint64_t v, int bits) {
  const uint64_t four = ((uint64_t)1 << 4 * bits) - 1, two = ((uint64_t)1 << 2 * bits) - 1, one = ((uint64_t)1 << bits) - 1;
  v = (v & four) | (v >> 4 * bits & four) << 32;
  v = (v & two * 0x100000001) | (v >> 2 * bits & two * 0x100000001) << 16;
  return (v & one * 0x1000100010001) | (v >> bits & one * 0x1000100010001) << 8;
}

struct Rows {  // of one width, as they are stored
  int64_t count, k, row_bytes, groups, group;
  int64_t panel_bytes, first, block_bytes;  // of the packed form: of a panel, to its first codes, from group to group
};

template <int BITS> static void pack_panel(const Rows& s, const uint8_t* rows, int64_t count, uint8_t* out) {
  const long steps = s.group / 4;
  uint8_t* codes = (uint8_t*)malloc(steps * 256);
  if (!codes) abort();
  for (long g = 0; g < s.groups; g++, out += s.block_bytes) {
    const long first = g * s.group, real = std::min<long>(s.group, s.k - first);
    memset(codes, 0, steps * 256);
    for (long r = 0; r < count; r++) {
      // Groups begin at whole bytes: they are multiples of 32.
      const uint8_t* row = rows + r * s.row_bytes;
      const long begin = first * BITS / 8, end = s.row_bytes;
      for (long i = 0; i < real; i += 8) {
        const long at = begin + i * BITS / 8;
        uint64_t v = 0;
        memcpy(&v, row + at, std::min<long>(BITS, end - at));
        v = BITS == 8 ? v ^ 0x8080808080808080 : spread(v, BITS);
        if (real - i < 8) v &= ((uint64_t)1 << 8 * (real - i)) - 1;
        memcpy(codes + i / 4 * 256 + 4 * r, &v, 4);
        const uint32_t high = (uint32_t)(v >> 32);
        memcpy(codes + (i / 4 + 1) * 256 + 4 * r, &high, 4);
      }
    }
    uint8_t* to = out;
    for (long u = 0; u < steps; u += Unit<BITS>::STEPS, to += Unit<BITS>::BYTES) Unit<BITS>::pack(codes + u * 256, to);
  }
  free(codes);
}

// Fill the codes of all panels of rows of one width; what else is in a panel stays.
extern "C" __attribute__((visibility("default"))) void mixllm_pack(const Rows* shape, int32_t bits,
                                                                   const uint8_t* rows, uint8_t* out, int32_t threads) {
  const Rows& s = *shape;
  const int64_t panels = (s.count + 63) / 64;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < panels; p++) {
    const uint8_t* from = rows + p * 64 * s.row_bytes;
    uint8_t* to = out + p * s.panel_bytes + s.first;
    const int64_t count = std::min<int64_t>(64, s.count - p * 64);
    switch (bits) {
      case 2: pack_panel<2>(s, from, count, to); break;
      case 3: pack_panel<3>(s, from, count, to); break;
      case 4: pack_panel<4>(s, from, count, to); break;
      case 5: pack_panel<5>(s, from, count, to); break;
      case 6: pack_panel<6>(s, from, count, to); break;
      case 8: pack_panel<8>(s, from, count, to); break;
    }
  }
}
