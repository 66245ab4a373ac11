/* A CUDA driver without a GPU: it answers what Mosaic's compiler asks, and records what a launch passes to it.

   Structures and numbers are those of cuda.h (CUDA 13). A tensor map, opaque there, is `struct tensor_map` here. */

#include <stdint.h>
#include <string.h>

typedef int Result;

enum { COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76, MULTIPROCESSOR_COUNT = 16 };

struct tensor_map {
    uint64_t address;
    uint64_t sizes[5];   /* elements, the fastest first */
    uint64_t strides[4]; /* bytes, of all but the fastest */
    uint32_t box[5];
    uint32_t rank, type, swizzle;
};

struct launch_config {
    uint32_t grid[3], block[3], shared_bytes;
    void *stream, *attributes;
    uint32_t num_attributes;
};

/* Read and written by compile_module.py. */
uint32_t num_params, param_bytes[128];
uint32_t num_launches, launch_grid[3], launch_block[3], launch_shared_bytes;
uint8_t launch_params[1 << 14]; /* all parameters, one after the other */

static Result record(void **params) {
    uint8_t *to = launch_params;
    for (uint32_t i = 0; i < num_params; to += param_bytes[i++]) memcpy(to, params[i], param_bytes[i]);
    num_launches++;
    return 0;
}

Result cuLaunchKernelEx(const struct launch_config *config, void *function, void **params, void **extra) {
    memcpy(launch_grid, config->grid, sizeof launch_grid);
    memcpy(launch_block, config->block, sizeof launch_block);
    launch_shared_bytes = config->shared_bytes;
    return record(params);
}

Result cuLaunchKernel(void *function, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, uint32_t block_x,
                      uint32_t block_y, uint32_t block_z, uint32_t shared_bytes, void *stream, void **params,
                      void **extra) {
    struct launch_config config = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes};
    return cuLaunchKernelEx(&config, function, params, extra);
}

Result cuTensorMapEncodeTiled(struct tensor_map *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                              const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                              int interleave, int swizzle, int l2_promotion, int fill) {
    for (uint32_t i = 0; i < rank; i++)
        if (element_strides[i] != 1) return 1;
    if (interleave || rank > 5) return 1;
    memset(map, 0, 128);
    map->address = (uint64_t)address, map->rank = rank, map->type = type, map->swizzle = swizzle;
    memcpy(map->sizes, sizes, rank * sizeof *sizes);
    memcpy(map->strides, strides, (rank - 1) * sizeof *strides);
    memcpy(map->box, box, rank * sizeof *box);
    return 0;
}

Result cuInit(uint32_t flags) { return 0; }
Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuDeviceGetCount(int *count) { return *count = 1, 0; }
Result cuDeviceGet(int *device, int ordinal) { return *device = 0, 0; }
Result cuCtxGetDevice(int *device) { return *device = 0, 0; }
Result cuDeviceGetName(char *name, int bytes, int device) { return strncpy(name, "NVIDIA H200", bytes), 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == COMPUTE_CAPABILITY_MAJOR   ? 9
             : attribute == COMPUTE_CAPABILITY_MINOR ? 0
             : attribute == MULTIPROCESSOR_COUNT     ? 132
                                                     : 227 << 10; /* the shared memory that a CTA may have */
    return 0;
}
Result cuGetErrorName(Result error, const char **name) { return *name = "an error of the fake driver", 0; }
Result cuGetErrorString(Result error, const char **text) { return cuGetErrorName(error, text); }
Result cuModuleLoadData(void **module, const void *image) { return *module = (void *)1, 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { return *function = (void *)1, 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, void *found) { return 500; }
