// Element types, reductions and ops. Torch-free; the numbers are part of fingerprints.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tpk {

enum class DType : uint8_t { F32, F64, BF16, F16, I8, U8, I16, I32, I64, Raw1, Raw2, Raw4, Raw8, Raw16, Count };
// From Product on: on the CPU only. Bitwise ones are of integers.
enum class ReduceOp : uint8_t { Sum, Avg, Max, Min, Product, BitAnd, BitOr, BitXor, None };

// The ops in which ranks take part. Each call carries its op in its fingerprint, so that ranks in different calls find
// out. Their numbers are part of the fingerprint (kArenaLayout of arena.h).
//    enumerator                 name
#define TPK_OPS(X)                                             \
  X(AllReduce, "all_reduce")                                   \
  X(AllReduceInplace, "all_reduce_")                           \
  X(ReduceScatter, "reduce_scatter")                           \
  X(AllGather, "all_gather")                                   \
  X(GemmAllReduce, "gemm_all_reduce")                          \
  X(GemmReduceScatter, "gemm_reduce_scatter")                  \
  X(AllGatherGemm, "all_gather_gemm")                          \
  X(ReplicatedGemmBackward, "replicated_gemm_backward")        \
  X(GemmReduceScatterBackward, "gemm_reduce_scatter_backward") \
  X(AllGatherGemmBackward, "all_gather_gemm_backward")         \
  X(VocabEmbedding, "vocab_embedding")                         \
  X(VocabCrossEntropy, "vocab_cross_entropy")                  \
  X(AllReduceAddRmsNorm, "all_reduce_add_rms_norm")            \
  X(Sizes, "sizes")                                            \
  X(Barrier, "barrier")                                        \
  X(Broadcast, "broadcast")                                    \
  X(Reduce, "reduce")                                          \
  X(Gather, "gather")                                          \
  X(Scatter, "scatter")                                        \
  X(AllToAll, "all_to_all")                                    \
  X(AverageWithFeedback, "average_with_feedback")

enum class Op : uint8_t {
#define TPK_OP_ENUMERATOR(id, name) id,
  TPK_OPS(TPK_OP_ENUMERATOR)
#undef TPK_OP_ENUMERATOR
      Count
};

constexpr size_t kOps = static_cast<size_t>(Op::Count);

inline const char* name_of(Op op) {
  constexpr const char* names[] = {
#define TPK_OP_NAME(id, name) name,
      TPK_OPS(TPK_OP_NAME)
#undef TPK_OP_NAME
  };
  return static_cast<size_t>(op) < kOps ? names[static_cast<size_t>(op)] : "unknown op";
}

inline const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32",       "float64",       "bfloat16",      "float16",       "int8",
                                   "uint8",         "int16",         "int32",         "int64",         "1-byte values",
                                   "2-byte values", "4-byte values", "8-byte values", "16-byte values"};
  return dtype < DType::Count ? names[static_cast<size_t>(dtype)] : "unknown dtype";
}

inline const char* name_of(ReduceOp op) {
  constexpr const char* names[] = {"sum",         "avg",        "max",         "min", "product",
                                   "bitwise and", "bitwise or", "bitwise xor", "none"};
  return op <= ReduceOp::None ? names[static_cast<size_t>(op)] : "unknown reduction";
}

// DType::Count when there is no dtype of that name.
inline DType dtype_named(const std::string& name) {
  for (uint8_t i = 0; i < static_cast<uint8_t>(DType::Count); ++i) {
    if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  return DType::Count;
}

inline size_t size_of(DType dtype) {
  constexpr size_t sizes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1, 2, 4, 8, 16};
  return sizes[static_cast<size_t>(dtype)];
}

}  // namespace tpk
