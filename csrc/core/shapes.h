// The shape rule of every op, once, for every backend. Torch-free.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"

namespace tpk {

using Shape = std::vector<int64_t>;

inline std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// y[..., N] = x[..., K] @ w[N, K].T (+ bias[N]); returns the shape of y.
inline Shape linear_shape(const char* op, const Shape& x, const Shape& w, const Shape* bias) {
  TPK_CHECK(x.size() >= 2, op, ": x must have 2 dims or more, got ", x.size(), " (shape ", text_of(x), ")");
  TPK_CHECK(w.size() == 2, op, ": w must have 2 dims [N, K], got shape ", text_of(w));
  TPK_CHECK(x.back() == w[1], op, ": x and w must have the same K (last dim), got ", x.back(), " and ", w[1]);
  TPK_CHECK(bias == nullptr || (bias->size() == 1 && bias->front() == w[0]), op, ": bias must have shape [", w[0],
            "], got ", bias == nullptr ? "none" : text_of(*bias));
  Shape y = x;
  y.back() = w[0];
  return y;
}

// A token dimension of x[..., K]: any but the last.
inline void check_token_dim(const char* op, const Shape& x, int64_t dim) {
  TPK_CHECK(dim >= 0 && dim + 1 < static_cast<int64_t>(x.size()), op, ": dim must be a token dimension, in [0, ",
            static_cast<int64_t>(x.size()) - 1, ") for x of shape ", text_of(x), ", got ", dim);
}

// x and residual [..., D], weight [D].
inline void check_add_norm(const char* op, const Shape& x, const Shape& residual, const Shape& weight) {
  TPK_CHECK(!x.empty(), op, ": x must have 1 dim or more, got 0");
  TPK_CHECK(residual == x, op, ": x and residual must have the same shape, got ", text_of(x), " and ",
            text_of(residual));
  TPK_CHECK(weight.size() == 1 && weight.front() == x.back(), op, ": weight must have shape [", x.back(), "], got ",
            text_of(weight));
}

}  // namespace tpk
