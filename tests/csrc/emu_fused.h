// One fused GEMM of a group of emulated ranks as a test sees it: its operands, its launches, its check.
//
// With integers the products are small whole numbers, which every format holds exactly: then the sum, rounded once, is
// the one right answer, to the bit. With others the reference is fp64, and the tolerance what rounding can do.
#pragma once

#include "cuda/comm/tensor_map.h"
#include "cuda/kernels/fused_gemm.h"
#include "emu_ranks.h"

namespace tpk::testing {

using cuda::FusedGrid;
using cuda::GemmOperands;
using cuda::RowCut;

enum class Fused : uint8_t { ReduceScatter, AllReduce, Gather };

struct Gemm {
  Fused kind;
  DType dtype = DType::BF16;
  Codec codec = Codec::None;
  std::vector<uint32_t> rows;  // of each rank
  uint32_t N, K;
  uint32_t tile_columns = 128;
  FusedGrid grid = {1, 2};
  bool bias = false;
  bool integers = true;
  // Columns of y, or of the x that is gathered, from the smallest numbers to overflow, and one NaN in the last one.
  bool decades = false;
  uint32_t piece_rows = 0;  // of each rank in one launch; 0: all
  uint32_t padding = 0;     // values behind each row of x, and of w
  bool transposed = false;  // w lies so, on ranks of even number: the others have it as it is
  uint64_t seed = 1;
};

inline std::string text_of(const Gemm& gemm) {
  constexpr const char* kinds[] = {"gemm_reduce_scatter", "gemm_all_reduce", "all_gather_gemm"};
  std::string text =
      concat(kinds[static_cast<int>(gemm.kind)], " ", name_of(gemm.dtype), " codec ", name_of(gemm.codec), " N ",
             gemm.N, " K ", gemm.K, " tiles of ", gemm.tile_columns, " blocks ", gemm.grid.communicating, " + ",
             gemm.grid.multiplying, gemm.bias ? " bias" : "", gemm.transposed ? " w transposed" : "",
             gemm.integers ? " integers" : "", " pieces of ", gemm.piece_rows, " seed ", gemm.seed, " rows");
  for (uint32_t rows : gemm.rows) text += concat(" ", rows);
  return text;
}

// Those of the library, or of kernels with a mistake.
struct FusedLaunches {
  decltype(&cuda::launch_gemm_reduce_scatter) reduce_scatter = cuda::launch_gemm_reduce_scatter;
  decltype(&cuda::launch_gemm_all_reduce) all_reduce = cuda::launch_gemm_all_reduce;
  decltype(&cuda::launch_all_gather_gemm) gather = cuda::launch_all_gather_gemm;
};

class PreparedGemm {
 public:
  PreparedGemm(const EmulatedGroup& group, const Gemm& gemm, const FusedLaunches& launches = {})
      : group_(group), gemm_(gemm), launches_(launches) {
    EXPECT(static_cast<int>(gemm.rows.size()) == group.ranks());
    for (uint32_t rows : gemm.rows) starts_.push_back(all_rows_), all_rows_ += rows;
    for (int r = 0; r < group.ranks(); ++r) prepare(r);
  }

  Call call(int rank, uint32_t piece = 0) const {
    Call call{};
    call.op = gathers()                        ? Op::AllGatherGemm
              : gemm_.kind == Fused::AllReduce ? Op::GemmAllReduce
                                               : Op::GemmReduceScatter;
    call.dtype = gemm_.dtype, call.codec = gemm_.codec, call.reduce_op = gathers() ? ReduceOp::None : ReduceOp::Sum;
    call.numel = uint64_t{all_rows_} * (gathers() ? gemm_.K : gemm_.N), call.shape_hash = 4711;
    call.brings = brings(rank);
    call.heap_offset = cuda::kNotInHeap;
    call.piece = piece;
    return call;
  }

  uint32_t pieces() const {
    const uint32_t largest = *std::max_element(gemm_.rows.begin(), gemm_.rows.end());
    return gemm_.piece_rows == 0 ? 1 : std::max(1u, (largest + gemm_.piece_rows - 1) / gemm_.piece_rows);
  }

  cudaError_t launch(int rank, cudaStream_t stream) const {
    for (uint32_t piece = 0; piece < pieces(); ++piece) {
      const cudaError_t error = launch(rank, stream, call(rank, piece), gemm_.grid);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // One piece, that of the call.
  cudaError_t launch(int rank, cudaStream_t stream, const Call& call, FusedGrid grid) const {
    const RowCut cut = cut_of(call.piece);
    const GemmOperands operands = operands_of(rank, cut);
    const Operands& mine = *operands_[static_cast<size_t>(rank)];
    const uint32_t first = cut.first[rank], start = starts_[static_cast<size_t>(rank)];
    switch (gemm_.kind) {
      case Fused::ReduceScatter:
        return launches_.reduce_scatter(group_.peers(rank), call, operands,
                                        mine.y->data() + size_t{first - start} * gemm_.N * 2, cut, grid, stream);
      case Fused::AllReduce:
        return launches_.all_reduce(group_.peers(rank), call, operands, mine.y->data(), cut, grid, stream);
      default:
        return launches_.gather(group_.peers(rank), call, mine.x->data() + (first - start) * x_stride() * 2, x_stride(),
                                mine.x_whole->data(), operands, mine.y->data(), cut, grid, stream);
    }
  }

  // The first piece of the same call, cut in another way or taken for another kind, as a rank would that disagrees.
  cudaError_t launch_cut(int rank, cudaStream_t stream, uint32_t piece_rows, uint32_t tile_columns) const {
    PreparedGemm other(*this);
    other.gemm_.piece_rows = piece_rows, other.gemm_.tile_columns = tile_columns;
    return other.launch(rank, stream, call(rank), gemm_.grid);
  }
  cudaError_t launch_as(Fused kind, int rank) const {
    PreparedGemm other(*this);
    other.gemm_.kind = kind;
    return other.launch(rank, nullptr, call(rank), gemm_.grid);
  }

  void check() const {
    for (int rank = 0; rank < group_.ranks(); ++rank) {
      if (gathers()) check_whole(rank);
      if (!gemm_.decades) check_products(rank);
    }
    if (gemm_.kind != Fused::AllReduce) return;
    for (int rank = 1; rank < group_.ranks(); ++rank) {
      EXPECT(output(rank) == output(0), text_of(gemm_), ": ranks 0 and ", rank, " hold other bits");
    }
  }

  bool is_right() const {
    try {
      check();
    } catch (const Failure&) {
      return false;
    }
    return true;
  }

  void check_untouched() const {
    for (int rank = 0; rank < group_.ranks(); ++rank) {
      EXPECT(is_blank(output(rank)), text_of(gemm_), ": y of rank ", rank, " was written");
      if (gathers()) {
        EXPECT(is_blank(operands_[static_cast<size_t>(rank)]->x_whole->values()), text_of(gemm_), ": x_whole");
      }
    }
  }

  Bytes output(int rank) const { return operands_[static_cast<size_t>(rank)]->y->values(); }
  uint32_t all_rows() const { return all_rows_; }

 private:
  static constexpr char kBlank = 'x';

  // Device memory of a rank, and the values of x and w as they are read.
  struct Operands {
    std::unique_ptr<DeviceBytes> x, w, bias, x_whole, y;
    std::vector<double> x_values, w_values, bias_values;
  };

  bool gathers() const { return gemm_.kind == Fused::Gather; }
  uint32_t x_stride() const { return gemm_.K + gemm_.padding; }
  bool is_transposed(int rank) const { return gemm_.transposed && rank % 2 == 0; }
  uint32_t w_stride(int rank) const { return (is_transposed(rank) ? gemm_.N : gemm_.K) + gemm_.padding; }
  uint32_t rows_of(int rank) const { return gemm_.rows[static_cast<size_t>(rank)]; }
  uint32_t brings(int rank) const { return gathers() ? rows_of(rank) * gemm_.K : 0; }
  static bool is_blank(const Bytes& bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](char byte) { return byte == kBlank; });
  }

  // rows x stride random values of which the first `columns` of a row count; the others are NaN.
  Bytes random_matrix(uint32_t rows, uint32_t columns, uint32_t stride, std::mt19937_64& random,
                      std::vector<double>& values) const {
    Bytes bytes(size_t{rows} * stride * 2);
    std::normal_distribution<double> normal;
    for (size_t row = 0; row < rows; ++row) {
      for (size_t column = 0; column < stride; ++column) {
        const double value = gemm_.integers ? static_cast<double>(random() % 3) - 1 : normal(random);
        put(gemm_.dtype, bytes, row * stride + column, column < columns ? value : NAN);
        if (column < columns) values.push_back(value_at(gemm_.dtype, bytes, row * stride + column));
      }
    }
    return bytes;
  }

  // Beyond what block exponents keep: from 2^-48 (fp16: its smallest number) to 2^12, the same for `count` values,
  // which lie `stride` apart; the next ones begin `next` further on.
  void spread(Bytes& bytes, size_t count, size_t stride, size_t next, std::mt19937_64& random, bool with_nan) const {
    const int lowest = gemm_.dtype == DType::BF16 ? -48 : -24;
    const size_t lines = next == 1 ? gemm_.K : gemm_.N;
    for (size_t line = 0; line < lines; ++line) {
      const int exponent = lowest + static_cast<int>(random() % static_cast<uint64_t>(13 - lowest));
      for (size_t k = 0; k < count; ++k) {
        const size_t i = line * next + k * stride;
        put(gemm_.dtype, bytes, i, std::ldexp(value_at(gemm_.dtype, bytes, i), exponent));
      }
    }
    if (with_nan && count > 0) put(gemm_.dtype, bytes, (lines - 1) * next, NAN);
  }

  // The rows of a rank that are gathered, without padding: what is unpacked of them on all ranks.
  Bytes as_all_have_it(int rank) const {
    const Bytes padded = operands_[static_cast<size_t>(rank)]->x->values();
    Bytes rows;
    for (size_t row = 0; row < rows_of(rank); ++row) {
      const auto first = padded.begin() + static_cast<ptrdiff_t>(row * x_stride() * 2);
      rows.insert(rows.end(), first, first + static_cast<ptrdiff_t>(size_t{gemm_.K} * 2));
    }
    const Wire& wire = wire_of(gemm_.dtype, gemm_.codec, ReduceOp::None);
    return decoded(wire, encoded(wire, rows), size_t{rows_of(rank)} * gemm_.K);
  }

  void prepare(int rank) {
    std::mt19937_64 random(gemm_.seed * 1009 + static_cast<uint64_t>(rank));
    operands_.push_back(std::make_shared<Operands>());
    Operands& mine = *operands_.back();
    const uint32_t rows = gathers() ? rows_of(rank) : all_rows_;
    const uint32_t y_rows = gemm_.kind == Fused::ReduceScatter ? rows_of(rank) : all_rows_;
    const auto put_there = [&](const Bytes& bytes) { return std::make_unique<DeviceBytes>(rank, bytes); };
    Bytes x = random_matrix(rows, gemm_.K, x_stride(), random, mine.x_values);
    if (gemm_.decades && gathers()) spread(x, rows, x_stride(), 1, random, rank == 0);
    mine.x = put_there(x);
    if (gemm_.codec != Codec::None && gathers()) {
      const Bytes known = as_all_have_it(rank);
      for (size_t i = 0; i < mine.x_values.size(); ++i) mine.x_values[i] = value_at(gemm_.dtype, known, i);
    }
    if (is_transposed(rank)) {
      mine.w = put_there(random_matrix(gemm_.K, gemm_.N, w_stride(rank), random, mine.w_values));
      const std::vector<double> lies = mine.w_values;
      for (size_t i = 0; i < lies.size(); ++i) mine.w_values[i] = lies[i % gemm_.K * gemm_.N + i / gemm_.K];
    } else {
      Bytes w = random_matrix(gemm_.N, gemm_.K, w_stride(rank), random, mine.w_values);
      if (gemm_.decades && !gathers()) spread(w, gemm_.K, 1, w_stride(rank), random, rank == 0);
      mine.w = put_there(w);
    }
    const bool has_bias = gemm_.bias && (gathers() || rank == 0);
    if (has_bias) mine.bias = put_there(random_matrix(1, gemm_.N, gemm_.N, random, mine.bias_values));
    if (gathers()) mine.x_whole = put_there(Bytes(size_t{all_rows_} * gemm_.K * 2, kBlank));
    mine.y = put_there(Bytes(size_t{y_rows} * gemm_.N * 2, kBlank));
  }

  RowCut cut_of(uint32_t piece) const {
    RowCut cut{};
    for (int r = 0; r < group_.ranks(); ++r) {
      const uint32_t rows = rows_of(r), begin = std::min(rows, piece * gemm_.piece_rows);
      cut.first[r] = starts_[static_cast<size_t>(r)] + begin;
      cut.count[r] = gemm_.piece_rows == 0 ? rows : std::min(gemm_.piece_rows, rows - begin);
      cut.brings[r] = brings(r);
    }
    return cut;
  }

  GemmOperands operands_of(int rank, const RowCut& cut) const {
    const Operands& mine = *operands_[static_cast<size_t>(rank)];
    GemmOperands operands{};
    operands.N = gemm_.N, operands.K = gemm_.K, operands.tile_columns = gemm_.tile_columns;
    operands.bias = mine.bias == nullptr ? nullptr : mine.bias->data();
    const size_t w_bytes = size_t{w_stride(rank)} * 2;
    operands.w_transposed = is_transposed(rank);
    operands.w = operands.w_transposed
                     ? cuda::tensor_map_of(gemm_.dtype, mine.w->data(), gemm_.K, gemm_.N, w_bytes, cuda::kTileDepth)
                     : cuda::tensor_map_of(gemm_.dtype, mine.w->data(), gemm_.N, gemm_.K, w_bytes, gemm_.tile_columns);
    for (int r = 0; r < group_.ranks(); ++r) {
      if (cut.count[r] == 0) continue;
      const bool from_whole = gathers() && (r != rank || gemm_.codec != Codec::None);
      const char* const base = from_whole ? mine.x_whole->data() : mine.x->data();
      const size_t row = cut.first[r] - (gathers() && !from_whole ? starts_[static_cast<size_t>(r)] : 0);
      const size_t stride = size_t{from_whole ? gemm_.K : x_stride()} * 2;
      operands.x[r] =
          cuda::tensor_map_of(gemm_.dtype, base + row * stride, cut.count[r], gemm_.K, stride, cuda::kTileRows);
      for (uint32_t slot = 0; slot < 2; ++slot) {
        const cuda::StoredRows to =
            gathers() ? cuda::StoredRows{gemm_.dtype, mine.y->data() + size_t{cut.first[r]} * gemm_.N * 2, gemm_.N * 2u}
                      : cuda::stored_rows(group_.peers(rank), cut, slot, r, gemm_.dtype, gemm_.codec, gemm_.N);
        operands.y[slot][r] =
            cuda::tensor_map_of(to.dtype, to.first, cut.count[r], gemm_.N, to.row_bytes, cuda::kTileRows);
      }
    }
    return operands;
  }

  // x_whole has the bits of all parts, as the CPU packs them.
  void check_whole(int rank) const {
    const Bytes whole = operands_[static_cast<size_t>(rank)]->x_whole->values();
    for (int r = 0; r < group_.ranks(); ++r) {
      const Bytes part = as_all_have_it(r);
      const auto first = whole.begin() + static_cast<ptrdiff_t>(starts_[static_cast<size_t>(r)] * size_t{gemm_.K} * 2);
      const Bytes got(first, first + static_cast<ptrdiff_t>(part.size()));
      std::string where;
      EXPECT(gemm_.codec == Codec::None ? got == part : same_values(gemm_.dtype, got, part, &where), text_of(gemm_),
             ": x_whole of rank ", rank, ", rows of rank ", r, ", ", where);
    }
  }

  // The sum of products that rank `of` makes of a row, and of their absolute values.
  std::pair<double, double> product(const Operands& x, size_t row, const Operands& w, size_t column) const {
    const double* const a = x.x_values.data() + row * gemm_.K;
    const double* const b = w.w_values.data() + column * gemm_.K;
    double sum = 0, size = 0;
    for (size_t k = 0; k < gemm_.K; ++k) sum += a[k] * b[k], size += std::fabs(a[k] * b[k]);
    return {sum, size};
  }

  void check_products(int rank) const {
    const Bytes y = output(rank);
    const size_t rows = y.size() / 2 / gemm_.N;
    const size_t first = gemm_.kind == Fused::ReduceScatter ? starts_[static_cast<size_t>(rank)] : 0;
    for (size_t row = 0; row < rows; ++row) {
      for (size_t column = 0; column < gemm_.N; ++column) {
        const double got = value_at(gemm_.dtype, y, row * gemm_.N + column);
        const auto [value, tolerance] = expected(rank, first + row, column);
        if (std::fabs(got - value) <= tolerance) continue;  // a text is made only for what is wrong
        EXPECT(false, text_of(gemm_), " over ", group_.ranks(), " ranks: rank ", rank, ", row ", first + row,
               ", column ", column, ": ", got, " is not ", value, " +- ", tolerance);
      }
    }
  }

  double rounded(double value) const {
    Bytes bytes(2);
    put(gemm_.dtype, bytes, 0, value);
    return value_at(gemm_.dtype, bytes, 0);
  }

  // Of y[row, column], and how far rounding may lead from it: each product is summed in fp32 and rounded, so is the
  // sum.
  std::pair<double, double> expected(int rank, size_t row, size_t column) const {
    const double unit = gemm_.dtype == DType::BF16 ? std::ldexp(1, -8) : std::ldexp(1, -11);
    double sum = 0, of_sums = 0, of_products = 0;
    for (int r = 0; r < group_.ranks(); ++r) {
      if (gathers() && (row < starts_[static_cast<size_t>(r)] || row >= starts_[static_cast<size_t>(r)] + rows_of(r)))
        continue;
      const Operands& x = *operands_[static_cast<size_t>(r)];
      const Operands& w = *operands_[static_cast<size_t>(gathers() ? rank : r)];
      auto [value, size] = product(x, gathers() ? row - starts_[static_cast<size_t>(r)] : row, w, column);
      if (!w.bias_values.empty()) value += w.bias_values[column];
      sum += gemm_.integers ? rounded(value) : value;
      of_sums += std::fabs(value), of_products += size;
    }
    if (gemm_.integers) return {rounded(sum), 0.0};
    const double in_fp32 = (gemm_.K + 8) * std::ldexp(1, -23) * of_products;
    return {sum, unit * (of_sums + std::fabs(sum)) * (1 + unit) + in_fp32 + 1e-6};
  }

  const EmulatedGroup& group_;
  Gemm gemm_;
  FusedLaunches launches_;
  std::vector<uint32_t> starts_;
  uint32_t all_rows_ = 0;
  std::vector<std::shared_ptr<Operands>> operands_;
};

// Launches on every rank what the steps do, in their order and without a wait in between.
using Launch = std::function<cudaError_t(int rank, cudaStream_t stream)>;
inline void run_launches(const EmulatedGroup& group, const std::vector<Launch>& steps, const std::string& what) {
  emu::run_ranks(group.ranks(), [&](int rank) {
    cudaStream_t stream;
    EXPECT(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    for (const Launch& step : steps) EXPECT(step(rank, stream) == cudaSuccess, what, " did not launch");
    EXPECT(cudaStreamSynchronize(stream) == cudaSuccess, what);
  });
  expect_no_reports(what);
  group.expect_no_failure();
}

// All of them one after the other, then the checks.
inline void run_gemms(const EmulatedGroup& group, const std::vector<Gemm>& gemms) {
  std::vector<std::unique_ptr<PreparedGemm>> prepared;
  std::vector<Launch> steps;
  for (const Gemm& gemm : gemms) {
    prepared.push_back(std::make_unique<PreparedGemm>(group, gemm));
    steps.push_back([one = prepared.back().get()](int rank, cudaStream_t stream) { return one->launch(rank, stream); });
  }
  run_launches(group, steps, text_of(gemms[0]));
  for (const auto& one : prepared) one->check();
}

}  // namespace tpk::testing
