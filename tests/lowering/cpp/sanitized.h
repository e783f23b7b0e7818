// Runs one case that test_sanitizers.py wrote, in buffers of exactly their size.
#include <stdio.h>
static long size_of(const char* name) {
  FILE* file = fopen(name, "rb");
  if (!file) return -1;
  fseek(file, 0, SEEK_END);
  const long size = ftell(file);
  fclose(file);
  return size;
}
static void* slurp(const char* name) {
  const long size = size_of(name);
  if (size < 0) return nullptr;
  void* data = malloc(size);
  FILE* file = fopen(name, "rb");
  if (fread(data, 1, size, file) != (size_t)size) abort();
  fclose(file);
  return data;
}
static int differs(const char* name, const void* found) {
  void* expected = slurp(name);
  const int wrong = memcmp(expected, found, size_of(name)) != 0;
  if (wrong) fprintf(stderr, "%s differs\n", name);
  free(expected);
  return wrong;
}
#ifdef LINEAR
int main(int, char** argv) {
  const int64_t tokens = atol(argv[1]);
  void *shape = slurp("shape"), *codes = slurp("codes"), *scales = slurp("scales"), *sums = slurp("sums");
  void *blob = slurp("blob"), *bias = slurp("bias"), *out = malloc(size_of("y"));
  memset(out, 0xff, size_of("y"));
  mixllm_linear((Shape*)shape, (int8_t*)codes, (float*)scales, (int32_t*)sums, (uint8_t*)blob, bias, out, tokens, 2);
  const int wrong = differs("y", out);
  for (void* p : {shape, codes, scales, sums, blob, bias, out}) free(p);
  return wrong;
}
#else
int main(int, char** argv) {
  const int64_t tokens = atol(argv[1]), stride = atol(argv[2]);
  void *quantizer = slurp("quantizer"), *x = slurp("x");
  void *codes = malloc(size_of("codes")), *scales = malloc(size_of("scales")), *sums = malloc(size_of("sums"));
  mixllm_quantize((Quantizer*)quantizer, x, stride, (int8_t*)codes, (float*)scales, (int32_t*)sums, tokens, 2);
  const int wrong = differs("codes", codes) + differs("scales", scales) + differs("sums", sums);
  for (void* p : {quantizer, x, codes, scales, sums}) free(p);
  return wrong;
}
#endif
