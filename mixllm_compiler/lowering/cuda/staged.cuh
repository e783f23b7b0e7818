// As `decode`, but tokens come through shared memory by bulk copies, in a ring of SLOTS groups that
// every warp has for itself: eight or sixteen rows of 128 bytes in one request, fragments by ldmatrix.
// With several tokens, loads of single words from as many lines would take longer than the weights.
template <int OCTETS, int WARPS, int SLOTS> struct StagedTokens {
    static constexpr u32 SLOT_BYTES = OCTETS * 1024;
    static constexpr u32 BYTES = WARPS * SLOTS * (SLOT_BYTES + 8) + 1024;  // + 1024: alignment
    const TensorMap* map;
    u32 ring, barriers;
    int mine, warp, lane;

    DEVICE explicit StagedTokens(const TensorMap* m) : map(m), lane(threadIdx.x & 31) {
        extern __shared__ u8 memory[];
        warp = uniform(threadIdx.x >> 5);
        const u32 smem = (shared_address(memory) + 1023) & ~1023u;
        ring = kept(smem + warp * (SLOTS * SLOT_BYTES));
        barriers = smem + WARPS * SLOTS * SLOT_BYTES + warp * (SLOTS * 8);
        if (lane == 0) {
            for (int s = 0; s < SLOTS; s++) barrier_init(barriers + 8 * s, 1);
            barriers_ready();
        }
        __syncwarp();
    }
    DEVICE void load(int i) {
        if (i >= mine) return;
        const int slot = i % SLOTS;
        barrier_expect(barriers + 8 * slot, SLOT_BYTES);
        load_tile(ring + slot * SLOT_BYTES, map, (warp + i * WARPS) * GROUP, 0, barriers + 8 * slot);
    }
    DEVICE void start(const Weights&, const Activations&, int groups_of_warp, int, int) {
        mine = groups_of_warp;
        if (lane == 0)
            for (int i = 0; i < SLOTS; i++) load(i);
    }
    DEVICE void fragments(int, int i, u32 (&b)[OCTETS][8]) const {
        const int slot = i % SLOTS;
        barrier_wait(barriers + 8 * slot, i / SLOTS & 1);
        const u32 row = ring + slot * SLOT_BYTES + (lane & 7) * 128;
#pragma unroll
        for (int q = 0; q < OCTETS; q++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 at = row + q * 1024 + (((4 * half + (lane >> 3)) ^ (lane & 7)) << 4);
                u32* r = b[q] + 4 * half;
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
            }
    }
    DEVICE void refill(int, int i) {  // after the products: all lanes have their fragments
        __syncwarp();
        if (lane == 0) load(i + SLOTS);
    }
};

template <int OCTETS, int BLOCKS, int WARPS, int AHEAD, int SLOTS, int TYPE>
DEVICE void staged(const TensorMap& map, const Weights& w, const Activations& x, const Output& out) {
    decode_with<OCTETS, BLOCKS, WARPS, AHEAD, TYPE>(w, x, out, [&](auto) {
        return StagedTokens<OCTETS, WARPS, SLOTS>(&map);
    });
}
