// How a call of transport `hierarchical` begins.
#include <cstring>

#include "core/cuts.h"
#include "core/errors.h"
#include "hierarchical_parts.h"

namespace tpk {

// Calls inside a host are unlike each other wherever their ranks do not begin in the same way: this one has no
// reduction, that of sum_inside has one. Where they are, all ranks of the host notice it, and exchange their openings
// alone, in a call that is the same whatever they called.
HierarchicalCommunicator::HostOpening HierarchicalCommunicator::open_inside(const CallSpec& spec, bool is_packed,
                                                                            const void* mine, const Sizes& bytes,
                                                                            char* all) {
  const auto exchange_records = [&](const Sizes& sizes) {
    Sizes records;
    std::vector<int64_t> shape;
    for (size_t n : sizes) {
      records.push_back(Opening::kBytes + n);
      shape.push_back(static_cast<int64_t>(n));
    }
    const Cut cut = cut_of(records);
    const Scratch own(records[local_]), of_all(cut.total());
    const Opening opening(call_, spec, is_packed);
    std::memset(own.at(0), 0, Opening::kBytes);
    std::memcpy(own.at(0), &opening, sizeof opening);
    if (mine != nullptr && sizes[local_] > 0) std::memcpy(own.at(Opening::kBytes), mine, sizes[local_]);
    const CallSpec call{Op::AllGather,
                        DType::Raw1,
                        ReduceOp::None,
                        Codec::None,
                        cut.total(),
                        hash_of(shape.data(), shape.size()),
                        static_cast<int64_t>(records[local_])};
    counted(*inner_, [&] { inner_->all_gather(call, bytes_wire(), own.at(0), of_all.at(0), cut); });
    HostOpening host{{}, true, false};
    for (size_t k = 0; k < here().size(); ++k) {
      const char* const record = of_all.at(cut.starts[k]);
      std::memcpy(&host.openings.emplace_back(), record, sizeof opening);
      host.agrees &= host.openings.back().is_like(opening);
      host.is_packed |= host.openings.back().is_packed != 0;
      if (sizes[k] > 0) std::memcpy(all, record + Opening::kBytes, sizes[k]);
      all += sizes[k];
    }
    return host;
  };
  const Sizes nothing(here().size(), 0);
  try {
    return exchange_records(bytes.empty() ? nothing : bytes);
  } catch (const RankMismatch&) {
    HostOpening host = exchange_records(nothing);
    host.agrees = false;
    return host;
  }
}

HierarchicalCommunicator::Opened HierarchicalCommunicator::open_call(const CallSpec& spec, bool is_packed) {
  return open_between(spec, open_inside(spec, is_packed));
}

HierarchicalCommunicator::Opened HierarchicalCommunicator::open_between(const CallSpec& spec, const HostOpening& host,
                                                                        const Messages& messages, const Rooms& rooms,
                                                                        Leaders::Room shared) {
  std::vector<char> openings = records_of(host);
  Opened opened;
  if (leads()) {
    counted(*outer_, [&] {
      opened.has_come = outer_->exchange_openings_of(spec.op, ranks_of_hosts(), openings.data(),
                                                     host.has_bytes() ? messages : Messages{}, rooms);
    });
  }
  if (has_led()) tell_led(spec, openings, host.has_bytes() ? shared : Leaders::Room{});
  compare(spec, openings, opened);
  return opened;
}

HierarchicalCommunicator::Sizes HierarchicalCommunicator::ranks_of_hosts() const {
  Sizes counts;
  for (const std::vector<int>& ranks : hosts_) counts.push_back(ranks.size());
  return counts;
}

std::vector<char> HierarchicalCommunicator::records_of(const HostOpening& host) const {
  const Cut starts = cut_of(ranks_of_hosts()).times(Opening::kBytes);
  std::vector<char> openings(starts.total());
  for (size_t k = 0; k < here().size(); ++k) {
    std::memcpy(openings.data() + starts.start(static_cast<int>(host_)) + k * Opening::kBytes, &host.openings[k],
                sizeof(Opening));
  }
  return openings;
}

// From the first leader.
void HierarchicalCommunicator::tell_led(const CallSpec& spec, std::vector<char>& openings, Leaders::Room shared) {
  std::vector<char> from_leader(openings), to_all(openings.size() + shared.bytes);
  if (shared.bytes > 0) from_leader.insert(from_leader.end(), shared.at, shared.at + shared.bytes);
  gather_from(*inner_, spec, bytes_wire(), from_leader.data(), to_all.data(), over_leaders({to_all.size()}));
  std::memcpy(openings.data(), to_all.data(), openings.size());
  if (shared.bytes > 0) std::memcpy(shared.at, to_all.data() + openings.size(), shared.bytes);
}

void HierarchicalCommunicator::compare(const CallSpec& spec, const std::vector<char>& openings, Opened& opened) const {
  opened.specs.resize(static_cast<size_t>(world_size()));
  for (size_t h = 0, i = 0; h < hosts_.size(); ++h) {
    for (size_t k = 0; k < hosts_[h].size(); ++k, ++i) {
      Opening theirs;
      std::memcpy(&theirs, openings.data() + i * Opening::kBytes, sizeof theirs);
      opened.specs[static_cast<size_t>(hosts_[h][k])] = theirs.spec();
      opened.is_packed |= theirs.is_packed != 0;
    }
  }
  check_agreement(spec, opened.specs);
}

void HierarchicalCommunicator::check_came(const CallSpec& spec, const Opened& opened) const {
  if (!opened.has_come) throw PeerLost(concat(describe_call(spec.op), ": a host sent another number of bytes."));
}

}  // namespace tpk
