// Products of a warpgroup: asked for, made when they are waited for.
#include <bit>

#include "async.h"
#include "ptx_tables.h"
#include "report.h"

namespace tpk::emu {
namespace {

constexpr size_t kKeptProducts = 32;
constexpr uint32_t kFirstWarp = 1024;  // agents of warps are numbered from here, those of barriers from 0

// What sums hold until they are waited for: a NaN that no arithmetic makes.
constexpr uint32_t kInFlight = 0x7fc0'f117;

// The words of an operand, of 16 bytes, by the bits of its descriptor (PTX ISA, matrix descriptor format): 0-13 where
// it starts and 32-45 the distance from 8 lines to the next 8, both without their lowest 4 bits; 49-51 how far the
// pattern of the swizzle is off; 62-63 the swizzle, where 1 is that of 128 bytes. A line is a row of the operand and a
// word 8 values of K; of a transposed one a line is a value of K and a word 8 rows, of which 16-29 say how far it is
// from 64 to the next 64. Of others they mean nothing.
//
// The swizzle is read from the table in the PTX ISA, not by the formula by which tiles land (async.h): a mistake in one
// of them is a wrong product.
class Operand {
 public:
  Operand(uint64_t descriptor, bool transposed, Where where)
      : start_((descriptor & 0x3fff) << 4),
        leading_((descriptor >> 16 & 0x3fff) << 4),
        stride_((descriptor >> 32 & 0x3fff) << 4) {
    const uint64_t layout = descriptor >> 62, offset = descriptor >> 49 & 7;
    const uint64_t unused = uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3ff} << 52;
    if (layout != 1 || offset != 0) misuse("an operand that is not in rows of 128 swizzled bytes", where);
    if ((descriptor & unused) != 0) misuse("an operand with bits that mean nothing", where);
    // Of the pattern, whose rows are 8 times 128 bytes, a start within the first row is one along K.
    const bool starts =
        transposed ? start_ % 1024 == 0 && leading_ % 1024 == 0 : start_ % 1024 < 128 && start_ % 128 + 32 <= 128;
    if (!starts || stride_ % 1024 != 0) misuse("an operand whose rows begin where its swizzle does not", where);
  }
  const char* word(uint32_t line, uint32_t number, Where where) const {
    const uintptr_t word = start_ % 128 / 16 + number;
    const uintptr_t pattern = start_ / 1024 * 1024 + word / 8 * leading_ + line / 8 * stride_;
    const char* const at = shared_base() + pattern + line % 8 * 128 + testing::kSwizzle128[line % 8][word % 8] * 16;
    if (!lies_in_shared(at, 16)) misuse("an operand that reaches beyond the block's shared memory", where);
    return at;
  }

 private:
  uintptr_t start_, leading_, stride_;
};

// Lines and words of an operand.
struct Words {
  uint32_t first_line, lines, first_word, words;
};
Words words_of_rows(uint32_t first, uint32_t rows, bool transposed) {
  return transposed ? Words{0, 16, first / 8, rows / 8} : Words{first, rows, 0, 2};
}

// [k][row]
void decode(uint64_t descriptor, bool transposed, uint32_t first, uint32_t rows, float (*value)(uint16_t),
            std::vector<float>& to, Where where) {
  const Operand operand(descriptor, transposed, where);
  const Words part = words_of_rows(first, rows, transposed);
  to.resize(size_t{rows} * 16);
  for (uint32_t line = 0; line < part.lines; ++line) {
    for (uint32_t word = 0; word < part.words; ++word) {
      uint16_t bits[8];
      std::memcpy(bits, operand.word(part.first_line + line, part.first_word + word, where), sizeof bits);
      for (uint32_t i = 0; i < 8; ++i) {
        to[transposed ? line * rows + word * 8 + i : (word * 8 + i) * rows + line] = value(bits[i]);
      }
    }
  }
}

// What a warp multiplies, read when the first of its lanes makes the product: on the hardware they all do at once.
const Decoded& decoded(uint32_t warp, size_t number, const Product& asked, Where where) {
  std::deque<Decoded>& of_warp = async().warps[warp].decoded;
  for (const Decoded& known : of_warp) {
    if (known.number == number) return known;
  }
  if (of_warp.size() >= kKeptProducts) of_warp.pop_front();
  of_warp.emplace_back();
  Decoded& fresh = of_warp.back();
  fresh.number = number;
  decode(asked.a, false, warp % 4 * 16, 16, asked.value, fresh.a, where);
  decode(asked.b, asked.b_transposed, 0, static_cast<uint32_t>(asked.columns), asked.value, fresh.b, where);
  return fresh;
}

// This thread's share: rows lane / 4 and 8 more of its warp's 16, columns 2 (lane % 4) and the next of every 8.
void make(const Product& asked, size_t number, std::vector<float>& sums, Where where) {
  const Thread& thread = *current_thread();
  const uint32_t lane = thread.lane(), columns = static_cast<uint32_t>(asked.columns);
  const Decoded& operands = decoded(thread.number / 32, number, asked, where);
  float* const d = sums.data();
  if (!asked.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
  for (uint32_t k = 0; k < 16; ++k) {
    const float upper = operands.a[k * 16 + lane / 4], lower = operands.a[k * 16 + lane / 4 + 8];
    const float* const column = operands.b.data() + k * columns + 2 * (lane % 4);
    for (uint32_t j = 0; j < columns / 8; ++j) {
      d[4 * j] += upper * column[8 * j], d[4 * j + 1] += upper * column[8 * j + 1];
      d[4 * j + 2] += lower * column[8 * j], d[4 * j + 3] += lower * column[8 * j + 1];
    }
  }
}

// ---- for the race detector: operands are read from when they are asked for until they are waited for ----------------

WarpProducts& watched_warp() {
  Thread& thread = *current_thread();
  const uint32_t warp = thread.number / 32;
  WarpProducts& mine = async().warps[warp];
  if (mine.agent == nullptr) {
    mine.agent = &agent_of(*thread.block, kFirstWarp + warp, "products of a warp");
    mine.before = mine.agent->last;
  }
  return mine;
}

// Once for each warp. Of b, which all four read, a quarter stands for the warp.
void watch(const Product& asked, size_t number, int group, Where where) {
  if (detector() == nullptr) return;
  Thread& thread = *current_thread();
  WarpProducts& warp = watched_warp();
  if (number < warp.watched) return;
  warp.watched = number + 1;
  warp.agent->last = warp.before + static_cast<uint32_t>(group) + 1;
  const Clock clock = clock_of(*warp.agent);
  const auto reads = [&](uint64_t descriptor, bool transposed, uint32_t first, uint32_t rows) {
    const Operand operand(descriptor, transposed, where);
    const Words read = words_of_rows(first, rows, transposed);
    for (uint32_t line = read.first_line; line < read.first_line + read.lines; ++line) {
      for (uint32_t word = read.first_word; word < read.first_word + read.words; ++word)
        detector()->async_access(thread, clock, operand.word(line, word, where), 16, false, where);
    }
  };
  const uint32_t part = thread.number / 32 % 4, columns = static_cast<uint32_t>(asked.columns) / 4;
  reads(asked.a, false, part * 16, 16);
  reads(asked.b, asked.b_transposed, part * columns, columns);
}

void know_products(int groups) {
  if (detector() == nullptr || groups <= 0) return;
  const WarpProducts& warp = watched_warp();
  current_thread()->memory.clock.join({nullptr, warp.agent->id, warp.before + static_cast<uint32_t>(groups)});
}

// The sums of which nothing is on its way any more are there.
void finish(Products& mine, Where where) {
  for (auto it = mine.sums.begin(); it != mine.sums.end();) {
    auto& [d, sums] = *it;
    const bool waits = std::any_of(mine.asked.begin(), mine.asked.end(),
                                   [d = d](const Products::Asked& asked) { return asked.product.d == d; });
    if (waits) {
      ++it;
      continue;
    }
    const bool untouched =
        std::all_of(d, d + sums.size(), [](const float& value) { return std::bit_cast<uint32_t>(value) == kInFlight; });
    if (!untouched) misuse("sums that were written to before their products were waited for", where);
    std::copy(sums.begin(), sums.end(), d);
    it = mine.sums.erase(it);
  }
}

}  // namespace

void products_begin() { async().products[current_thread()].begun = true; }

void product(const Product& asked, Where where) {
  Async& state = async();
  Thread& thread = *current_thread();
  Products& mine = state.products[&thread];
  if (!mine.begun) misuse("a product that no products_begin comes before", where);
  std::vector<Request>& requests = state.requests[thread.number / 128];
  const Request now{asked.a, asked.b, asked.accumulate, asked.b_transposed, asked.columns, where.line()};
  if (mine.asked_for == requests.size()) requests.push_back(now);
  if (requests[mine.asked_for] != now) {
    report(Kind::Divergence,
           this_block().name() + ": threads of a warpgroup ask for different products at " + text_of(where));
    this_block().die(cudaErrorIllegalInstruction);
  }
  watch(asked, mine.asked_for++, mine.group, where);
  const auto count = static_cast<size_t>(asked.columns / 2);
  if (mine.sums.find(asked.d) == mine.sums.end()) {
    mine.sums[asked.d].assign(asked.d, asked.d + count);
    std::fill_n(asked.d, count, std::bit_cast<float>(kInFlight));
  }
  mine.asked.push_back({asked, mine.group});
}

void products_commit() { ++async().products[current_thread()].group; }

void products_wait(int groups_left, Where where) {
  Products& mine = async().products[current_thread()];
  const int groups = mine.group - groups_left;  // that are over then
  size_t done = 0;
  for (; done < mine.asked.size() && mine.asked[done].group < groups; ++done) {
    const Product& asked = mine.asked[done].product;
    make(asked, mine.made++, mine.sums[asked.d], where);
  }
  mine.asked.erase(mine.asked.begin(), mine.asked.begin() + static_cast<ptrdiff_t>(done));
  if (groups_left == 0 && !mine.asked.empty()) misuse("a wait for products that no products_commit has closed", where);
  // A warp waits as one: its lanes go on when the products of all of them are made.
  sync_warp(0xffffffffu, {}, finish_ballot, where);
  know_products(groups);
  finish(mine, where);
  if (mine.asked.empty()) mine.begun = false;
}

}  // namespace tpk::emu
