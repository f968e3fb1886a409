// When a sum over connections is one exchange, in which every end sends all that it has to all others. Torch-free.
#pragma once

namespace tpk {

constexpr double kCopiedPerSecond = 4e9;  // bytes of memory

// What the further ways over the link cost that a scatter and a gather take (a reduce_scatter takes one more, an
// all_reduce two) against what they save: bytes where the ends are more than two or halves are summed, and the time to
// sum all of the bytes after they have come.
struct OneExchange {
  double ends;        // that are connected with each other
  double sent, back;  // bytes of the message on its way to the owners of its parts, and of the sums on theirs
  double summed;      // bytes of the message as it is summed
  bool scatters;

  bool is_faster(double bytes_per_s, double hop_s) const {
    const double others = ends - 1, more = scatters ? 0 : others * (sent - (sent + back) / ends);
    return more / bytes_per_s + summed * (scatters ? others / ends : others) / kCopiedPerSecond <=
           (scatters ? 1 : 2) * hop_s;
  }
};

}  // namespace tpk
