// Embedding and cross entropy on emulated devices, each rank with its shard, against plain loops over the whole.
#include <algorithm>
#include <limits>
#include <memory>

#include "cpu/loops/softmax.h"
#include "emu_local.h"

using namespace tpk;
using namespace tpk::testing;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool is_slow() { return emu::detects_races(); }

// Ids as the ops take them, at any place.
DeviceBytes on_device(const std::vector<int64_t>& ids, bool are_64) {
  Bytes bytes(ids.size() * (are_64 ? 8 : 4));
  for (size_t i = 0; i < ids.size(); ++i) {
    const int32_t narrow = static_cast<int32_t>(ids[i]);
    std::memcpy(bytes.data() + i * (are_64 ? 8 : 4), are_64 ? static_cast<const void*>(&ids[i]) : &narrow,
                are_64 ? 8 : 4);
  }
  return DeviceBytes(0, bytes);
}

std::vector<int64_t> random_ids(size_t n, int64_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int64_t> ids(n);
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % static_cast<uint64_t>(size));
  return ids;
}

DeviceBytes zero_count() { return DeviceBytes(0, Bytes(sizeof(uint32_t))); }
uint32_t* count_of(const DeviceBytes& bytes) { return reinterpret_cast<uint32_t*>(bytes.data()); }

// A cut of the vocabulary, even or not: the first id of each rank, and the end.
using Starts = std::vector<int64_t>;

// ---- embedding

void check_embedding(size_t row_bytes, size_t tokens, bool are_64, size_t shift) {
  const int64_t size = 11, start = 3, shard = 5;
  const std::vector<int64_t> ids = random_ids(tokens, size, row_bytes + tokens);
  const Bytes table = random_values(DType::U8, static_cast<size_t>(shard) * row_bytes, row_bytes);
  const DeviceBytes ids_on = on_device(ids, are_64), table_on(0, table, shift), bad = zero_count();
  const DeviceBytes out(0, Bytes(tokens * row_bytes, 'x'), shift);
  EXPECT(cuda::launch_embedding(ids_on.data(), are_64, table_on.data(), out.data(), tokens, row_bytes, start, shard,
                                size, count_of(bad), nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  Bytes want(tokens * row_bytes);
  for (size_t i = 0; i < tokens; ++i) {
    if (ids[i] < start || ids[i] >= start + shard) continue;
    const size_t at = static_cast<size_t>(ids[i] - start) * row_bytes;
    std::copy_n(table.begin() + static_cast<long>(at), row_bytes, want.begin() + static_cast<long>(i * row_bytes));
  }
  EXPECT(out.values() == want, "rows of ", row_bytes, " bytes, ", tokens, " tokens, shift ", shift);
  EXPECT(*count_of(bad) == 0);
  expect_no_reports("embedding");
}

void check_embedding_backward(DType dtype, size_t tokens, size_t width, size_t shift) {
  const int64_t size = 13, start = 4, shard = 6;
  std::vector<int64_t> ids = random_ids(tokens, size, tokens + width);
  for (size_t i = 0; i < tokens; i += 3) ids[i] = 5;  // one id of many tokens
  std::vector<int64_t> order(tokens), sorted(tokens);
  for (size_t i = 0; i < tokens; ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return ids[static_cast<size_t>(a)] < ids[static_cast<size_t>(b)]; });
  for (size_t i = 0; i < tokens; ++i) sorted[i] = ids[static_cast<size_t>(order[i])];
  const size_t places = static_cast<size_t>(shard) * width;
  const Bytes dy = random_values(dtype, tokens * width, width, true);
  const DeviceBytes dy_on(0, dy, shift * size_of(dtype)), sorted_on = on_device(sorted, true);
  const DeviceBytes order_on = on_device(order, true), gradient(0, Bytes(places * size_of(dtype), 'x'), size_of(dtype));
  EXPECT(cuda::launch_embedding_backward(dtype, dy_on.data(), reinterpret_cast<const int64_t*>(sorted_on.data()),
                                         reinterpret_cast<const int64_t*>(order_on.data()), gradient.data(), tokens,
                                         width, start, shard, nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  std::vector<float> sums(places);
  std::vector<double> wide(places);
  for (size_t i = 0; i < tokens; ++i) {
    if (ids[i] < start || ids[i] >= start + shard) continue;
    for (size_t j = 0; j < width; ++j) {
      const double value = value_at(dtype, dy, i * width + j);
      const size_t to = static_cast<size_t>(ids[i] - start) * width + j;
      sums[to] += static_cast<float>(value), wide[to] += value;
    }
  }
  if (dtype != DType::F64) wide.assign(sums.begin(), sums.end());
  std::string where;
  const bool same = same_values(dtype, gradient.values(), bytes_of(dtype, wide), &where);
  EXPECT(same, name_of(dtype), " ", tokens, " tokens of ", width, ": ", where);
  expect_no_reports("embedding_backward");
}

// ---- loss: all ranks' shards one after the other on one device

struct Loss {
  DType dtype;
  size_t tokens;
  Starts starts;
  double smoothing = 0.0;
  bool are_64 = true;
  size_t shift = 0;
  int64_t ignore_index = -100;
  std::vector<double> logits = {};  // [tokens, size]
  std::vector<int64_t> targets = {};

  int64_t size() const { return starts.back(); }
  size_t ranks() const { return starts.size() - 1; }
  std::string text() const { return concat(name_of(dtype), " ", tokens, " tokens of ", size(), " over ", ranks()); }
};

Loss random_loss(DType dtype, size_t tokens, Starts starts, uint64_t seed) {
  Loss loss{.dtype = dtype, .tokens = tokens, .starts = std::move(starts)};
  const size_t n = tokens * static_cast<size_t>(loss.size());
  loss.logits = doubles(dtype, normal_values(dtype, n, seed, 3.0));
  loss.targets = random_ids(tokens, loss.size(), seed);
  for (size_t i = 0; i < tokens; i += 4) loss.targets[i] = loss.ignore_index;
  return loss;
}

Bytes logits_of(const Loss& loss, size_t rank) {
  const size_t size = static_cast<size_t>(loss.size()), start = static_cast<size_t>(loss.starts[rank]);
  const size_t end = static_cast<size_t>(loss.starts[rank + 1]);
  std::vector<double> mine;
  for (size_t i = 0; i < loss.tokens; ++i) {
    mine.insert(mine.end(), loss.logits.begin() + static_cast<long>(i * size + start),
                loss.logits.begin() + static_cast<long>(i * size + end));
  }
  return bytes_of(loss.dtype, mine);
}

// The stats of every rank, [R][tokens].
Bytes stats_of(const Loss& loss, uint32_t bad_expected) {
  Bytes all;
  for (size_t r = 0; r < loss.ranks(); ++r) {
    const int64_t start = loss.starts[r], shard = loss.starts[r + 1] - start;
    const DeviceBytes logits(0, logits_of(loss, r), loss.shift * size_of(loss.dtype)), bad = zero_count();
    const DeviceBytes targets = on_device(loss.targets, loss.are_64);
    const DeviceBytes stats(0, Bytes(loss.tokens * 4 * size_of(sum_dtype_of(loss.dtype)), 'x'));
    EXPECT(cuda::launch_row_stats(loss.dtype, logits.data(), targets.data(), loss.are_64, stats.data(), loss.tokens,
                                  static_cast<size_t>(shard), start, loss.size(), loss.ignore_index, count_of(bad),
                                  nullptr) == cudaSuccess);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    EXPECT(*count_of(bad) == bad_expected, "bad targets: ", *count_of(bad));
    const Bytes found = stats.values();
    all.insert(all.end(), found.begin(), found.end());
  }
  return all;
}

struct Combined {
  std::vector<double> loss, lse;
};

Combined combined(const Loss& loss, const Bytes& stats) {
  const DType sums = sum_dtype_of(loss.dtype);
  const DeviceBytes stats_on(0, stats), targets = on_device(loss.targets, loss.are_64);
  const DeviceBytes found(0, Bytes(loss.tokens * size_of(sums), 'x')), lse(0, Bytes(loss.tokens * sizeof(double), 'x'));
  EXPECT(cuda::launch_combine_stats(loss.dtype, stats_on.data(), static_cast<int>(loss.ranks()), targets.data(),
                                    loss.are_64, found.data(), lse.data(), loss.tokens, loss.size(), loss.ignore_index,
                                    loss.smoothing, nullptr) == cudaSuccess);
  EXPECT(cudaDeviceSynchronize() == cudaSuccess);
  return {doubles(sums, found.values()), doubles(DType::F64, lse.values())};
}

// The whole row in double.
double lse_of(const Loss& loss, size_t token) {
  const size_t size = static_cast<size_t>(loss.size());
  double largest = -kInfinity, sum = 0.0;
  for (size_t j = 0; j < size; ++j) largest = std::max(largest, loss.logits[token * size + j]);
  for (size_t j = 0; j < size; ++j) sum += std::exp(loss.logits[token * size + j] - largest);
  return largest + std::log(sum);
}

// Additions of a row, an exponential and a logarithm, relative to the size of the logits.
double bound_of(const Loss& loss) {
  double largest = 1.0;
  for (double logit : loss.logits) largest = std::max(largest, std::abs(logit));
  return (static_cast<double>(loss.size()) + 32) * sum_unit_of(loss.dtype) * largest;
}

void check_gradient(const Loss& loss, const Combined& found) {
  const DType sums = sum_dtype_of(loss.dtype);
  const std::vector<double> dloss = doubles(sums, normal_values(sums, loss.tokens, 77));
  const DeviceBytes dloss_on(0, bytes_of(sums, dloss)), lse_on(0, bytes_of(DType::F64, found.lse));
  const double uniform = loss.smoothing / static_cast<double>(loss.size());
  for (size_t r = 0; r < loss.ranks(); ++r) {
    const int64_t start = loss.starts[r], shard = loss.starts[r + 1] - start;
    const Bytes mine = logits_of(loss, r);
    const DeviceBytes logits(0, mine, loss.shift * size_of(loss.dtype)), targets = on_device(loss.targets, loss.are_64);
    const DeviceBytes gradient(0, Bytes(mine.size(), 'x'));
    for (const DeviceBytes* to : {&gradient, &logits}) {  // and in place
      EXPECT(cuda::launch_loss_gradient(loss.dtype, dloss_on.data(), logits.data(), targets.data(), loss.are_64,
                                        lse_on.data(), to->data(), loss.tokens, static_cast<size_t>(shard), start,
                                        loss.size(), loss.ignore_index, loss.smoothing, nullptr) == cudaSuccess);
    }
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    EXPECT(gradient.values() == logits.values(), "in place it is another gradient");
    const Bytes got = gradient.values();
    for (size_t i = 0; i < loss.tokens; ++i) {
      for (int64_t j = 0; j < shard; ++j) {
        const size_t at = i * static_cast<size_t>(shard) + static_cast<size_t>(j);
        const bool hot = start + j == loss.targets[i], ignored = loss.targets[i] == loss.ignore_index;
        const double chance = std::exp(value_at(loss.dtype, mine, at) - found.lse[i]);
        const double want = ignored ? 0.0 : dloss[i] * (chance - (hot ? 1 - loss.smoothing : 0.0) - uniform);
        const double off = std::abs(dloss[i]) * (bound_of(loss) + 2 * unit_of(loss.dtype)) + smallest_step(loss.dtype);
        expect_near(value_at(loss.dtype, got, at), want, off, loss.text() + ": gradient");
      }
    }
  }
}

void check_loss(const Loss& loss) {
  const Combined found = combined(loss, stats_of(loss, 0));
  const size_t size = static_cast<size_t>(loss.size());
  for (size_t i = 0; i < loss.tokens; ++i) {
    const double lse = lse_of(loss, i);
    double total = 0.0;
    for (size_t j = 0; j < size; ++j) total += loss.logits[i * size + j];
    const bool ignored = loss.targets[i] == loss.ignore_index;
    const double target = ignored ? 0.0 : loss.logits[i * size + static_cast<size_t>(loss.targets[i])];
    const double want = lse - (1 - loss.smoothing) * target - loss.smoothing / static_cast<double>(size) * total;
    expect_near(found.lse[i], lse, bound_of(loss), loss.text() + ": lse");
    expect_near(found.loss[i], ignored ? 0.0 : want, ignored ? 0.0 : 2 * bound_of(loss), loss.text() + ": loss");
  }
  check_gradient(loss, found);
  expect_no_reports(loss.text());
}

}  // namespace

CASE(rows_of_any_length_at_any_place_are_looked_up) {
  configure(1, 0);
  for (size_t row_bytes : {1, 2, 6, 16, 20, 1040, 0}) {
    for (size_t tokens : {0, 1, 9, 40}) {
      for (size_t shift : {0, 1, 2, 4}) check_embedding(row_bytes, tokens, tokens % 2 == 0, shift);
    }
  }
  emu::reset();
}

CASE(an_id_outside_the_vocabulary_is_counted_and_reads_nothing) {
  configure(1, 0);
  const std::vector<int64_t> ids = {0, -1, 4, 5, 1000000, 2};
  for (bool are_64 : {false, true}) {
    const DeviceBytes ids_on = on_device(ids, are_64), bad = zero_count(), out(0, Bytes(ids.size() * 4, 'x'));
    const DeviceBytes table(0, Bytes(5 * 4, 't'));
    EXPECT(cuda::launch_embedding(ids_on.data(), are_64, table.data(), out.data(), ids.size(), 4, 0, 5, 5,
                                  count_of(bad), nullptr) == cudaSuccess);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess && *count_of(bad) == 3, "counted ", *count_of(bad));
    for (size_t i = 0; i < ids.size(); ++i) {
      const bool known = ids[i] >= 0 && ids[i] < 5;
      EXPECT(out.values()[4 * i] == (known ? 't' : '\0'), "token ", i);
    }
  }
  expect_no_reports("bad ids");
  emu::reset();
}

CASE(gradients_of_rows_are_sums_in_token_order) {
  for (uint64_t seed : {0, 3}) {
    configure(1, seed);
    for (DType dtype : kFloating) {
      for (size_t width : {1, 8, 37, 1100}) {
        if (is_slow() && width > 100) continue;
        for (size_t tokens : {0, 1, 30, 101}) check_embedding_backward(dtype, tokens, width, seed == 0 ? 0 : 1);
      }
    }
    emu::reset();
  }
}

CASE(losses_of_any_cut_of_the_vocabulary) {
  const std::vector<Starts> cuts = {{0, 17}, {0, 9, 17}, {0, 0, 5, 5, 17}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, {0, 600, 1201}};
  uint64_t seed = 0;
  for (const Starts& starts : cuts) {
    configure(1, seed);
    for (DType dtype : kFloating) {
      for (double smoothing : {0.0, 0.1, 1.0}) {
        Loss loss = random_loss(dtype, starts.back() > 100 ? 3 : 6, starts, ++seed);
        loss.smoothing = smoothing, loss.are_64 = seed % 2 == 0, loss.shift = seed % 3;
        check_loss(loss);
      }
    }
    emu::reset();
  }
}

CASE(an_ignored_target_may_lie_inside_the_vocabulary) {
  configure(1, 0);
  Loss loss = random_loss(DType::F32, 8, {0, 3, 7}, 5);
  loss.ignore_index = 2, loss.targets[0] = 2, loss.targets[4] = 1;
  check_loss(loss);
  emu::reset();
}

CASE(extreme_logits_overflow_nothing_and_nan_is_seen) {
  configure(1, 0);
  for (DType dtype : {DType::F32, DType::BF16, DType::F64}) {
    Loss loss = random_loss(dtype, 6, {0, 6, 12}, 9);
    loss.targets = {1, 2, 11, 0, 3, loss.ignore_index};
    const std::vector<double> rows = {16384.0, -16384.0, -kInfinity, 0.0, 1.0, -kInfinity};
    for (size_t i = 0; i < loss.logits.size(); ++i) loss.logits[i] = rows[i / 12];
    loss.logits[2 * 12 + 11] = 4.0;  // on the other rank there is nothing but -inf
    loss.logits[3 * 12 + 7] = NAN, loss.logits[4 * 12 + 8] = kInfinity;
    const Combined found = combined(loss, stats_of(loss, 0));
    EXPECT(std::abs(found.loss[0] - std::log(12.0)) < 2e-3 && std::abs(found.loss[1] - std::log(12.0)) < 2e-3);
    EXPECT(found.loss[2] == 0.0 && std::isnan(found.loss[3]) && std::isnan(found.loss[4]), found.loss[2]);
    EXPECT(found.loss[5] == 0.0 && found.lse[5] == -kInfinity, "a row of nothing: ", found.lse[5]);
    expect_no_reports("extreme logits");
  }
  emu::reset();
}

CASE(a_target_outside_the_vocabulary_is_counted) {
  configure(1, 0);
  Loss loss = random_loss(DType::F16, 4, {0, 3, 7}, 5);
  loss.targets = {-1, 7, loss.ignore_index, 6};
  stats_of(loss, 2);
  expect_no_reports("bad targets");
  emu::reset();
}

// The largest logit and the target's are what the CPU finds, to the bit; sums have another order.
CASE(stats_are_those_of_the_cpu) {
  configure(1, 0);
  const Loss loss = random_loss(DType::BF16, 5, {0, 333}, 21);
  const Bytes logits = logits_of(loss, 0), found = stats_of(loss, 0);
  for (size_t i = 0; i < loss.tokens; ++i) {
    RowStats<float> got, want;
    std::memcpy(&got, found.data() + i * sizeof got, sizeof got);
    row_stats<Bfloat16>(reinterpret_cast<const Bfloat16*>(logits.data()) + i * 333, 333, true, &want);
    const double target = loss.targets[i] < 0 ? 0.0 : loss.logits[i * 333 + static_cast<size_t>(loss.targets[i])];
    EXPECT(got.largest == want.largest && got.target == static_cast<float>(target));
    expect_near(got.exponents, want.exponents, 400 * 0x1p-24 * want.exponents, "exponents");
    expect_near(got.total, want.total, 400 * 0x1p-24 * 3000, "total");
  }
  emu::reset();
}
