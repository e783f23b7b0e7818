// Where the values of a quantizer come from. `values` fills v [runs][8] with what the model would have
// written to memory, each result rounded to the type where the model rounds it; zeros behind k.
// Parameters of a norm are constants and may be read before the previous kernel has ended.

struct Inputs {
    const void *x, *other;  // [m] rows; other: the residual, or the factor of an activation
    long long x_stride, other_stride;  // of rows, in elements
    void* total;  // [m][k], x + residual
    const void *weight, *bias;  // [k]
    float eps;
};

template <int TYPE> DEVICE const void* row_of(const void* p, long long stride) {
    return (const u8*)p + (long long)blockIdx.x * stride * (TYPE == 2 ? 4 : 2);
}

template <int TYPE, bool WHOLE> struct Plain {
    Inputs in;

    template <class P> DEVICE void values(float (*v)[8], int k) {
        wait_for_predecessor();
        const void* x = row_of<TYPE>(in.x, in.x_stride);
        Run<TYPE, WHOLE> run[P::COUNT];
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) run[p].load(x, P::at(p), k);
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) run[p].get(v[p]);
    }
};

// ---- activations --------------------------------------------------------------------------------
constexpr int SILU = 0, GELU = 1, GELU_TANH = 2, GELU_NEW = 3;

// x / (1 + exp(-x)), divided as IEEE wants it: where the denominator has a normal reciprocal that takes
// the steps which a compiler's division takes, without its test of every operand.
DEVICE void silu(float (&v)[8]) {
    float below[8], lowest = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        below[i] = 1.f + expf(-v[i]);
        lowest = fminf(lowest, v[i]);
    }
    if (lowest > -80.f) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float y;
            asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(below[i]));
            y = __fmaf_rn(y, __fmaf_rn(-below[i], y, 1.f), y);
            float q = __fmul_rn(v[i], y);
            q = __fmaf_rn(__fmaf_rn(-below[i], q, v[i]), y, q);
            v[i] = __fmaf_rn(__fmaf_rn(-below[i], q, v[i]), y, q);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __fdiv_rn(v[i], below[i]);
    }
}

// As torch computes them, in fp32; GELU_NEW is written out in the model and rounded after every step.
template <int FUNCTION, int TYPE> DEVICE void activate(float (&v)[8]) {
    if constexpr (FUNCTION == GELU_NEW) {
        float x[8], t[8];
#pragma unroll
        for (int i = 0; i < 8; i++) { x[i] = v[i]; t[i] = __fmul_rn(x[i], x[i]); }
        round_to<TYPE>(t);
#pragma unroll
        for (int i = 0; i < 8; i++) t[i] = __fmul_rn(t[i], x[i]);
        round_to<TYPE>(t);
#pragma unroll
        for (int i = 0; i < 8; i++) t[i] = __fmul_rn(t[i], 0.044715f);
        round_to<TYPE>(t);
#pragma unroll
        for (int i = 0; i < 8; i++) t[i] = __fadd_rn(t[i], x[i]);
        round_to<TYPE>(t);
#pragma unroll
        for (int i = 0; i < 8; i++) t[i] = __fmul_rn(t[i], 0.7978845608028654f);
        round_to<TYPE>(t);
#pragma unroll
        for (int i = 0; i < 8; i++) t[i] = tanhf(t[i]);
        round_to<TYPE>(t);
#pragma unroll
        for (int i = 0; i < 8; i++) { t[i] = __fadd_rn(t[i], 1.f); v[i] = __fmul_rn(x[i], 0.5f); }
        round_to<TYPE>(t);
        round_to<TYPE>(v);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __fmul_rn(v[i], t[i]);
    } else if constexpr (FUNCTION == SILU) {
        silu(v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float x = v[i];
            if constexpr (FUNCTION == GELU) v[i] = x * 0.5f * (1.f + erff(x * 0.70710678118654752f));
            if constexpr (FUNCTION == GELU_TANH)
                v[i] = 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * (x * x * x))));
        }
    }
    round_to<TYPE>(v);
}

template <int TYPE, bool WHOLE, int FUNCTION, bool GATED> struct Activation {
    Inputs in;

    template <class P> DEVICE void values(float (*v)[8], int k) {
        wait_for_predecessor();
        const void *x = row_of<TYPE>(in.x, in.x_stride), *factor = row_of<TYPE>(in.other, in.other_stride);
        constexpr bool BOTH = GATED && P::COUNT * Run<TYPE, WHOLE>::WORDS <= 16;  // fit beside each other
        Run<TYPE, WHOLE> run[P::COUNT], other[BOTH ? P::COUNT : 1];
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) {
            run[p].load(x, P::at(p), k);
            if constexpr (BOTH) other[p].load(factor, P::at(p), k);
        }
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) {
            run[p].get(v[p]);
            activate<FUNCTION, TYPE>(v[p]);
            if constexpr (GATED) {
                float f[8];
                if constexpr (!BOTH) other[0].load(factor, P::at(p), k);
                other[BOTH ? p : 0].get(f);
#pragma unroll
                for (int i = 0; i < 8; i++) v[p][i] = __fmul_rn(v[p][i], f[i]);
                round_to<TYPE>(v[p]);
            }
        }
    }
};

// ---- norms --------------------------------------------------------------------------------------
// RMS: rounded, then times the weight. RMS_ONCE: times the weight, rounded once. RMS_PLUS_ONE: that
// with 1 + weight. LAYER: mean taken off, times the weight, plus the bias, rounded once.
constexpr int RMS = 0, RMS_ONCE = 1, RMS_PLUS_ONE = 2, LAYER = 3;

// The same sum in all threads; the order of additions depends on the number of threads alone.
template <int SLOT> DEVICE float sum_of_all(float v) {
    __shared__ float part[32];
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
#pragma unroll
    for (int h = 16; h; h /= 2) v += __shfl_xor_sync(~0u, v, h);
    if (lane == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    v = lane < warps ? part[lane] : 0.f;
#pragma unroll
    for (int h = 16; h; h /= 2) v += __shfl_xor_sync(~0u, v, h);
    return v;
}

template <int TYPE, bool WHOLE, int FORM, bool RESIDUAL, int WEIGHT, int BIAS> struct Norm {  // -1: none
    Inputs in;

    template <class P> DEVICE void values(float (*v)[8], int k) {
        // A few runs of the parameters fit beside the values: they are on their way before the wait.
        constexpr bool EARLY = P::COUNT * ((WEIGHT == 2) + (WEIGHT >= 0) + (BIAS == 2) + (BIAS >= 0)) <= 4;
        Run<WEIGHT < 0 ? 0 : WEIGHT, WHOLE> weight[EARLY && WEIGHT >= 0 ? P::COUNT : 1];
        Run<BIAS < 0 ? 0 : BIAS, WHOLE> bias[EARLY && BIAS >= 0 ? P::COUNT : 1];
        if constexpr (EARLY) {
#pragma unroll
            for (int p = 0; p < P::COUNT; p++) {
                if constexpr (WEIGHT >= 0) weight[p].load(in.weight, P::at(p), k);
                if constexpr (BIAS >= 0) bias[p].load(in.bias, P::at(p), k);
            }
        }
        wait_for_predecessor();
        read<P>(v, k);
        const float each = __frcp_rn((float)k);
        if constexpr (FORM == LAYER) {
            float sum = 0.f;
#pragma unroll
            for (int p = 0; p < P::COUNT; p++) sum += ((v[p][0] + v[p][1]) + (v[p][2] + v[p][3])) + ((v[p][4] + v[p][5]) + (v[p][6] + v[p][7]));
            const float mean = sum_of_all<0>(sum) * each;
#pragma unroll
            for (int p = 0; p < P::COUNT; p++)
#pragma unroll
                for (int i = 0; i < 8; i++) v[p][i] = P::at(p) + (WHOLE ? 0 : i) < k ? v[p][i] - mean : 0.f;
        }
        float square = 0.f;
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) {
            float part = 0.f;
#pragma unroll
            for (int i = 0; i < 8; i++) part = __fmaf_rn(v[p][i], v[p][i], part);
            square += part;
        }
        const float factor = rsqrtf(sum_of_all<1>(square) * each + in.eps);
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) {
            float w[8], b[8];
            if constexpr (WEIGHT >= 0) {
                if constexpr (!EARLY) weight[0].load(in.weight, P::at(p), k);
                weight[EARLY ? p : 0].get(w);
            }
            if constexpr (BIAS >= 0) {
                if constexpr (!EARLY) bias[0].load(in.bias, P::at(p), k);
                bias[EARLY ? p : 0].get(b);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) v[p][i] = __fmul_rn(v[p][i], factor);
            if constexpr (FORM == RMS) round_to<TYPE>(v[p]);
            if constexpr (WEIGHT >= 0) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float f = FORM == RMS_PLUS_ONE ? __fadd_rn(1.f, w[i]) : w[i];
                    v[p][i] = BIAS >= 0 ? __fmaf_rn(v[p][i], f, b[i]) : __fmul_rn(v[p][i], f);
                }
            }
            round_to<TYPE>(v[p]);
        }
    }

    // x, or x + residual, which is written as well.
    template <class P> DEVICE void read(float (*v)[8], int k) {
        const void *x = row_of<TYPE>(in.x, in.x_stride), *residual = row_of<TYPE>(in.other, in.other_stride);
        void* total = const_cast<void*>(row_of<TYPE>(in.total, k));
        Run<TYPE, WHOLE> run[P::COUNT], other[RESIDUAL ? P::COUNT : 1];
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) {
            run[p].load(x, P::at(p), k);
            if constexpr (RESIDUAL) other[p].load(residual, P::at(p), k);
        }
#pragma unroll
        for (int p = 0; p < P::COUNT; p++) {
            run[p].get(v[p]);
            if constexpr (RESIDUAL) {
                float f[8];
                other[p].get(f);
#pragma unroll
                for (int i = 0; i < 8; i++) v[p][i] = __fadd_rn(v[p][i], f[i]);
                run[p].set(v[p]);
                run[p].store(total, P::at(p), k);
                run[p].get(v[p]);
            }
        }
    }
};
