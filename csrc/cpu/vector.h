// What the CPU's vector loops share: how they are compiled, and GCC's and clang's vector types.
#pragma once

// CLONES before a loop's function: compiled for plain x86-64, AVX2 and AVX-512, chosen when the library is loaded, so
// that a built extension runs on any machine. It reaches only what is inlined: helpers are INLINE.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace lottery {

template <class T, int n>
struct VecOf {  // n elements, wherever in memory they begin, whatever else reads them
  typedef T type __attribute__((vector_size(n * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T, int n>
using Vec = typename VecOf<T, n>::type;

// The n elements from p on as one vector, to read or to write. A reference, because how a vector is returned depends on
// the instruction set, and this is inlined into code for each of them.
template <int n, class T>
INLINE Vec<T, n>& vec(T* p) {
  return *reinterpret_cast<Vec<T, n>*>(p);
}
template <int n, class T>
INLINE const Vec<T, n>& vec(const T* p) {
  return *reinterpret_cast<const Vec<T, n>*>(p);
}

}  // namespace lottery
