/* A libcuda in which every call succeeds and nothing happens: what Triton's launcher needs in order to run on a machine without a
 * GPU, so that the host's work of a launch can be measured and its arguments can be looked at. See stand_in.py. */
#include <stddef.h>
#include <stdint.h>

typedef int Result; /* CUresult; 0 is success */

static char context, module, function;

long stand_in_launches = 0;

Result cuGetErrorString(Result error, const char **text) {
  *text = "the stand-in knows no errors";
  return 0;
}
Result cuDriverGetVersion(int *version) {
  *version = 12080;
  return 0;
}
Result cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void **current, int device) {
  *current = &context;
  return 0;
}
Result cuCtxGetCurrent(void **current) {
  *current = &context;
  return 0;
}
Result cuCtxGetDevice(int *device) {
  *device = 0;
  return 0;
}
Result cuStreamIsCapturing(void *stream, int *status) {
  *status = 0;
  return 0;
}
Result cuCtxSetCurrent(void *current) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) {
  *value = 0;
  return 0;
}
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
/* Of an H100: Triton refuses kernels that need more shared memory or threads than there are. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 8:  /* shared memory of a block */
  case 81: /* shared memory of a multiprocessor */
  case 97: /* shared memory that a block can opt in to */
    *value = 232448;
    break;
  case 10: /* warp size */
    *value = 32;
    break;
  case 16: /* multiprocessors */
    *value = 132;
    break;
  default:
    *value = 1;
  }
  return 0;
}
Result cuModuleLoadData(void **loaded, const void *image) {
  *loaded = &module;
  return 0;
}
Result cuModuleUnload(void *loaded) { return 0; }
Result cuModuleGetFunction(void **found, void *loaded, const char *name) {
  *found = &function;
  return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, void *kernel) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a block at most; registers and spills are not asked of the stand-in */
  return 0;
}
Result cuFuncSetAttribute(void *kernel, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *kernel, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *clusters, void *kernel, const void *config) {
  *clusters = 1;
  return 0;
}
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return 0;
}
Result cuLaunchKernelEx(const void *config, void *kernel, void **parameters, void **extra) {
  stand_in_launches++;
  return 0;
}
