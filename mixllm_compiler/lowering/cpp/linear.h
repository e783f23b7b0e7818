// The linear: activations in tiles of tokens, work shared among threads, panels in output order.

struct Shape {  // what does not change from call to call
  int64_t n, groups, group, panels;
  int32_t widths;  // bit b: there are rows of b bits
  int32_t out_type, bias_type;
};

constexpr long BLOCK = 96;         // tokens that pass a panel together: their codes stay in the L2 cache
constexpr long CHUNK = 10 * BLOCK;  // tokens whose tiles are in memory at a time

// Tokens are cut into as few tiles as there can be, that differ by at most one token.
struct Tiling {
  long m, count, base, wider;
  explicit Tiling(long tokens) : m(tokens), count((tokens + TOKENS - 1) / TOKENS), base(tokens / count), wider(tokens % count) {}
  long first(long i) const { return i * base + std::min(i, wider); }
  int tokens(long i) const { return (int)(base + (i < wider)); }
};

// Where the tiles of some tokens lie in a buffer.
struct Activations {
  long groups, padded;
  bool tables;
  int8_t* codes;
  int32_t *halves, *minus128, *table;
  float* scales;
  Activations(const Shape& s, long m, Buffer& buffer)
      : groups(s.groups), padded(s.groups * s.group), tables(FAMILY == ASYM && LOOKS_UP && (s.widths & 0x1c)) {
    const size_t each = ((size_t)m * groups * 4 + 63) & ~(size_t)63, all = ((size_t)m * padded + 63) & ~(size_t)63;
    uint8_t* p = buffer.reserve(all + 3 * each + (tables ? 16 * each : 0));
    table = (int32_t*)p;
    p += tables ? 16 * each : 0;
    codes = (int8_t*)p;
    halves = (int32_t*)(p + all);
    minus128 = (int32_t*)(p + all + each);
    scales = (float*)(p + all + 2 * each);
  }
  // The tile of tokens m ... m + T - 1; `outside` are codes that need no new order.
  Tile tile(long m, const float* token_scales, const int8_t* outside) const {
    const long at = m * groups;
    return {outside ? outside : codes + m * padded, halves + at, minus128 + (INTEGER ? m : at), table + at * 16,
            PER_GROUP ? scales + at : token_scales + m, {}};
  }
  // Write the tile of tokens m ... m + T - 1. One token's codes are in order already.
  void fill(long m, int T, const int8_t* x, const float* x_scales, const int32_t* sums) {
    if (T > 1) interleave(x + m * padded, T, (uint32_t*)(codes + m * padded));
    for (int t = 0; t < T; t++) {
      const int32_t* sum = sums + (m + t) * groups;
      int32_t all = 0;
      for (long g = 0; g < groups; g++) {
        const long at = m * groups + g * T + t;
        const uint32_t s = (uint32_t)sum[g];
        all += sum[g];
        if (!INTEGER) minus128[at] = -128 * sum[g];
        if (FAMILY == ASYM) halves[at] = (int32_t)((0 - s) & 0xffff);
        else if (!INTEGER) halves[at] = (int32_t)(g % 2 ? s << 16 : s & 0xffff);
        else if (g % 2 == 0)
          halves[m * groups + g / 2 * T + t] =
              (int32_t)((s & 0xffff) | (g + 1 < groups ? (uint32_t)sum[g + 1] << 16 : 0));
        if (PER_GROUP) scales[at] = x_scales[(m + t) * groups + g];
        if (tables)
          for (int z = 0; z < 16; z++) table[at * 16 + z] = -z * sum[g];
      }
      if (INTEGER) minus128[m + t] = -128 * all;
    }
  }

 private:
  void interleave(const int8_t* x, int T, uint32_t* to) const {
    for (int t = 0; t < T; t++)
      for (long k = 0; k < padded / 4; k++) memcpy(to + k * T + t, x + t * padded + 4 * k, 4);
  }
};

// Numbers 0 ... count - 1, shared out among threads: large pieces first, small ones at the end, so that
// a core that is slow, or was taken away for a while, is waited for as little as can be.
class Queue {
 public:
  Queue(long count, int threads) : count_(count), share_(4 * threads) {}
  bool take(long& from, long& to) {
    from = next_.load(std::memory_order_relaxed);
    do {
      if (from >= count_) return false;
      to = from + std::max<long>(1, (count_ - from) / share_);
    } while (!next_.compare_exchange_weak(from, to, std::memory_order_relaxed));
    return true;
  }

 private:
  std::atomic<long> next_{0};
  const long count_, share_;
};

// Tokens of a block pass a panel one after the other, panels of a block one after the other.
static long blocks_of(const Tiling& tiling) {
  const long tiles = std::max<long>(1, BLOCK / TOKENS);
  return (tiling.count + tiles - 1) / tiles;
}

static void multiply(const Shape& s, const Activations& in, const Tiling& tiling, Queue& queue, const int8_t* x,
                     const float* x_scales, const uint8_t* blob, const void* bias, void* out, long m0) {
  const Panel* panels = (const Panel*)(blob + s.panels * 256);
  const long blocks = blocks_of(tiling), padded = s.groups * s.group;
  const Type type = (Type)s.out_type;
  alignas(64) float results[TOKENS * 64 + 16] = {};
  Rows rows = {};
  for (long from, to; queue.take(from, to);)
    for (long item = from; item < to; item++) {
      const long b = item / s.panels, p = item % s.panels;
      const Panel& panel = panels[p];
      if (p + 1 < s.panels) announce(panels[p + 1], blob);
      gather(panel, blob, rows);
      const long first = tiling.count * b / blocks, last = tiling.count * (b + 1) / blocks;
      // One tile streams its weights; more of them bring the next panel's near, each its share.
      const long turn = STEPS_OF_TURN[panel.bits], table = panel.bits == 8 ? 0 : (s.groups + 1) / 2 * 128;
      const long head = FAMILY == TWO_LEVEL ? 256 + table : 0;
      Next next = {blob + panel.start + head + AHEAD, turn * panel.bits / 2};
      const bool alone = last - first == 1, ends = p + 1 == s.panels;
      const long share = alone || ends ? 0 : panels[p + 1].bits * 8 * padded / (last - first);
      if (!alone) next = {ends ? blob : blob + panels[p + 1].start, (share / 64 * turn * 4 + padded - 1) / padded};
      for (long i = first; i < last; i++) {
        const long m = tiling.first(i);
        const int T = tiling.tokens(i);
        Tile tile = in.tile(m, x_scales, T == 1 ? x + m * in.padded : nullptr);
        const Output y = {type, (Type)s.bias_type, bias, (uint8_t*)out + (m0 + m) * s.n * (type == FLOAT32 ? 4 : 2), s.n};
        tile.next = {next.at + (i - first) * share, next.lines};
        expect(panel, T, y);
        run(panel.bits, T, blob + panel.start, tile, s.groups, s.group / 4, results);
        finish(panel, rows, results, T, x_scales + m, y);
      }
    }
}

static thread_local Buffer own, shared;

// y [m, n] = the mixed linear of codes [m, K'], scales [m, groups or 1], sums [m, groups].
extern "C" __attribute__((visibility("default"))) void mixllm_linear(
    const Shape* shape, const int8_t* codes, const float* scales, const int32_t* sums, const uint8_t* blob,
    const void* bias, void* out, int64_t tokens, int32_t threads) {
  const Shape& s = *shape;
  const long padded = s.groups * s.group, n_scales = PER_GROUP ? s.groups : 1;
  // A thread for work that takes less than it takes to wake one up helps nobody.
  const double work = (double)tokens * s.panels * 64 * padded;
  threads = std::max<int32_t>(1, (int32_t)std::min<double>(threads, work / 200e3));
  for (long m0 = 0; m0 < tokens; m0 += CHUNK) {
    const long m = std::min<long>(CHUNK, tokens - m0);
    const int8_t* x = codes + m0 * padded;
    const float* x_scales = scales + m0 * n_scales;
    const int32_t* x_sums = sums + m0 * s.groups;
    const Tiling tiling(m);
    Queue queue(blocks_of(tiling) * s.panels, threads);
    if (tiling.count == 1) {  // each thread prepares its own copy: cheaper than to wait for one
#pragma omp parallel num_threads(threads)
      {
        Activations in(s, m, own);
        in.fill(0, (int)m, x, x_scales, x_sums);
        multiply(s, in, tiling, queue, x, x_scales, blob, bias, out, m0);
      }
      continue;
    }
    Activations in(s, m, shared);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (long i = 0; i < tiling.count; i++) in.fill(tiling.first(i), tiling.tokens(i), x, x_scales, x_sums);
      multiply(s, in, tiling, queue, x, x_scales, blob, bias, out, m0);
    }
    shared.trim();
  }
}
