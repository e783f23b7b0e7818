// Any number of tokens on sm_80 and newer: four warps, one tile of 64 rows, TOKENS tokens, all of K.
// Tokens come through shared memory by asynchronous copies, STAGES groups deep; weights go straight
// to registers, one group ahead.
DEVICE void copy_async16(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

template <int BITS, int TOKENS, int STAGES>
DEVICE void mma_groups(int (&acc)[TOKENS / 8][4], u32 smem, const u8* blocks, const Weights& w, const Activations& x,
                       int token0, int warp, int lane) {
    using C = Code<BITS>;
    constexpr int BYTES = TOKENS * GROUP;
    u32 words[2][C::WORDS], meta[2] = {0, 0};
    auto request = [&](u32 (&to)[C::WORDS], u32& m, int group) {
        const u8* block = blocks + (long long)group * C::BLOCK;
        const u8* codes = block + warp * WARP_BYTES<BITS>;
        load_words<BITS>(to, [&](int at) { return stream16(codes + at); },
                         [&](int at) { return stream8(codes + at); }, lane);
        if constexpr (BITS < 8) m = stream4(block + C::CODES + warp * 32 + (lane >> 2) * 4);
    };
    auto copy_tokens = [&](int group) {
        if (group < w.groups) {
            const u32 stage = smem + group % STAGES * BYTES;
#pragma unroll
            for (int i = threadIdx.x; i < TOKENS * 8; i += 128) {
                const int token = i >> 3, chunk = i & 7;
                const bool there = token0 + token < x.m;
                const s8* from = x.codes + ((long long)(there ? token0 + token : 0) * w.groups + group) * GROUP + chunk * 16;
                copy_async16(stage + token * GROUP + ((chunk ^ (token & 7)) << 4), from, there);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    auto multiply = [&](const u32 (&from)[C::WORDS], u32 m, int group) {
        const u32 stage = smem + group % STAGES * BYTES;
        const Steps steps(m);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 a[4];
            dequantize<BITS>(from, steps, j, a);
#pragma unroll
            for (int q = 0; q < TOKENS / 8; q += 2) {
                const int token = 8 * (q + (lane >> 4)) + (lane & 7), chunk = 2 * j + ((lane >> 3) & 1);
                u32 b[4];
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                             : "r"(stage + token * GROUP + ((chunk ^ (token & 7)) << 4)));
                mma(acc[q], a, b[0], b[1]);
                mma(acc[q + 1], a, b[2], b[3]);
            }
        }
    };
    request(words[0], meta[0], 0);
    let_successor_start();
    wait_for_predecessor();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) copy_tokens(i);
    auto step = [&](u32 (&now)[C::WORDS], u32& m, u32 (&then)[C::WORDS], u32& m_then, int group) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory");
        __syncthreads();  // the group is there for all, and nobody reads the stage that is next to be filled
        copy_tokens(group + STAGES - 1);
        if (group + 1 < w.groups) request(then, m_then, group + 1);
        multiply(now, m, group);
    };
    for (int group = 0; group < w.groups; group += 2) {
        step(words[0], meta[0], words[1], meta[1], group);
        if (group + 1 < w.groups) step(words[1], meta[1], words[0], meta[0], group + 1);
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

template <int TOKENS, int STAGES, int TYPE>
DEVICE void stream_tokens(const Weights& w, const Activations& x, const Output& out) {
    constexpr int CHUNK = 4096 / PITCH<TYPE> < TOKENS ? 4096 / PITCH<TYPE> : TOKENS;
    static_assert(TOKENS % 16 == 0 && CHUNK % 8 == 0 && STAGES * TOKENS * GROUP >= CHUNK * PITCH<TYPE>, "");
    __shared__ __align__(128) u8 memory[STAGES * TOKENS * GROUP];
    const u32 smem = shared_address(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int blocks_of_tokens = (x.m + TOKENS - 1) / TOKENS;
    const int tile = w.tiles - 1 - blockIdx.x / blocks_of_tokens, token0 = blockIdx.x % blocks_of_tokens * TOKENS;

    int acc[TOKENS / 8][4] = {};
    by_width(w, tile, [&](auto bits, const u8* blocks) {
        mma_groups<bits.value, TOKENS, STAGES>(acc, smem, blocks, w, x, token0, warp, lane);
    });
    const int row = tile * TILE + 16 * warp + g;
    const float s0 = w.scales()[row], s1 = w.scales()[row + 8];
    const float b0 = bias_at(out, w.order()[row]), b1 = bias_at(out, w.order()[row + 8]);
#pragma unroll
    for (int first = 0; first < TOKENS; first += CHUNK) {
        __syncthreads();
#pragma unroll
        for (int q = 0; q < CHUNK / 8; q++) {
            const int token = token0 + first + 8 * q + 2 * t;
            const int (&v)[4] = acc[first / 8 + q];
            float xs[2], y[4];
            int sum[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                xs[i] = token + i < x.m ? x.scales[token + i] : 0.f;
                sum[i] = token + i < x.m ? x.sums[token + i] : 0;
            }
#pragma unroll
            for (int c = 0; c < 4; c++) y[c] = finish(out, v[c], sum[c & 1], c < 2 ? s0 : s1, xs[c & 1], c < 2 ? b0 : b1);
            put_octet<TYPE>(smem, 8 * q, warp, lane, y);
        }
        __syncthreads();
        store_tile<TYPE, CHUNK>(smem, w.order() + tile * TILE, out, w.n, token0 + first, x.m, warp, lane);
    }
}
