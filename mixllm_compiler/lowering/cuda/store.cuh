// Outputs of a tile to model order. Four warps hold 64 features x some tokens as matrix-instruction
// accumulators, features along lanes' rows. They go through shared memory as [token][64 features],
// so that afterwards the lanes of a warp hold ascending features of ONE token: packed rows of one
// width keep their model order, so a warp's stores fall into few sectors, and where a tile's rows
// are neighbours in the model they are whole 16-byte words.

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

// The column that the first of a tile's features goes to if all go to 64 neighbours, aligned for 16 bytes;
// else -1.
DEVICE int first_of_line(const int* order, const Output& out, int n, int size, int lane) {
    const int first = __shfl_sync(~0u, order[lane], 0), last = __shfl_sync(~0u, order[lane + 32], 31);
    const u64 ragged = (u64)out.y | (u64)((long long)first * size) | (u64)((long long)n * size);
    return last - first != 63 || (ragged & 15) ? -1 : first;
}

// Tokens token0 ... token0 + TOKENS - 1 of a chunk, those below m, by WARPS warps.
template <int TYPE, int TOKENS, int WARPS>
DEVICE void store_line(u32 chunk, int first, const Output& out, int n, int token0, int m, int warp, int lane) {
    using Raw = typename Float<TYPE>::Raw;
    constexpr int WORDS = PITCH<TYPE> / 16, EACH = 16 / sizeof(Raw), AT_ONCE = 32 / WORDS;
    Raw* y = reinterpret_cast<Raw*>(out.y) + (long long)token0 * n;
    const int word = lane % WORDS;
#pragma unroll 4
    for (int i = 0; i < TOKENS; i += WARPS * AT_ONCE) {
        const int token = i + warp * AT_ONCE + lane / WORDS;
        const uint4 v = shared16(chunk_address<TYPE>(chunk, token, word * EACH));
        if (token < TOKENS && token0 + token < m)
            *reinterpret_cast<uint4*>(y + (long long)token * n + first + word * EACH) = v;
    }
}

// Features of a lane that go to columns of their own.
template <int TYPE, int COUNT> struct Places {
    int column[COUNT];  // -1: nowhere
    u32 source[COUNT];  // where token 0 waits
    DEVICE void set(int i, int to, u32 chunk, int feature) {
        constexpr int EACH = 16 / sizeof(typename Float<TYPE>::Raw);
        column[i] = to;
        source[i] = chunk_address<TYPE>(chunk, 0, feature) + feature % EACH * (16 / EACH);
    }
};

template <int TYPE> DEVICE Places<TYPE, 2> places_of_tile(const int* order, u32 chunk, int lane) {
    Places<TYPE, 2> to;
#pragma unroll
    for (int i = 0; i < 2; i++) to.set(i, order[32 * i + lane], chunk, 32 * i + lane);
    return to;
}

// Of two tiles by ascending column: neighbours among them are often of the other tile, so a warp's stores
// fall into a quarter fewer sectors than those of one tile.
template <int TYPE>
DEVICE Places<TYPE, 4> places_of_pair(const u8* pair, const int* order0, const int* order1, u32 chunk, u32 chunk_bytes, int lane) {
    Places<TYPE, 4> to;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = pair[32 * i + lane], feature = row % TILE;
        const int* order = row < TILE ? order0 : order1;
        to.set(i, order ? order[feature] : -1, chunk + (row < TILE ? 0 : chunk_bytes), feature);
    }
    return to;
}

// The same as `store_line` to any columns. Tokens of one swizzle follow each other, so an output costs a
// load, a store and their addresses: other warps want to issue, too.
template <int TYPE, int TOKENS, int WARPS, int COUNT>
DEVICE void store_places(const Places<TYPE, COUNT>& to, const Output& out, int n, int token0, int m, int warp, int lane) {
    using Raw = typename Float<TYPE>::Raw;
    constexpr int STEP = 8, AT_ONCE = TOKENS < 64 ? TOKENS / 8 : 4;
    const u32 row_bytes = n * sizeof(Raw), step = STEP * row_bytes;
    const int tokens = min(TOKENS, m - token0);
#pragma unroll 1
    for (int token = warp; token < STEP; token += WARPS) {
        int left = (tokens - token + STEP - 1) / STEP;
        u32 from[COUNT];
        u8* y[COUNT];
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            from[c] = (to.source[c] ^ (token << 4)) + token * PITCH<TYPE>;
            y[c] = (u8*)out.y + (u64)(token0 + token) * row_bytes + (u64)max(to.column[c], 0) * sizeof(Raw);
        }
        auto store = [&](auto count) {
            Raw v[count.value][COUNT];
#pragma unroll
            for (int i = 0; i < count.value; i++)
#pragma unroll
                for (int c = 0; c < COUNT; c++) {
                    const u32 at = from[c] + i * STEP * PITCH<TYPE>;
                    if constexpr (TYPE < 2) v[i][c] = shared2(at); else v[i][c] = __uint_as_float(shared4(at));
                }
#pragma unroll
            for (int i = 0; i < count.value; i++)
#pragma unroll
                for (int c = 0; c < COUNT; c++)
                    if (to.column[c] >= 0) *reinterpret_cast<Raw*>(y[c] + (u64)step * (u32)i) = v[i][c];
#pragma unroll
            for (int c = 0; c < COUNT; c++) {
                from[c] += count.value * STEP * PITCH<TYPE>;
                y[c] += (u64)step * (u32)count.value;
            }
        };
        for (; left >= AT_ONCE; left -= AT_ONCE) store(Const<AT_ONCE>{});
        for (; left > 0; left--) store(Const<1>{});
    }
}

// A tile to model order, wherever that is.
template <int TYPE, int TOKENS, int WARPS = 4>
DEVICE void store_tile(u32 chunk, const int* order, const Output& out, int n, int token0, int m, int warp, int lane) {
    const int first = first_of_line(order, out, n, sizeof(typename Float<TYPE>::Raw), lane);
    if (first >= 0) store_line<TYPE, TOKENS, WARPS>(chunk, first, out, n, token0, m, warp, lane);
    else store_places<TYPE, TOKENS, WARPS>(places_of_tile<TYPE>(order, chunk, lane), out, n, token0, m, warp, lane);
}
