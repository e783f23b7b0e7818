// Activations to int8, a CTA a token: codes = round(x / s), s = max|x| / 127, sum of the codes. Values
// stay in registers, 8 neighbouring ones at a time. BLOCK > 0: first an orthonormal Hadamard transform of
// every BLOCK elements, in the definition's order of additions and rounded to the type of x as there;
// 8 elements are a thread's own, BLOCK / 8 neighbouring lanes exchange theirs.
template <int TYPE> DEVICE float rounded_to(float v) {
    if constexpr (TYPE == 2) {
        return v;
    } else {
        const u16 raw = (u16)Float<TYPE>::pair(v, v);
        return float_at<TYPE>(&raw, 0);
    }
}

template <int TYPE> DEVICE void load_eight(const void* row, int at, int k, bool whole, float (&v)[8]) {
    if (whole && at + 8 <= k) {
        if constexpr (TYPE == 2) {
            const float4* p = reinterpret_cast<const float4*>(reinterpret_cast<const float*>(row) + at);
            const float4 a = p[0], b = p[1];
            v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
        } else {
            union { uint4 words; u16 raw[8]; } u;
            u.words = *reinterpret_cast<const uint4*>(reinterpret_cast<const u16*>(row) + at);
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] = float_at<TYPE>(u.raw, i);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = at + i < k ? float_at<TYPE>(row, at + i) : 0.f;
}

template <int BLOCK, int TYPE> DEVICE void hadamard(float (&v)[8], int lane) {
#pragma unroll
    for (int half = 1; half < 8; half *= 2)
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (!(i & half)) {
                const float a = v[i], b = v[i + half];
                v[i] = a + b;
                v[i + half] = a - b;
            }
#pragma unroll
    for (int half = 8; half < BLOCK; half *= 2) {
        const float sign = (lane & (half / 8)) ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(~0u, v[i], half / 8));
    }
    const float scale = BLOCK == 32 ? 0.17677669529663687f : BLOCK == 64 ? 0.125f : BLOCK == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = rounded_to<TYPE>(__fmul_rn(v[i], scale));
}

// Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded half to even, and its lowest byte
// is the code. Conversions to integers would take the slow unit.
constexpr float MAGIC = 12582912.f;

// Eight codes as bytes: v / scale by IEEE division, half to even, in [-127, 127]; NaN gives 0. A product
// with the reciprocal is at most 3e-5 off for quotients up to 127, so it decides unless one lies near a
// half; then, and for scales whose reciprocal is not a normal number, the divisions are done.
struct Coder {
    float scale, inverse;
    DEVICE explicit Coder(float s) : scale(s), inverse(s > 1e-30f && s < 1e30f ? __frcp_rn(s) : __int_as_float(0x7fc00000)) {}
    DEVICE uint2 operator()(const float (&v)[8]) const {
        u32 bits[8];
        float off = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float quotient = __fmul_rn(v[i], inverse), sum = __fadd_rn(quotient, MAGIC);
            bits[i] = __float_as_uint(sum);
            off = fmaxf(off, fabsf(__fsub_rn(quotient, __fsub_rn(sum, MAGIC))));
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

template <int TYPE, int EACH, int BLOCK>
DEVICE void quantize(const void* x, long long row_stride, s8* codes, float* scales, int* sums, int k, int padded) {
    __shared__ u32 largest_of[32];
    __shared__ int sum_of[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    constexpr int SIZE = TYPE == 2 ? 4 : 2;
    const u8* row = reinterpret_cast<const u8*>(x) + (long long)blockIdx.x * row_stride * SIZE;
    let_successor_start();
    wait_for_predecessor();
    const bool whole = ((u64)row & 15) == 0;
    float v[EACH][8];
#pragma unroll
    for (int e = 0; e < EACH; e++) load_eight<TYPE>(row, (e * blockDim.x + threadIdx.x) * 8, k, whole, v[e]);
    float most = 0.f;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if constexpr (BLOCK > 0) hadamard<BLOCK, TYPE>(v[e], lane);
#pragma unroll
        for (int i = 0; i < 8; i++) asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(fabsf(v[e][i])));
    }
    // As bits they order like the floats, and a NaN wins.
    u32 largest = __float_as_uint(most);
    largest = __reduce_max_sync(~0u, largest);
    if (lane == 0) largest_of[warp] = largest;
    __syncthreads();
    largest = __reduce_max_sync(~0u, lane < warps ? largest_of[lane] : 0);
    float scale = __fdiv_rn(__uint_as_float(largest), 127.f);
    if (scale == 0.f) scale = 1.f;  // all zero, or so small that the division gave zero
    const Coder code(scale);
    int sum = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int at = (e * blockDim.x + threadIdx.x) * 8;
        const uint2 packed = code(v[e]);
        sum = __dp4a((int)packed.x, 0x01010101, __dp4a((int)packed.y, 0x01010101, sum));
        if (at < padded) *reinterpret_cast<uint2*>(codes + (long long)blockIdx.x * padded + at) = packed;
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) sum_of[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        sum = __reduce_add_sync(~0u, lane < warps ? sum_of[lane] : 0);
        if (lane == 0) {
            scales[blockIdx.x] = scale;
            sums[blockIdx.x] = sum;
        }
    }
}
