// What a kernel header needs so that three compilers read the same source: nvcc (the real build), g++ against
// tests/simt/simt.h (SIMT_CPU: each CUDA thread is a fiber) and g++ for the CPU ops (scalar functions only).
#pragma once

#if defined(SIMT_CPU)  // simt.h, included before, has it all
#elif defined(__CUDACC__)
#define DYN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#else
#include <cmath>
#define __host__
#define __device__
#endif

#define HOST_DEVICE __host__ __device__ inline

namespace lottery {

// N neighbouring elements that are loaded and stored at once, 16 bytes in an instruction.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

template <class T>
constexpr int kPack = 16 / sizeof(T);  // elements in 16 bytes

template <int N, class T>
HOST_DEVICE Pack<T, N>& pack(T* p) {
  return *reinterpret_cast<Pack<T, N>*>(p);
}
template <int N, class T>
HOST_DEVICE const Pack<T, N>& pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T>
HOST_DEVICE bool aligned(const T* p) {
  return reinterpret_cast<unsigned long long>(p) % alignof(Pack<T, N>) == 0;
}

}  // namespace lottery
