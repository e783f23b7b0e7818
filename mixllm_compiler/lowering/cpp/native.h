// The ops of `native.py` for torch's dispatcher, through its C interface alone: no header of torch.

typedef struct Opaque* Tensor;
typedef uint64_t Value;  // what an argument or a result is on the stack of a call

// Functions of torch's C interface, in the order in which `native.py` lists them.
struct Torch {
  int32_t (*data)(Tensor, void**);
  int32_t (*dimensions)(Tensor, int64_t*);
  int32_t (*sizes)(Tensor, int64_t**);
  int32_t (*strides)(Tensor, int64_t**);
  int32_t (*type)(Tensor, int32_t*);
  int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
  int32_t (*release)(Tensor);
  int32_t (*library)(const char*, const char*, const char*, uint32_t, void**);
  int32_t (*implement)(void*, const char*, void (*)(Value*, uint64_t, uint64_t));
};
static Torch torch;

struct Shape {  // of linear.h
  int64_t n, groups, group, panels;
  int32_t widths, out_type, bias_type;
};
struct Quantizer {  // of quantize.h
  int64_t k, groups, group;
  int32_t type, per_group, block;
};
typedef void (*Linear)(const Shape*, const int8_t*, const float*, const int32_t*, const uint8_t*, const void*, void*, int64_t, int32_t);
typedef void (*Quantize)(const Quantizer*, const void*, int64_t, int8_t*, float*, int32_t*, int64_t, int32_t);
static Linear linears[4];  // two-level? 2, and one scale a group? 1 more
static Quantize quantize;

enum ScalarType { INT8 = 1, INT32 = 3, HALF = 5, SINGLE = 6, BRAIN = 15 };
static void check(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(std::string("mixllm's native op: ") + what);
}
static Type type_of(int32_t scalar) {
  check(scalar == SINGLE || scalar == BRAIN || scalar == HALF, "a float tensor is not fp32, bf16 or fp16");
  return scalar == SINGLE ? FLOAT32 : scalar == BRAIN ? BFLOAT16 : FLOAT16;
}

// An argument, released at the end of the call.
class Argument {
 public:
  explicit Argument(Value value) : tensor_((Tensor)value) {
    check(!torch.dimensions(tensor_, &dimensions) && !torch.sizes(tensor_, &sizes) && !torch.strides(tensor_, &strides) &&
              !torch.type(tensor_, &type) && !torch.data(tensor_, &data),
          "an argument is no tensor");
  }
  ~Argument() { torch.release(tensor_); }
  Argument(const Argument&) = delete;
  int64_t rows() const {
    int64_t m = 1;
    for (int64_t i = 0; i + 1 < dimensions; i++) m *= sizes[i];
    return m;
  }
  int64_t last() const { return sizes[dimensions - 1]; }
  // Elements from row to row, if that is one number and rows are contiguous; else -1.
  int64_t row_stride() const {
    if (strides[dimensions - 1] != 1 && last() > 1) return -1;
    int64_t stride = -1, expected = -1;
    for (int64_t i = dimensions - 2; i >= 0; i--) {
      if (sizes[i] == 1) continue;
      if (stride < 0) stride = expected = strides[i];
      if (strides[i] != expected) return -1;
      expected *= sizes[i];
    }
    return stride < 0 ? last() : stride;
  }
  bool contiguous() const { return row_stride() == last() || rows() == 0; }
  void* data;
  int64_t dimensions, *sizes, *strides;
  int32_t type;

 private:
  Tensor tensor_;
};

// A new tensor [..., last], with the leading sizes of another.
static Tensor allocate(const Argument& like, int64_t last, int32_t type, void** data) {
  int64_t sizes[16], strides[16], step = 1;
  check(like.dimensions <= 16, "a tensor has more than 16 dimensions");
  for (int64_t i = like.dimensions - 1; i >= 0; i--) {
    sizes[i] = i == like.dimensions - 1 ? last : like.sizes[i];
    strides[i] = step;
    step *= std::max<int64_t>(1, sizes[i]);
  }
  Tensor made;
  check(!torch.empty(like.dimensions, sizes, strides, type, 0, 0, &made), "no memory for an output");
  torch.data(made, data);
  return made;
}

static int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// linear(codes, scales, sums, packed, bias?, n, groups, group, panels, widths, two_level, out)
static void call_linear(Value* stack, uint64_t, uint64_t) {
  Argument codes(stack[0]), scales(stack[1]), sums(stack[2]), packed(stack[3]);
  Value* optional = (Value*)stack[4];
  const Shape fixed = {(int64_t)stack[5], (int64_t)stack[6], (int64_t)stack[7], (int64_t)stack[8], (int32_t)stack[9], (int32_t)stack[11], NONE};
  const bool two_level = stack[10];
  struct Bias {
    Value* value;
    Argument* argument;
    ~Bias() { delete argument; delete value; }
  } bias{optional, optional ? new Argument(*optional) : nullptr};
  Shape shape = fixed;
  if (bias.argument) shape.bias_type = type_of(bias.argument->type);
  const int64_t m = codes.rows();
  check(codes.contiguous() && scales.contiguous() && sums.contiguous(), "codes, scales or sums are not contiguous");
  check(codes.last() == shape.groups * shape.group && sums.last() == shape.groups, "codes or sums do not fit the layout");
  const bool per_group = scales.last() > 1;
  check(!per_group || scales.last() == shape.groups, "scales do not fit the layout");
  const Linear run = linears[2 * two_level + per_group];
  check(run != nullptr, "its library is not loaded");
  void* out;
  static const int32_t TYPES[] = {SINGLE, BRAIN, HALF};
  Tensor y = allocate(codes, shape.n, TYPES[shape.out_type], &out);
  if (m)
    run(&shape, (const int8_t*)codes.data, (const float*)scales.data, (const int32_t*)sums.data, (const uint8_t*)packed.data,
        bias.argument ? bias.argument->data : nullptr, out, m, threads());
  stack[0] = (Value)y;
}

static thread_local Buffer copied;

// The rows of a tensor that lies in some other order, one after the other.
static const void* gather(const Argument& x, int64_t size) {
  uint8_t* to = copied.reserve(std::max<int64_t>(1, x.rows() * x.last() * size));
  for (int64_t row = 0; row < x.rows(); row++) {
    int64_t rest = row, at = 0;
    for (int64_t i = x.dimensions - 2; i >= 0; i--) at += rest % x.sizes[i] * x.strides[i], rest /= x.sizes[i];
    const uint8_t* from = (const uint8_t*)x.data + at * size;
    const int64_t step = x.strides[x.dimensions - 1] * size;
    for (int64_t k = 0; k < x.last(); k++) memcpy(to + (row * x.last() + k) * size, from + k * step, size);
  }
  return to;
}

// quantize_activation(x, group, per_group, block)
static void call_quantize(Value* stack, uint64_t, uint64_t) {
  Argument x(stack[0]);
  Quantizer q = {x.last(), 0, (int64_t)stack[1], type_of(x.type), (int32_t)stack[2], (int32_t)stack[3]};
  q.groups = (q.k + q.group - 1) / q.group;
  check(!q.block || q.k % q.block == 0, "K is not a multiple of the Hadamard block");
  void *codes, *scales, *sums;
  Tensor results[] = {allocate(x, q.groups * q.group, INT8, &codes),
                      allocate(x, q.per_group ? q.groups : 1, SINGLE, &scales), allocate(x, q.groups, INT32, &sums)};
  const int64_t m = x.rows(), stride = x.row_stride();
  const void* rows = stride < 0 && m ? gather(x, q.type == FLOAT32 ? 4 : 2) : x.data;
  if (m) quantize(&q, rows, stride < 0 ? q.k : stride, (int8_t*)codes, (float*)scales, (int32_t*)sums, m, threads());
  copied.trim();
  for (int i = 0; i < 3; i++) stack[i] = (Value)results[i];
}

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void mixllm_set_linear(int32_t which, void* function) { linears[which] = (Linear)function; }
EXPORT void mixllm_set_quantize(void* function) { quantize = (Quantize)function; }
// Make the two ops known for CPUs; the library that torch gives lives as long as the process.
EXPORT int32_t mixllm_register(const Torch* functions) {
  torch = *functions;
  void* library;
  return torch.library("mixllm_native", "CPU", __FILE__, __LINE__, &library) || torch.implement(library, "linear", call_linear) ||
         torch.implement(library, "quantize_activation", call_quantize);
}
