// Transport `hierarchical`: ranks of several hosts, of which some host has several. What a host's ranks say or sum goes
// between the hosts once, over connections, and through shared memory inside them. Torch-free.
//
// Ranks    rank k of a host belongs to slice k % S, where S is the number of ranks of the smallest host. Rank k < S
//          leads its slice: it alone has connections, one to the leader of the same slice on each other host.
// Opening  the ranks of a host compare their fingerprints in the first call inside it, which brings small messages of
// all
//          of them, or sums larger ones. The leaders send the fingerprints of their hosts to each other, and with them
//          what the hosts have to say: a sum of the host, or the parts of a gather. So all ranks compare all
//          fingerprints before they write anything, the calls of the two communicators inside always agree, and a
//          call that is not so large that its bytes take longer is one way over the link.
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
#include "one_exchange.h"
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
  bool sums_in_one_exchange(const Wire&, size_t n, bool scatters) const override;
  // Which costs that they are copied once more.
  bool gathers_in_one_exchange(size_t bytes) const override {
    return static_cast<double>(bytes) / kCopiedPerSecond <= hop_s();
  }
  bool has_thread() const override { return true; }
  void let_thread_run() override {
    if (outer_ != nullptr) outer_->let_thread_run();
  }
  // Where every rank leads a slice: chunks of parts do not pass through other ranks.
  bool cuts_parts() const override;
  std::vector<std::vector<int>> parts_in_order() const override;
  double share_of_link() const override {
    return (1.0 - 1.0 / static_cast<double>(hosts_.size())) / static_cast<double>(slices_);
  }

 protected:
  void do_all_reduce(const CallSpec&, const Wire&, Input in, void* out, size_t n) override;
  void do_reduce_scatter(const CallSpec&, const Wire&, Input in, void* out, const Cut&) override;
  void do_all_gather(const CallSpec&, const Wire&, const void* in, void* out, const Cut&) override;
  void do_all_to_all(const CallSpec&, const Wire&, const void* in, void* out, const Cut& send,
                     const Cut& receive) override;
  std::vector<int64_t> do_exchange(const CallSpec&) override;
  void do_all_reduce_beside(const CallSpec&, const Wire&, void* data, size_t n,
                            const std::function<void()>& meanwhile) override;
  void do_all_reduce_chunks(const CallSpec&, const Wire&, const Chunks&,
                            const std::function<void()>& meanwhile) override;
  void do_reduce_scatter_chunks(const CallSpec&, const Wire&, const Chunks&, void* out, const Cut&,
                                const std::function<void()>& meanwhile) override;
  void do_all_gather_chunks(const CallSpec&, const Wire&, const void* in, void* out, const Cut&,
                            const std::vector<size_t>& ends, const std::function<void()>& meanwhile,
                            const std::function<void(size_t)>& use) override;
  void do_close() override;
  void do_abort() override;

 private:
  class OuterWatch;
  struct HostOpening;
  struct Opened;
  struct Forms;
  struct Beside;
  using Sizes = std::vector<size_t>;
  using SizeOfPair = std::function<size_t(int source, int destination)>;
  using Messages = std::vector<Leaders::Message>;
  using Rooms = std::vector<Leaders::Room>;
  // Of a link that was not timed.
  static constexpr double kAssumedRate = 125e6, kAssumedHop = 100e-6;
  double hop_s() const { return link_hop_s > 0 ? link_hop_s : kAssumedHop; }
  // Every rank has the inputs of its host and sums them, and every leader sends the whole sum.
  static constexpr size_t kMostInputs = size_t{64} << 10, kLeastInline = 1024, kMostInline = 4096;

  // --- openings (hierarchical_opening.cpp)
  // The first call inside a host: fingerprints, and bytes[k] bytes of each rank k of the host, to `all`.
  HostOpening open_inside(const CallSpec&, bool is_packed = false, const void* mine = nullptr, const Sizes& bytes = {},
                          char* all = nullptr);
  // The same with a reduce_scatter over the leaders of this host; of packed inputs nothing is summed.
  HostOpening sum_inside(const CallSpec&, const Forms&, const Input& in, void* slice, const Sizes& slices);
  // The first exchange between hosts. A leader sends messages[h] to each other host h; rooms[h]: where as much from it
  // is put; no rooms: only fingerprints. Ranks that do not lead get what is in `shared`, which holds all rooms.
  Opened open_between(const CallSpec&, const HostOpening&, const Messages& = {}, const Rooms& = {},
                      Leaders::Room shared = {});
  Opened open_call(const CallSpec&, bool is_packed = false);
  Sizes ranks_of_hosts() const;
  // Openings of all ranks, of which those of this host are there.
  std::vector<char> records_of(const HostOpening&) const;
  void tell_led(const CallSpec&, std::vector<char>& openings, Leaders::Room shared = {});
  // Throws RankMismatch on all ranks where they are not of one call.
  void compare(const CallSpec&, const std::vector<char>& openings, Opened&) const;
  void check_came(const CallSpec&, const Opened&) const;

  // --- calls beside the work of the calling thread (hierarchical_chunks.cpp)
  void run_beside(const CallSpec&, const Wire& link, Beside&, const Leaders::Move& move,
                  const std::function<void()>& work);
  // Whether all ranks have agreed; all ranks of a host call it at the same point of their calls inside.
  bool has_agreed(const CallSpec&, Beside&);
  void gather_in_pieces(const CallSpec&, const Wire&, const void* in, void* out, const Cut&,
                        const std::vector<size_t>& ends, const std::function<void()>& meanwhile,
                        const std::function<void(size_t)>& use);
  bool gathers_in_pieces(const Wire&, const Cut&) const;

  // --- between all ranks (hierarchical_transport.cpp)
  void gather_now(const CallSpec&, const Wire&, const void* in, void* out, const Cut&);
  // out = bytes[r] bytes of each rank r, in rank order; `mine` are this rank's.
  void gather(const CallSpec&, const void* mine, const Sizes& bytes, char* out);
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
  Opened sum_inline(const CallSpec&, const Forms&, const Input& in, void* out, size_t n);
  Opened sum_slices(const CallSpec&, const Forms&, const Input& in, void* out, size_t n);
  void sum_slice(const CallSpec&, const Forms&, char* slice, char* sum, size_t n);
  Opened scatter_slices(const CallSpec&, const Forms&, const Input& in, void* out, const Cut&);
  // A leader's `slice` of the sum of its host goes with the opening, sizes[h] values from starts[h] on to each host h;
  // total = the sum over the hosts of what comes to this one.
  Opened sum_with_opening(const CallSpec&, const Forms&, const HostOpening&, const char* slice, const Sizes& starts,
                          const Sizes& sizes, char* total);
  void sum_packed(const CallSpec&, const Wire&, const Input& in, void* out, size_t n);
  void scatter_packed(const CallSpec&, const Wire&, const Input& in, void* out, const Cut&);
  // The wires of all ranks for this rank's part, in rank order; `memory` holds them.
  std::vector<const void*> collect_wires(const CallSpec&, const Wire&, const char* packed, const Cut&,
                                         const Scratch& memory);

  static const Wire& bytes_wire() { return *find_wire(DType::Raw1, Codec::None, ReduceOp::None); }
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
