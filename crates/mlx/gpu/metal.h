// The words in which the kernels beside this file are written, for Metal; cuda.h has the same for CUDA.
#define DEVICE device
#define SHARED threadgroup
#define SHARED_POINTER threadgroup
#define FUNCTION inline
#define BARRIER() threadgroup_barrier(metal::mem_flags::mem_device | metal::mem_flags::mem_threadgroup)
#define WARP_BARRIER() simdgroup_barrier(metal::mem_flags::mem_threadgroup)
#define GROUP_X int(threadgroup_position_in_grid.x)
#define GROUP_Y int(threadgroup_position_in_grid.y)
#define LOCAL_X int(thread_position_in_threadgroup.x)
#define LOCAL_SIZE int(threads_per_threadgroup.x)
#define GLOBAL_X int(thread_position_in_grid.x)
#define GLOBAL_Y int(thread_position_in_grid.y)
#define GLOBAL_Z int(thread_position_in_grid.z)
#define UNROLL _Pragma("clang loop unroll_count(8)")
#define UNROLL_ALL _Pragma("clang loop unroll(full)")
#define EXP(x) metal::precise::exp(x)
#define COS(x) metal::precise::cos(x)
#define SIN(x) metal::precise::sin(x)
#define AS_FLOAT(x) as_type<float>(x)
#define MINUS_INFINITY (-INFINITY)

FUNCTION float warp_sum(float x) {
  return metal::simd_sum(x);
}

FUNCTION float warp_max(float x) {
  return metal::simd_max(x);
}

FUNCTION int warp_min(int x) {
  return metal::simd_min(x);
}

FUNCTION float from_lane(float x, int lane) {
  return metal::simd_shuffle(x, ushort(lane));
}

template <typename T>
using Four = metal::vec<T, 4>;

template <typename T>
using Two = metal::vec<T, 2>;
