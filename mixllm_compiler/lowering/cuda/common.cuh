// What all kernels share: arguments, weights of a lane, matrix instructions, the last arithmetic.
// No header is included: NVRTC needs no CUDA installation then.
using u8 = unsigned char;
using s8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define DEVICE __device__ __forceinline__

constexpr int TILE = 64;    // packed rows of one width
constexpr int GROUP = 128;  // elements of K that share t and c

template <int V> struct Const { static constexpr int value = V; };

// The same in all lanes, so that the compiler may keep what follows from it in uniform registers.
DEVICE int uniform(int v) { return __shfl_sync(~0u, v, 0); }

// ---- arguments, by value; `launch.py` fills the same structures ---------------------------------
struct Weights {
    const u8* blob;
    int n, tiles, groups;
    int end[6];         // per width of the spec: the first tile behind it
    long long base[6];  // per width: where block 0 of tile 0 would lie, had all tiles this width

    DEVICE const int* order() const { return reinterpret_cast<const int*>(blob); }
    DEVICE const float* scales() const { return reinterpret_cast<const float*>(blob) + TILE * tiles; }
    DEVICE const int* schedule() const { return reinterpret_cast<const int*>(blob) + 2 * TILE * tiles; }
    DEVICE const u8* pairs() const { return reinterpret_cast<const u8*>(schedule() + (tiles + 31) / 32 * 32); }
};

struct Activations {
    const s8* codes;      // [m][groups * 128]
    const float* scales;  // [m]
    const int* sums;      // [m], of all codes of a token
    int m;
};

struct Output {
    void* y;           // [m][n], model order
    const void* bias;  // [n] or null
    int bias_type;     // 0 bf16, 1 fp16, 2 fp32
};

// ---- widths -------------------------------------------------------------------------------------
template <int BITS> struct Code;  // generated: WORDS, BLOCK, fragment()

template <int I, int BITS, int... REST, class F>
DEVICE void width_from(const Weights& w, int tile, F&& f) {
    if constexpr (sizeof...(REST) > 0) {
        if (tile >= w.end[I]) return width_from<I + 1, REST...>(w, tile, f);
    }
    f(Const<BITS>{}, w.blob + w.base[I] + (long long)tile * w.groups * Code<BITS>::BLOCK);
}

// Bytes of the 16 rows of a warp in front of warp `warp`, of one block.
template <int BITS> constexpr int WARP_BYTES = 256 * BITS;

// A lane's words of one block and warp, from word `first` to the end of the piece that `last` is in:
// pieces of 16 bytes a lane, a rest of 8.
template <int BITS, class LOAD16, class LOAD8>
DEVICE void load_words(u32 (&words)[Code<BITS>::WORDS], LOAD16 load16, LOAD8 load8, int lane,
                       int first = 0, int last = Code<BITS>::WORDS - 1) {
    constexpr int WHOLE = Code<BITS>::WORDS / 4;
#pragma unroll
    for (int i = 0; i < WHOLE; i++) {
        if (4 * i < first || 4 * i > last) continue;
        const uint4 v = load16(i * 512 + lane * 16);
        words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
    }
    if (Code<BITS>::WORDS % 4 && 4 * WHOLE >= first && 4 * WHOLE <= last) {
        const uint2 v = load8(WHOLE * 512 + lane * 8);
        words[4 * WHOLE] = v.x; words[4 * WHOLE + 1] = v.y;
    }
}

DEVICE u32 prmt(u32 a, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(r) : "r"(a), "r"(selector));
    return r;
}

// t and c of a lane's two rows: t as they are, c in all four bytes.
struct Steps {
    u32 t0, t1, c0, c1;
    DEVICE explicit Steps(u32 meta)
        : t0(meta & 0xff), t1((meta >> 16) & 0xff), c0(prmt(meta, 0x1111)), c1(prmt(meta, 0x3333)) {}
};

// Fragment of k-step j as bytes of weight + 128: one multiply-add for four codes. t*q + c never
// carries into the next byte, the format's limit on codes says so.
template <int BITS>
DEVICE void dequantize(const u32 (&words)[Code<BITS>::WORDS], const Steps& s, int j, u32 (&a)[4]) {
    Code<BITS>::fragment(words, j, a);
    if constexpr (BITS < 8) {
        a[0] = a[0] * s.t0 + s.c0; a[1] = a[1] * s.t1 + s.c1;
        a[2] = a[2] * s.t0 + s.c0; a[3] = a[3] * s.t1 + s.c1;
    }
}

// ---- memory -------------------------------------------------------------------------------------
DEVICE uint4 stream16(const u8* p) {  // read once: past L1
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}
DEVICE uint2 stream8(const u8* p) {
    uint2 r;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
    return r;
}
DEVICE u32 stream4(const u8* p) {
    u32 r;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r) : "l"(p));
    return r;
}
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE uint4 shared16(u32 a) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(a));
    return r;
}
DEVICE uint2 shared8(u32 a) {
    uint2 r;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(a));
    return r;
}
DEVICE u32 shared4(u32 a) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(a));
    return r;
}
DEVICE u16 shared2(u32 a) {
    u16 r;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(a));
    return r;
}
DEVICE void put_shared4(u32 a, u32 v) { asm volatile("st.shared.u32 [%0], %1;" :: "r"(a), "r"(v) : "memory"); }
DEVICE void put_shared2(u32 a, u16 v) { asm volatile("st.shared.u16 [%0], %1;" :: "r"(a), "h"(v) : "memory"); }

// ---- programmatic dependent launch: nothing before sm_90 ----------------------------------------
// Weights may be read before `wait_for_predecessor`; activations and outputs only after it.
DEVICE void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- arithmetic ---------------------------------------------------------------------------------
// 16 rows x 8 tokens, k = 32. Lane 4g + t: a[q] row g + 8*(q & 1), k 16*(q >> 1) + 4t + byte;
// b[h] token g, k 16h + 4t + byte; c[i] row g + 8*(i >> 1), token 2t + (i & 1).
DEVICE void mma(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int TYPE> DEVICE float float_at(const void* p, int i);
template <> DEVICE float float_at<0>(const void* p, int i) {
    return __uint_as_float((u32)reinterpret_cast<const u16*>(p)[i] << 16);
}
template <> DEVICE float float_at<1>(const void* p, int i) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(reinterpret_cast<const u16*>(p)[i]));
    return r;
}
template <> DEVICE float float_at<2>(const void* p, int i) { return reinterpret_cast<const float*>(p)[i]; }

DEVICE float bias_at(const Output& out, int column) {
    if (!out.bias || column < 0) return 0.f;
    return out.bias_type == 0 ? float_at<0>(out.bias, column)
         : out.bias_type == 1 ? float_at<1>(out.bias, column) : float_at<2>(out.bias, column);
}

// y of one output: acc counts every weight 128 too high, `sum` is the sum of the token's codes.
// Every operation is rounded by itself, in the order of the definition: the bits are the same.
DEVICE float finish(const Output& out, int acc, int sum, float row_scale, float x_scale, float bias) {
    const float y = __fmul_rn(__int2float_rn(acc - (sum << 7)), __fmul_rn(row_scale, x_scale));
    return out.bias ? __fadd_rn(y, bias) : y;
}

template <int TYPE> struct Float;  // 0 bf16, 1 fp16, 2 fp32: how outputs are written
template <> struct Float<0> {
    using Raw = u16;
    DEVICE static u32 pair(float low, float high) {
        u32 r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    DEVICE static Raw raw(float v) { return (Raw)pair(v, v); }
};
template <> struct Float<1> {
    using Raw = u16;
    DEVICE static u32 pair(float low, float high) {
        u32 r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    DEVICE static Raw raw(float v) { return (Raw)pair(v, v); }
};
template <> struct Float<2> {
    using Raw = float;
    DEVICE static Raw raw(float v) { return v; }
};
