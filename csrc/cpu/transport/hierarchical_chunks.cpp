// Calls of transport `hierarchical` whose bytes the thread of the leaders moves between the hosts while the calling
// thread multiplies, or handles what has come.
//
// Inside     the calling threads of a host sum and gather over shared memory, in an order that depends on the chunks
//            alone. Every chunk is summed as soon as it is made; an all_reduce gathers its sums kLag chunks later, so
//            that chunks are under way meanwhile and no rank of the host waits for another's thread in between.
// Between    the sums of a host are the chunks of a stream (streams.h).
// Openings   those of the host come first. Those of all ranks are exchanged by the thread, beside the first product.
//            Where they differ, a host makes all chunks up to the point at which its ranks learn of it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "core/bytes.h"
#include "core/cuts.h"
#include "core/errors.h"
#include "cpu/chunks.h"
#include "hierarchical_parts.h"

namespace tpk {
namespace {

constexpr size_t kLag = 3;                       // chunks
constexpr size_t kGathered = size_t{512} << 10;  // bytes of a part that a host gathers at once
constexpr size_t kNone = SIZE_MAX;

}  // namespace

// A call that the thread moves.
struct HierarchicalCommunicator::Beside {
  Ready ready;                 // 1: the ranks have agreed; more: what the stream counts
  std::vector<char> openings;  // of all ranks
  bool has_come = false;       // whether they are
  std::function<void(const Opened&)> check = [](const Opened&) {};
};

void HierarchicalCommunicator::run_beside(const CallSpec& spec, const Wire& link, Beside& beside,
                                          const Leaders::Move& move, const std::function<void()>& work) {
  const HostOpening host = open_inside(spec);
  if (!host.agrees) open_between(spec, host);  // throws
  beside.openings = records_of(host);
  const auto call = [&] {
    struct End {
      Ready& ready;
      ~End() { ready.end(); }
    } end{beside.ready};
    outer_->exchange_openings(spec.op, ranks_of_hosts(), beside.openings.data(), {}, {});
    beside.has_come = true;
    Opened opened;
    compare(spec, beside.openings, opened);
    beside.check(opened);
    beside.ready.set(1);
    outer_->stream(spec.op, link, move);
  };
  try {
    if (leads()) {
      counted(*outer_, [&] { outer_->beside(spec.op, call, work); });
    } else {
      work();
    }
  } catch (const TimeoutFailure&) {
    throw;
  } catch (const PeerLost&) {
    throw;
  } catch (const RankMismatch&) {
    throw;
  } catch (const std::exception& error) {  // of the work: the others wait for what will not come
    const std::string why = concat(describe_call(spec.op), ": ", error.what());
    watch_->leave(call_ - 1);
    inner_->close(why);
    if (outer_ != nullptr) outer_->close(why);
    break_off(why);
    throw;
  }
}

bool HierarchicalCommunicator::has_agreed(const CallSpec& spec, Beside& beside) {
  const bool agreed = !leads() || beside.ready.wait_for(1);
  if (!agreed && !beside.has_come) return false;
  if (has_led()) tell_led(spec, beside.openings);
  Opened opened;
  if (!leads()) compare(spec, beside.openings, opened);
  return agreed;
}

bool HierarchicalCommunicator::cuts_parts() const {
  for (const std::vector<int>& ranks : hosts_) {
    if (ranks.size() != slices_) return false;
  }
  return true;
}

std::vector<std::vector<int>> HierarchicalCommunicator::parts_in_order() const {
  std::vector<std::vector<int>> order;
  for (size_t i = 1; i <= hosts_.size(); ++i) order.push_back(hosts_[(host_ + i) % hosts_.size()]);
  return order;
}

void HierarchicalCommunicator::do_all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                                                    const std::function<void()>& meanwhile) {
  if (wire.bytes(n) < kSmallestForThread) return Communicator::do_all_reduce_beside(spec, wire, data, n, meanwhile);
  do_all_reduce_chunks(spec, wire, {{{0, n}}, [&](size_t) { return data; }}, meanwhile);
}

void HierarchicalCommunicator::do_all_reduce_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks,
                                                    const std::function<void()>& meanwhile) {
  const Forms forms(wire, world_size());
  const Wire &sums = *forms.sums, &link = *forms.link;
  const bool sends_halves = forms.widens() && link.is_plain();
  struct Part {  // this rank's slice of a chunk
    Cut cut;     // of the chunk, over the leaders
    void* made = nullptr;
    std::optional<Scratch> slice, halves;
  };
  std::vector<Part> parts(chunks.list.size());
  Source source;
  size_t end = 0;  // of the slices so far
  for (size_t c = 0; c < parts.size(); ++c) {
    const size_t n = chunks.list[c].end - chunks.list[c].begin;
    const Cut over_slices = cut_at_blocks(n, static_cast<int>(slices_), link.block_values);
    Sizes sizes;
    for (size_t l = 0; l < slices_; ++l) sizes.push_back(over_slices.size(static_cast<int>(l)));
    parts[c].cut = over_leaders(sizes);
    const size_t mine = parts[c].cut.size(static_cast<int>(local_));
    source.list.push_back({end, end + mine});
    end += mine;
  }
  const auto size_of = [&](size_t c) { return source.list[c].end - source.list[c].begin; };

  Beside beside;
  std::atomic<size_t> num_made{0};
  source.wait_for = [&](size_t c, const std::function<void()>& idle) {
    outer_->wait_until_made([&] {
      idle();
      return num_made.load(std::memory_order_acquire) > c;
    });
    return Source::Made{Input(parts[c].slice->at(0)), (sends_halves ? parts[c].halves : parts[c].slice)->at(0)};
  };
  source.use = [&](size_t c) { beside.ready.set(c + 2); };
  const auto move = [&](Stream& stream) {
    if (sends_halves) stream.halves = forms.values;
    stream_all_reduce(stream, source, [] {});
  };
  const auto add = [&](size_t c) {
    Part& part = parts[c];
    const size_t n = part.cut.total();
    part.made = chunks.make(c);
    part.slice.emplace(size_of(c) * sums.value_bytes);
    if (forms.widens()) part.halves.emplace(size_of(c) * forms.values->value_bytes);
    const Scratch wide(forms.widens() ? n * sums.value_bytes : 0);
    if (forms.widens()) forms.widen(part.made, wide.at(0), n);
    scatter_from(*inner_, spec, sums, forms.widens() ? wide.at(0) : part.made, part.slice->at(0), part.cut);
    num_made.store(c + 1, std::memory_order_release);
    if (leads()) outer_->hand_over();
  };
  const auto finish = [&](size_t c) {
    Part& part = parts[c];
    if (c == 0 && !has_agreed(spec, beside)) return false;
    if (size_of(c) > 0 && !beside.ready.wait_for(c + 2)) return false;
    if (forms.widens() && !sends_halves) forms.narrow(part.slice->at(0), part.halves->at(0), size_of(c));
    gather_from(*inner_, spec, *forms.values, (forms.widens() ? part.halves : part.slice)->at(0), part.made, part.cut);
    chunks.use(c);
    return true;
  };
  const auto work = [&] {
    size_t finished = 0;
    for (size_t c = 0; c < parts.size(); ++c) {
      add(c);
      if (c >= kLag && !finish(finished++)) return;
    }
    meanwhile();
    while (finished < parts.size() && finish(finished)) ++finished;
  };
  guarded(spec.op, [&] { run_beside(spec, link, beside, move, work); });
}

void HierarchicalCommunicator::do_reduce_scatter_chunks(const CallSpec& spec, const Wire& wire, const Chunks& chunks,
                                                        void* out, const Cut& cut,
                                                        const std::function<void()>& meanwhile) {
  const Forms forms(wire, world_size());
  const size_t value = forms.sums->value_bytes, value_of_rank = forms.values->value_bytes;
  struct Round {  // chunks of parts of one host that are summed at once
    size_t host;
    Sizes chunks;  // by slice
    std::optional<Scratch> sum;
  };
  std::vector<std::pair<size_t, size_t>> places(static_cast<size_t>(world_size()));  // host and slice of each rank
  for (size_t h = 0; h < hosts_.size(); ++h) {
    for (size_t k = 0; k < hosts_[h].size(); ++k) places[static_cast<size_t>(hosts_[h][k])] = {h, k};
  }
  std::vector<Round> rounds;
  for (size_t c = 0, next = 0; c < chunks.list.size(); ++c) {
    const auto& [h, k] = places[static_cast<size_t>(chunks.list[c].part)];
    if (rounds.empty() || rounds.back().host != h || k < next) rounds.push_back({h, Sizes(slices_, kNone), {}});
    rounds.back().chunks[k] = c;
    next = k + 1;
  }
  Source source;
  Sizes round_of, of_hosts;  // of a chunk of this rank's slice; values of each host's part of it
  for (size_t i = 0; i < rounds.size(); ++i) {
    const size_t c = rounds[i].chunks[local_];
    if (c == kNone) continue;
    source.list.push_back({chunks.list[c].begin, chunks.list[c].end, static_cast<int>(rounds[i].host)});
    round_of.push_back(i);
  }
  for (const std::vector<int>& ranks : hosts_) of_hosts.push_back(cut.size(ranks[local_]));
  const Cut over_hosts = cut_of(of_hosts);

  Beside beside;
  std::atomic<size_t> num_made{0};
  const Scratch wide(forms.widens() ? cut.size(rank()) * value : 0);
  source.wait_for = [&](size_t c, const std::function<void()>& idle) {
    outer_->wait_until_made([&] {
      idle();
      return num_made.load(std::memory_order_acquire) > c;
    });
    void* const sum = rounds[round_of[c]].sum->at(0);
    return Source::Made{Input(sum), sum};
  };
  source.use = [&](size_t c) {
    const Chunks::Chunk& chunk = source.list[c];
    if (forms.widens()) {
      forms.narrow(wide.at(chunk.begin * value), at(out, chunk.begin * value_of_rank), chunk.end - chunk.begin);
    }
    chunks.use(rounds[round_of[c]].chunks[local_]);
  };
  const auto move = [&](Stream& stream) {
    stream_reduce_scatter(stream, source, forms.widens() ? wide.at(0) : out, over_hosts);
  };
  const auto add = [&](Round& round) {
    Sizes sizes;
    std::vector<char*> made;
    bool is_dense = !forms.widens();
    for (size_t c : round.chunks) {
      sizes.push_back(c == kNone ? 0 : chunks.list[c].end - chunks.list[c].begin);
      made.push_back(c == kNone ? nullptr : static_cast<char*>(chunks.make(c)));
      const size_t l = sizes.size() - 1;
      is_dense &= l == 0 || (c != kNone && made[l] == made[l - 1] + sizes[l - 1] * value);
    }
    const Cut slices = over_leaders(sizes);
    const Scratch ordered(is_dense ? 0 : slices.total() * value);
    for (size_t l = 0; l < slices_ && !is_dense; ++l) {
      if (sizes[l] > 0) forms.widen(made[l], ordered.at(slices.starts[l] * value), sizes[l]);
    }
    round.sum.emplace(sizes[local_] * value);
    scatter_from(*inner_, spec, *forms.sums, is_dense ? made[0] : ordered.at(0), round.sum->at(0), slices);
    if (round.chunks[local_] == kNone) return;
    num_made.fetch_add(1, std::memory_order_release);
    outer_->hand_over();
  };
  const auto work = [&] {
    for (Round& round : rounds) add(round);
    meanwhile();
  };
  guarded(spec.op, [&] { run_beside(spec, *forms.link, beside, move, work); });
}

// A rule of bytes alone: what a rank does beside it is its own affair.
bool HierarchicalCommunicator::gathers_in_pieces(const Wire& wire, const Cut& cut) const {
  size_t bytes = 0;
  for (int r = 0; r < world_size(); ++r) bytes += wire.bytes(cut.size(r));
  return forced_chunks != 1 && cuts_parts() && bytes >= kSmallestForThread && !gathers_in_one_exchange(bytes);
}

void HierarchicalCommunicator::do_all_gather_chunks(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                                    const Cut& cut, const std::vector<size_t>& ends,
                                                    const std::function<void()>& meanwhile,
                                                    const std::function<void(size_t)>& use) {
  guarded(spec.op, [&] {
    if (gathers_in_pieces(wire, cut)) return gather_in_pieces(spec, wire, in, out, cut, ends, meanwhile, use);
    gather_now(spec, wire, in, out, cut);
    meanwhile();
    for (size_t i = 0; i < ends.size(); ++i) use(i);
  });
}

// Parts are packed by their own ranks, and unpacked by all. Each leader gets those of its slice, piece by piece; a
// piece goes to the other ranks of the host when it has come to all leaders.
void HierarchicalCommunicator::gather_in_pieces(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                                const Cut& cut, const std::vector<size_t>& ends,
                                                const std::function<void()>& meanwhile,
                                                const std::function<void(size_t)>& use) {
  const auto bytes_to = [&](int r, size_t value) { return wire.bytes(std::min(value, cut.size(r))); };
  const size_t most = cut.largest();
  const Scratch packed(wire.is_plain() ? 0 : bytes_to(rank(), most));
  if (!wire.is_plain()) wire.encode(in, packed.at(0), cut.size(rank()));
  const void* const own = wire.is_plain() ? in : packed.at(0);
  Sizes of_hosts;  // of this rank's slice
  for (const std::vector<int>& ranks : hosts_) of_hosts.push_back(bytes_to(ranks[local_], most));
  const Cut hosts = cut_of(of_hosts);
  const Scratch slice(hosts.total());

  // Values [begin, end) of the parts of host h, from the ranks of this one.
  const auto spread = [&](size_t h, const void* mine, size_t begin, size_t end) {
    Sizes sizes;
    for (int r : hosts_[h]) sizes.push_back(bytes_to(r, end) - bytes_to(r, begin));
    const Cut slices = cut_of(sizes);
    const Scratch all(slices.total());
    gather_from(*inner_, spec, bytes_wire(), mine, all.at(0), slices);
    for (size_t l = 0; l < slices_; ++l) {
      const int r = hosts_[h][l];
      if (sizes[l] == 0) continue;
      wire.decode(all.at(slices.starts[l]), at(out, (cut.start(r) + begin) * wire.value_bytes),
                  std::min(end, cut.size(r)) - begin);
    }
  };
  Beside beside;
  beside.check = [&](const Opened& opened) { check_parts(spec, opened.specs, cut); };
  const auto move = [&](Stream& stream) {
    stream_all_gather(stream, Input(own), slice.at(0), hosts, [&](size_t bytes) { beside.ready.set(1 + bytes); });
  };
  const auto work = [&] {
    spread(host_, own, 0, most);
    meanwhile();
    const size_t step = std::max(wire.values_in(kGathered), wire.block_values);
    size_t used = 0;
    for (size_t begin = 0; begin < most; begin += step) {
      const size_t end = std::min(begin + step, most);
      if (!beside.ready.wait_for(1 + std::min(wire.bytes(end), hosts.largest()))) return;
      for (size_t h = 0; h < hosts_.size(); ++h) {
        if (h != host_) spread(h, slice.at(hosts.starts[h] + bytes_to(hosts_[h][local_], begin)), begin, end);
      }
      for (; used < ends.size() && std::min(ends[used], most) <= end; ++used) use(used);
    }
  };
  run_beside(spec, bytes_wire(), beside, move, work);
}

}  // namespace tpk
