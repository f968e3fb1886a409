// How R values become one, on every backend: the type a sum is held in, the step, and the rounding at the end.
//
// Sums are float (double for double; integers wrap as unsigned) and are rounded once. max and min keep a NaN of any
// input.
#pragma once

#include <type_traits>

#include "core/types.h"
#include "half.h"

namespace tpk {

// The type a sum is held in, and the way into it and out of it.
template <class T>
struct Sum {
  using type = std::make_unsigned_t<T>;  // integers: overflow wraps, as it does in torch
  TPK_ALWAYS_INLINE static type in(T value) { return static_cast<type>(value); }
  TPK_ALWAYS_INLINE static T out(type value) { return static_cast<T>(value); }
};
template <>
struct Sum<double> {
  using type = double;
  TPK_ALWAYS_INLINE static double in(double value) { return value; }
  TPK_ALWAYS_INLINE static double out(double value) { return value; }
};
template <>
struct Sum<float> {
  using type = float;
  TPK_ALWAYS_INLINE static float in(float value) { return value; }
  TPK_ALWAYS_INLINE static float out(float value) { return value; }
};
template <>
struct Sum<Half> {
  using type = float;
  TPK_ALWAYS_INLINE static float in(Half value) { return to_float(value); }
  TPK_ALWAYS_INLINE static Half out(float value) { return to_half(value); }
};
template <>
struct Sum<Bfloat16> {
  using type = float;
  TPK_ALWAYS_INLINE static float in(Bfloat16 value) { return to_float(value); }
  TPK_ALWAYS_INLINE static Bfloat16 out(float value) { return to_bfloat16(value); }
};

// One more input. `op` is a constant to the CPU's loops and an argument to kernels, which spares them three quarters of
// their variants.
template <class T>
TPK_ALWAYS_INLINE auto combine(ReduceOp op, typename Sum<T>::type left, typename Sum<T>::type right) ->
    typename Sum<T>::type {
  using S = typename Sum<T>::type;
  if (op == ReduceOp::Sum || op == ReduceOp::Avg) return static_cast<S>(left + right);
  if constexpr (std::is_floating_point_v<S>) {
    const bool keep = op == ReduceOp::Max ? left > right : left < right;
    return keep || left != left ? left : right;
  } else {
    const T a = static_cast<T>(left), b = static_cast<T>(right);
    return (op == ReduceOp::Max ? a > b : a < b) ? left : right;
  }
}

// The value of a sum of num_inputs. avg has a meaning for floating dtypes only.
template <class T>
TPK_ALWAYS_INLINE T finish(ReduceOp op, typename Sum<T>::type sum, int num_inputs) {
  using S = typename Sum<T>::type;
  if constexpr (std::is_floating_point_v<S>) {
    if (op == ReduceOp::Avg) return Sum<T>::out(sum / static_cast<S>(num_inputs));
  }
  return Sum<T>::out(sum);
}

}  // namespace tpk
