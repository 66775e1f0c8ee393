/* The part of onnxruntime's C interface that this library and the host in docs/examples use.
 *
 * A runtime hands out a table of functions that only ever grows at its end: the position of a
 * function is its identity. Version 18 of the table, asked for here, is in every onnxruntime since
 * 1.18. Valid as C99 and as C++17. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define ORT_API_CALL __stdcall
typedef wchar_t OrtPathChar;
#else
#define ORT_API_CALL
typedef char OrtPathChar;
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { ORT_ABI_VERSION = 18 };

/* Element types of tensors, numbered as in ONNX's TensorProto. */
enum {
  ORT_UNDEFINED = 0,
  ORT_FLOAT32 = 1,
  ORT_UINT8 = 2,
  ORT_INT32 = 6,
  ORT_INT64 = 7,
  ORT_FLOAT16 = 10,
  ORT_BFLOAT16 = 16
};

/* Codes of errors. */
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };

/* What an operator says of an input or output. */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

enum { ORT_LOG_WARNING = 2, ORT_ARENA_ALLOCATOR = 1, ORT_MEMORY_DEFAULT = 0 };

typedef struct OrtEnv OrtEnv;
typedef struct OrtStatus OrtStatus; /* a null pointer is success */
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtSession OrtSession;
typedef struct OrtValue OrtValue;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtCustomOp OrtCustomOp;

typedef struct OrtApi {
  /* 0 */
  OrtStatus*(ORT_API_CALL* CreateStatus)(int code, const char* message);
  void* slot_1[1];
  const char*(ORT_API_CALL* GetErrorMessage)(const OrtStatus* status);
  OrtStatus*(ORT_API_CALL* CreateEnv)(int log_level, const char* log_id, OrtEnv** env);
  void* slot_4[3];
  /* 7 */
  OrtStatus*(ORT_API_CALL* CreateSession)(const OrtEnv* env, const OrtPathChar* model_path,
                                          const OrtSessionOptions* options, OrtSession** session);
  void* slot_8[1];
  OrtStatus*(ORT_API_CALL* Run)(OrtSession* session, const OrtRunOptions* options,
                                const char* const* input_names, const OrtValue* const* inputs,
                                size_t input_count, const char* const* output_names,
                                size_t output_count, OrtValue** outputs);
  OrtStatus*(ORT_API_CALL* CreateSessionOptions)(OrtSessionOptions** options);
  void* slot_11[15];
  /* 26 */
  OrtStatus*(ORT_API_CALL* CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** domain);
  OrtStatus*(ORT_API_CALL* CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
  OrtStatus*(ORT_API_CALL* AddCustomOpDomain)(OrtSessionOptions* options,
                                              OrtCustomOpDomain* domain);
  void* slot_29[20];
  /* 49 */
  OrtStatus*(ORT_API_CALL* CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo* memory, void* data,
                                                           size_t bytes, const int64_t* dims,
                                                           size_t rank, int element_type,
                                                           OrtValue** value);
  void* slot_50[1];
  OrtStatus*(ORT_API_CALL* GetTensorMutableData)(OrtValue* value, void** data);
  void* slot_52[8];
  /* 60 */
  OrtStatus*(ORT_API_CALL* GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info,
                                                 int* element_type);
  OrtStatus*(ORT_API_CALL* GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info,
                                               size_t* rank);
  OrtStatus*(ORT_API_CALL* GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims,
                                          size_t rank);
  void* slot_63[2];
  /* 65 */
  OrtStatus*(ORT_API_CALL* GetTensorTypeAndShape)(const OrtValue* value,
                                                  OrtTensorTypeAndShapeInfo** info);
  void* slot_66[3];
  /* 69 */
  OrtStatus*(ORT_API_CALL* CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo** info);
  void* slot_70[15];
  /* 85 */
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_float)(const OrtKernelInfo* info,
                                                         const char* name, float* value);
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_int64)(const OrtKernelInfo* info,
                                                         const char* name, int64_t* value);
  /* Without a buffer, sets the size that is needed, the final 0 included. */
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_string)(const OrtKernelInfo* info,
                                                          const char* name, char* buffer,
                                                          size_t* size);
  OrtStatus*(ORT_API_CALL* KernelContext_GetInputCount)(const OrtKernelContext* context,
                                                        size_t* count);
  OrtStatus*(ORT_API_CALL* KernelContext_GetOutputCount)(const OrtKernelContext* context,
                                                         size_t* count);
  /* An input or output that the model leaves out is a null value. */
  OrtStatus*(ORT_API_CALL* KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                                   const OrtValue** value);
  OrtStatus*(ORT_API_CALL* KernelContext_GetOutput)(OrtKernelContext* context, size_t index,
                                                    const int64_t* dims, size_t rank,
                                                    OrtValue** value);
  /* 92 */
  void(ORT_API_CALL* ReleaseEnv)(OrtEnv* env);
  void(ORT_API_CALL* ReleaseStatus)(OrtStatus* status);
  void(ORT_API_CALL* ReleaseMemoryInfo)(OrtMemoryInfo* info);
  void(ORT_API_CALL* ReleaseSession)(OrtSession* session);
  void(ORT_API_CALL* ReleaseValue)(OrtValue* value);
  void* slot_97[2];
  /* 99 */
  void(ORT_API_CALL* ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  void(ORT_API_CALL* ReleaseSessionOptions)(OrtSessionOptions* options);
  void(ORT_API_CALL* ReleaseCustomOpDomain)(OrtCustomOpDomain* domain);
  void* slot_102[28];
  /* 130 */
  OrtStatus*(ORT_API_CALL* AddSessionConfigEntry)(OrtSessionOptions* options, const char* key,
                                                  const char* value);
  void* slot_131[31];
  /* 162: without a buffer, these set the count that is needed. */
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttributeArray_float)(const OrtKernelInfo* info,
                                                              const char* name, float* values,
                                                              size_t* count);
  OrtStatus*(ORT_API_CALL* KernelInfoGetAttributeArray_int64)(const OrtKernelInfo* info,
                                                              const char* name, int64_t* values,
                                                              size_t* count);
  void* slot_164[64];
  /* 228 */
  OrtStatus*(ORT_API_CALL* RegisterCustomOpsLibrary_V2)(OrtSessionOptions* options,
                                                        const OrtPathChar* library_path);
  void* slot_229[8];
  /* 237 */
  OrtStatus*(ORT_API_CALL* HasSessionConfigEntry)(const OrtSessionOptions* options,
                                                  const char* key, int* has);
  OrtStatus*(ORT_API_CALL* GetSessionConfigEntry)(const OrtSessionOptions* options,
                                                  const char* key, char* buffer, size_t* size);
  void* slot_239[35];
  /* 274: `function` is called with each number below `total`; 0 batches lets the runtime choose. */
  OrtStatus*(ORT_API_CALL* KernelContext_ParallelFor)(const OrtKernelContext* context,
                                                      void (*function)(void* data, size_t number),
                                                      size_t total, size_t batches, void* data);
} OrtApi;

typedef struct OrtApiBase {
  /* Null if the runtime is older than the version. */
  const OrtApi*(ORT_API_CALL* GetApi)(uint32_t version);
  const char*(ORT_API_CALL* GetVersionString)(void);
} OrtApiBase;

/* One operator for one combination of element types, described by functions. */
struct OrtCustomOp {
  uint32_t version;
  void*(ORT_API_CALL* CreateKernel)(const OrtCustomOp* op, const OrtApi* api,
                                    const OrtKernelInfo* info);
  const char*(ORT_API_CALL* GetName)(const OrtCustomOp* op);
  const char*(ORT_API_CALL* GetExecutionProviderType)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetInputType)(const OrtCustomOp* op, size_t index);
  size_t(ORT_API_CALL* GetInputTypeCount)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t(ORT_API_CALL* GetOutputTypeCount)(const OrtCustomOp* op);
  void(ORT_API_CALL* KernelCompute)(void* kernel, OrtKernelContext* context);
  void(ORT_API_CALL* KernelDestroy)(void* kernel);
  int(ORT_API_CALL* GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  int(ORT_API_CALL* GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  int(ORT_API_CALL* GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int(ORT_API_CALL* GetVariadicInputMinArity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus*(ORT_API_CALL* CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api,
                                           const OrtKernelInfo* info, void** kernel);
  OrtStatus*(ORT_API_CALL* KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus*(ORT_API_CALL* InferOutputShapeFn)(const OrtCustomOp* op,
                                               OrtShapeInferContext* context);
  int(ORT_API_CALL* GetStartVersion)(const OrtCustomOp* op);
  int(ORT_API_CALL* GetEndVersion)(const OrtCustomOp* op);
  size_t(ORT_API_CALL* GetMayInplace)(int** inputs, int** outputs);
  void(ORT_API_CALL* ReleaseMayInplace)(int* inputs, int* outputs);
  size_t(ORT_API_CALL* GetAliasMap)(int** inputs, int** outputs);
  void(ORT_API_CALL* ReleaseAliasMap)(int* inputs, int* outputs);
};

#ifdef __cplusplus
}
#endif

/* An array of negative size is an error in either language. */
#define ORT_ABI_AT(type, member, number) \
  typedef char ort_abi_##member[offsetof(type, member) == (number) * sizeof(void*) ? 1 : -1]
ORT_ABI_AT(OrtApi, GetErrorMessage, 2);
ORT_ABI_AT(OrtApi, CreateEnv, 3);
ORT_ABI_AT(OrtApi, CreateSession, 7);
ORT_ABI_AT(OrtApi, Run, 9);
ORT_ABI_AT(OrtApi, CreateSessionOptions, 10);
ORT_ABI_AT(OrtApi, CreateCustomOpDomain, 26);
ORT_ABI_AT(OrtApi, AddCustomOpDomain, 28);
ORT_ABI_AT(OrtApi, CreateTensorWithDataAsOrtValue, 49);
ORT_ABI_AT(OrtApi, GetTensorMutableData, 51);
ORT_ABI_AT(OrtApi, GetTensorElementType, 60);
ORT_ABI_AT(OrtApi, GetDimensions, 62);
ORT_ABI_AT(OrtApi, GetTensorTypeAndShape, 65);
ORT_ABI_AT(OrtApi, CreateCpuMemoryInfo, 69);
ORT_ABI_AT(OrtApi, KernelInfoGetAttribute_float, 85);
ORT_ABI_AT(OrtApi, KernelInfoGetAttribute_string, 87);
ORT_ABI_AT(OrtApi, KernelContext_GetInput, 90);
ORT_ABI_AT(OrtApi, KernelContext_GetOutput, 91);
ORT_ABI_AT(OrtApi, ReleaseEnv, 92);
ORT_ABI_AT(OrtApi, ReleaseValue, 96);
ORT_ABI_AT(OrtApi, ReleaseTensorTypeAndShapeInfo, 99);
ORT_ABI_AT(OrtApi, ReleaseCustomOpDomain, 101);
ORT_ABI_AT(OrtApi, AddSessionConfigEntry, 130);
ORT_ABI_AT(OrtApi, KernelInfoGetAttributeArray_float, 162);
ORT_ABI_AT(OrtApi, RegisterCustomOpsLibrary_V2, 228);
ORT_ABI_AT(OrtApi, HasSessionConfigEntry, 237);
ORT_ABI_AT(OrtApi, KernelContext_ParallelFor, 274);
ORT_ABI_AT(OrtCustomOp, CreateKernelV2, 17);
ORT_ABI_AT(OrtCustomOp, ReleaseAliasMap, 25);
