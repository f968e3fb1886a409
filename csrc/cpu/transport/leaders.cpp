#include "leaders.h"

namespace tpk {

bool Leaders::exchange_openings_of(Op op, const std::vector<size_t>& counts, char* openings,
                                   const std::vector<Message>& to, const std::vector<Room>& from) {
  bool fits = false;
  as_one_call(op, [&] { fits = exchange_openings(op, counts, openings, to, from); });
  return fits;
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
