// The kernels of every op, as a backend registers them. The schemas and formulas are in schemas.cpp.
#pragma once

#include "collectives.h"
#include "compress.h"
#include "fused_gemm.h"
#include "norm.h"
#include "vocab.h"

namespace tpk {

template <auto op>
struct Unscoped;
template <class Result, class... Args, Result (*op)(Args...)>
struct Unscoped<op> {
  static Result call(Args... args) { return op(std::forward<Args>(args)...); }
};

// Scoped<&op>::call calls the op; a backend may do something around it.
template <template <auto> class Scoped>
void register_kernels(torch::stable::detail::StableLibrary& library) {
#define TPK_KERNEL_OF(op) library.impl(#op, TORCH_BOX(&Scoped<&op>::call))
  TPK_KERNEL_OF(all_reduce);
  TPK_KERNEL_OF(all_reduce_);
  TPK_KERNEL_OF(reduce_scatter);
  TPK_KERNEL_OF(all_gather);
  TPK_KERNEL_OF(gemm_all_reduce);
  TPK_KERNEL_OF(gemm_reduce_scatter);
  TPK_KERNEL_OF(all_gather_gemm);
  TPK_KERNEL_OF(replicated_gemm);
  TPK_KERNEL_OF(linear_backward);
  TPK_KERNEL_OF(replicated_gemm_backward);
  TPK_KERNEL_OF(gemm_reduce_scatter_backward);
  TPK_KERNEL_OF(all_gather_gemm_backward);
  TPK_KERNEL_OF(vocab_embedding);
  TPK_KERNEL_OF(vocab_embedding_backward);
  TPK_KERNEL_OF(vocab_cross_entropy);
  TPK_KERNEL_OF(vocab_cross_entropy_backward);
  TPK_KERNEL_OF(all_reduce_add_rms_norm);
  TPK_KERNEL_OF(rms_norm_backward);
  TPK_KERNEL_OF(squared_norm);
  TPK_KERNEL_OF(compress);
  TPK_KERNEL_OF(decompress);
  TPK_KERNEL_OF(compress_with_feedback);
  TPK_KERNEL_OF(all_reduce_packed);
  TPK_KERNEL_OF(reduce_scatter_packed);
#undef TPK_KERNEL_OF
}

}  // namespace tpk
