/* What src/cuda/driver.h declares by hand against the real cuda.h and nvrtc.h, where the build found them. Function
 * types are compared by the compiler: this file does not build if one differs. */
#include <stddef.h>
#if __has_include(<cuda.h>)
#include <cuda.h>
#define HAVE_CUDA_H 1
#define NBHD_CU_TENSOR_MAP CUtensorMap
#define NBHD_CU_LAUNCH_CONFIG CUlaunchConfig
#endif
#if __has_include(<nvrtc.h>)
#include <nvrtc.h>
#define HAVE_NVRTC_H 1
#endif
#include "cuda/driver.h"
#include "test.h"

/* Assigning in an operand of sizeof checks the types and neither runs nor links anything. Where cuda.h renames an entry
 * point by a macro, both sides are renamed. An enumeration of theirs and our `unsigned` are one type to gcc and
 * clang. */
#define SAME_TYPE(name, arguments) (void)sizeof(ours.name = name);

#ifdef HAVE_CUDA_H
static const struct {
    const char *name;
    long ours, theirs;
} values[] = {
    {"sizeof CUtensorMap", sizeof(struct nbhd_tensor_map), sizeof(CUtensorMap)},
    {"sizeof CUlaunchConfig", sizeof(struct nbhd_launch_config), sizeof(CUlaunchConfig)},
    {"grid", offsetof(struct nbhd_launch_config, grid), offsetof(CUlaunchConfig, gridDimX)},
    {"block", offsetof(struct nbhd_launch_config, block), offsetof(CUlaunchConfig, blockDimX)},
    {"shared", offsetof(struct nbhd_launch_config, shared), offsetof(CUlaunchConfig, sharedMemBytes)},
    {"stream", offsetof(struct nbhd_launch_config, stream), offsetof(CUlaunchConfig, hStream)},
    {"attributes", offsetof(struct nbhd_launch_config, attributes), offsetof(CUlaunchConfig, attrs)},
    {"count", offsetof(struct nbhd_launch_config, count), offsetof(CUlaunchConfig, numAttrs)},
    {"CUDA_SUCCESS", NBHD_CU_SUCCESS, CUDA_SUCCESS},
    {"CUDA_ERROR_NO_DEVICE", NBHD_CU_ERROR_NO_DEVICE, CUDA_ERROR_NO_DEVICE},
    {"CUDA_ERROR_INVALID_IMAGE", NBHD_CU_ERROR_INVALID_IMAGE, CUDA_ERROR_INVALID_IMAGE},
    {"CUDA_ERROR_NO_BINARY_FOR_GPU", NBHD_CU_ERROR_NO_BINARY_FOR_GPU, CUDA_ERROR_NO_BINARY_FOR_GPU},
    {"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", NBHD_CU_ERROR_UNSUPPORTED_PTX_VERSION,
     CUDA_ERROR_UNSUPPORTED_PTX_VERSION},
    {"SHARED_MEMORY_PER_BLOCK_OPTIN", NBHD_CU_SHARED_MEMORY_PER_BLOCK_OPTIN,
     CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN},
    {"MULTIPROCESSOR_COUNT", NBHD_CU_MULTIPROCESSOR_COUNT, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT},
    {"COMPUTE_CAPABILITY_MAJOR", NBHD_CU_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR},
    {"COMPUTE_CAPABILITY_MINOR", NBHD_CU_COMPUTE_CAPABILITY_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR},
    {"L2_CACHE_SIZE", NBHD_CU_L2_CACHE_SIZE, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE},
    {"FUNC_SHARED_SIZE_BYTES", NBHD_CU_FUNC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES},
    {"FUNC_MAX_DYNAMIC_SHARED", NBHD_CU_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES,
     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES},
    {"STREAM_NON_BLOCKING", NBHD_CU_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING},
    {"CAPTURE_MODE_GLOBAL", NBHD_CU_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_GLOBAL},
    {"TENSOR_MAP_INT32", NBHD_CU_TENSOR_INT32, CU_TENSOR_MAP_DATA_TYPE_INT32},
    {"TENSOR_MAP_FLOAT32", NBHD_CU_TENSOR_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT32},
    {"TENSOR_MAP_FLOAT16", NBHD_CU_TENSOR_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16},
    {"TENSOR_MAP_BFLOAT16", NBHD_CU_TENSOR_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16},
    {"TENSOR_MAP_FLOAT64", NBHD_CU_TENSOR_FLOAT64, CU_TENSOR_MAP_DATA_TYPE_FLOAT64},
    {"TENSOR_MAP_SWIZZLE_32B", NBHD_CU_TENSOR_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_32B},
    {"TENSOR_MAP_SWIZZLE_64B", NBHD_CU_TENSOR_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_64B},
    {"TENSOR_MAP_SWIZZLE_128B", NBHD_CU_TENSOR_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_128B},
    {"TENSOR_MAP_INTERLEAVE_NONE", NBHD_CU_TENSOR_INTERLEAVE_NONE, CU_TENSOR_MAP_INTERLEAVE_NONE},
    {"TENSOR_MAP_L2_256B", NBHD_CU_TENSOR_L2_256B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B},
    {"TENSOR_MAP_FILL_ZERO", NBHD_CU_TENSOR_FILL_ZERO, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE},
};
#endif

int main(void)
{
#ifdef HAVE_CUDA_H
    {
        struct nbhd_driver ours;
        NBHD_DRIVER_LIST(SAME_TYPE)
    }
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        CHECK(values[i].ours == values[i].theirs, "%s is %ld here and %ld in cuda.h", values[i].name, values[i].ours,
              values[i].theirs);
#else
    test_skip("there is no cuda.h to compare with");
#endif
#ifdef HAVE_NVRTC_H
    {
        struct nbhd_nvrtc ours;
        NBHD_NVRTC_LIST(SAME_TYPE)
        CHECK(sizeof ours > 0, "nvrtc.h was read");
    }
#else
    test_skip("there is no nvrtc.h to compare with");
#endif
    return test_done();
}
