// Every op, one schema a line, its formula above it. R ranks; rank r holds x_r, w_r, ...; sums are over the ranks.
// world_size and rank are there because a tensor without data (compile, export, meta) has no group, and because
// the forward that torch.compile saves must differ between ranks wherever its backward does. grad_codec packs what the
// backward sends; forward kernels do not use it.
//
// Part of the CPU module. The module of each backend registers its kernels under these names: kernels.h.
#include <torch/csrc/stable/library.h>

#include "collectives.h"

STABLE_TORCH_LIBRARY(tpkernels, m) {
  // y = reduce_r x_r                        op: sum, avg, max, min
  m.def("all_reduce(Tensor x, str group, int world_size, str op, str codec) -> Tensor");
  // x = reduce_r x_r, in place; nothing is copied when x lies in the arena (group.empty)
  m.def("all_reduce_(Tensor(a!) x, str group, int world_size, str op, str codec) -> ()");
  // y = this rank's part along dim of reduce_r x_r
  m.def(
      "reduce_scatter(Tensor x, str group, int world_size, int rank, int dim, str op, str codec, str grad_codec) -> "
      "Tensor");
  // y = cat_r x_r along dim                 dim_size: of y, or -1: the ranks exchange their sizes
  m.def(
      "all_gather(Tensor x_shard, str group, int world_size, int rank, int dim, SymInt dim_size, str codec, "
      "str grad_codec) -> Tensor");

  // y[M, N] = sum_r x_r[M, K/R] @ w_r[N, K/R].T + bias[N]
  m.def(
      "gemm_all_reduce(Tensor x_shard, Tensor w_shard, Tensor? bias, str group, int world_size, str codec) -> Tensor");
  // y = this rank's part along dim of that
  m.def(
      "gemm_reduce_scatter(Tensor x_shard, Tensor w_shard, Tensor? bias, str group, int world_size, int rank, int dim, "
      "str codec, str grad_codec) -> Tensor");
  // y[M, N/R] = (cat_r x_r along dim)[M, K] @ w_shard[N/R, K].T + bias[N/R]
  m.def(
      "all_gather_gemm(Tensor x_shard, Tensor w_shard, Tensor? bias, str group, int world_size, int rank, int dim, "
      "SymInt dim_size, str codec, str grad_codec) -> Tensor");
  // y[M, N/R] = x[M, K] @ w_shard[N/R, K].T + bias[N/R]; x is replicated, and so its gradient is summed
  m.def("replicated_gemm(Tensor x, Tensor w_shard, Tensor? bias, str group, int world_size, str codec) -> Tensor");

  // dx = dy @ w,  dw = dy.T @ x,  db = sum over tokens of dy        what is not needed comes back empty
  // nothing is sent; the group has the engines that it has measured
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor w, bool need_x, bool need_w, bool need_b, str group) -> "
      "(Tensor, Tensor, Tensor)");
  // dx = sum_r dy_r @ w_r, under way while dw = dy.T @ x and db are computed
  m.def(
      "replicated_gemm_backward(Tensor dy, Tensor x, Tensor w_shard, bool need_x, bool need_w, bool need_b, str group, "
      "int world_size, str codec) -> (Tensor, Tensor, Tensor)");
  // dy = cat_r dy_r along dim, then linear_backward: db is the full sum on every rank
  m.def(
      "gemm_reduce_scatter_backward(Tensor dy_shard, Tensor x_shard, Tensor w_shard, bool need_x, bool need_w, "
      "bool need_b, str group, int world_size, int dim, SymInt dim_size, str codec) -> (Tensor, Tensor, Tensor)");
  // dx = this rank's part along dim of sum_r dy_r @ w_r,  dw = dy.T @ (cat_r x_r along dim)
  // codec packs x, grad_codec dx
  m.def(
      "all_gather_gemm_backward(Tensor dy, Tensor x_shard, Tensor w_shard, bool need_x, bool need_w, bool need_b, "
      "str group, int world_size, int rank, int dim, SymInt dim_size, str codec, str grad_codec) -> (Tensor, Tensor, "
      "Tensor)");

  // y[..., D] = table[ids], where table[V, D] = cat_r table_r and table_shard begins at row vocab_start
  m.def(
      "vocab_embedding(Tensor ids, Tensor table_shard, str group, int world_size, SymInt vocab_start, "
      "SymInt vocab_size) -> Tensor");
  // dtable_shard[ids - vocab_start] += dy
  m.def("vocab_embedding_backward(Tensor dy, Tensor ids, SymInt vocab_start, SymInt shard_size) -> Tensor");
  // lse = log sum_j exp(logits[j]), in fp64;  loss = lse - (1 - s) logits[target] - s / V sum_j logits[j];  0 where
  // ignored
  m.def(
      "vocab_cross_entropy(Tensor logits_shard, Tensor target, str group, int world_size, SymInt vocab_start, "
      "SymInt vocab_size, int ignore_index, float label_smoothing) -> (Tensor loss, Tensor lse)");
  // dlogits[j] = dloss (exp(logits[j] - lse) - (1 - s) [j = target] - s / V)
  m.def(
      "vocab_cross_entropy_backward(Tensor dloss, Tensor logits_shard, Tensor target, Tensor lse, SymInt vocab_start, "
      "SymInt vocab_size, int ignore_index, float label_smoothing) -> Tensor");

  // residual_out = residual + sum_r x_r;  i = 1 / sqrt(mean(residual_out^2) + eps);  y = residual_out i weight
  m.def(
      "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, str group, int world_size, float eps, "
      "str codec) -> (Tensor y, Tensor residual_out, Tensor inverse_rms)");
  // g = dy weight,  dr = i (g - r i^2 mean(g r)) + dresidual_out,  dweight = sum over tokens of dy r i
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dresidual_out, Tensor residual_out, Tensor weight, Tensor inverse_rms, "
      "bool need_r, bool need_w) -> (Tensor dr, Tensor dweight)");

  // sum over all xs of x^2, a scalar; squares and sums in fp64
  m.def("squared_norm(Tensor[] xs) -> Tensor");
  // wire = encode(x), bytes;  x = decode(wire)
  m.def("compress(Tensor x, str codec) -> Tensor");
  m.def("decompress(Tensor wire, SymInt[] shape, ScalarType dtype, str codec) -> Tensor");
  // v = scale x + residual (fp32);  wire = encode(v);  residual = v - decode(wire)
  m.def("compress_with_feedback(Tensor x, Tensor(a!) residual, str codec, float scale) -> Tensor");
  // y = reduce_r decode(wire_r)                                    the wires go out as they are
  m.def(
      "all_reduce_packed(Tensor wire, SymInt[] shape, ScalarType dtype, str group, int world_size, str op, str codec) "
      "-> Tensor");
  // y = this rank's part of cat_p reduce_r decode(wire_r[p])       wire_r: the parts of all ranks, packed one by one
  m.def(
      "reduce_scatter_packed(Tensor wire, SymInt numel, ScalarType dtype, str group, int world_size, int rank, str op, "
      "str codec) -> Tensor");

  // An uninitialised tensor inside this rank's arena.
  m.def("arena_empty(str group, int[] shape, ScalarType dtype) -> Tensor");
  // The same on a device.
  m.def("device_arena_empty(str group, int[] shape, ScalarType dtype, Device device) -> Tensor");
  // This rank's number, from every rank.
  m.def("exchange_sizes(str group, int mine) -> int[]");
}

// Without a tensor among the arguments there is no dispatch by device: that of the group decides.
STABLE_TORCH_LIBRARY_IMPL(tpkernels, CompositeExplicitAutograd, m) {
  m.impl("arena_empty", TORCH_BOX(&tpk::arena_empty));
  m.impl("exchange_sizes", TORCH_BOX(&tpk::exchange_sizes));
}
