// Activations to int8, a CTA a token: codes = round(x / s), s = max|x| / 127, sum of the codes. All of a
// token's values stay in registers from the read to the codes; a SOURCE says where they come from (see
// sources.cuh). BLOCK > 0: first an orthonormal Hadamard transform of every BLOCK elements, in the
// definition's order of additions and rounded to the type of x as there.

// Eight neighbouring values as they lie in memory. WHOLE: rows begin at 16 bytes and end with a run.
template <int TYPE, bool WHOLE> struct Run {
    static constexpr int WORDS = TYPE == 2 ? 8 : 4;
    u32 w[WORDS];

    DEVICE void load(const void* row, int at, int k) {  // zeros behind k
        if constexpr (WHOLE) {
#pragma unroll
            for (int i = 0; i < WORDS; i++) w[i] = 0;
            if (at < k) {
                const uint4* p = reinterpret_cast<const uint4*>((const u8*)row + (long long)at * (WORDS / 2));
#pragma unroll
                for (int i = 0; i < WORDS / 4; i++) {
                    const uint4 q = p[i];
                    w[4 * i] = q.x; w[4 * i + 1] = q.y; w[4 * i + 2] = q.z; w[4 * i + 3] = q.w;
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                if constexpr (TYPE == 2) {
                    w[i] = at + i < k ? ((const u32*)row)[at + i] : 0;
                } else {
                    const u16* p = (const u16*)row + at + 2 * i;
                    w[i] = (at + 2 * i < k ? (u32)p[0] : 0) | (at + 2 * i + 1 < k ? (u32)p[1] << 16 : 0);
                }
            }
        }
    }
    DEVICE void store(void* row, int at, int k) const {
        if constexpr (WHOLE) {
            if (at >= k) return;
            uint4* p = reinterpret_cast<uint4*>((u8*)row + (long long)at * (WORDS / 2));
#pragma unroll
            for (int i = 0; i < WORDS / 4; i++) p[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (at + i >= k) break;
                if constexpr (TYPE == 2) ((u32*)row)[at + i] = w[i];
                else ((u16*)row)[at + i] = (u16)(w[i / 2] >> (16 * (i % 2)));
            }
        }
    }
    DEVICE void get(float (&v)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if constexpr (TYPE == 2) {
                v[i] = __uint_as_float(w[i]);
            } else if constexpr (TYPE == 0) {
                v[i] = __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000u : w[i / 2] << 16);
            } else {
                const u16 half = (u16)(w[i / 2] >> (16 * (i % 2)));
                v[i] = float_at<TYPE>(&half, 0);
            }
        }
    }
    DEVICE void set(const float (&v)[8]) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            if constexpr (TYPE == 2) w[i] = __float_as_uint(v[i]);
            else w[i] = Float<TYPE>::pair(v[2 * i], v[2 * i + 1]);
        }
    }
};

// As a model that computes in TYPE rounds every result.
template <int TYPE> DEVICE void round_to(float (&v)[8]) {
    if constexpr (TYPE != 2) {
        Run<TYPE, true> run;
        run.set(v);
        run.get(v);
    }
}

// Which elements a thread has: RUNS * EACH runs of 8. LANES neighbouring lanes share a span of
// RUNS * LANES runs, a Hadamard block where that is large enough: bits 0-2 of an element's place in it
// are the run's own, the next ones the lane's, the highest the number of the run. So a block costs few
// exchanges between lanes, in which the definition's order of additions is kept.
template <int RUNS, int EACH, int BLOCK> struct Place {
    static constexpr int LANES = BLOCK == 0 ? 8 : BLOCK >= 8 * RUNS ? BLOCK / (8 * RUNS) : 1;
    static constexpr int STRIDE = 8 * LANES, COUNT = RUNS * EACH;
    DEVICE static int at(int p) {
        return threadIdx.x / LANES * (STRIDE * RUNS) + threadIdx.x % LANES * 8 + p % RUNS * STRIDE +
               p / RUNS * (int)blockDim.x * 8 * RUNS;
    }
};

template <int RUNS, int BLOCK, int TYPE> DEVICE void hadamard(float (*v)[8]) {
    using P = Place<RUNS, 1, BLOCK>;
#pragma unroll
    for (int half = 1; half < 8 && half < BLOCK; half *= 2)
#pragma unroll
        for (int r = 0; r < RUNS; r++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (!(i & half)) {
                    const float a = v[r][i], b = v[r][i + half];
                    v[r][i] = a + b;
                    v[r][i + half] = a - b;
                }
#pragma unroll
    for (int half = 8; half < P::STRIDE; half *= 2) {
        const float sign = (threadIdx.x & (half / 8)) ? -1.f : 1.f;
#pragma unroll
        for (int r = 0; r < RUNS; r++)
#pragma unroll
            for (int i = 0; i < 8; i++) v[r][i] = __fmaf_rn(v[r][i], sign, __shfl_xor_sync(~0u, v[r][i], half / 8));
    }
#pragma unroll
    for (int half = P::STRIDE; half < BLOCK; half *= 2)
#pragma unroll
        for (int r = 0; r < RUNS; r++)
            if (!(r & (half / P::STRIDE)))
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float a = v[r][i], b = v[r + half / P::STRIDE][i];
                    v[r][i] = a + b;
                    v[r + half / P::STRIDE][i] = a - b;
                }
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[r][i] = __fmul_rn(v[r][i], HADAMARD_SCALE);
        round_to<TYPE>(v[r]);
    }
}

// Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded half to even, and its lowest byte
// is the code. Conversions to integers would take the slow unit.
constexpr float MAGIC = 12582912.f;

// Eight codes as bytes: v / scale by IEEE division, half to even, in [-127, 127]; NaN gives 0. A product
// with the reciprocal is at most 1.2e-5 off for quotients up to 127, so it decides unless one lies near a
// half; then, and for scales whose reciprocal is not a normal number, the divisions are done.
struct Coder {
    float scale, inverse;
    DEVICE explicit Coder(float s) : scale(s), inverse(s > 1e-30f && s < 1e30f ? __frcp_rn(s) : __int_as_float(0x7fc00000)) {}
    DEVICE uint2 operator()(const float (&v)[8]) const {
        u32 bits[8];
        float off = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float sum = __fmaf_rn(v[i], inverse, MAGIC);
            bits[i] = __float_as_uint(sum);
            off = fmaxf(off, fabsf(__fmaf_rn(v[i], inverse, MAGIC - sum)));
        }
        if (!(off < 0.49995f && inverse == inverse)) {
#pragma unroll
            for (int i = 0; i < 8; i++) bits[i] = (u32)max(-127, min(127, __float2int_rn(__fdiv_rn(v[i], scale))));
        }
        return make_uint2(pack(bits), pack(bits + 4));
    }
    DEVICE static u32 pack(const u32* b) {
        return __byte_perm(__byte_perm(b[0], b[1], 0x0040), __byte_perm(b[2], b[3], 0x0040), 0x5410);
    }
};

struct Codes {
    s8* codes;      // [m][padded]
    float* scales;  // [m]
    int* sums;      // [m]
    int k, padded;
};

template <class SOURCE, int TYPE, int RUNS, int EACH, int BLOCK>
DEVICE void quantize(SOURCE source, const Codes& out) {
    using P = Place<RUNS, EACH, BLOCK>;
    __shared__ u32 largest_of[32];
    __shared__ int sum_of[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    let_successor_start();
    float v[P::COUNT][8];
    source.template values<P>(v, out.k);
    float most = 0.f;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if constexpr (BLOCK > 0) hadamard<RUNS, BLOCK, TYPE>(v + e * RUNS);
#pragma unroll
        for (int r = e * RUNS; r < (e + 1) * RUNS; r++)
#pragma unroll
            for (int i = 0; i < 8; i++) asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(fabsf(v[r][i])));
    }
    // As bits they order like the floats, and a NaN wins.
    u32 largest = __reduce_max_sync(~0u, __float_as_uint(most));
    if (lane == 0) largest_of[warp] = largest;
    __syncthreads();
    largest = __reduce_max_sync(~0u, lane < warps ? largest_of[lane] : 0);
    float scale = __fdiv_rn(__uint_as_float(largest), 127.f);
    if (scale == 0.f) scale = 1.f;  // all zero, or so small that the division gave zero
    const Coder code(scale);
    s8* codes = out.codes + (long long)blockIdx.x * out.padded;
    int sum = 0;
#pragma unroll
    for (int p = 0; p < P::COUNT; p++) {
        const uint2 packed = code(v[p]);
        sum = __dp4a((int)packed.x, 0x01010101, __dp4a((int)packed.y, 0x01010101, sum));
        if (P::at(p) < out.padded) *reinterpret_cast<uint2*>(codes + P::at(p)) = packed;
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) sum_of[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        sum = __reduce_add_sync(~0u, lane < warps ? sum_of[lane] : 0);
        if (lane == 0) {
            out.scales[blockIdx.x] = scale;
            out.sums[blockIdx.x] = sum;
        }
    }
}
