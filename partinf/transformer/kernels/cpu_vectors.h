// What the CPU's kernels share: vectors, scratch memory, and spreading work over the threads of XLA's pool.
//
// Everything is written with vectors of sixteen floats, which the compiler cuts to what the machine has.

#ifndef PARTINF_CPU_VECTORS_H_
#define PARTINF_CPU_VECTORS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace partinf {

namespace ffi = xla::ffi;

constexpr int kWidth = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

inline Vec Load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec Load(const uint16_t* from) {  // the bits of bfloat16 are the upper half of those of float32
#ifdef __AVX512F__  // for which GCC, left to itself, takes two halves
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
#else
  typedef uint16_t Bits __attribute__((vector_size(32)));
  typedef uint32_t Wide __attribute__((vector_size(64)));
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, Wide) << 16);
#endif
}

inline Vec Load(const int8_t* from) {
#ifdef __AVX512F__  // for which GCC, left to itself, takes two steps
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  typedef int8_t Bytes __attribute__((vector_size(16)));
  typedef int16_t Shorts __attribute__((vector_size(32)));
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  // Twice as wide at a time, for which GCC has instructions; it takes elements one by one otherwise.
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, Shorts), IntVec), Vec);
#endif
}

inline void Store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// The first `count` of sixteen numbers, rounded to the nearest bfloat16, of two that are as near to the even one.
inline void StoreNarrow(uint16_t* to, Vec v, size_t count = kWidth) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  const auto bits = _mm512_cvtneps_pbh((__m512)v);
#else
  typedef uint16_t Bits __attribute__((vector_size(32)));
  const IntVec wide = reinterpret_cast<IntVec>(v), odd = (wide >> 16) & 1;
  const IntVec rounded = v == v ? wide + odd + 0x7fff : wide | 0x400000;  // a NaN stays one, whatever bits it has
  const Bits bits = __builtin_convertvector(rounded >> 16, Bits);
#endif
  std::memcpy(to, &bits, count * sizeof *to);
}

// Sixteen words of two numbers each, rounded to bfloat16 as by StoreNarrow: `low` in the lower halves.
inline Vec Joined(Vec low, Vec high) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, both);
#else
  typedef uint32_t Words __attribute__((vector_size(64)));
  uint16_t halves[2][kWidth];
  StoreNarrow(halves[0], low);
  StoreNarrow(halves[1], high);
  Words words;
  for (int i = 0; i < kWidth; ++i) words[i] = halves[0][i] | uint32_t{halves[1][i]} << 16;
  return reinterpret_cast<Vec>(words);
#endif
}

inline void Fetch(const void* from, int64_t ahead) { __builtin_prefetch(static_cast<const char*>(from) + ahead, 0, 2); }

inline Vec Splat(float x) { return x - Vec{}; }

inline Quarter Fold(Vec v) {
  const Half half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

// The sums of four vectors.
inline Quarter Sums(Vec a, Vec b, Vec c, Vec d) {
  const Quarter p = Fold(a), q = Fold(b), r = Fold(c), s = Fold(d);
  const Quarter pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Quarter rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// exp(x) for x <= 0 to about two units in the last place; 0 where a float32 would be denormal, NaN for NaN.
inline Vec Exp(Vec x) {
  const Vec clamped = Max(Splat(-87.f), x);  // in this order, which lets NaN through
  const Vec shifted = clamped * 1.44269504f + 12582912.f;  // rounds to a whole number in the lowest bits
  const Vec whole = shifted - 12582912.f;
  const Vec rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec value = Splat(1.9875691500e-4f);
  for (float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    value = value * rest + term;
  }
  value = value * rest * rest + rest + 1.f;
  const IntVec power = (__builtin_convertvector(whole, IntVec) + 127) << 23;
  return x < -87.f ? Vec{} : value * reinterpret_cast<Vec>(power);
}

inline float Sum(Vec v) {
  const Quarter q = Fold(v);
  return (q[0] + q[1]) + (q[2] + q[3]);
}

inline float Largest(Vec v) {
  float found = v[0];
  for (int i = 1; i < kWidth; ++i) found = std::max(found, v[i]);
  return found;
}

// `count` floats of `held` that start on a line of the cache.
inline float* Aligned(std::vector<float>& held, size_t count) {
  if (held.size() < count + kWidth) held.resize(count + kWidth);
  const auto address = reinterpret_cast<uintptr_t>(held.data());
  return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
}

// Floats of a thread's own that start on a line of its cache; they stay for its next unit of work.
inline float* Scratch(size_t count) {
  static thread_local std::vector<float> held;
  return Aligned(held, count);
}

constexpr int64_t kPauses = 1000;  // while the last units end; a thread that gives its core away may come back late

inline void Pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

// Calls first(0) to first(before - 1), and when all have returned work(0) to work(count - 1), on the caller's thread and those of the pool
// that have time: they are woken once for both.
//
// Threads wait only for units that others have begun: where all threads of the pool are held up, by collectives that wait for this
// very device, the caller does everything itself.
template <typename First, typename Work>
void SpreadAfter(ffi::ThreadPool& pool, int64_t before, const First& first, int64_t count, const Work& work) {
  struct Shared {
    std::atomic<int64_t> begun{0}, prepared{0}, next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  const auto reached = [](const std::atomic<int64_t>& counter, int64_t wanted) {
    for (int64_t waits = 0; counter.load(std::memory_order_acquire) < wanted; ++waits) {
      if (waits < kPauses) Pause();
      else std::this_thread::yield();
    }
  };
  auto take = [shared, before, count, reached, &first, &work] {  // neither is touched once all units are taken
    for (int64_t i; (i = shared->begun.fetch_add(1)) < before;) {
      first(i);
      shared->prepared.fetch_add(1, std::memory_order_release);
    }
    reached(shared->prepared, before);
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      work(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), count); ++helper) pool.Schedule(std::function<void()>(take));
  take();
  reached(shared->done, count);
}

// Calls work(0) to work(count - 1) in the same way.
template <typename Work>
void Spread(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  SpreadAfter(pool, 0, [](int64_t) {}, count, work);
}

// Calls run with an element of the type that an array is stored in; bfloat16 by its bits.
template <typename Run>
ffi::Error ByType(ffi::DataType type, const Run& run) {
  switch (type) {
    case ffi::F32: run(float{}); return ffi::Error::Success();
    case ffi::BF16:
    case ffi::U16: run(uint16_t{}); return ffi::Error::Success();
    case ffi::S8: run(int8_t{}); return ffi::Error::Success();
    default: return ffi::Error::InvalidArgument("stored are float32, bfloat16 or its bits as uint16, and int8");
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

}  // namespace partinf

#endif  // PARTINF_CPU_VECTORS_H_
