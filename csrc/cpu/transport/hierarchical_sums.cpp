// The sums of transport `hierarchical`.
//
//   inline        the inputs of a host go to all its ranks, its sum from each leader to the others.
//   with opening  a host sums its inputs, each leader a slice, and sends that with the opening.
//   slices        a host sums its inputs, each leader a slice; the leaders of a slice sum those over the hosts, each a
//                 part of it, and gather the parts; the ranks of a host gather the slices.
//   packed        the ranks pack and sum as over other transports; only the bytes take the way over the leaders.
#include <cstring>

#include "core/bytes.h"
#include "core/cuts.h"
#include "core/errors.h"
#include "hierarchical_parts.h"

namespace tpk {

bool HierarchicalCommunicator::sums_in_one_exchange(const Wire& wire, size_t n, bool scatters) const {
  if (!scatters && n * wire.value_bytes <= inline_bytes_) return true;
  const Forms forms(wire, world_size());
  const size_t slice = (n + slices_ - 1) / slices_;
  const auto bytes = [&](const Wire* form) { return static_cast<double>(form->bytes(slice)); };
  return OneExchange{static_cast<double>(hosts_.size()), bytes(forms.link),
                     bytes(wire.is_plain() ? forms.values : forms.link), bytes(forms.sums), scatters}
      .is_faster(link_bytes_per_s > 0 ? link_bytes_per_s : kAssumedRate, hop_s());
}

void HierarchicalCommunicator::all_reduce_now(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                              size_t n) {
  const Forms forms(wire, world_size());
  const bool is_small = n * wire.value_bytes <= inline_bytes_;
  const Opened opened = is_small ? sum_inline(spec, forms, in, out, n) : sum_slices(spec, forms, in, out, n);
  if (opened.is_packed) sum_packed(spec, wire, in, out, n);
}

void HierarchicalCommunicator::reduce_scatter_now(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                                  const Cut& cut) {
  const Opened opened = scatter_slices(spec, Forms(wire, world_size()), in, out, cut);
  if (opened.is_packed) scatter_packed(spec, wire, in, out, cut);
}

HierarchicalCommunicator::HostOpening HierarchicalCommunicator::sum_inside(const CallSpec& spec, const Forms& forms,
                                                                           const Input& in, void* slice,
                                                                           const Sizes& slices) {
  CallSpec call = spec;
  call.shape_hash += in.is_packed() ? 1 : 0;
  const Cut cut = over_leaders(in.is_packed() ? Sizes(slices_, 0) : slices);
  const void* const values = in.is_packed() ? nullptr : in.values();
  try {
    counted(*inner_, [&] { inner_->reduce_scatter(call, *forms.sums, values, slice, cut); });
  } catch (const RankMismatch&) {
    HostOpening host = open_inside(spec, in.is_packed());
    host.agrees = false;
    return host;
  }
  return {std::vector<Opening>(here().size(), Opening(call_, spec, in.is_packed())), true, in.is_packed()};
}

HierarchicalCommunicator::Opened HierarchicalCommunicator::sum_inline(const CallSpec& spec, const Forms& forms,
                                                                      const Input& in, void* out, size_t n) {
  const size_t bytes = forms.values->bytes(n), wide_bytes = forms.sums->bytes(n), packed_bytes = forms.link->bytes(n);
  const Scratch inputs(here().size() * bytes), wide(here().size() * wide_bytes), total(wide_bytes),
      sums(hosts_.size() * packed_bytes);
  const void* const mine = in.is_packed() ? nullptr : in.values();
  const HostOpening host = open_inside(spec, in.is_packed(), mine, Sizes(here().size(), bytes), inputs.at(0));
  Messages messages;
  Rooms rooms;
  std::vector<const void*> hosts, of_host;
  for (size_t h = 0; h < hosts_.size(); ++h) {
    messages.push_back({sums.at(host_ * packed_bytes), packed_bytes});
    rooms.push_back({sums.at(h * packed_bytes), packed_bytes});
    hosts.push_back(sums.at(h * packed_bytes));
  }
  if (host.has_bytes()) {
    for (size_t k = 0; k < here().size(); ++k) {
      if (forms.widens()) forms.widen(inputs.at(k * bytes), wide.at(k * wide_bytes), n);
      of_host.push_back(forms.widens() ? wide.at(k * wide_bytes) : inputs.at(k * bytes));
    }
    forms.sums->reduce_to_values(of_host.data(), static_cast<int>(of_host.size()), total.at(0), n);
    forms.link->encode(total.at(0), sums.at(host_ * packed_bytes), n);
  }
  Opened opened = open_between(spec, host, messages, rooms, {sums.at(0), hosts_.size() * packed_bytes});
  if (opened.is_packed) return opened;
  check_came(spec, opened);
  forms.link->reduce_to_values(hosts.data(), static_cast<int>(hosts.size()), total.at(0), n);
  forms.divide(total.at(0), n);
  forms.repack(total.at(0), n);
  forms.narrow(total.at(0), out, n);
  return opened;
}

HierarchicalCommunicator::Opened HierarchicalCommunicator::sum_with_opening(const CallSpec& spec, const Forms& forms,
                                                                            const HostOpening& host, const char* slice,
                                                                            const Sizes& starts, const Sizes& sizes,
                                                                            char* total) {
  if (!leads()) return open_between(spec, host);
  const Wire& link = *forms.link;
  const size_t own = sizes[host_], own_bytes = link.bytes(own);
  Sizes packed_sizes;
  for (size_t n : sizes) packed_sizes.push_back(link.is_plain() ? 0 : link.bytes(n));
  const Cut packed_starts = cut_of(packed_sizes);
  const Scratch packed(packed_starts.total()), received(hosts_.size() * own_bytes);
  Messages messages;
  Rooms rooms;
  std::vector<const void*> hosts;
  for (size_t h = 0; h < hosts_.size(); ++h) {
    const char* message = at(slice, starts[h] * forms.sums->value_bytes);
    if (!link.is_plain()) {
      char* const to = packed.at(packed_starts.starts[h]);
      if (host.has_bytes()) link.encode(message, to, sizes[h]);
      message = to;
    }
    messages.push_back({message, link.bytes(sizes[h])});
    rooms.push_back({received.at(h * own_bytes), own_bytes});
    hosts.push_back(h == host_ ? message : received.at(h * own_bytes));
  }
  Opened opened = open_between(spec, host, messages, rooms);
  if (opened.is_packed) return opened;
  check_came(spec, opened);
  link.reduce_to_values(hosts.data(), static_cast<int>(hosts.size()), total, own);
  forms.divide(total, own);
  return opened;
}

HierarchicalCommunicator::Opened HierarchicalCommunicator::sum_slices(const CallSpec& spec, const Forms& forms,
                                                                      const Input& in, void* out, size_t n) {
  const size_t value = forms.sums->value_bytes;
  const Cut over_slices = cut_at_blocks(n, static_cast<int>(slices_), forms.link->block_values);
  Sizes sizes;
  for (size_t l = 0; l < slices_; ++l) sizes.push_back(over_slices.size(static_cast<int>(l)));
  const Cut slices = over_leaders(sizes);
  const size_t mine = slices.size(static_cast<int>(local_)), hosts = hosts_.size();

  const bool widens = forms.widens() && !in.is_packed();
  const Scratch wide(widens ? n * value : 0), slice(mine * value);
  if (widens) forms.widen(in.values(), wide.at(0), n);
  const HostOpening host = sum_inside(spec, forms, widens ? Input(wide.at(0)) : in, slice.at(0), sizes);

  char* const sum = at(out, slices.start(static_cast<int>(local_)) * forms.values->value_bytes);  // of the slice
  Opened opened;
  if (sums_in_one_exchange(*forms.given, n, false)) {
    const Scratch total(mine * value);
    opened = sum_with_opening(spec, forms, host, slice.at(0), Sizes(hosts, 0), Sizes(hosts, mine), total.at(0));
    if (opened.is_packed) return opened;
    if (leads()) {
      forms.repack(total.at(0), mine);
      forms.narrow(total.at(0), sum, mine);
    }
  } else {
    opened = open_between(spec, host);
    if (opened.is_packed) return opened;
    if (leads()) sum_slice(spec, forms, slice.at(0), sum, mine);
  }
  gather_from(*inner_, spec, *forms.values, sum, out, slices);
  return opened;
}

void HierarchicalCommunicator::sum_slice(const CallSpec& spec, const Forms& forms, char* slice, char* sum, size_t n) {
  if (n == 0) return;
  const Cut parts = cut_at_blocks(n, static_cast<int>(hosts_.size()), forms.link->block_values);
  const int host = static_cast<int>(host_);
  const size_t own = parts.size(host);
  const Scratch part(own * forms.sums->value_bytes);
  scatter_from(*outer_, spec, *forms.link, slice, part.at(0), parts);
  forms.divide(part.at(0), own);
  if (forms.link->is_plain()) {
    char* const rounded = at(sum, parts.start(host) * forms.values->value_bytes);
    forms.narrow(part.at(0), rounded, own);
    gather_from(*outer_, spec, *forms.values, rounded, sum, parts);
  } else {
    char* const total = forms.widens() ? slice : sum;
    gather_from(*outer_, spec, *forms.link, part.at(0), total, parts);
    if (forms.widens()) forms.narrow(total, sum, n);
  }
}

// Leader k sums what goes to the ranks of its slice, host by host.
HierarchicalCommunicator::Opened HierarchicalCommunicator::scatter_slices(const CallSpec& spec, const Forms& forms,
                                                                          const Input& in, void* out, const Cut& cut) {
  const size_t value = forms.sums->value_bytes, value_of_rank = forms.values->value_bytes;
  const auto size_of = [&](const std::vector<int>& ranks) {
    size_t size = 0;
    for (int r : ranks) size += cut.size(r);
    return size;
  };
  const Scratch ordered(in.is_packed() ? 0 : cut.total() * value);
  Sizes slices(slices_, 0), hosts;
  size_t next = 0;
  for (size_t l = 0; l < slices_; ++l) {
    for (const auto& of_host : in_slice_) {
      slices[l] += size_of(of_host[l]);
      for (int r : of_host[l]) {
        if (in.is_packed()) continue;
        forms.widen(at(in.values(), cut.start(r) * value_of_rank), ordered.at(next * value), cut.size(r));
        next += cut.size(r);
      }
    }
  }
  for (const auto& of_host : in_slice_) hosts.push_back(size_of(of_host[local_ % slices_]));

  const Scratch slice(leads() ? slices[local_] * value : 0), sums(leads() ? hosts[host_] * value : 0);
  const HostOpening host = sum_inside(spec, forms, in.is_packed() ? in : Input(ordered.at(0)), slice.at(0), slices);
  const bool at_once = sums_in_one_exchange(*forms.given, cut.total(), true);
  const Cut starts = cut_of(hosts);
  Opened opened = at_once ? sum_with_opening(spec, forms, host, slice.at(0), starts.starts, hosts, sums.at(0))
                          : open_between(spec, host);
  if (opened.is_packed) return opened;
  const Scratch rounded(has_led() && leads() ? hosts[host_] * value_of_rank : 0);
  if (leads()) {
    if (!at_once) {
      scatter_from(*outer_, spec, *forms.link, slice.at(0), sums.at(0), starts);
      forms.divide(sums.at(0), hosts[host_]);
    }
    forms.narrow(sums.at(0), has_led() ? rounded.at(0) : out, hosts[host_]);
  }
  if (!has_led()) return opened;
  Sizes of_leaders;
  for (size_t l = 0; l < slices_; ++l) of_leaders.push_back(size_of(in_slice_[host_][l]));
  const Cut leaders = over_leaders(of_leaders);
  const Scratch all(leaders.total() * value_of_rank);
  gather_from(*inner_, spec, *forms.values, rounded.at(0), all.at(0), leaders);
  size_t start = leaders.starts[local_ % slices_];
  for (size_t k = local_ % slices_; k < local_; k += slices_) start += cut.size(here()[k]);
  forms.values->encode(all.at(start * value_of_rank), out, cut.size(rank()));
  return opened;
}

std::vector<const void*> HierarchicalCommunicator::collect_wires(const CallSpec& spec, const Wire& wire,
                                                                 const char* packed, const Cut& cut,
                                                                 const Scratch& memory) {
  route(spec, packed, [&](int, int d) { return wire.bytes(cut.size(d)); }, memory.at(0));
  std::vector<const void*> wires;
  for (size_t r = 0; r < static_cast<size_t>(world_size()); ++r) {
    wires.push_back(memory.at(r * wire.bytes(cut.size(rank()))));
  }
  return wires;
}

void HierarchicalCommunicator::sum_packed(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                          size_t n) {
  const Cut cut = cut_at_blocks(n, world_size(), wire.block_values);
  const size_t mine = wire.bytes(cut.size(rank()));
  const Scratch packed(wire.bytes(n)), all(static_cast<size_t>(world_size()) * mine), total(mine);
  in.encode(wire, packed.at(0), n);
  const std::vector<const void*> wires = collect_wires(spec, wire, packed.at(0), cut, all);
  void* const sum = total.at(0);
  wire.reduce(wires.data(), world_size(), &sum, 1, cut.size(rank()));
  Sizes bytes;
  for (int r = 0; r < world_size(); ++r) bytes.push_back(wire.bytes(cut.size(r)));
  gather(spec, total.at(0), bytes, packed.at(0));
  wire.decode(packed.at(0), out, n);
}

void HierarchicalCommunicator::scatter_packed(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                              const Cut& cut) {
  const size_t mine = wire.bytes(cut.size(rank()));
  size_t bytes = 0;
  for (int r = 0; r < world_size(); ++r) bytes += wire.bytes(cut.size(r));
  const Scratch packed(bytes), all(static_cast<size_t>(world_size()) * mine);
  char* next = packed.at(0);
  for (int r = 0; r < world_size(); ++r) {
    if (cut.size(r) == 0) continue;
    in.of_part(wire, cut.starts, static_cast<size_t>(r), 0).encode(wire, next, cut.size(r));
    next += wire.bytes(cut.size(r));
  }
  const std::vector<const void*> wires = collect_wires(spec, wire, packed.at(0), cut, all);
  wire.reduce_to_values(wires.data(), world_size(), out, cut.size(rank()));
}

}  // namespace tpk
