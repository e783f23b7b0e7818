// sm_90: barriers in shared memory, bulk copies, clusters, warpgroup matrix instructions.
struct alignas(64) TensorMap { u64 words[16]; };

DEVICE void barrier_init(u32 b, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(arrivals)); }
DEVICE void barrier_expect(u32 b, u32 bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory"); }
DEVICE void barrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
DEVICE void barrier_wait(u32 b, u32 parity) {
    asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}" :: "r"(b), "r"(parity) : "memory");
}
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void sync_threads(int id, int count) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(count) : "memory"); }

DEVICE void load_tile(u32 to, const TensorMap* map, int x, int y, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier) : "memory");
}
DEVICE void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

DEVICE int cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return (int)r; }
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 in_rank(u32 address, int rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
DEVICE void put_cluster16(u32 a, const int* v) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%2,%3,%4};" :: "r"(a), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }

// 64 rows x N tokens, k = 32: A from registers (warp w of the warpgroup has rows 16w ... 16w + 15, lanes
// as in `mma`), B from shared memory. acc[4i + c]: row 16w + g + 8*(c >> 1), token 8i + 2t + (c & 1).
template <int N> struct Wgmma;  // generated

// B: rows of 128 bytes, 128-byte swizzle, 8 rows in 1,024 bytes. The low word of its descriptor; + 2 is
// the next 32 bytes of k. The high word is the constant in `Wgmma`.
DEVICE u32 token_descriptor(u32 a) { return ((a & 0x3ffff) >> 4) | (1u << 16); }

// Not to be computed again at every use.
DEVICE u32 kept(u32 v) { asm volatile("" : "+r"(v)); return v; }

constexpr u32 SLOT = TILE * GROUP;  // shared memory for one block of any width

// Where a tile's blocks lie and how many bytes one has.
struct Blocks {
    const u8* first;
    u32 bytes;
    DEVICE Blocks(const Weights& w, int tile) {
        by_width(w, tile, [&](auto bits, const u8* blocks) { first = blocks; bytes = Code<bits.value>::BLOCK; });
    }
};

// A warp's words and metadata of a block in shared memory.
template <int BITS>
DEVICE void load_block(u32 block, int warp, int lane, u32 (&words)[Code<BITS>::WORDS], int first = 0, int last = Code<BITS>::WORDS - 1) {
    const u32 codes = block + warp * WARP_BYTES<BITS>;
    load_words<BITS>(words, [&](int at) { return shared16(codes + at); }, [&](int at) { return shared8(codes + at); }, lane, first, last);
}
template <int BITS> DEVICE u32 load_meta(u32 block, int warp, int lane) {
    if constexpr (BITS < 8) return shared4(block + Code<BITS>::CODES + warp * 32 + (lane >> 2) * 4);
    return 0;
}

// One group as a pipeline of two halves: the fragments of one are made while the other multiplies.
// b: descriptor of the tokens. `landed` runs after the wait that ends all reading of the previous group.
template <int BITS, int N, class LANDED>
DEVICE void multiply_group(int (&acc)[N / 2], u32 (&a)[2][2][4], u32 b, u32 block, int warp, int lane, LANDED landed) {
    u32 words[Code<BITS>::WORDS];
    const Steps steps(load_meta<BITS>(block, warp, lane));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Words when they are first needed: that keeps registers free.
        load_block<BITS>(block, warp, lane, words, half ? Code<BITS>::last_word(1) + 1 : 0, Code<BITS>::last_word(2 * half + 1));
#pragma unroll
        for (int j = 0; j < 2; j++) dequantize<BITS>(words, steps, 2 * half + j, a[half][j]);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < 2; j++) Wgmma<N>::mma(acc, a[half][j], b + 4 * half + 2 * j);
        wgmma_commit();
        wgmma_wait<1>();
        if (half == 0) landed();
    }
}
