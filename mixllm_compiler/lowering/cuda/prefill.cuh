// Many tokens: persistent CTAs of two tiles x TOKENS tokens, one tile a consumer warpgroup, each with
// the code of its own width; one thread requests, in a ring of STAGES groups. CTAs go through the
// tiles in the order of their output columns, BAND token tiles at a time, so that the stores of
// neighbouring rows meet in L2.
template <int TOKENS, int STAGES, int TYPE> struct Prefill {
    static constexpr u32 STAGE = TOKENS * GROUP + 2 * SLOT, RING = STAGES * STAGE;
    static constexpr int CHUNK = 8192 / PITCH<TYPE>;
    static constexpr u32 OUT = RING, BARRIERS = OUT + 2 * 2 * 8192, BYTES = BARRIERS + 16 * STAGES + 1024;
};

template <int TOKENS, int STAGES, int BAND, int TYPE>
DEVICE void prefill(const TensorMap& map, const Weights& w, const Activations& x, const Output& out) {
    using S = Prefill<TOKENS, STAGES, TYPE>;
    extern __shared__ u8 memory[];
    const u32 smem = kept((shared_address(memory) + 1023) & ~1023u), full = smem + S::BARRIERS, empty = full + 8 * STAGES;
    const int token_tiles = (x.m + TOKENS - 1) / TOKENS, pairs = (w.tiles + 1) / 2, items = token_tiles * pairs;
    const int warpgroup = uniform(threadIdx.x >> 7), tid = threadIdx.x & 127;
    auto locate = [&](int item, int& pair, int& token0) {
        const int band = item / (BAND * pairs), inside = item - band * BAND * pairs, wide = min(BAND, token_tiles - band * BAND);
        pair = inside / wide;
        token0 = (band * BAND + inside - pair * wide) * TOKENS;
    };
    // Where the last pair lacks a tile, the one before is computed twice and stored once.
    auto tile_of = [&](int pair, int i) { return w.schedule()[min(2 * pair + i, w.tiles - 1)]; };

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) { barrier_init(full + 8 * s, 1); barrier_init(empty + 8 * s, 8); }
        barriers_ready();
    }
    __syncthreads();
    let_successor_start();

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x != 0) return;
        int stage = 0;
        u32 phase = 1;
        for (int item = blockIdx.x; item < items; item += gridDim.x) {
            int pair, token0, group = 0;
            locate(item, pair, token0);
            const Blocks b0(w, tile_of(pair, 0)), b1(w, tile_of(pair, 1));
            auto load_weights = [&](int s, int i) {
                const u32 to = smem + s * S::STAGE + TOKENS * GROUP, barrier = full + 8 * s;
                barrier_expect(barrier, TOKENS * GROUP + b0.bytes + b1.bytes);
                load_bytes(to, b0.first + (long long)i * b0.bytes, b0.bytes, barrier);
                load_bytes(to + SLOT, b1.first + (long long)i * b1.bytes, b1.bytes, barrier);
            };
            auto load_tokens = [&](int s, int i) { load_tile(smem + s * S::STAGE, &map, i * GROUP, token0, full + 8 * s); };
            if (item == blockIdx.x) {  // weights do not wait for the previous kernel
                const int ahead = min(STAGES, w.groups);
#pragma unroll 1
                for (int i = 0; i < ahead; i++) load_weights(i, i);
                wait_for_predecessor();
#pragma unroll 1
                for (int i = 0; i < ahead; i++) load_tokens(i, i);
                group = ahead;
                if (ahead == STAGES) phase = 0; else stage = ahead;
            }
#pragma unroll 1
            for (; group < w.groups; group++) {
                barrier_wait(empty + 8 * stage, phase);
                load_weights(stage, group);
                load_tokens(stage, group);
                if (++stage == STAGES) { stage = 0; phase ^= 1; }
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int half = warpgroup - 1, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    int stage = 0, buffer = 0;
    u32 phase = 0;
    wait_for_predecessor();
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        int pair, token0, previous = 0;
        locate(item, pair, token0);
        const int tile = uniform(tile_of(pair, half));
        int acc[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) acc[i] = 0;
        auto free = [&](int s) { if (lane == 0) barrier_arrive(empty + 8 * s); };
        by_width(w, tile, [&](auto bits, const u8*) {
            u32 a[2][2][4];
            for (int i = 0; i < w.groups; i++) {
                barrier_wait(full + 8 * stage, phase);
                const u32 at = smem + stage * S::STAGE;
                multiply_group<bits.value, TOKENS>(acc, a, at, at + TOKENS * GROUP + half * SLOT, warp, lane,
                                                   [&]() { if (i > 0) free(previous); });
                previous = stage;
                if (++stage == STAGES) { stage = 0; phase ^= 1; }
            }
            wgmma_wait<0>();
        });
        free(previous);
        if (2 * pair + half >= w.tiles) continue;

        const int row = tile * TILE + 16 * warp + g;
        const float s0 = w.scales()[row], s1 = w.scales()[row + 8];
        const float b0 = bias_at(out, w.order()[row]), b1 = bias_at(out, w.order()[row + 8]);
        const Columns to(w.order() + tile * TILE, out, w.n, sizeof(typename Float<TYPE>::Raw), lane);
#pragma unroll
        for (int first = 0; first < TOKENS; first += S::CHUNK) {
            if (token0 + first >= x.m) break;
            const u32 chunk = smem + S::OUT + (2 * half + buffer) * 8192;
            buffer ^= 1;  // in turn: whoever passes the barrier below has left the buffer before
#pragma unroll
            for (int i = 0; i < S::CHUNK / 8; i++) {
                const int token = token0 + first + 8 * i + 2 * t, o = (first + 8 * i) / 2;
                const float x0 = token < x.m ? x.scales[token] : 0.f, x1 = token + 1 < x.m ? x.scales[token + 1] : 0.f;
                const int sum0 = token < x.m ? x.sums[token] : 0, sum1 = token + 1 < x.m ? x.sums[token + 1] : 0;
                const float y[4] = {finish(out, acc[o], sum0, s0, x0, b0), finish(out, acc[o + 1], sum1, s0, x1, b0),
                                    finish(out, acc[o + 2], sum0, s1, x0, b1), finish(out, acc[o + 3], sum1, s1, x1, b1)};
                put_octet<TYPE>(chunk, 8 * i, warp, lane, y);
            }
            sync_threads(1 + half, 128);
            store_chunk<TYPE, S::CHUNK>(chunk, to, out, w.n, token0 + first, x.m, warp, lane);
        }
    }
}
