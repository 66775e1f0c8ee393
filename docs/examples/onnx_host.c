/* A host in C99: loads onnxruntime and the operators of nsq at run time, quantizes float32 values
 * from the standard input, and writes the codes to the standard output.
 *
 *   onnx_host libonnxruntime.so libnsq_onnx.so quantize.onnx tokens head_dim < x > packed */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "ort_abi.h"

static const OrtApi* ort;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", ort->GetErrorMessage(status));
  ort->ReleaseStatus(status);
  exit(1);
}

static void fail(const char* message) {
  fprintf(stderr, "%s\n", message);
  exit(1);
}

static const OrtApi* load(const char* path) {
  typedef const OrtApiBase* (*GetBase)(void);
  GetBase get_base;
  void* library = dlopen(path, RTLD_NOW);
  if (library == NULL) fail(dlerror());
  *(void**)&get_base = dlsym(library, "OrtGetApiBase");
  if (get_base == NULL) fail(dlerror());
  return get_base()->GetApi(ORT_ABI_VERSION);
}

int main(int count, char** arguments) {
  const char* const inputs[] = {"x"};
  const char* const outputs[] = {"packed"};
  OrtEnv* env = NULL;
  OrtSessionOptions* options = NULL;
  OrtSession* session = NULL;
  OrtMemoryInfo* memory = NULL;
  OrtValue* x = NULL;
  OrtValue* packed = NULL;
  OrtTensorTypeAndShapeInfo* info = NULL;
  int64_t dims[2], packed_dims[2];
  size_t values, rank = 0;
  float* data;
  void* codes = NULL;

  if (count != 6) fail("usage: onnx_host libonnxruntime libnsq_onnx model tokens head_dim");
  ort = load(arguments[1]);
  if (ort == NULL) fail("this onnxruntime is older than 1.18");
  dims[0] = atoll(arguments[4]);
  dims[1] = atoll(arguments[5]);
  if (dims[0] < 1 || dims[1] < 1) fail("tokens and head_dim must be at least 1");
  values = (size_t)(dims[0] * dims[1]);
  data = malloc(values * sizeof(float));
  if (data == NULL) fail("no memory");
  if (fread(data, sizeof(float), values, stdin) != values) fail("too few values");

  check(ort->CreateEnv(ORT_LOG_WARNING, "onnx_host", &env));
  check(ort->CreateSessionOptions(&options));
  check(ort->RegisterCustomOpsLibrary_V2(options, arguments[2]));
  check(ort->CreateSession(env, arguments[3], options, &session));
  check(ort->CreateCpuMemoryInfo(ORT_ARENA_ALLOCATOR, ORT_MEMORY_DEFAULT, &memory));
  check(ort->CreateTensorWithDataAsOrtValue(memory, data, values * sizeof(float), dims, 2,
                                            ORT_FLOAT32, &x));
  check(ort->Run(session, NULL, inputs, (const OrtValue* const*)&x, 1, outputs, 1, &packed));

  check(ort->GetTensorTypeAndShape(packed, &info));
  check(ort->GetDimensionsCount(info, &rank));
  if (rank != 2) fail("expected two axes");
  check(ort->GetDimensions(info, packed_dims, rank));
  check(ort->GetTensorMutableData(packed, &codes));
  fwrite(codes, 1, (size_t)(packed_dims[0] * packed_dims[1]), stdout);

  ort->ReleaseTensorTypeAndShapeInfo(info);
  ort->ReleaseValue(packed);
  ort->ReleaseValue(x);
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(env);
  free(data);
  return 0;
}
