// Transport `hierarchical`: ranks of several hosts, of which some host has several. What a host's ranks say or sum goes
// between the hosts once, over connections, and through shared memory inside them. Torch-free.
//
// Ranks    rank k of a host belongs to slice k % S, where S is the number of ranks of the smallest host. Rank k < S
//          leads its slice: it alone has connections, one to the leader of the same slice on each other host.
// Opening  a call begins with the fingerprints of all ranks, and the values of small sums, in one exchange between the
//          hosts. So all ranks compare all fingerprints, and the calls of the two communicators inside always agree.
// Sums     inside a host in rank order, then over the hosts in the order of their first ranks, in fp32 (fp64 of fp64),
//          rounded once: the same bits in any pieces, but not those of transports that sum in rank order alone. A
//          codec packs the sums of the hosts. Where the inputs of a rank are packed already, all inputs are sent
//          packed and summed in rank order, as over any transport.
// Errors   the two communicators know ranks by other numbers. What they throw is replaced by what the watch of the
//          whole group finds; then this rank closes both, so that ranks that wait for it look for the reason, too.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "leaders.h"
#include "scratch.h"

namespace tpk {

class HierarchicalCommunicator final : public Communicator {
 public:
  using Hosts = std::vector<std::vector<int>>;  // the ranks of each, ascending; by their first ranks
  // inner: of the ranks of this host, in rank order; sockets: where this rank leads a slice, one to each other leader
  // of it, in the order of hosts, -1 for this one; else none.
  HierarchicalCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s, Hosts hosts,
                           std::shared_ptr<Communicator> inner, std::vector<int> sockets, size_t capacity,
                           std::unique_ptr<SocketExchange::Watch> watch);
  ~HierarchicalCommunicator() override;

  const char* transport() const override { return "hierarchical"; }
  void set_timeout(double timeout_s) override;
  void* heap_allocate(size_t bytes) override { return inner_->heap_allocate(bytes); }
  void heap_free(void* pointer) override { inner_->heap_free(pointer); }
  size_t heap_bytes() const override { return inner_->heap_bytes(); }
  // Whether messages of so many bytes a rank go with the opening: then a call is one exchange between the hosts.
  bool is_inline(size_t bytes) const { return bytes <= inline_bytes_; }

 protected:
  void do_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) override;
  void do_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&) override;
  void do_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&) override;
  void do_all_to_all(const CallSpec&, const Wire&, const void* in, void* out, const Cut& send,
                     const Cut& receive) override;
  std::vector<int64_t> do_exchange(const CallSpec&) override;
  void do_close() override;
  void do_abort() override;

 private:
  class OuterWatch;
  struct Opened;
  struct Forms;
  using Sizes = std::vector<size_t>;
  using SizeOfPair = std::function<size_t(int source, int destination)>;
  // A gather of this rank's `block` between the hosts, of which each sends so many bytes.
  using Between = std::function<void(const char* block, const Sizes& from_hosts, char* received)>;
  // Every call copies the records of all ranks, with room for that many bytes of each.
  static constexpr size_t kMostRecords = size_t{64} << 10, kLeastInline = 1024, kMostInline = 4096;

  // --- between all ranks (hierarchical_transport.cpp)
  // The fingerprints of all ranks; `payload`, of up to inline_bytes_, where it is not null.
  Opened open_call(const CallSpec&, bool is_packed = false, const void* payload = nullptr, size_t bytes = 0);
  // out = bytes[r] bytes of each rank r, in rank order; `mine` are this rank's.
  void gather(const CallSpec&, const void* mine, const Sizes& bytes, char* out);
  void gather(const CallSpec&, const void* mine, const Sizes& bytes, char* out, const Between&);
  // size(s, d) bytes of rank s go to rank d. in: by destination, out: by source, in rank order.
  void route(const CallSpec&, const char* in, const SizeOfPair& size, char* out);
  template <class Body>
  void guarded(Op op, Body&& body);
  [[noreturn]] void fail(Op op, bool late);
  // --- calls of the two communicators; everything they send counts as sent by the call in progress
  void gather_from(Communicator&, const CallSpec&, const Wire&, const void* in, void* out, const Cut&);
  void scatter_from(Communicator&, const CallSpec&, const Wire&, const void* in, void* out, const Cut&);
  void exchange_from(Communicator&, const CallSpec&, const void* in, void* out, const Cut& send, const Cut& receive);
  template <class Body>
  void counted(Communicator&, Body&& body);

  // --- sums (hierarchical_sums.cpp)
  void all_reduce_now(const CallSpec&, const Wire&, const Input& in, void* out, size_t n);
  void reduce_scatter_now(const CallSpec&, const Wire&, const Input& in, void* out, const Cut&);
  void sum_inline(const Forms&, const Opened&, void* out, size_t n) const;
  void sum_slices(const CallSpec&, const Forms&, const void* in, void* out, size_t n);
  void scatter_slices(const CallSpec&, const Forms&, const void* in, void* out, const Cut&);
  void sum_packed(const CallSpec&, const Wire&, const Input& in, void* out, size_t n);
  void scatter_packed(const CallSpec&, const Wire&, const Input& in, void* out, const Cut&);
  // The wires of all ranks for this rank's part, in rank order; `memory` holds them.
  std::vector<const void*> collect_wires(const CallSpec&, const Wire&, const char* packed, const Cut&,
                                         const Scratch& memory);

  size_t me() const { return static_cast<size_t>(rank()); }
  const std::vector<int>& here() const { return hosts_[host_]; }
  bool leads() const { return local_ < slices_; }
  // Whether ranks of this host are led by others.
  bool has_led() const { return here().size() > slices_; }
  // A cut over the ranks of this host of which only leaders have parts.
  Cut over_leaders(const Sizes& sizes) const;

  const Hosts hosts_;
  size_t host_ = 0, local_ = 0, slices_ = 0;  // of this rank; how many slices
  size_t inline_bytes_ = 0;
  std::vector<std::vector<std::vector<int>>> in_slice_;  // [host][slice]: ranks
  const std::shared_ptr<Communicator> inner_;
  const std::unique_ptr<SocketExchange::Watch> watch_;
  std::unique_ptr<Leaders> outer_;  // of the leaders of a slice, a rank is a host; else none
  std::exception_ptr found_;        // by the watch, in this call
};

}  // namespace tpk
