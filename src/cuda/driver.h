/* The CUDA driver and NVRTC, opened at run time: nothing of CUDA is needed to build this library or to start it.
 * Every entry point that we use stands once in a list below, with its type written by hand; tests/test_driver_abi.c
 * compares the lists, structures and constants with cuda.h and nvrtc.h where those exist. CUDA 12.0 and later. */
#ifndef NBHD_CUDA_DRIVER_H
#define NBHD_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>
#include "core/kernel.h"

/* Handles carry the driver's own tags. Its enumerations are unsigned, its device an int, device memory a 64-bit
 * number. */
struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct _nvrtcProgram;

/* CUtensorMap: written by cuTensorMapEncodeTiled, passed to a kernel by value, read by TMA. */
struct nbhd_tensor_map {
    _Alignas(128) uint64_t opaque[16]; /* 64 is asked for by CUDA 12 */
};

/* CUlaunchConfig. We set no attributes. */
struct nbhd_launch_config {
    unsigned grid[3], block[3], shared;
    struct CUstream_st *stream;
    void *attributes;
    unsigned count;
};

/* test_driver_abi.c puts the real types here. */
#ifndef NBHD_CU_TENSOR_MAP
#define NBHD_CU_TENSOR_MAP struct nbhd_tensor_map
#define NBHD_CU_LAUNCH_CONFIG struct nbhd_launch_config
#endif

enum { /* values of the driver's enumerations, as far as used */
    NBHD_CU_SUCCESS = 0,
    NBHD_CU_ERROR_NO_DEVICE = 100,
    NBHD_CU_ERROR_INVALID_IMAGE = 200,
    NBHD_CU_ERROR_NO_BINARY_FOR_GPU = 209,
    NBHD_CU_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    NBHD_CU_MULTIPROCESSOR_COUNT = 16,
    NBHD_CU_L2_CACHE_SIZE = 38,
    NBHD_CU_COMPUTE_CAPABILITY_MAJOR = 75,
    NBHD_CU_COMPUTE_CAPABILITY_MINOR = 76,
    NBHD_CU_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
    NBHD_CU_FUNC_SHARED_SIZE_BYTES = 1,
    NBHD_CU_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    NBHD_CU_STREAM_NON_BLOCKING = 1,
    NBHD_CU_CAPTURE_MODE_GLOBAL = 0,
    NBHD_CU_TENSOR_INT32 = 3,
    NBHD_CU_TENSOR_FLOAT16 = 6,
    NBHD_CU_TENSOR_FLOAT32 = 7,
    NBHD_CU_TENSOR_FLOAT64 = 8,
    NBHD_CU_TENSOR_BFLOAT16 = 9,
    NBHD_CU_TENSOR_INTERLEAVE_NONE = 0,
    NBHD_CU_TENSOR_SWIZZLE_NONE = 0,
    NBHD_CU_TENSOR_SWIZZLE_32B = 1,
    NBHD_CU_TENSOR_SWIZZLE_64B = 2,
    NBHD_CU_TENSOR_SWIZZLE_128B = 3,
    NBHD_CU_TENSOR_L2_256B = 3,
    NBHD_CU_TENSOR_FILL_ZERO = 0
};

/* X(name, arguments); all return an unsigned result, 0 for success. Names as in the library: with their version. */
#define NBHD_DRIVER_LIST(X)                                                                                            \
    X(cuInit, (unsigned))                                                                                              \
    X(cuDriverGetVersion, (int *))                                                                                     \
    X(cuGetErrorName, (unsigned, const char **))                                                                       \
    X(cuGetErrorString, (unsigned, const char **))                                                                     \
    X(cuDeviceGet, (int *, int))                                                                                       \
    X(cuDeviceGetCount, (int *))                                                                                       \
    X(cuDeviceGetName, (char *, int, int))                                                                             \
    X(cuDeviceGetAttribute, (int *, unsigned, int))                                                                    \
    X(cuDevicePrimaryCtxRetain, (struct CUctx_st **, int))                                                             \
    X(cuCtxGetCurrent, (struct CUctx_st **))                                                                           \
    X(cuCtxPushCurrent_v2, (struct CUctx_st *))                                                                        \
    X(cuCtxPopCurrent_v2, (struct CUctx_st **))                                                                        \
    X(cuCtxGetDevice, (int *))                                                                                         \
    X(cuCtxGetId, (struct CUctx_st *, unsigned long long *))                                                           \
    X(cuCtxSynchronize, (void))                                                                                        \
    X(cuModuleLoadData, (struct CUmod_st **, const void *))                                                            \
    X(cuModuleUnload, (struct CUmod_st *))                                                                             \
    X(cuModuleGetFunction, (struct CUfunc_st **, struct CUmod_st *, const char *))                                     \
    X(cuFuncGetAttribute, (int *, unsigned, struct CUfunc_st *))                                                       \
    X(cuFuncSetAttribute, (struct CUfunc_st *, unsigned, int))                                                         \
    X(cuLaunchKernelEx, (const NBHD_CU_LAUNCH_CONFIG *, struct CUfunc_st *, void **, void **))                         \
    X(cuTensorMapEncodeTiled,                                                                                          \
      (NBHD_CU_TENSOR_MAP *, unsigned, uint32_t, void *, const uint64_t *, const uint64_t *, const uint32_t *,         \
       const uint32_t *, unsigned, unsigned, unsigned, unsigned))                                                      \
    X(cuMemAlloc_v2, (unsigned long long *, size_t))                                                                   \
    X(cuMemFree_v2, (unsigned long long))                                                                              \
    X(cuMemGetInfo_v2, (size_t *, size_t *))                                                                           \
    X(cuMemcpyHtoD_v2, (unsigned long long, const void *, size_t))                                                     \
    X(cuMemcpyDtoH_v2, (void *, unsigned long long, size_t))                                                           \
    X(cuMemcpyDtoDAsync_v2, (unsigned long long, unsigned long long, size_t, struct CUstream_st *))                    \
    X(cuMemsetD8Async, (unsigned long long, unsigned char, size_t, struct CUstream_st *))                              \
    X(cuStreamCreate, (struct CUstream_st **, unsigned))                                                               \
    X(cuStreamDestroy_v2, (struct CUstream_st *))                                                                      \
    X(cuStreamSynchronize, (struct CUstream_st *))                                                                     \
    X(cuStreamBeginCapture_v2, (struct CUstream_st *, unsigned))                                                       \
    X(cuStreamEndCapture, (struct CUstream_st *, struct CUgraph_st **))                                                \
    X(cuGraphInstantiateWithFlags, (struct CUgraphExec_st **, struct CUgraph_st *, unsigned long long))                \
    X(cuGraphLaunch, (struct CUgraphExec_st *, struct CUstream_st *))                                                  \
    X(cuGraphExecDestroy, (struct CUgraphExec_st *))                                                                   \
    X(cuGraphDestroy, (struct CUgraph_st *))                                                                           \
    X(cuEventCreate, (struct CUevent_st **, unsigned))                                                                 \
    X(cuEventDestroy_v2, (struct CUevent_st *))                                                                        \
    X(cuEventRecord, (struct CUevent_st *, struct CUstream_st *))                                                      \
    X(cuEventSynchronize, (struct CUevent_st *))                                                                       \
    X(cuEventElapsedTime, (float *, struct CUevent_st *, struct CUevent_st *))

#define NBHD_NVRTC_LIST(X)                                                                                             \
    X(nvrtcVersion, (int *, int *))                                                                                    \
    X(nvrtcGetNumSupportedArchs, (int *))                                                                              \
    X(nvrtcGetSupportedArchs, (int *))                                                                                 \
    X(nvrtcCreateProgram,                                                                                              \
      (struct _nvrtcProgram **, const char *, const char *, int, const char *const *, const char *const *))            \
    X(nvrtcCompileProgram, (struct _nvrtcProgram *, int, const char *const *))                                         \
    X(nvrtcDestroyProgram, (struct _nvrtcProgram **))                                                                  \
    X(nvrtcGetCUBINSize, (struct _nvrtcProgram *, size_t *))                                                           \
    X(nvrtcGetCUBIN, (struct _nvrtcProgram *, char *))                                                                 \
    X(nvrtcGetPTXSize, (struct _nvrtcProgram *, size_t *))                                                             \
    X(nvrtcGetPTX, (struct _nvrtcProgram *, char *))                                                                   \
    X(nvrtcGetProgramLogSize, (struct _nvrtcProgram *, size_t *))                                                      \
    X(nvrtcGetProgramLog, (struct _nvrtcProgram *, char *))

#define NBHD_ENTRY(name, arguments) unsigned(*name) arguments;
struct nbhd_driver {
    NBHD_DRIVER_LIST(NBHD_ENTRY)
    int version; /* 12040: CUDA 12.4 */
};

struct nbhd_nvrtc {
    NBHD_NVRTC_LIST(NBHD_ENTRY)
    int version;     /* 1205: NVRTC 12.5 */
    int archs[64];   /* compute capabilities it compiles for, ascending */
    int arch_count;
    char path[1024]; /* the library's file */
};
#undef NBHD_ENTRY

/* Opens and initializes the driver, once per process; false, with a sentence in why, where there is none that serves.
 * nbhd_cu may be used after the first success. */
bool nbhd_driver_open(char why[NBHD_TEXT]);
extern struct nbhd_driver nbhd_cu;
/* NVRTC likewise. Searched for in this order: $NBHD_NVRTC (the library or its directory), what the dynamic linker
 * finds, toolkits (/usr/local/cuda*), the nvidia packages of the Python environments that hold this library or are on
 * PATH. */
const struct nbhd_nvrtc *nbhd_nvrtc(char why[NBHD_TEXT]);

/* NBHD_OK for a result of 0; else NBHD_ERROR_DEVICE and "what: CUDA_ERROR_X, its description". */
nbhd_status nbhd_driver_check(unsigned result, const char *what);

#endif
