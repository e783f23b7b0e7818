// 17 to some hundred tokens: TILES tiles of 64 rows x TOKENS tokens a CTA. One warp requests, in a
// ring of STAGES groups; 4 * TILES * SPLIT warps multiply. K is split over SPLIT sets of warpgroups and
// over the RANKS CTAs of a cluster; each of these parts gives its sums of all but TOKENS / parts tokens
// away, through (distributed) shared memory, and finishes the rest. No workspace, no atomics.
//
// PIPELINE 0: a group at a time. 1: the fragments of two groups in turn. 2: k-steps, fewest registers.
template <int BITS, int TOKENS, int STAGES, int SPLIT, int PIPELINE>
DEVICE void middle_groups(int (&acc)[TOKENS / 2], u32 smem, u32 stage_bytes, u32 full, u32 empty, int groups,
                          int set, int tile, int warp, int lane) {
    constexpr u32 TOKEN_BYTES = TOKENS * GROUP;
    int stage = set, previous = 0;
    u32 phase = 0;
    // Every warp for itself: its weights are ordinary loads that no other warp's wait covers.
    auto free = [&](int s) { if (lane == 0) barrier_arrive(empty + 8 * s); };
    auto advance = [&]() { previous = stage; stage += SPLIT; if (stage >= STAGES) { stage -= STAGES; phase ^= 1; } };
    auto block = [&]() { return smem + stage * stage_bytes + TOKEN_BYTES + tile * SLOT; };
    if constexpr (PIPELINE == 2) {
        u32 a[2][2][4];
        for (int i = 0; i < groups; i++) {
            barrier_wait(full + 8 * stage, phase);
            multiply_group<BITS, TOKENS>(acc, a, token_descriptor(smem + stage * stage_bytes), block(), warp, lane,
                                         [&]() { if (i > 0) free(previous); });
            advance();
        }
    } else {
        auto group = [&](u32 (&a)[4][4], int i) {
            barrier_wait(full + 8 * stage, phase);
            const u32 b = token_descriptor(smem + stage * stage_bytes);
            u32 words[Code<BITS>::WORDS];
            const Steps steps(load_meta<BITS>(block(), warp, lane));
            load_block<BITS>(block(), warp, lane, words);
#pragma unroll
            for (int j = 0; j < 4; j++) dequantize<BITS>(words, steps, j, a[j]);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < 4; j++) Wgmma<TOKENS>::mma(acc, a[j], b + 2 * j);
            wgmma_commit();
            if constexpr (PIPELINE == 1) { wgmma_wait<1>(); if (i > 0) free(previous); }
            else { wgmma_wait<0>(); free(stage); }
            advance();
        };
        u32 a0[4][4];
        if constexpr (PIPELINE == 1) {
            u32 a1[4][4];  // pairs, the odd one behind: alternating inside the loop would serialize wgmma
            for (int i = 0; i + 1 < groups; i += 2) { group(a0, i); group(a1, i + 1); }
            if (groups & 1) group(a0, groups - 1);
        } else {
            for (int i = 0; i < groups; i++) group(a0, i);
        }
    }
    wgmma_wait<0>();
}

template <int TOKENS, int STAGES, int RANKS, int TILES, int SPLIT, int TYPE> struct Middle {
    static constexpr int PARTS = RANKS * SPLIT, MINE = TOKENS / PARTS, WARPS = 4 * TILES * SPLIT;
    static constexpr u32 STAGE = TOKENS * GROUP + TILES * SLOT, RING = STAGES * STAGE;
    static constexpr u32 RECEIVED = PARTS > 1 ? SPLIT * PARTS * TILES * MINE * 256 : 0;
    static constexpr u32 BARRIERS = RING, META = BARRIERS + 16 * STAGES;
    static_assert(STAGES % SPLIT == 0, "else a stage changes its set, and a parity wait can pass a round early");
    static_assert(MINE % 8 == 0 && RECEIVED + SPLIT * TILES * MINE * PITCH<TYPE> <= RING, "");
};

template <int TOKENS, int STAGES, int RANKS, int PIPELINE, int TILES, int SPLIT, int TYPE>
DEVICE void middle(const TensorMap& map, const Weights& w, const Activations& x, const Output& out) {
    using S = Middle<TOKENS, STAGES, RANKS, TILES, SPLIT, TYPE>;
    extern __shared__ u8 memory[];
    const u32 smem = kept((shared_address(memory) + 1023) & ~1023u), full = smem + S::BARRIERS, empty = full + 8 * STAGES;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int rank = RANKS > 1 ? cluster_rank() : 0, token_tiles = (x.m + TOKENS - 1) / TOKENS;
    const int item = blockIdx.x / RANKS, row0 = item / token_tiles * TILES, token0 = item % token_tiles * TOKENS;
    const int group0 = w.groups * rank / RANKS, groups = w.groups * (rank + 1) / RANKS - group0;
    const int warpgroup = uniform(threadIdx.x >> 7), half = warpgroup % TILES, set = warpgroup / TILES;
    const int warp = (threadIdx.x >> 5) & 3, tid = threadIdx.x & 127;
    const bool consumer = threadIdx.x < 32 * S::WARPS;
    // Wide rows first. Where the last pair lacks a tile, tile 0 is computed twice and stored once.
    auto tile_of = [&](int i) { return max(w.tiles - 1 - (row0 + i), 0); };

    if (threadIdx.x == 32 * S::WARPS) {
        for (int s = 0; s < STAGES; s++) { barrier_init(full + 8 * s, 1); barrier_init(empty + 8 * s, 4 * TILES); }
        barriers_ready();
    }
    __syncthreads();
    let_successor_start();

    int acc[TOKENS / 2];
    if (!consumer) {
        if (lane == 0) {
            const Blocks b0(w, tile_of(0)), b1(w, tile_of(TILES - 1));
            auto load_weights = [&](int s, int i) {
                const u32 to = smem + s * S::STAGE + TOKENS * GROUP, barrier = full + 8 * s;
                barrier_expect(barrier, TOKENS * GROUP + b0.bytes + (TILES == 2 ? b1.bytes : 0));
                load_bytes(to, b0.first + (long long)(group0 + i) * b0.bytes, b0.bytes, barrier);
                if (TILES == 2) load_bytes(to + SLOT, b1.first + (long long)(group0 + i) * b1.bytes, b1.bytes, barrier);
            };
            auto load_tokens = [&](int s, int i) { load_tile(smem + s * S::STAGE, &map, (group0 + i) * GROUP, token0, full + 8 * s); };
            const int ahead = min(STAGES, groups);
            for (int i = 0; i < ahead; i++) load_weights(i, i);
            wait_for_predecessor();
            for (int i = 0; i < ahead; i++) load_tokens(i, i);
            int stage = 0;
            u32 phase = 0;
#pragma unroll 1
            for (int i = ahead; i < groups; i++) {
                barrier_wait(empty + 8 * stage, phase);
                load_weights(stage, i);
                load_tokens(stage, i);
                if (++stage == STAGES) { stage = 0; phase ^= 1; }
            }
        }
        __syncwarp();
    } else {
        wait_for_predecessor();
        for (int i = threadIdx.x; i < SPLIT * S::MINE; i += 32 * S::WARPS) {
            const int token = token0 + rank * SPLIT * S::MINE + i;
            put_token(smem + S::META + 8 * i, token < x.m ? x.scales[token] : 0.f, token < x.m ? x.sums[token] : 0);
        }
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) acc[i] = 0;
        by_width(w, tile_of(half), [&](auto bits, const u8*) {
            middle_groups<bits.value, TOKENS, STAGES, SPLIT, PIPELINE>(
                acc, smem, S::STAGE, full, empty, (groups - set + SPLIT - 1) / SPLIT, set, half, warp, lane);
        });
    }

    // Part p finishes tokens [p * MINE, (p + 1) * MINE); the ring is free when all have arrived.
    const int part = rank * SPLIT + set;
    int own[S::MINE / 2];
    if constexpr (S::PARTS > 1) {
        const auto sync = []() { if constexpr (RANKS > 1) cluster_sync(); else __syncthreads(); };
        constexpr u32 INBOX = S::RECEIVED / SPLIT;
        auto slot = [&](int from, int to_set) {
            return smem + to_set * INBOX + (((from * TILES + half) * (S::MINE / 8)) * 128 + tid) * 16;
        };
        sync();
        if (consumer) {
#pragma unroll
            for (int p = 0; p < S::PARTS; p++) {
                if (p == part) {
#pragma unroll
                    for (int i = 0; i < S::MINE / 2; i++) own[i] = acc[p * (S::MINE / 2) + i];
                } else {
                    const u32 to = in_rank(slot(part, p % SPLIT), p / SPLIT);
#pragma unroll
                    for (int i = 0; i < S::MINE / 8; i++) put_cluster16(to + i * 2048, acc + p * (S::MINE / 2) + 4 * i);
                }
            }
        }
        sync();
        if (consumer) {
#pragma unroll
            for (int p = 0; p < S::PARTS; p++) {
                if (p == part) continue;
#pragma unroll
                for (int i = 0; i < S::MINE / 8; i++) {
                    const uint4 v = shared16(slot(p, set) + i * 2048);
                    own[4 * i] += (int)v.x; own[4 * i + 1] += (int)v.y; own[4 * i + 2] += (int)v.z; own[4 * i + 3] += (int)v.w;
                }
            }
        }
    } else if (consumer) {
        sync_threads(8, 32 * S::WARPS);
#pragma unroll
        for (int i = 0; i < S::MINE / 2; i++) own[i] = acc[i];
    }
    if (!consumer || row0 + half >= w.tiles) return;
    const int tile = tile_of(half), row = tile * TILE + 16 * warp + g, first = token0 + part * S::MINE;
    const float s0 = w.scales()[row], s1 = w.scales()[row + 8];
    const float b0 = bias_at(out, w.order()[row]), b1 = bias_at(out, w.order()[row + 8]);
    const u32 chunk = smem + S::RECEIVED + warpgroup * (S::MINE * PITCH<TYPE>);
#pragma unroll
    for (int i = 0; i < S::MINE / 8; i++) {
        const TokenPair pair(smem + S::META + 8 * (set * S::MINE + 8 * i + 2 * t));
        finish_octet<TYPE>(out, chunk, 8 * i, warp, lane, own + 4 * i, pair, s0, s1, b0, b1);
    }
    sync_threads(1 + warpgroup, 128);
    store_tile<TYPE, S::MINE>(chunk, w.order() + tile * TILE, out, w.n, first, x.m, warp, lane);
}
