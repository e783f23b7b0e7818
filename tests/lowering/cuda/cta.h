// One CTA on a CPU: threads are contexts that take turns, lanes and barriers meet by counting. Enough
// of CUDA for kernels that use no matrix instructions and no copies.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;
struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

template <class TO, class FROM> static TO bits(FROM v) {
    TO to;
    memcpy(&to, &v, sizeof to);
    return to;
}

// ---- threads ------------------------------------------------------------------------------------
static struct { unsigned x; } blockIdx, blockDim;
static unsigned running;
static struct { struct { operator unsigned() const { return running; } } x; } threadIdx;

static ucontext_t scheduler, contexts[1024];
static bool done[1024];

static void wait_a_turn() {
    const unsigned me = running;
    swapcontext(&contexts[me], &scheduler);
    running = me;
}

struct Barrier {
    unsigned arrived = 0, round = 0;
    void meet(unsigned all) {
        const unsigned now = round;
        if (++arrived == all) {
            arrived = 0;
            round++;
        } else {
            while (round == now) wait_a_turn();
        }
    }
};
static Barrier cta, warps[32];
static uint32_t lanes[1024];

static void __syncthreads() { cta.meet(blockDim.x); }
static const uint32_t* exchange(uint32_t v) {  // the 32 values of the warp
    const unsigned warp = running / 32;
    lanes[running] = v;
    warps[warp].meet(32);
    static uint32_t all[1024][32];
    memcpy(all[running], lanes + warp * 32, sizeof all[0]);
    warps[warp].meet(32);
    return all[running];
}
template <class T> static T __shfl_xor_sync(unsigned, T v, int mask) {
    return bits<T>(exchange(bits<uint32_t>(v))[running % 32 ^ mask]);
}
static unsigned __reduce_max_sync(unsigned, unsigned v) {
    const uint32_t* all = exchange(v);
    return *std::max_element(all, all + 32);
}
static int __reduce_add_sync(unsigned, int v) {
    const uint32_t* all = exchange((uint32_t)v);
    uint32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += all[i];
    return (int)sum;
}

template <class KERNEL> static void run_grid(KERNEL kernel, int grid, int threads) {
    const std::unique_ptr<char[]> stacks(new char[(size_t)threads << 17]);  // not written: pages come as used
    static KERNEL* entry;
    entry = &kernel;
    blockDim.x = threads;
    for (int block = 0; block < grid; block++) {
        blockIdx.x = block;
        for (int t = 0; t < threads; t++) {
            done[t] = false;
            getcontext(&contexts[t]);
            contexts[t].uc_stack.ss_sp = stacks.get() + ((size_t)t << 17);
            contexts[t].uc_stack.ss_size = 1 << 17;
            contexts[t].uc_link = &scheduler;
            makecontext(&contexts[t], +[] { (*entry)(); done[running] = true; }, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (int t = 0; t < threads; t++) {
                if (done[t]) continue;
                left = true;
                running = t;
                swapcontext(&scheduler, &contexts[t]);
            }
        }
    }
}

// ---- arithmetic ---------------------------------------------------------------------------------
static float __uint_as_float(unsigned v) { return bits<float>(v); }
static float __int_as_float(int v) { return bits<float>(v); }
static unsigned __float_as_uint(float v) { return bits<unsigned>(v); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __frcp_rn(float a) { return 1.f / a; }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static float rsqrtf(float a) { return (float)(1 / std::sqrt((double)a)); }
static int __float2int_rn(float a) { return a == a ? (int)std::nearbyint(a) : 0; }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
static int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return sum;
}
static float larger_or_nan(float a, float b) { return a != a ? a : b != b ? b : max(a, b); }

// ---- what stands in the kernels' own header, in PTX there ---------------------------------------
using u8 = unsigned char;
using s8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
#define DEVICE inline

static void let_successor_start() {}
static void wait_for_predecessor() {}

template <int TYPE> static float float_at(const void* p, int i) {
    if constexpr (TYPE == 0) return bits<float>((u32)((const u16*)p)[i] << 16);
    if constexpr (TYPE == 1) return (float)((const _Float16*)p)[i];
    return ((const float*)p)[i];
}
template <int TYPE> struct Float {
    static u32 raw(float v) {
        if constexpr (TYPE == 1) return bits<u16>((_Float16)v);
        const u32 all = bits<u32>(v);
        return v != v ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
    }
    static u32 pair(float low, float high) { return raw(low) | raw(high) << 16; }
};
