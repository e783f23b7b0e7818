// Few tokens (M <= 8 * OCTETS): the time is that of reading the weights. A CTA has 16 * BLOCKS rows
// of one tile and all of K, whose groups go round its WARPS. A lane's loads are its fragments: global
// memory to registers, AHEAD groups in flight, no shared memory before the sums of the warps are
// added. Weights of the first groups are requested before the previous kernel has ended.

// Fragments of the tokens straight from global memory, as far ahead as the weights: when the previous
// kernel has ended, one latency is left. Tokens that do not exist are copies of the last one; their
// columns are never stored.
template <int OCTETS, int WARPS, int AHEAD> struct DirectTokens {
    u32 ahead[AHEAD][OCTETS][8];
    const u32* from[OCTETS];
    int mine;

    DEVICE void start(const Weights& w, const Activations& x, int groups_of_warp, int warp, int lane) {
        mine = groups_of_warp;
#pragma unroll
        for (int q = 0; q < OCTETS; q++) {
            const int token = min(8 * q + (lane >> 2), x.m - 1);
            from[q] = reinterpret_cast<const u32*>(x.codes + ((long long)token * w.groups + warp) * GROUP) + (lane & 3);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) load(i, i);
    }
    DEVICE void load(int slot, int i) {
        if (i >= mine) return;
#pragma unroll
        for (int q = 0; q < OCTETS; q++)
#pragma unroll
            for (int v = 0; v < 8; v++) ahead[slot][q][v] = from[q][i * (WARPS * GROUP / 4) + 4 * v];
    }
    DEVICE void fragments(int slot, int, u32 (&b)[OCTETS][8]) const {
#pragma unroll
        for (int q = 0; q < OCTETS; q++)
#pragma unroll
            for (int v = 0; v < 8; v++) b[q][v] = ahead[slot][q][v];
    }
    DEVICE void refill(int slot, int i) { load(slot, i + AHEAD); }
};

template <int BITS, int OCTETS, int BLOCKS, int WARPS, int AHEAD, class TOKENS, class READY>
DEVICE void decode_groups(int (&acc)[BLOCKS][OCTETS][4], const u8* blocks, const Weights& w, const Activations& x,
                          TOKENS& tokens, int block0, int warp, int lane, READY ready) {
    using C = Code<BITS>;
    const int mine = (w.groups - warp + WARPS - 1) / WARPS;
    u32 words[AHEAD][BLOCKS][C::WORDS], meta[AHEAD][BLOCKS];
    auto request = [&](int slot, int i) {
        if (i >= mine) return;
        const u8* block = blocks + (long long)(warp + i * WARPS) * C::BLOCK;
#pragma unroll
        for (int r = 0; r < BLOCKS; r++) {
            const u8* codes = block + (block0 + r) * WARP_BYTES<BITS>;
            load_words<BITS>(words[slot][r], [&](int at) { return stream16(codes + at); },
                             [&](int at) { return stream8(codes + at); }, lane);
            if constexpr (BITS < 8) meta[slot][r] = stream4(block + C::CODES + (block0 + r) * 32 + (lane >> 2) * 4);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) request(i, i);
    let_successor_start();
    wait_for_predecessor();
    tokens.start(w, x, mine, warp, lane);
    ready();
    for (int first = 0; first < mine; first += AHEAD) {
#pragma unroll
        for (int slot = 0; slot < AHEAD; slot++) {
            const int i = first + slot;
            if (i >= mine) break;
            u32 b[OCTETS][8];
            tokens.fragments(slot, i, b);
#pragma unroll
            for (int r = 0; r < BLOCKS; r++) {
                const Steps steps(meta[slot][r]);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 a[4];
                    dequantize<BITS>(words[slot][r], steps, j, a);
#pragma unroll
                    for (int q = 0; q < OCTETS; q++) mma(acc[r][q], a, b[q][2 * j], b[q][2 * j + 1]);
                }
            }
            request(slot, i + AHEAD);
            tokens.refill(slot, i);
        }
    }
}

// `source(Const<depth>)` makes the tokens of a warp that works so many groups ahead.
template <int OCTETS, int BLOCKS, int WARPS, int AHEAD, int TYPE, class SOURCE>
DEVICE void decode_with(const Weights& w, const Activations& x, const Output& out, SOURCE source) {
    constexpr int ROWS = 16 * BLOCKS, COLUMNS = 8 * OCTETS, PITCH_ = ROWS + 4;  // + 4: no bank conflicts
    constexpr int THREADS = 32 * WARPS, EACH = (ROWS * COLUMNS + THREADS - 1) / THREADS;
    __shared__ int partial[WARPS][COLUMNS * PITCH_];
    const int lane = threadIdx.x & 31, warp = uniform(threadIdx.x >> 5);
    const int tile = w.tiles - 1 - blockIdx.x / (4 / BLOCKS);  // wide rows first: they take longest
    const int block0 = blockIdx.x % (4 / BLOCKS) * BLOCKS;

    // What the last step needs is loaded early: its latency hides behind the weights.
    int column[EACH], sum[EACH];
    float row_scale[EACH], x_scale[EACH], bias[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int o = e * THREADS + threadIdx.x, row = tile * TILE + 16 * block0 + o % ROWS;
        const bool there = o < ROWS * COLUMNS && o / ROWS < x.m;
        column[e] = there ? w.order()[row] : -1;
        row_scale[e] = there ? w.scales()[row] : 0.f;
        bias[e] = bias_at(out, column[e]);
    }
    int acc[BLOCKS][OCTETS][4] = {};
    by_width(w, tile, [&](auto bits, const u8* blocks) {
        constexpr int DEPTH = bits.value == 8 && AHEAD >= 4 ? AHEAD / 2 : AHEAD;
        auto tokens = source(Const<DEPTH>{});
        decode_groups<bits.value, OCTETS, BLOCKS, WARPS, DEPTH>(acc, blocks, w, x, tokens, block0, warp, lane, [&]() {
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int token = (e * THREADS + threadIdx.x) / ROWS;
                x_scale[e] = column[e] >= 0 ? x.scales[token] : 0.f;
                sum[e] = column[e] >= 0 ? x.sums[token] : 0;
            }
        });
    });
#pragma unroll
    for (int r = 0; r < BLOCKS; r++)
#pragma unroll
        for (int q = 0; q < OCTETS; q++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                partial[warp][(8 * q + 2 * (lane & 3) + (c & 1)) * PITCH_ + 16 * r + (lane >> 2) + 8 * (c >> 1)] = acc[r][q][c];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if (column[e] < 0) continue;
        const int o = e * THREADS + threadIdx.x, token = o / ROWS;
        int total = 0;
#pragma unroll
        for (int k = 0; k < WARPS; k++) total += partial[k][token * PITCH_ + o % ROWS];
        const float y = finish(out, total, sum[e], row_scale[e], x_scale[e], bias[e]);
        reinterpret_cast<typename Float<TYPE>::Raw*>(out.y)[(long long)token * w.n + column[e]] = Float<TYPE>::raw(y);
    }
}

template <int OCTETS, int BLOCKS, int WARPS, int AHEAD, int TYPE>
DEVICE void decode(const Weights& w, const Activations& x, const Output& out) {
    decode_with<OCTETS, BLOCKS, WARPS, AHEAD, TYPE>(w, x, out, [](auto depth) {
        return DirectTokens<OCTETS, WARPS, depth.value>();
    });
}
