#include "hierarchical_transport.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <map>
#include <numeric>
#include <utility>

#include "core/bytes.h"
#include "core/check.h"
#include "core/cuts.h"
#include "core/errors.h"
#include "hierarchical_parts.h"

namespace tpk {
namespace {

size_t sum_of(const std::vector<size_t>& sizes) { return std::accumulate(sizes.begin(), sizes.end(), size_t{0}); }

}  // namespace

// Passes what the connections show to the watch of all ranks, which knows these by their numbers.
class HierarchicalCommunicator::OuterWatch final : public SocketExchange::Watch {
 public:
  explicit OuterWatch(HierarchicalCommunicator& group) : group_(group) {}
  void look(uint64_t, bool late, bool ended, const std::string&) override {
    try {
      group_.watch_->look(group_.call_, late, ended, ended ? "a connection between hosts ended" : "a host is silent");
    } catch (...) {
      group_.found_ = std::current_exception();
      throw;
    }
  }
  void leave(uint64_t) noexcept override {}

 private:
  HierarchicalCommunicator& group_;
};

HierarchicalCommunicator::HierarchicalCommunicator(std::string name, std::string label, int rank, int world_size,
                                                   double timeout_s, Hosts hosts, std::shared_ptr<Communicator> inner,
                                                   std::vector<int> sockets, size_t capacity,
                                                   std::unique_ptr<SocketExchange::Watch> watch)
    : Communicator(std::move(name), std::move(label), rank, world_size, timeout_s),
      hosts_(std::move(hosts)),
      inner_(std::move(inner)),
      watch_(std::move(watch)) {
  slices_ = hosts_[0].size();
  inline_bytes_ = std::clamp(kMostInputs / static_cast<size_t>(world_size), kLeastInline, kMostInline);
  for (const std::vector<int>& ranks : hosts_) slices_ = std::min(slices_, ranks.size());
  for (size_t h = 0; h < hosts_.size(); ++h) {
    in_slice_.emplace_back(slices_);
    for (size_t k = 0; k < hosts_[h].size(); ++k) {
      in_slice_[h][k % slices_].push_back(hosts_[h][k]);
      if (hosts_[h][k] == rank) std::tie(host_, local_) = {h, k};
    }
  }
  TPK_CHECK(inner_->world_size() == static_cast<int>(here().size()) && inner_->rank() == static_cast<int>(local_),
            "Group.open: the ranks of this host do not fit");
  if (!leads()) return;
  const int leader = static_cast<int>(host_), num_hosts = static_cast<int>(hosts_.size());
  outer_ = std::make_unique<Leaders>(this->name() + "/hosts", this->label(), leader, num_hosts, timeout_s,
                                     std::make_unique<SocketExchange>(std::move(sockets), leader, capacity, timeout_s,
                                                                      std::make_unique<OuterWatch>(*this)));
}

HierarchicalCommunicator::~HierarchicalCommunicator() = default;

void HierarchicalCommunicator::set_timeout(double timeout_s) {
  Communicator::set_timeout(timeout_s);
  inner_->set_timeout(timeout_s);
}

void HierarchicalCommunicator::do_close() {
  watch_->leave(call_);  // first, so that a rank that finds the others closed also finds the reason
  inner_->close();
  if (outer_ != nullptr) outer_->close();
}

void HierarchicalCommunicator::do_abort() {
  inner_->abort("this rank aborted the group");
  if (outer_ != nullptr) outer_->abort("this rank aborted the group");
}

void HierarchicalCommunicator::fail(Op op, bool late) {
  if (is_aborted()) throw PeerLost(concat(describe_call(op), ": this rank aborted the group."));
  std::exception_ptr why = found_;
  try {
    if (why == nullptr)
      watch_->look(call_, late, true, late ? "a rank of this host is silent" : "a rank left its host");
  } catch (...) {
    why = std::current_exception();
  }
  const auto leave = [&](bool was_late) {
    inner_->give_up(was_late);
    const std::string closing = "a call of the group failed";
    inner_->close(closing);
    if (outer_ != nullptr) outer_->close(closing);
  };
  try {
    if (why != nullptr) std::rethrow_exception(why);
  } catch (const TimeoutFailure& error) {
    leave(true);
    throw TimeoutFailure(concat(describe_call(op), ": ", error.what()));
  } catch (const PeerLost& error) {
    leave(false);
    throw PeerLost(concat(describe_call(op), ": ", error.what()));
  }
  leave(late);
  throw PeerLost(concat(describe_call(op), ": a rank was lost."));
}

void HierarchicalCommunicator::gather_from(Communicator& part, const CallSpec& spec, const Wire& wire, const void* in,
                                           void* out, const Cut& cut) {
  const CallSpec own{
      spec.op, wire.dtype, ReduceOp::None, wire.codec, cut.total(), 0, static_cast<int64_t>(cut.size(part.rank()))};
  counted(part, [&] { part.all_gather(own, wire, in, out, cut); });
}

void HierarchicalCommunicator::scatter_from(Communicator& part, const CallSpec& spec, const Wire& wire, const void* in,
                                            void* out, const Cut& cut) {
  const CallSpec own{spec.op, wire.dtype, wire.op, wire.codec, cut.total(), 0, 0};
  counted(part, [&] { part.reduce_scatter(own, wire, in, out, cut); });
}

void HierarchicalCommunicator::exchange_from(Communicator& part, const CallSpec& spec, const void* in, void* out,
                                             const Cut& send, const Cut& receive) {
  const CallSpec own{spec.op, DType::Raw1, ReduceOp::None, Codec::None, 0, 0, 0};
  counted(part, [&] { part.all_to_all(own, bytes_wire(), in, out, send, receive); });
}

Cut HierarchicalCommunicator::over_leaders(const Sizes& sizes) const {
  Sizes all = sizes;
  all.resize(here().size(), 0);
  return cut_of(all);
}

// Inside hosts to the leaders, between hosts, and inside hosts to all.
void HierarchicalCommunicator::gather(const CallSpec& spec, const void* mine, const Sizes& bytes, char* out) {
  const Cut starts = cut_of(bytes);
  if (starts.total() == 0) return;
  const auto bytes_of = [&](const std::vector<int>& ranks) {
    return std::accumulate(ranks.begin(), ranks.end(), size_t{0},
                           [&](size_t sum, int r) { return sum + bytes[static_cast<size_t>(r)]; });
  };
  Sizes from_hosts;  // of this rank's slice
  for (const auto& slices : in_slice_) from_hosts.push_back(bytes_of(slices[local_ % slices_]));

  const char* block = static_cast<const char*>(mine);
  const Scratch host_parts(has_led() ? bytes_of(here()) : 0), slice(has_led() ? from_hosts[host_] : 0);
  if (has_led()) {
    Sizes parts;
    for (int r : here()) parts.push_back(bytes[static_cast<size_t>(r)]);
    const Cut cut = cut_of(parts);
    gather_from(*inner_, spec, bytes_wire(), mine, host_parts.at(0), cut);
    char* next = slice.at(0);
    for (size_t k = local_ % slices_; k < here().size(); k += slices_) {
      if (parts[k] > 0) std::memcpy(next, host_parts.at(cut.starts[k]), parts[k]);
      next += parts[k];
    }
    block = slice.at(0);
  }

  const Scratch received(leads() ? sum_of(from_hosts) : 0), all(starts.total());
  if (leads()) gather_from(*outer_, spec, bytes_wire(), block, received.at(0), cut_of(from_hosts));

  Sizes of_slices;
  for (size_t l = 0; l < slices_; ++l) {
    of_slices.push_back(0);
    for (const auto& slices : in_slice_) of_slices.back() += bytes_of(slices[l]);
  }
  gather_from(*inner_, spec, bytes_wire(), received.at(0), all.at(0), over_leaders(of_slices));
  const char* next = all.at(0);
  for (size_t l = 0; l < slices_; ++l) {
    for (const auto& slices : in_slice_) {
      for (int r : slices[l]) {
        const size_t n = bytes[static_cast<size_t>(r)];
        if (n > 0) std::memcpy(out + starts.start(r), next, n);
        next += n;
      }
    }
  }
}

// Inside a host to the receiver or to the leader of its slice, between hosts, and inside a host from the leader.
void HierarchicalCommunicator::route(const CallSpec& spec, const char* in, const SizeOfPair& size, char* out) {
  using Pairs = std::vector<std::pair<int, int>>;  // source, destination
  std::map<std::pair<int, int>, const char*> found;
  std::list<Scratch> memory;
  const auto move = [&](Communicator& part, const std::vector<Pairs>& to, const std::vector<Pairs>& from) {
    const auto sizes_of = [&](const std::vector<Pairs>& all) {
      Sizes sizes;
      for (const Pairs& pairs : all) {
        sizes.push_back(0);
        for (const auto& [s, d] : pairs) sizes.back() += size(s, d);
      }
      return sizes;
    };
    const Sizes send = sizes_of(to), receive = sizes_of(from);
    char* packed = memory.emplace_back(sum_of(send)).at(0);
    char* const received = memory.emplace_back(sum_of(receive)).at(0);
    char* next = packed;
    for (const Pairs& pairs : to) {
      for (const auto& pair : pairs) {
        const size_t n = size(pair.first, pair.second);
        if (n > 0) std::memcpy(next, found.at(pair), n);
        next += n;
      }
    }
    exchange_from(part, spec, packed, received, cut_of(send), cut_of(receive));
    next = received;
    for (const Pairs& pairs : from) {
      for (const auto& pair : pairs) {
        found[pair] = next;
        next += size(pair.first, pair.second);
      }
    }
  };
  for (int d = 0; d < world_size(); ++d) {
    found[{rank(), d}] = in;
    in += size(rank(), d);
  }

  const auto through = [&](int source, size_t k) {
    Pairs pairs{{source, here()[k]}};
    for (size_t h = 0; h < hosts_.size() && k < slices_; ++h) {
      if (h == host_) continue;
      for (int d : in_slice_[h][k]) pairs.emplace_back(source, d);
    }
    return pairs;
  };
  std::vector<Pairs> to, from;
  for (size_t k = 0; k < here().size(); ++k) {
    to.push_back(through(rank(), k));
    from.push_back(through(here()[k], local_));
  }
  move(*inner_, to, from);

  if (leads()) {
    to.assign(hosts_.size(), {});
    from.assign(hosts_.size(), {});
    for (size_t h = 0; h < hosts_.size(); ++h) {
      if (h == host_) continue;
      for (int s : here()) {
        for (int d : in_slice_[h][local_]) to[h].emplace_back(s, d);
      }
      for (int s : hosts_[h]) {
        for (int d : in_slice_[host_][local_]) from[h].emplace_back(s, d);
      }
    }
    move(*outer_, to, from);
  }

  if (has_led()) {
    to.assign(here().size(), {});
    from.assign(here().size(), {});
    for (size_t h = 0; h < hosts_.size(); ++h) {
      if (h == host_) continue;
      for (int s : hosts_[h]) {
        for (size_t k = local_ + slices_; leads() && k < here().size(); k += slices_) to[k].emplace_back(s, here()[k]);
        if (!leads()) from[local_ % slices_].emplace_back(s, rank());
      }
    }
    move(*inner_, to, from);
  }
  for (int s = 0; s < world_size(); ++s) {
    const size_t n = size(s, rank());
    if (n > 0) std::memcpy(out, found.at({s, rank()}), n);
    out += n;
  }
}

void HierarchicalCommunicator::do_all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n) {
  guarded(spec.op, [&] { all_reduce_now(spec, wire, in, out, n); });
}

void HierarchicalCommunicator::do_reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out,
                                                 const Cut& cut) {
  guarded(spec.op, [&] { reduce_scatter_now(spec, wire, in, out, cut); });
}

void HierarchicalCommunicator::do_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                             const Cut& cut) {
  guarded(spec.op, [&] {
    if (gathers_in_pieces(wire, cut)) return gather_in_pieces(spec, wire, in, out, cut, {}, [] {}, [](size_t) {});
    gather_now(spec, wire, in, out, cut);
  });
}

// Parts are packed by their own ranks, so that the bits are those of every transport. Those of the host come with the
// first call inside it, those of other hosts with the first exchange.
void HierarchicalCommunicator::gather_now(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                          const Cut& cut) {
  const auto bytes_of = [&](int r) { return wire.bytes(cut.size(r)); };
  const Scratch packed(wire.is_plain() ? 0 : bytes_of(rank()));
  if (!wire.is_plain()) wire.encode(in, packed.at(0), cut.size(rank()));
  const char* const own = static_cast<const char*>(wire.is_plain() ? in : packed.at(0));
  const auto place = [&](int r, const char* part) {
    wire.decode(part, at(out, cut.start(r) * wire.value_bytes), cut.size(r));
    return part + bytes_of(r);
  };
  Sizes of_host, of_all;
  for (int r : here()) of_host.push_back(bytes_of(r));
  for (int r = 0; r < world_size(); ++r) of_all.push_back(bytes_of(r));
  if (!gathers_in_one_exchange(sum_of(of_all))) {
    check_parts(spec, open_call(spec).specs, cut);
    const Scratch wires(wire.is_plain() ? 0 : sum_of(of_all));
    gather(spec, own, of_all, wire.is_plain() ? static_cast<char*>(out) : wires.at(0));
    const char* part = wires.at(0);
    for (int r = 0; r < world_size() && !wire.is_plain(); ++r) part = place(r, part);
    return;
  }
  const Scratch parts(sum_of(of_host));
  const HostOpening host = open_inside(spec, false, own, of_host, parts.at(0));

  // The parts of other hosts by slices, in each by hosts.
  Sizes of_slices(slices_, 0);
  std::vector<int> order;
  Rooms rooms(hosts_.size());
  for (size_t l = 0; l < slices_; ++l) {
    for (size_t h = 0; h < hosts_.size(); ++h) {
      if (h == host_) continue;
      for (int r : in_slice_[h][l]) {
        of_slices[l] += bytes_of(r);
        if (l == local_) rooms[h].bytes += bytes_of(r);
        order.push_back(r);
      }
    }
  }
  const Scratch received(leads() ? of_slices[local_] : 0), others(sum_of(of_slices));
  char* next = received.at(0);
  for (auto& room : rooms) next = (room.at = next) + room.bytes;
  size_t mine = 0;  // bytes of this rank's slice in its host
  for (size_t k = local_; leads() && k < of_host.size(); k += slices_) mine += of_host[k];
  const Scratch block(mine);
  const Cut starts = cut_of(of_host);
  next = block.at(0);
  for (size_t k = local_; leads() && k < of_host.size(); k += slices_) {
    if (of_host[k] > 0) std::memcpy(next, parts.at(starts.starts[k]), of_host[k]);
    next += of_host[k];
  }
  const Opened opened = open_between(spec, host, Messages(hosts_.size(), {block.at(0), mine}), rooms);
  check_parts(spec, opened.specs, cut);
  check_came(spec, opened);
  gather_from(*inner_, spec, bytes_wire(), received.at(0), others.at(0), over_leaders(of_slices));
  const char* part = parts.at(0);
  for (int r : here()) part = place(r, part);
  part = others.at(0);
  for (int r : order) part = place(r, part);
}

void HierarchicalCommunicator::do_all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                             const Cut& send, const Cut& receive) {
  guarded(spec.op, [&] {
    open_call(spec);
    const size_t ranks = static_cast<size_t>(world_size());
    std::vector<uint64_t> mine, all(2 * ranks * ranks);
    for (const Cut* cut : {&send, &receive}) {
      for (int r = 0; r < world_size(); ++r) mine.push_back(cut->size(r));
    }
    const size_t row = mine.size() * sizeof(uint64_t);
    gather(spec, mine.data(), Sizes(ranks, row), reinterpret_cast<char*>(all.data()));
    std::vector<const uint64_t*> sends, receives;
    for (size_t r = 0; r < ranks; ++r) {
      sends.push_back(all.data() + 2 * ranks * r);
      receives.push_back(sends.back() + ranks);
    }
    if (check_pairs(spec, sends, receives) == 0) return;
    const auto size = [&](int s, int d) { return sends[static_cast<size_t>(s)][d] * wire.value_bytes; };
    route(spec, static_cast<const char*>(in), size, static_cast<char*>(out));
  });
}

std::vector<int64_t> HierarchicalCommunicator::do_exchange(const CallSpec& spec) {
  std::vector<int64_t> all;
  guarded(spec.op, [&] {
    for (const CallSpec& theirs : open_call(spec).specs) all.push_back(theirs.mine);
  });
  return all;
}

}  // namespace tpk
