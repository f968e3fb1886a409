#include "leaders.h"

namespace tpk {

void Leaders::gather_records_of(Op op, const char* mine, const std::vector<size_t>& counts, size_t record_bytes,
                                char* out) {
  as_one_call(op, [&] { send_records(op, mine, counts, record_bytes, out); });
}

void Leaders::do_all_to_all(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& send,
                            const Cut& receive) {
  for (int r = 0; r < world_size(); ++r) {
    if (r == rank()) continue;
    link().send(static_cast<size_t>(r), at(in, send.start(r) * wire.value_bytes), wire.bytes(send.size(r)));
    link().receive(static_cast<size_t>(r), at(out, receive.start(r) * wire.value_bytes), wire.bytes(receive.size(r)));
    count(wire.bytes(send.size(r)));
  }
  const uint64_t started = now_nanoseconds();
  described(spec.op, [&] { link().wait(call_); });
  count_wait(now_nanoseconds() - started);
}

}  // namespace tpk
