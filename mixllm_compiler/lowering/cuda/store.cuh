// Outputs of a tile to model order. Four warps hold 64 features x some tokens as matrix-instruction
// accumulators, features along lanes' rows. They go through shared memory as [token][64 features],
// so that afterwards the lanes of a warp hold ascending features of ONE token: packed rows of one
// width keep their model order, so a warp's stores fall into few sectors, and where a tile's rows
// are neighbours in the model they are whole 16-byte words.

// Where the features of a tile go. `first` >= 0: to 64 neighbouring columns, aligned for 16 bytes.
struct Columns {
    int c0, c1;  // of features `lane` and `lane` + 32; -1: nowhere
    int first;
    DEVICE Columns(const int* order, const Output& out, int n, int size, int lane)
        : c0(order[lane]), c1(order[lane + 32]) {
        const int last = __shfl_sync(~0u, c1, 31);
        first = __shfl_sync(~0u, c0, 0);
        const u64 ragged = (u64)out.y | (u64)((long long)first * size) | (u64)((long long)n * size);
        if (last - first != 63 || (ragged & 15)) first = -1;
    }
};

template <int TYPE> constexpr int PITCH = TILE * sizeof(typename Float<TYPE>::Raw);

// Address of a feature's 16 bytes in a chunk: the swizzle keeps both directions free of conflicts.
template <int TYPE> DEVICE u32 chunk_address(u32 chunk, int token, int feature) {
    constexpr int EACH = 16 / sizeof(typename Float<TYPE>::Raw);
    return chunk + token * PITCH<TYPE> + (((feature / EACH) ^ (token & 7)) << 4);
}

// Eight tokens of the 16 features of warp `warp`: y[c] is feature g + 8*(c >> 1), token 2t + (c & 1).
template <int TYPE> DEVICE void put_octet(u32 chunk, int token0, int warp, int lane, const float (&y)[4]) {
#if __CUDA_ARCH__ >= 900
    if constexpr (TYPE < 2) {
        const u32 at = chunk_address<TYPE>(chunk, token0 + (lane & 7), 16 * warp + (lane & 8));
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};"
                     :: "r"(at), "r"(Float<TYPE>::pair(y[0], y[1])), "r"(Float<TYPE>::pair(y[2], y[3])) : "memory");
        return;
    }
#endif
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const int token = token0 + 2 * t + (c & 1), feature = 16 * warp + g + 8 * (c >> 1);
        const u32 at = chunk_address<TYPE>(chunk, token, feature);
        if constexpr (TYPE < 2) put_shared2(at + 2 * (feature & 7), Float<TYPE>::raw(y[c]));
        else put_shared4(at + 4 * (feature & 3), __float_as_uint(y[c]));
    }
}

// What the last arithmetic needs of two tokens: scale and sum of each, 16 bytes in shared memory.
struct TokenPair {
    float scale0, scale1;
    int sum0, sum1;
    DEVICE explicit TokenPair(u32 at) {
        const uint4 v = shared16(at);
        scale0 = __uint_as_float(v.x); sum0 = (int)v.y;
        scale1 = __uint_as_float(v.z); sum1 = (int)v.w;
    }
};
DEVICE void put_token(u32 at, float scale, int sum) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" :: "r"(at), "r"(__float_as_uint(scale)), "r"(sum) : "memory");
}

// Eight tokens of accumulators: finished and put into a chunk. `pair` is that of the lane's two tokens.
template <int TYPE>
DEVICE void finish_octet(const Output& out, u32 chunk, int token0, int warp, int lane, const int* acc, const TokenPair& pair,
                         float s0, float s1, float b0, float b1) {
    const float y[4] = {finish(out, acc[0], pair.sum0, s0, pair.scale0, b0), finish(out, acc[1], pair.sum1, s0, pair.scale1, b0),
                        finish(out, acc[2], pair.sum0, s1, pair.scale0, b1), finish(out, acc[3], pair.sum1, s1, pair.scale1, b1)};
    put_octet<TYPE>(chunk, token0, warp, lane, y);
}

// Tokens token0 ... token0 + TOKENS - 1 of a chunk, those below m, by WARPS warps.
template <int TYPE, int TOKENS, int WARPS = 4>
DEVICE void store_chunk(u32 chunk, const Columns& to, const Output& out, int n, int token0, int m, int warp, int lane) {
    using Raw = typename Float<TYPE>::Raw;
    Raw* y = reinterpret_cast<Raw*>(out.y) + (long long)token0 * n;
    if (to.first >= 0) {
        constexpr int WORDS = PITCH<TYPE> / 16, EACH = 16 / sizeof(Raw), AT_ONCE = 32 / WORDS;
        const int word = lane % WORDS;
#pragma unroll 4
        for (int i = 0; i < TOKENS; i += WARPS * AT_ONCE) {
            const int token = i + warp * AT_ONCE + lane / WORDS;
            const uint4 v = shared16(chunk_address<TYPE>(chunk, token, word * EACH));
            if (token < TOKENS && token0 + token < m)
                *reinterpret_cast<uint4*>(y + (long long)token * n + to.first + word * EACH) = v;
        }
        return;
    }
#pragma unroll 4
    for (int token = warp; token < TOKENS; token += WARPS) {
        if (token0 + token >= m) break;
        Raw* row = y + (long long)token * n;
        const u32 a0 = chunk_address<TYPE>(chunk, token, lane), a1 = chunk_address<TYPE>(chunk, token, lane + 32);
        if constexpr (TYPE < 2) {
            const u16 v0 = shared2(a0 + 2 * (lane & 7)), v1 = shared2(a1 + 2 * (lane & 7));
            if (to.c0 >= 0) row[to.c0] = v0;
            if (to.c1 >= 0) row[to.c1] = v1;
        } else {
            const u32 v0 = shared4(a0 + 4 * (lane & 3)), v1 = shared4(a1 + 4 * (lane & 3));
            if (to.c0 >= 0) row[to.c0] = __uint_as_float(v0);
            if (to.c1 >= 0) row[to.c1] = __uint_as_float(v1);
        }
    }
}
