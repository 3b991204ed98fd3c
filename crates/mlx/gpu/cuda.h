// The words in which the kernels beside this file are written, for CUDA; metal.h has the same for Metal.
#define DEVICE
#define SHARED __shared__
#define SHARED_POINTER
#define FUNCTION __device__ inline
#define BARRIER() __syncthreads()
#define WARP_BARRIER() __syncwarp()
#define GROUP_X int(blockIdx.x)
#define GROUP_Y int(blockIdx.y)
#define LOCAL_X int(threadIdx.x)
#define LOCAL_SIZE int(blockDim.x)
#define GLOBAL_X int(blockIdx.x * blockDim.x + threadIdx.x)
#define GLOBAL_Y int(blockIdx.y * blockDim.y + threadIdx.y)
#define GLOBAL_Z int(blockIdx.z * blockDim.z + threadIdx.z)
#define UNROLL _Pragma("unroll 8")
#define UNROLL_ALL _Pragma("unroll")
#define EXP(x) expf(x)
#define COS(x) cosf(x)
#define SIN(x) sinf(x)
#define AS_FLOAT(x) __int_as_float(x)
#define MINUS_INFINITY __int_as_float(0xff800000)

FUNCTION float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

FUNCTION float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

FUNCTION int warp_min(int x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other < x ? other : x;
  }
  return x;
}

FUNCTION float from_lane(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x, y, z, w;
};

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};
