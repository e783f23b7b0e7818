// Many tokens: persistent CTAs of two tiles x TOKENS tokens, one tile a consumer warpgroup, each with
// the code of its own width; one thread requests, in a ring of STAGES groups. Three more warps store:
// outputs wait for them in shared memory, all of an item's, while the consumers multiply the next
// item. Scattered to model order they take up to a third of the time of the products; so they take
// nothing but the last item's.
//
// An item begins at the ring's first stage, whatever the last one left over: so stages are immediates in
// the loop, whose instructions count as much as its products. Every stage has a parity of its own.
//
// CTAs go through the tiles in the order of their output columns, BAND token tiles at a time, so that
// the stores of neighbouring rows meet in L2.
template <int TOKENS, int STAGES, int TYPE> struct Prefill {
    static constexpr u32 STAGE = TOKENS * GROUP + 2 * SLOT, RING = STAGES * STAGE;
    static constexpr u32 OUT = RING, OUT_BYTES = TOKENS * 2 * TILE;  // of one warpgroup
    static constexpr int PASS = OUT_BYTES / PITCH<TYPE>, PASSES = TOKENS / PASS;
    static constexpr u32 META = OUT + 2 * OUT_BYTES, BARRIERS = META + 4 * 8 * TOKENS;
};

template <int TOKENS, int STAGES, int BAND, int TYPE>
DEVICE void prefill(const TensorMap& map, const Weights& w, const Activations& x, const Output& out) {
    using S = Prefill<TOKENS, STAGES, TYPE>;
    extern __shared__ u8 memory[];
    const u32 smem = kept((shared_address(memory) + 1023) & ~1023u), full = smem + S::BARRIERS, empty = full + 8 * STAGES;
    const u32 out_full = empty + 8 * STAGES, out_empty = out_full + 16;
    const int token_tiles = (x.m + TOKENS - 1) / TOKENS, pairs = (w.tiles + 1) / 2, items = token_tiles * pairs;
    const int warpgroup = uniform(threadIdx.x >> 7), tid = threadIdx.x & 127, lane = tid & 31, warp = uniform(tid >> 5);
    auto locate = [&](int item, int& pair, int& token0) {
        const int band = item / (BAND * pairs), inside = item - band * BAND * pairs, wide = min(BAND, token_tiles - band * BAND);
        pair = inside / wide;
        token0 = (band * BAND + inside - pair * wide) * TOKENS;
    };
    // Where the last pair lacks a tile, the one before is computed twice and stored once.
    auto tile_of = [&](int pair, int i) { return w.schedule()[min(2 * pair + i, w.tiles - 1)]; };

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) { barrier_init(full + 8 * s, 1); barrier_init(empty + 8 * s, 8); }
        for (int h = 0; h < 2; h++) { barrier_init(out_full + 8 * h, 4); barrier_init(out_empty + 8 * h, 3); }
        barriers_ready();
    }
    __syncthreads();
    let_successor_start();

    // Registers: 56 and 224 a thread are what 168 were, for one warpgroup and two.
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (warp == 0) {
            if (lane != 0) return;
            u32 parity = ~0u;  // bit s: of stage s
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
                    parity ^= (1u << ahead) - 1;
                }
#pragma unroll 1
                for (; group < w.groups; group += STAGES) {
#pragma unroll
                    for (int s = 0; s < STAGES; s++) {
                        if (group + s >= w.groups) break;
                        barrier_wait(empty + 8 * s, parity >> s & 1);
                        parity ^= 1u << s;
                        load_weights(s, group + s);
                        load_tokens(s, group + s);
                    }
                }
            }
        } else {
            wait_for_predecessor();
            u32 rounds[2] = {0, 0};
            for (int item = blockIdx.x; item < items; item += gridDim.x) {
                int pair, token0;
                locate(item, pair, token0);
                const int halves = min(2, w.tiles - 2 * pair);
                const int *order0 = w.order() + tile_of(pair, 0) * TILE, *order1 = w.order() + tile_of(pair, 1) * TILE;
                const int first0 = first_of_line(order0, out, w.n, sizeof(typename Float<TYPE>::Raw), lane);
                const int first1 = first_of_line(order1, out, w.n, sizeof(typename Float<TYPE>::Raw), lane);
                const auto to = places_of_pair<TYPE>(w.pairs() + 2 * TILE * pair, order0, halves == 2 ? order1 : nullptr,
                                                     smem + S::OUT, S::OUT_BYTES, lane);
                for (int pass = 0; pass < S::PASSES; pass++) {
                    const int from = token0 + pass * S::PASS;
                    for (int half = 0; half < halves; half++) barrier_wait(out_full + 8 * half, rounds[half]++ & 1);
                    if (first0 < 0 || first1 < 0) {
                        store_places<TYPE, S::PASS, 3>(to, out, w.n, from, x.m, warp - 1, lane);
                    } else {
                        for (int half = 0; half < halves; half++)
                            store_line<TYPE, S::PASS, 3>(smem + S::OUT + half * S::OUT_BYTES, half ? first1 : first0, out, w.n, from, x.m, warp - 1, lane);
                    }
                    __syncwarp();
                    if (lane == 0)
                        for (int half = 0; half < halves; half++) barrier_arrive(out_empty + 8 * half);
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        const int half = warpgroup - 1, g = lane >> 2, t = lane & 3;
        const u32 tokens = token_descriptor(smem), block = smem + TOKENS * GROUP + half * SLOT;
        int turn = 0;
        u32 parity = 0, round = 0;  // bit s: of stage s
        wait_for_predecessor();
        for (int item = blockIdx.x; item < items; item += gridDim.x, turn ^= 1) {
            int pair, token0;
            locate(item, pair, token0);
            const int tile = uniform(tile_of(pair, half));
            // Loaded now, needed after the products.
            float scale[TOKENS / 128];
            int sum[TOKENS / 128];
#pragma unroll
            for (int i = 0; i < TOKENS / 128; i++) {
                const int token = token0 + 128 * i + tid;
                scale[i] = token < x.m ? x.scales[token] : 0.f;
                sum[i] = token < x.m ? x.sums[token] : 0;
            }
            int acc[TOKENS / 2];
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) acc[i] = 0;
            auto free = [&](int s) { if (lane == 0) barrier_arrive(empty + 8 * s); };
            by_width(w, tile, [&](auto bits, const u8*) {
                u32 a[2][2][4];
#pragma unroll 1
                for (int i = 0; i < w.groups; i += STAGES) {
#pragma unroll
                    for (int s = 0; s < STAGES; s++) {
                        if (i + s >= w.groups) break;
                        barrier_wait(full + 8 * s, parity >> s & 1);
                        parity ^= 1u << s;
                        multiply_group<bits.value, TOKENS>(acc, a, tokens + s * (S::STAGE >> 4), block + s * S::STAGE, warp, lane,
                                                           [&]() { if (i + s > 0) free((s + STAGES - 1) % STAGES); });
                    }
                }
                wgmma_wait<0>();
            });
            free((w.groups - 1) % STAGES);
            if (2 * pair + half >= w.tiles) continue;

            const int row = tile * TILE + 16 * warp + g;
            const float s0 = w.scales()[row], s1 = w.scales()[row + 8];
            const float b0 = bias_at(out, w.order()[row]), b1 = bias_at(out, w.order()[row + 8]);
            // In turns: nobody is two items ahead of a warp that still reads.
            const u32 meta = smem + S::META + (2 * half + turn) * (8 * TOKENS), chunk = smem + S::OUT + half * S::OUT_BYTES;
#pragma unroll
            for (int i = 0; i < TOKENS / 128; i++) put_token(meta + 8 * (128 * i + tid), scale[i], sum[i]);
            sync_threads(1 + half, 128);
#pragma unroll
            for (int pass = 0; pass < S::PASSES; pass++, round++) {
                barrier_wait(out_empty + 8 * half, (round & 1) ^ 1);
#pragma unroll
                for (int i = 0; i < S::PASS / 8; i++) {
                    const int token = pass * S::PASS + 8 * i;
                    const TokenPair two(meta + 8 * (token + 2 * t));
                    finish_octet<TYPE>(out, chunk, 8 * i, warp, lane, acc + token / 2, two, s0, s1, b0, b1);
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(out_full + 8 * half);
            }
        }
    }
}
