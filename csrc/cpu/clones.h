// CLONES before a loop's function: compiled for plain x86-64, AVX2 and AVX-512, chosen when the library is loaded, so
// that a built extension runs on any machine. It reaches only what is inlined: helpers are INLINE.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
