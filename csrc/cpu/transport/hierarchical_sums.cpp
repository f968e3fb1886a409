// The sums of transport `hierarchical`.
//
//   inline    the values of all ranks go with the opening; every rank sums them.
//   slices    a host sums its inputs, each leader a slice; the leaders of a slice sum those over the hosts, each a part
//             of it, and gather the parts; the ranks of a host gather the slices.
//   packed    the ranks pack and sum as over other transports; only the bytes take the way over the leaders.
#include <cstring>

#include "core/bytes.h"
#include "core/cuts.h"
#include "core/moves.h"
#include "hierarchical_parts.h"

namespace tpk {

// The forms that the values of a sum take.
struct HierarchicalCommunicator::Forms {
  const Wire* values;  // of the ranks
  const Wire* sums;    // inside a host
  const Wire* link;    // between hosts: as `sums`, or packed
  int divisor;         // of an average, which is a sum until the end

  Forms(const Wire& wire, int world_size) {
    const bool is_avg = wire.op == ReduceOp::Avg, is_half = wire.dtype == DType::BF16 || wire.dtype == DType::F16;
    const ReduceOp op = is_avg ? ReduceOp::Sum : wire.op;
    const bool rounds = op == ReduceOp::Sum || op == ReduceOp::Product;
    values = find_wire(wire.dtype, Codec::None, op);
    sums = is_half && rounds ? find_wire(DType::F32, Codec::None, op) : values;
    link = find_wire(sums->dtype, wire.codec, op);
    divisor = is_avg ? world_size : 1;
  }
  bool widens() const { return sums->dtype != values->dtype; }
  void widen(const void* from, void* to, size_t n) const {
    if (!widens()) return sums->encode(from, to, n);
    moves().dtypes[static_cast<size_t>(values->dtype)].to_floats(from, static_cast<float*>(to), n);
  }
  void narrow(const void* from, void* to, size_t n) const {
    if (!widens()) return sums->encode(from, to, n);
    moves().dtypes[static_cast<size_t>(values->dtype)].from_floats(static_cast<const float*>(from), to, n);
  }
  void divide(void* of, size_t n) const {
    if (divisor == 1) return;
    if (sums->dtype == DType::F32) return moves().divide(static_cast<float*>(of), divisor, n);
    for (size_t i = 0; i < n; ++i) static_cast<double*>(of)[i] /= divisor;
  }
};

void HierarchicalCommunicator::all_reduce_now(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                              size_t n) {
  const size_t bytes = n * wire.value_bytes;
  const bool sends = is_inline(bytes) && !in.is_packed();
  const Opened opened = open_call(spec, in.is_packed(), sends ? in.values() : nullptr, bytes);
  if (opened.is_packed) return sum_packed(spec, wire, in, out, n);
  const Forms forms(wire, world_size());
  sends ? sum_inline(forms, opened, out, n) : sum_slices(spec, forms, in.values(), out, n);
}

void HierarchicalCommunicator::reduce_scatter_now(const CallSpec& spec, const Wire& wire, const Input& in, void* out,
                                                  const Cut& cut) {
  const Opened opened = open_call(spec, in.is_packed());
  if (opened.is_packed) return scatter_packed(spec, wire, in, out, cut);
  scatter_slices(spec, Forms(wire, world_size()), in.values(), out, cut);
}

void HierarchicalCommunicator::sum_inline(const Forms& forms, const Opened& opened, void* out, size_t n) const {
  const size_t bytes = forms.sums->bytes(n), packed_bytes = forms.link->bytes(n);
  std::vector<char> total(bytes), packed(packed_bytes), host_sum(bytes);
  std::vector<std::vector<char>> widened, host_sums;
  std::vector<const void*> hosts;
  for (const std::vector<int>& ranks : hosts_) {
    std::vector<const void*> inputs;
    widened.clear();
    for (int r : ranks) {
      if (forms.widens()) forms.widen(opened.payload(r), widened.emplace_back(bytes).data(), n);
      inputs.push_back(forms.widens() ? widened.back().data() : opened.payload(r));
    }
    forms.sums->reduce_to_values(inputs.data(), static_cast<int>(inputs.size()), host_sum.data(), n);
    forms.link->encode(host_sum.data(), host_sums.emplace_back(packed_bytes).data(), n);
    hosts.push_back(host_sums.back().data());
  }
  forms.link->reduce_to_values(hosts.data(), static_cast<int>(hosts.size()), total.data(), n);
  forms.divide(total.data(), n);
  forms.link->encode(total.data(), packed.data(), n);
  forms.link->decode(packed.data(), total.data(), n);
  forms.narrow(total.data(), out, n);
}

void HierarchicalCommunicator::sum_slices(const CallSpec& spec, const Forms& forms, const void* in, void* out,
                                          size_t n) {
  const size_t value = forms.sums->value_bytes;
  const Cut over_slices = cut_at_blocks(n, static_cast<int>(slices_), forms.link->block_values);
  Sizes sizes;
  for (size_t l = 0; l < slices_; ++l) sizes.push_back(over_slices.size(static_cast<int>(l)));
  const Cut slices = over_leaders(sizes);
  const size_t mine = slices.size(static_cast<int>(local_));

  const Scratch wide(forms.widens() ? n * value : 0), slice(mine * value);
  if (forms.widens()) forms.widen(in, wide.at(0), n);
  scatter_from(*inner_, spec, *forms.sums, forms.widens() ? wide.at(0) : in, slice.at(0), slices);

  char* const sum = at(out, slices.start(static_cast<int>(local_)) * forms.values->value_bytes);  // of the slice
  if (leads() && mine > 0) {
    const Cut parts = cut_at_blocks(mine, static_cast<int>(hosts_.size()), forms.link->block_values);
    const int host = static_cast<int>(host_);
    const size_t own = parts.size(host);
    const Scratch part(own * value);
    scatter_from(*outer_, spec, *forms.link, slice.at(0), part.at(0), parts);
    forms.divide(part.at(0), own);
    if (forms.link->is_plain()) {
      char* const rounded = at(sum, parts.start(host) * forms.values->value_bytes);
      forms.narrow(part.at(0), rounded, own);
      gather_from(*outer_, spec, *forms.values, rounded, sum, parts);
    } else {
      char* const total = forms.widens() ? slice.at(0) : sum;
      gather_from(*outer_, spec, *forms.link, part.at(0), total, parts);
      if (forms.widens()) forms.narrow(total, sum, mine);
    }
  }
  gather_from(*inner_, spec, *forms.values, sum, out, slices);
}

// Leader k sums what goes to the ranks of its slice, host by host.
void HierarchicalCommunicator::scatter_slices(const CallSpec& spec, const Forms& forms, const void* in, void* out,
                                              const Cut& cut) {
  const size_t value = forms.sums->value_bytes, value_of_rank = forms.values->value_bytes;
  const auto size_of = [&](const std::vector<int>& ranks) {
    size_t size = 0;
    for (int r : ranks) size += cut.size(r);
    return size;
  };
  const Scratch ordered(cut.total() * value);
  Sizes slices(slices_, 0), hosts;
  size_t next = 0;
  for (size_t l = 0; l < slices_; ++l) {
    for (const auto& of_host : in_slice_) {
      for (int r : of_host[l]) {
        forms.widen(at(in, cut.start(r) * value_of_rank), ordered.at(next * value), cut.size(r));
        next += cut.size(r);
      }
      slices[l] += size_of(of_host[l]);
    }
  }
  for (const auto& of_host : in_slice_) hosts.push_back(size_of(of_host[local_ % slices_]));

  const Scratch slice(leads() ? slices[local_] * value : 0), sums(leads() ? hosts[host_] * value : 0);
  scatter_from(*inner_, spec, *forms.sums, ordered.at(0), slice.at(0), over_leaders(slices));
  const Scratch rounded(has_led() && leads() ? hosts[host_] * value_of_rank : 0);
  if (leads()) {
    scatter_from(*outer_, spec, *forms.link, slice.at(0), sums.at(0), cut_of(hosts));
    forms.divide(sums.at(0), hosts[host_]);
    forms.narrow(sums.at(0), has_led() ? rounded.at(0) : out, hosts[host_]);
  }
  if (!has_led()) return;
  Sizes of_leaders;
  for (size_t l = 0; l < slices_; ++l) of_leaders.push_back(size_of(in_slice_[host_][l]));
  const Cut leaders = over_leaders(of_leaders);
  const Scratch all(leaders.total() * value_of_rank);
  gather_from(*inner_, spec, *forms.values, rounded.at(0), all.at(0), leaders);
  size_t start = leaders.starts[local_ % slices_];
  for (size_t k = local_ % slices_; k < local_; k += slices_) start += cut.size(here()[k]);
  forms.values->encode(all.at(start * value_of_rank), out, cut.size(rank()));
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
