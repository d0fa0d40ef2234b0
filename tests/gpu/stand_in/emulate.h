// Lets a CUDA C source be compiled as plain C++: its builtins, and the table in which driver.cpp finds its kernels.
//
// Only what our kernels use is here; a kernel that needs more does not compile. There is no shared memory and no
// __syncthreads: the threads of a launch run one after another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;

// One copy of these in each source; host threads may run kernels at the same time.
static thread_local uint3 blockIdx, threadIdx;
static thread_local dim3 gridDim, blockDim;

struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::isfinite;
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline float __fmul_rn(float a, float b) { return a * b; }  // -ffp-contract=off keeps the two apart
inline float __fadd_rn(float a, float b) { return a + b; }

inline float emulated_logf(float x) { return static_cast<float>(std::log(static_cast<double>(x))); }
#define logf emulated_logf  // logf itself is libm's, which need not round as well

inline void sincospif(float x, float* sine, float* cosine) {
  // The quadrant is taken off exactly, so that multiples of 1/2 give exact zeros and ones, as on a GPU.
  const double quarters = std::nearbyint(2.0 * x);
  const double rest = M_PI * (x - 0.5 * quarters);
  const double s = std::sin(rest), c = std::cos(rest);
  const int quadrant = static_cast<int>(std::fmod(quarters, 4.0) + 4.0) % 4;
  *sine = static_cast<float>(quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c);
  *cosine = static_cast<float>(quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s) + 0.0f;  // no -0
}

inline int atomicCAS(int* address, int compare, int value) {
  __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return compare;
}

namespace stand_in {

struct Launch {
  std::function<void()> run;
  std::vector<const void*> pointers;  // its arguments that are pointers: the driver checks where they lead
};

struct Kernel {
  const char* name;
  int max_threads;  // per block: its __launch_bounds__
  std::size_t parameters;
  std::function<Launch(dim3 grid, dim3 block, void** params)> prepare;  // copies the arguments
};

std::vector<Kernel>& kernels();  // driver.cpp

template <class... P, std::size_t... I>
Launch prepare(void (*kernel)(P...), dim3 grid, dim3 block, void** params, std::index_sequence<I...>) {
  std::tuple<P...> arguments;
  (std::memcpy(&std::get<I>(arguments), params[I], sizeof(P)), ...);
  Launch launch;
  [[maybe_unused]] auto note = [&](auto argument) {
    if constexpr (std::is_pointer_v<decltype(argument)>) launch.pointers.push_back(argument);
  };
  (note(std::get<I>(arguments)), ...);
  launch.run = [=] {
    gridDim = grid;
    blockDim = block;
    uint3 &b = blockIdx, &t = threadIdx;
    for (b.z = 0; b.z < grid.z; ++b.z)
      for (b.y = 0; b.y < grid.y; ++b.y)
        for (b.x = 0; b.x < grid.x; ++b.x)
          for (t.z = 0; t.z < block.z; ++t.z)
            for (t.y = 0; t.y < block.y; ++t.y)
              for (t.x = 0; t.x < block.x; ++t.x) std::apply(kernel, arguments);
  };
  return launch;
}

template <class... P>
bool enrol(const char* name, int max_threads, void (*kernel)(P...)) {
  kernels().push_back({name, max_threads, sizeof...(P), [=](dim3 grid, dim3 block, void** params) {
                         return prepare(kernel, grid, block, params, std::index_sequence_for<P...>{});
                       }});
  return true;
}

}  // namespace stand_in
