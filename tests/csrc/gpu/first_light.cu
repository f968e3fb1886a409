// First light: what a GPU does with every primitive that the kernels are made of, each alone, before any of them runs.
// Torch-free, one binary, a few seconds. Also built for emulated devices, where it is a test.
//
//   first_light              every check in a process of its own, so that one that fails or hangs takes no other along
//   first_light --here       all of them in this process, as a sanitizer needs it
//   first_light NAME ...     these alone, in this process
//   first_light --dry        no device: the references and the comparisons, each with a value that is wrong
//
// A check says nothing but "ok", or the first value that differs and what it should be. Exit code 1 when one fails.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/comm/runtime.h"
#include "cuda/comm/tensor_map.h"
#include "first_light_compare.h"
#include "first_light_kernels.cuh"

namespace tpk::first_light {
namespace {

constexpr unsigned kLimitS = 30;  // of a check, after which its process ends

// Values on the device; zero at first.
template <class T>
class Device {
 public:
  explicit Device(size_t n) : n_(n) {
    TPK_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), n * sizeof(T)));
    TPK_CUDA_CHECK(cudaMemset(data_, 0, n * sizeof(T)));
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    TPK_CUDA_CHECK(cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { static_cast<void>(cudaFree(data_)); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  T* get() const { return data_; }
  // When all that was launched is over.
  std::vector<T> values() const {
    TPK_CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<T> values(n_);
    TPK_CUDA_CHECK(cudaMemcpy(values.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t n_;
  T* data_ = nullptr;
};

template <class T>
void allow_shared(void (*kernel)(T), int bytes) {
  TPK_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// ---- launches, time, words ------------------------------------------------------------------------------------------

std::string check_threads() {
  const Device<uint32_t> out(8 * 96);
  TPK_CUDA_CHECK(TPK_LAUNCH(number_threads, 8, 96, 0, nullptr, out.get()));
  return difference("thread", out.values(), [](size_t i) { return static_cast<uint32_t>(3 * i + 1); });
}

std::string check_clock() {
  const Device<uint64_t> passed(1);
  TPK_CUDA_CHECK(TPK_LAUNCH(read_clock, 1, 1, 0, nullptr, passed.get()));
  const uint64_t ns = passed.values()[0];
  return ns >= 100'000 ? "" : concat("after 2^24 looks at it ", ns, " ns have passed: deadlines would never come");
}

std::string check_words() {
  constexpr uint32_t kThreads = 4 * 64;
  std::vector<Word16> words(kThreads);
  for (uint32_t i = 0; i < kThreads; ++i) words[i] = {i, i + 1000, i + 2000, i + 3000};
  const Device<Word16> from(words), by_cache(kThreads), by_link(kThreads);
  const Device<uint32_t> count(1);
  TPK_CUDA_CHECK(TPK_LAUNCH(move_words, 4, 64, 0, nullptr, from.get(), by_cache.get(), by_link.get(), count.get()));
  for (const Device<Word16>* moved : {&by_cache, &by_link}) {
    const std::vector<Word16> got = moved->values();
    for (uint32_t i = 0; i < kThreads; ++i) {
      if (got[i].x != i || got[i].y != i + 1000 || got[i].z != i + 2000 || got[i].w != i + 3000)
        return concat("word ", i, moved == &by_cache ? "" : " past the cache", " is ", got[i].x, " ", got[i].y, " ",
                      got[i].z, " ", got[i].w);
    }
  }
  const uint32_t counted = count.values()[0];
  return counted == kThreads ? "" : concat(kThreads, " threads were counted as ", counted);
}

std::string check_conversions() {
  constexpr uint32_t kCount = 1 << 16;
  // Of every exponent and sign, ties and their neighbours, infinities, NaNs.
  std::vector<float> values(kCount);
  std::mt19937 random(1);
  for (uint32_t i = 0; i < kCount; ++i) {
    const uint32_t half = to_float(static_cast<Half>(i)) == 0 ? 0 : bits_of(to_float(static_cast<Half>(i)));
    values[i] = from_bits(i % 4 == 0 ? half + 0x1000u : i % 4 == 1 ? half + 0xfffu : i % 4 == 2 ? half : random());
  }
  const Device<float> floats(kCount), from(values);
  const Device<uint16_t> back(kCount);
  const Device<uint32_t> halves(kCount), bfloats(kCount);
  TPK_CUDA_CHECK(TPK_LAUNCH(convert, kCount / 256, 256, 0, nullptr, floats.get(), back.get(), from.get(), halves.get(),
                            bfloats.get()));
  const std::vector<float> widened = floats.values();
  for (uint32_t i = 0; i < kCount; ++i) {
    const uint32_t got = bits_of(widened[i]), wanted = bits_of(to_float(static_cast<Half>(i)));
    if (got != wanted) return concat("half with bits ", i, " has the bits ", got, " as a float, not ", wanted);
  }
  std::string found = difference("float number", back.values(),
                                 [&](size_t i) { return static_cast<uint16_t>(from_float<Half>(values[i])); });
  if (found.empty()) found = pair_difference<Half>("half", values, halves.values());
  if (found.empty()) found = pair_difference<Bfloat16>("bfloat16", values, bfloats.values());
  return found;
}

// ---- flags between ranks --------------------------------------------------------------------------------------------

std::string check_flags(uint32_t ranks) {
  constexpr uint32_t kThreads = 64, kRounds = 50;
  const Device<uint32_t> data(ranks * kThreads), came(ranks * 32), taken(ranks * 32), wrong(ranks * 3 * kThreads);
  std::vector<cudaStream_t> streams(ranks);
  for (cudaStream_t& stream : streams) TPK_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  TPK_CUDA_CHECK(cudaDeviceSynchronize());
  for (uint32_t r = 0; r < ranks; ++r) {
    const uint32_t next = (r + 1) % ranks, previous = (r + ranks - 1) % ranks;
    const RankArgs args{data.get() + r * kThreads,
                        data.get() + next * kThreads,
                        came.get() + r * 32,
                        came.get() + next * 32,
                        taken.get() + r * 32,
                        taken.get() + previous * 32,
                        r,
                        ranks,
                        kRounds,
                        wrong.get() + r * 3 * kThreads};
    TPK_CUDA_CHECK(TPK_LAUNCH(pass_round, 1, kThreads, 0, streams[r], args));
  }
  const std::vector<uint32_t> found = wrong.values();
  for (const cudaStream_t stream : streams) TPK_CUDA_CHECK(cudaStreamDestroy(stream));
  for (uint32_t r = 0; r < ranks; ++r) {
    const auto first = found.begin() + r * 3 * kThreads;
    const std::string of_rank = wrong_round({first, first + 3 * kThreads});
    if (!of_rank.empty()) return concat("rank ", r, " of ", ranks, ": ", of_rank);
  }
  return "";
}

std::string check_flags_of_all() {
  for (uint32_t ranks : {2u, 4u, 8u}) {
    const std::string found = check_flags(ranks);
    if (!found.empty()) return found;
  }
  return "";
}

// ---- threads of a block ---------------------------------------------------------------------------------------------

std::string check_transactions() {
  constexpr uint32_t kRounds = 9;
  const Device<uint32_t> sums(128);
  TPK_CUDA_CHECK(TPK_LAUNCH(meet_by_transactions, 1, 128, 0, nullptr, sums.get(), kRounds));
  return difference("sum of thread", sums.values(), [](size_t t) {
    const auto other = static_cast<uint32_t>((t / 32 + 1) % 4);
    return kRounds * (kRounds - 1) / 2 * 10 + kRounds * other;
  });
}

std::string check_warps() {
  const Device<uint32_t> chosen(384), heard(384), largest(384);
  TPK_CUDA_CHECK(TPK_LAUNCH(meet_by_name, 1, 384, 0, nullptr, chosen.get(), heard.get(), largest.get()));
  const std::vector<uint32_t> elected = chosen.values();
  for (size_t warp = 0; warp < 12; ++warp) {
    uint32_t count = 0;
    for (size_t lane = 0; lane < 32; ++lane) count += elected[warp * 32 + lane];
    if (count != 1) return concat("of warp ", warp, " ", count, " lanes were elected, not 1");
  }
  std::string found = difference("largest of the warp of thread", largest.values(), [](size_t t) {
    uint32_t most = 0;
    for (size_t lane = 0; lane < 32; ++lane) {
      const auto value = static_cast<uint32_t>((t / 32 * 32 + lane) * 7 % 61);
      most = value > most ? value : most;
    }
    return most;
  });
  if (found.empty())
    found = difference("what thread heard", heard.values(),
                       [](size_t t) { return static_cast<uint32_t>((t ^ 32) + 1000); });
  return found;
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

std::string check_tile() {
  constexpr int32_t kMatrixRows = 200, kColumns = 136;
  std::vector<uint16_t> matrix(static_cast<size_t>(kMatrixRows * kColumns));
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  const Device<uint16_t> x(matrix), tile(128 * 64);
  const Device<uint32_t> late(1);
  // The last one lies outside as a whole, as the last columns of a transposed w may.
  constexpr int32_t kPlaces[][2] = {{0, 0}, {64, 64}, {128, 128}, {-16, -8}, {256, 192}};
  for (const auto& [row, column] : kPlaces) {
    const TileArgs args{tensor_map_of(DType::BF16, x.get(), kMatrixRows, kColumns, kColumns * 2, 128), tile.get(),
                        late.get(), column, row};
    TPK_CUDA_CHECK(TPK_LAUNCH(dump_tile, 1, 64, 128 * 128 + 1024, nullptr, args));
    if (late.values()[0] != 0) return concat("the tile at row ", row, ", column ", column, " never came");
    const std::string found = tile_difference(tile.values(), matrix, kMatrixRows, kColumns, row, column);
    if (!found.empty()) return found;
  }
  return "";
}

// ---- products -------------------------------------------------------------------------------------------------------

template <class T>
std::vector<T> rounded(const std::vector<double>& values) {
  std::vector<T> made;
  for (double value : values) made.push_back(from_float<T>(static_cast<float>(value)));
  return made;
}

template <class T, int N, bool transposed>
std::string check_product(const char* what, Filled filled, uint32_t rows, uint32_t K) {
  const Factors of = factors(filled, rows, N, K);
  const Device<T> x(rounded<T>(of.x)), w(rounded<T>(transposed ? of.transposed_w() : of.w));
  const Device<float> y(kRows * N);
  const Device<uint32_t> late(1);
  constexpr DType dtype = std::is_same_v<T, Half> ? DType::F16 : DType::BF16;
  constexpr int kBytes = static_cast<int>(kStages * (kRows + N) * kDepth * 2 + 1024);
  const auto kernel = multiply_tile<T, N, transposed>;
  allow_shared(kernel, kBytes);
  const ProductArgs args{tensor_map_of(dtype, x.get(), rows, K, size_t{K} * 2, kRows),
                         transposed ? tensor_map_of(dtype, w.get(), K, N, size_t{N} * 2, kDepth)
                                    : tensor_map_of(dtype, w.get(), N, K, size_t{K} * 2, N),
                         y.get(), late.get(), K};
  TPK_CUDA_CHECK(TPK_LAUNCH(kernel, 1, 160, kBytes, nullptr, args));
  const uint32_t who = late.values()[0];
  if (who != 0) return concat(what, ": ", who == 1 ? "no stage was given back" : "no stage came");
  return product_difference(what, of, y.values());
}

template <class T, int N, bool transposed>
std::string check_products_of(const char* what) {
  std::string found = check_product<T, N, transposed>(what, Filled::WithColumns, kRows, 64);
  if (found.empty()) found = check_product<T, N, transposed>(what, Filled::WithDepths, kRows, 64);
  if (found.empty()) found = check_product<T, N, transposed>(what, Filled::AtRandom, 50, 328);
  return found;
}

template <bool transposed>
std::string check_products() {
  std::string found = check_products_of<Bfloat16, 128, transposed>("bf16");
  if (found.empty()) found = check_products_of<Bfloat16, 256, transposed>("bf16");
  if (found.empty()) found = check_products_of<Half, 128, transposed>("fp16");
  if (found.empty()) found = check_products_of<Half, 256, transposed>("fp16");
  return found;
}

std::string check_gather() {
  const Device<uint16_t> x(8 * 64);
  const Device<uint32_t> written(1), loaded(1), wrong(3 * 64);
  const GatherArgs args{
      tensor_map_of(DType::BF16, x.get(), 8, 64, 128, 8), x.get(), written.get(), loaded.get(), wrong.get(), 60};
  TPK_CUDA_CHECK(TPK_LAUNCH(write_and_load, 2, 64, 2048, nullptr, args));
  return wrong_round(wrong.values());
}

std::string check_bulk() {
  constexpr uint32_t kWords = kPieces * kPieceWords;
  const Device<uint32_t> from(kWords), first(kWords), second(kWords), written(1), copied(1), wrong(3 * 64);
  const BulkArgs args{from.get(), first.get(), second.get(), written.get(), copied.get(), wrong.get(), 60};
  TPK_CUDA_CHECK(TPK_LAUNCH(write_and_copy, 2, 64, 2 * kPieceWords * 4 + 1024, nullptr, args));
  return wrong_round(wrong.values());
}

// A tile at the edges of a matrix of [200, 136] values of 2 bytes, or of as many bytes: what lies outside stays.
std::string check_store(DType dtype, int32_t row, int32_t column) {
  constexpr uint16_t kUntouched = 0x5555;
  const StoredTile tile = stored_tile(200, 136, row, column);
  const Device<uint16_t> image(tile.image), y(std::vector<uint16_t>(200 * 136, kUntouched));
  const Device<uint32_t> places(tile.places), stored(1), seen(1), wrong(3 * 128);
  const int32_t values = dtype == DType::U8 ? 2 : 1;  // of the map, in 2 bytes
  const StoreArgs args{tensor_map_of(dtype, y.get(), 200, static_cast<uint64_t>(136 * values), 272, 128),
                       image.get(),
                       places.get(),
                       y.get(),
                       stored.get(),
                       seen.get(),
                       wrong.get(),
                       20,
                       column * values,
                       row};
  TPK_CUDA_CHECK(TPK_LAUNCH(store_and_read, 2, 128, 128 * 128 + 1024, nullptr, args));
  const std::string found = wrong_round(wrong.values());
  return found.empty() ? stored_over(tile, y.values(), kUntouched) : found;
}

std::string check_stores() {
  for (DType dtype : {DType::BF16, DType::U8}) {
    for (const auto& [row, column] : {std::pair{0, 0}, {64, 64}, {128, 128}}) {
      const std::string found = check_store(dtype, row, column);
      if (!found.empty())
        return concat(dtype == DType::U8 ? "bytes" : "values", " at row ", row, ", column ", column, ": ", found);
    }
  }
  return "";
}

// ---- all of them ----------------------------------------------------------------------------------------------------

struct Check {
  const char* name;
  std::string (*run)();
};

constexpr Check kChecks[] = {
    {"threads", check_threads},
    {"clock", check_clock},
    {"words", check_words},
    {"conversions", check_conversions},
    {"flags", check_flags_of_all},
    {"transactions", check_transactions},
    {"warps", check_warps},
    {"tile", check_tile},
    {"products", check_products<false>},
    {"transposed", check_products<true>},
    {"gather", check_gather},
    {"bulk", check_bulk},
    {"store", check_stores},
};

// A line for people; "E " is where scripts/gpu_check.py looks for the reason.
bool report(const Check& check) {
  std::string found;
  try {
    found = check.run();
  } catch (const std::exception& error) {
    found = error.what();
  }
  if (found.empty()) {
    std::printf("ok  %s\n", check.name);
  } else {
    std::printf("E   %s: %s\n", check.name, found.c_str());
  }
  std::fflush(stdout);
  return found.empty();
}

bool report_apart(const char* program, const Check& check) {
  const pid_t child = fork();
  if (child == 0) {
    execl(program, program, check.name, static_cast<char*>(nullptr));
    _exit(127);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return std::printf("E   %s: no process\n", check.name), false;
  if (WIFSIGNALED(status))
    std::printf("E   %s: ended by signal %d%s\n", check.name, WTERMSIG(status),
                WTERMSIG(status) == SIGALRM ? ", it did not end by itself" : "");
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int run(const std::vector<std::string>& arguments, const char* program) {
  if (arguments.size() == 1 && arguments[0] == "--dry") {
    const bool all = run_dry();
    std::printf("%zu checks, %s\n", std::size(kChecks), all ? "the host's half of them holds" : "E   dry");
    return all ? 0 : 1;
  }
  const bool apart = arguments.empty(), here = arguments.size() == 1 && arguments[0] == "--here";
  size_t asked = 0, held = 0;
  for (const Check& check : kChecks) {
    bool wanted = apart || here;
    for (const std::string& name : arguments) wanted |= name == check.name;
    if (!wanted) continue;
    if (!apart) alarm(kLimitS);
    ++asked, held += apart ? report_apart(program, check) : report(check);
  }
  if (apart || here) std::printf("%zu of %zu primitives do what they should\n", held, asked);
  return asked > 0 && held == asked ? 0 : 1;
}

}  // namespace
}  // namespace tpk::first_light

int main(int count, char** arguments) {
  return tpk::first_light::run({arguments + 1, arguments + count}, "/proc/self/exe");
}
