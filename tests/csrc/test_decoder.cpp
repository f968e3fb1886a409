// Steps of whole layers against the same in double, token by token, and prompts against their tokens, on one rank.
#include "cpu/decoder.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "core/codec/half.h"
#include "expect.h"

using namespace tpk;

namespace {

using Doubles = std::vector<double>;

constexpr size_t kWidth = 24, kHeadDim = 6, kQueryHeads = 4, kKvHeads = 2, kInner = 40, kMaxLength = 9;
constexpr float kEps = 1e-5f, kScale = 0.3f;

Doubles random_values(size_t n, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, 0.3f);
  Doubles values(n);
  for (double& value : values) value = normal(random);
  return values;
}

std::vector<float> floats(const Doubles& values) { return {values.begin(), values.end()}; }

// x[K] @ w[N, K].T + bias
Doubles multiply(const Doubles& x, const Doubles& w, const Doubles& bias = {}) {
  Doubles y(w.size() / x.size());
  for (size_t n = 0; n < y.size(); ++n) {
    y[n] = bias.empty() ? 0.0 : bias[n];
    for (size_t k = 0; k < x.size(); ++k) y[n] += x[k] * w[n * x.size() + k];
  }
  return y;
}

Doubles normalise(const Doubles& x, const Doubles& weight) {
  double mean = 0.0;
  for (double value : x) mean += value * value / static_cast<double>(x.size());
  Doubles y(x);
  for (size_t j = 0; j < x.size(); ++j) y[j] = x[j] / std::sqrt(mean + static_cast<double>(kEps)) * weight[j];
  return y;
}

void rotate(Doubles& heads, const Doubles& cos, const Doubles& sin) {
  const Doubles x = heads;
  for (size_t i = 0; i < heads.size(); ++i) {
    const size_t j = i % kHeadDim, half = kHeadDim / 2;
    heads[i] = x[i] * cos[j] + (j < half ? -x[i + half] : x[i - half]) * sin[j];
  }
}

struct Layer {
  Doubles input_norm, q, k, v, q_bias, k_bias, v_bias, o, post_norm, gate, up, down;

  explicit Layer(unsigned seed)
      : input_norm(random_values(kWidth, seed)),
        q(random_values(kQueryHeads * kHeadDim * kWidth, seed + 1)),
        k(random_values(kKvHeads * kHeadDim * kWidth, seed + 2)),
        v(random_values(kKvHeads * kHeadDim * kWidth, seed + 3)),
        q_bias(random_values(kQueryHeads * kHeadDim, seed + 4)),
        k_bias(random_values(kKvHeads * kHeadDim, seed + 5)),
        v_bias(random_values(kKvHeads * kHeadDim, seed + 6)),
        o(random_values(kWidth * kQueryHeads * kHeadDim, seed + 7)),
        post_norm(random_values(kWidth, seed + 8)),
        gate(random_values(kInner * kWidth, seed + 9)),
        up(random_values(kInner * kWidth, seed + 10)),
        down(random_values(kWidth * kInner, seed + 11)) {}
};

// What came before in a sequence: keys and values of each token, rotated.
struct Past {
  std::vector<Doubles> keys, values;
};

Doubles step_in_double(const Layer& l, Doubles x, const Doubles& cos, const Doubles& sin, Past& past) {
  const Doubles n = normalise(x, l.input_norm);
  Doubles q = multiply(n, l.q, l.q_bias), k = multiply(n, l.k, l.k_bias);
  rotate(q, cos, sin);
  rotate(k, cos, sin);
  past.keys.push_back(k);
  past.values.push_back(multiply(n, l.v, l.v_bias));
  Doubles attended(q.size());
  for (size_t h = 0; h < kQueryHeads; ++h) {
    const size_t at = h / (kQueryHeads / kKvHeads) * kHeadDim;
    Doubles weights;
    double total = 0.0;
    for (const Doubles& key : past.keys) {
      double score = 0.0;
      for (size_t j = 0; j < kHeadDim; ++j) score += q[h * kHeadDim + j] * key[at + j];
      weights.push_back(std::exp(score * static_cast<double>(kScale)));
      total += weights.back();
    }
    for (size_t t = 0; t < weights.size(); ++t) {
      for (size_t j = 0; j < kHeadDim; ++j) attended[h * kHeadDim + j] += weights[t] / total * past.values[t][at + j];
    }
  }
  const Doubles added = multiply(attended, l.o);
  for (size_t j = 0; j < kWidth; ++j) x[j] += added[j];
  const Doubles m = normalise(x, l.post_norm), gate = multiply(m, l.gate), up = multiply(m, l.up);
  Doubles inner(kInner);
  for (size_t j = 0; j < kInner; ++j) inner[j] = gate[j] / (1.0 + std::exp(-gate[j])) * up[j];
  const Doubles more = multiply(inner, l.down);
  for (size_t j = 0; j < kWidth; ++j) x[j] += more[j];
  return x;
}

// A layer's weights and cache in float.
struct Stored {
  std::vector<std::vector<float>> weights;
  std::vector<float> keys, values;
  DecoderLayer layer{};

  Stored(const Layer& l, size_t slots)
      : keys(slots * kKvHeads * kMaxLength * kHeadDim, std::numeric_limits<float>::quiet_NaN()), values(keys) {
    for (const Doubles* w : {&l.input_norm, &l.q, &l.k, &l.v, &l.q_bias, &l.k_bias, &l.v_bias, &l.o, &l.post_norm,
                             &l.gate, &l.up, &l.down}) {
      weights.push_back(floats(*w));
    }
    const auto at = [&](size_t i) { return weights[i].data(); };
    layer.input_norm = at(0), layer.q = at(1), layer.k = at(2), layer.v = at(3);
    layer.q_bias = at(4), layer.k_bias = at(5), layer.v_bias = at(6), layer.o = at(7);
    layer.post_norm = at(8), layer.gate = at(9), layer.up = at(10), layer.down = at(11);
    layer.keys = keys.data(), layer.values = values.data();
    layer.query_heads = kQueryHeads, layer.kv_heads = kKvHeads, layer.inner = kInner;
    layer.input_eps = layer.post_eps = kEps, layer.scale = kScale;
  }
};

void serially(size_t n, size_t, const std::function<void(size_t, size_t)>& body) { body(0, n); }
// As many threads would: small pieces, the last one first.
void in_pieces(size_t n, size_t, const std::function<void(size_t, size_t)>& body) {
  for (size_t end = n; end > 0;) {
    const size_t begin = end > 3 ? end - 3 : 0;
    body(begin, end);
    end = begin;
  }
}

// Tokens of one step: of which slot, where, what, and their embeddings.
struct Tokens {
  std::vector<int64_t> slots, positions;
  std::vector<float> x, cos, sin;

  // At random, but the same for the same place.
  void add(int64_t slot, int64_t position) {
    slots.push_back(slot);
    positions.push_back(position);
    const unsigned seed = static_cast<unsigned>(1000 * slot + 10 * position);
    const auto append = [](std::vector<float>& to, const Doubles& values) {
      to.insert(to.end(), values.begin(), values.end());
    };
    append(x, random_values(kWidth, seed + 1));
    append(cos, random_values(kHeadDim, seed + 2));
    append(sin, random_values(kHeadDim, seed + 3));
  }
};

std::vector<float> run(Communicator& comm, const Tokens& tokens, const std::vector<Stored>& stored,
                       const std::vector<float>& last_norm, const ParallelFor& parallel_for) {
  std::vector<float> y(tokens.slots.size() * kWidth);
  std::vector<DecoderLayer> layers;
  for (const Stored& s : stored) layers.push_back(s.layer);
  const size_t slots = stored[0].keys.size() / (kKvHeads * kMaxLength * kHeadDim);
  const DecoderStep step{DType::F32,
                         tokens.slots.size(),
                         kWidth,
                         kHeadDim,
                         slots,
                         kMaxLength,
                         tokens.slots.data(),
                         tokens.positions.data(),
                         tokens.cos.data(),
                         tokens.sin.data(),
                         last_norm.data(),
                         kEps,
                         tokens.x.data(),
                         y.data()};
  decode_step(comm, step, layers, parallel_for);
  return y;
}

// Sequences of different lengths, each token against double; what is behind a sequence in the cache is NaN.
void check(size_t rows, const ParallelFor& parallel_for) {
  const auto comm = make_local("decoder", "decoder");
  const std::vector<Layer> layers{Layer(100), Layer(200)};
  std::vector<Stored> stored;
  for (const Layer& layer : layers) stored.emplace_back(layer, rows);
  std::vector<std::vector<Past>> past(layers.size(), std::vector<Past>(rows));
  const Doubles last_norm = random_values(kWidth, 7);
  const std::vector<float> last = floats(last_norm);
  for (size_t turn = 0; turn < kMaxLength; ++turn) {
    const size_t going = turn < 4 ? rows : (rows + 1) / 2;  // the others have ended
    Tokens tokens;
    for (size_t m = 0; m < going; ++m) tokens.add(static_cast<int64_t>(m), static_cast<int64_t>(turn));
    const std::vector<float> y = run(*comm, tokens, stored, last, parallel_for);
    for (size_t m = 0; m < going; ++m) {
      const auto part = [&](const std::vector<float>& of, size_t n) {
        return Doubles(of.begin() + static_cast<ptrdiff_t>(m * n), of.begin() + static_cast<ptrdiff_t>((m + 1) * n));
      };
      Doubles want = part(tokens.x, kWidth);
      for (size_t i = 0; i < layers.size(); ++i) {
        want = step_in_double(layers[i], want, part(tokens.cos, kHeadDim), part(tokens.sin, kHeadDim), past[i][m]);
      }
      want = normalise(want, last_norm);
      double largest = 0.0;
      for (double value : want) largest = std::max(largest, std::fabs(value));
      for (size_t j = 0; j < kWidth; ++j) {
        const double found = static_cast<double>(y[m * kWidth + j]);
        EXPECT(std::fabs(found - want[j]) <= 1e-5 * largest, "rows ", rows, " turn ", turn, ": y[", m, ", ", j,
               "] = ", found, ", exactly ", want[j]);
      }
    }
  }
}

}  // namespace

CASE(steps_are_those_in_double_whatever_the_rows_and_the_threads) {
  for (size_t rows : {1, 2, 5, 8, 19}) {
    check(rows, serially);
    check(rows, in_pieces);
  }
}

CASE(prompts_have_the_bits_of_their_tokens_one_by_one_whatever_is_beside_them) {
  const auto comm = make_local("decoder", "decoder");
  const std::vector<Layer> layers{Layer(100), Layer(200)};
  const std::vector<float> last = floats(random_values(kWidth, 7));
  const std::vector<int64_t> lengths{5, 1, static_cast<int64_t>(kMaxLength), 3};
  const auto fresh = [&] {
    std::vector<Stored> stored;
    for (const Layer& layer : layers) stored.emplace_back(layer, lengths.size());
    return stored;
  };
  std::vector<Stored> one_by_one = fresh(), together = fresh();
  Tokens all;
  std::vector<float> want;
  for (size_t slot = 0; slot < lengths.size(); ++slot) {
    for (int64_t position = 0; position < lengths[slot]; ++position) {
      Tokens one;
      one.add(static_cast<int64_t>(slot), position);
      all.add(static_cast<int64_t>(slot), position);
      const std::vector<float> y = run(*comm, one, one_by_one, last, serially);
      want.insert(want.end(), y.begin(), y.end());
    }
  }
  EXPECT(want.size() == 18 * kWidth);
  for (const ParallelFor& parallel_for : {ParallelFor(serially), ParallelFor(in_pieces)}) {
    const std::vector<float> got = run(*comm, all, together, last, parallel_for);
    EXPECT(std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0);
    for (size_t i = 0; i < layers.size(); ++i) {
      EXPECT(std::memcmp(together[i].keys.data(), one_by_one[i].keys.data(), together[i].keys.size() * sizeof(float)) ==
             0);
    }
  }
}

CASE(rows_slots_and_positions_out_of_range_are_refused) {
  const auto comm = make_local("decoder", "decoder");
  const float values[kWidth] = {};
  float y[kWidth];
  const auto refused = [&](size_t rows, int64_t slot, int64_t position, const char* text) {
    const DecoderStep step{DType::F32, rows,   kWidth, kHeadDim, 2,    kMaxLength, &slot,
                           &position,  values, values, values,   kEps, values,     y};
    try {
      decode_step(*comm, step, {}, serially);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what()).find(text) != std::string::npos;
    }
    return false;
  };
  EXPECT(refused(0, 0, 0, "one row or more, got 0"));
  EXPECT(refused(1, 0, -1, "positions must be in [0, 9), got -1"));
  EXPECT(refused(1, 0, kMaxLength, "positions must be in [0, 9), got 9"));
  EXPECT(refused(1, -1, 0, "slots must be in [0, 2), got -1"));
  EXPECT(refused(1, 2, 0, "slots must be in [0, 2), got 2"));
}
