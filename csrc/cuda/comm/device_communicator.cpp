#include "device_communicator.h"

#include <algorithm>

#include "core/check.h"
#include "core/errors.h"

namespace tpk::cuda {

Stretch Stretch::all(const Cut& cut) {
  Stretch all;
  for (size_t r = 0; r + 1 < cut.starts.size(); ++r) {
    all.begin.push_back(0);
    all.end.push_back(cut.starts[r + 1] - cut.starts[r]);
  }
  return all;
}

size_t Stretch::largest() const {
  size_t largest = 0;
  for (size_t r = 0; r < begin.size(); ++r) largest = std::max(largest, end[r] - begin[r]);
  return largest;
}

DeviceCommunicator::DeviceCommunicator(std::string name, std::string label, int rank, int world_size, double timeout_s,
                                       int device)
    : Communicator(std::move(name), std::move(label), rank, world_size, timeout_s), device_(device) {
  const DeviceScope scope(device);
  on_device_ = std::make_unique<OnDevice>(device);
}

void DeviceCommunicator::run(const std::function<void()>& body) {
  piece_ = 0;
  try {
    body();
  } catch (const CudaError&) {
    raise_failure();  // a device that gave up fails every call from then on; the record has the reason
    throw;
  }
  raise_failure();
}

void DeviceCommunicator::enter() {
  int current = -1;
  TPK_CUDA_CHECK(cudaGetDevice(&current));
  TPK_CHECK(current == device_, "group '", label(), "' is on cuda:", device_, ", got tensors on cuda:", current);
  const cudaStream_t stream = current_stream();
  const uint64_t capture = capture_of(stream);
  Last& last = capture == 0 ? eager_ : captured_;
  // Recorded only now, when another stream needs it: most programs use one stream. A stream that is captured meanwhile
  // cannot be waited for; what ran on it before is over, because captures begin idle.
  if (last.is_there && last.capture == capture && stream != last.stream && capture_of(last.stream) == capture) {
    on_device_->event.order(last.stream, stream);
  }
  last = {true, stream, capture};
}

// A stream of an earlier capture may be destroyed, so that it is not used.
bool DeviceCommunicator::is_being_captured() const {
  return capture_of(current_stream()) != 0 || (eager_.is_there && capture_of(eager_.stream) != 0);
}

void DeviceCommunicator::do_all_reduce(const CallSpec& spec, const Wire& wire, Input in, void* out, size_t n) {
  run([&] {
    enter();
    send_all_reduce(spec, wire, in, out, n);
  });
}

void DeviceCommunicator::do_reduce_scatter(const CallSpec& spec, const Wire& wire, Input in, void* out,
                                           const Cut& cut) {
  run([&] {
    enter();
    send_reduce_scatter(spec, wire, in, out, cut, Stretch::all(cut));
  });
}

void DeviceCommunicator::do_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out,
                                       const Cut& cut) {
  run([&] {
    enter();
    send_all_gather(spec, wire, in, out, cut, Stretch::all(cut));
  });
}

bool DeviceCommunicator::add_norm(const CallSpec& spec, const Wire& wire, const AddNorm& args) {
  if (!fuses_norm(wire, args)) return false;
  as_one_call(spec.op, [&] {
    run([&] {
      enter();
      send_add_norm(spec, wire, args);
    });
  });
  return true;
}

void DeviceCommunicator::do_all_reduce_beside(const CallSpec& spec, const Wire& wire, void* data, size_t n,
                                              const std::function<void()>& meanwhile) {
  run([&] { run_beside([&](int) { send_all_reduce(spec, wire, data, data, n); }, meanwhile); });
}

void DeviceCommunicator::fused_gemm(const CallSpec& spec, const FusedGemm& gemm) {
  as_one_call(spec.op, [&] {
    run([&] {
      enter();
      send_fused_gemm(spec, gemm);
    });
  });
}

void DeviceCommunicator::send_beside(Op op, const Part& send, const std::function<void()>& meanwhile) {
  as_one_call(op, [&] { run([&] { run_beside(send, meanwhile); }); });
}

void DeviceCommunicator::run_beside(const Part& send, const std::function<void()>& meanwhile) {
  with_both_streams([&](cudaStream_t caller) {
    send_part(0, send, caller);
    {
      const ProductScope share(product_share());
      meanwhile();
    }
    join(caller);
  });
}

void DeviceCommunicator::send_part(int part, const Part& send, cudaStream_t caller) {
  const cudaStream_t side = on_device_->side.get();
  on_device_->event.order(caller, side);
  Last& last = last_on(caller);
  if (last.stream == caller) last.stream = side;  // ordered already
  const StreamScope scope(side);
  enter();
  send(part);
}

void DeviceCommunicator::join(cudaStream_t caller) {
  on_device_->event.order(on_device_->side.get(), caller);
  last_on(caller).stream = caller;
}

// What the body allocated belongs to the caller's stream, and a capture must be joined before it ends.
void DeviceCommunicator::with_both_streams(const std::function<void(cudaStream_t caller)>& body) {
  const cudaStream_t caller = current_stream();
  is_beside_ = true;
  try {
    body(caller);
    is_beside_ = false;
  } catch (...) {
    is_beside_ = false;
    try {
      if (capture_of(on_device_->side.get()) == capture_of(caller)) join(caller);
    } catch (const CudaError&) {  // the first error is the cause
    }
    throw;
  }
}

void DeviceCommunicator::produce_and_send(Op op, int parts, const Part& produce, const Part& send) {
  as_one_call(op, [&] {
    run([&] {
      enter();  // first: what is produced may go where peers still read the product of the last call
      if (parts == 1) {
        produce(0);
        return send(0);
      }
      with_both_streams([&](cudaStream_t caller) {
        for (int i = 0; i < parts; ++i) {
          const ProductScope share(i > 0 ? product_share() : 0);
          produce(i);
          send_part(i, send, caller);
        }
        join(caller);
      });
    });
  });
}

void DeviceCommunicator::receive_and_consume(Op op, int parts, const Part& receive, const Part& consume) {
  as_one_call(op, [&] {
    run([&] {
      if (parts == 1) {
        enter();
        receive(0);
        return consume(0);
      }
      with_both_streams([&](cudaStream_t caller) {
        send_part(0, receive, caller);
        for (int i = 0; i < parts; ++i) {
          join(caller);  // part i is here; the next one need not be
          if (i + 1 < parts) {
            const StreamScope scope(on_device_->side.get());
            receive(i + 1);
          }
          const ProductScope share(i + 1 < parts ? product_share() : 0);
          consume(i);
        }
      });
    });
  });
}

std::vector<int64_t> DeviceCommunicator::do_exchange(const CallSpec& spec) {
  TPK_CHECK(!is_being_captured(), describe_call(spec.op),
            ": the ranks cannot exchange sizes while a CUDA graph is captured; pass dim_size or vocab_size");
  std::vector<int64_t> all;
  const DeviceScope scope(device_);
  run([&] {
    const uint64_t started = now_nanoseconds();
    enter();
    all = send_exchange(spec);
    count_wait(now_nanoseconds() - started);
  });
  return all;
}

void DeviceCommunicator::synchronize() { TPK_CUDA_CHECK(cudaStreamSynchronize(eager_.stream)); }

void DeviceCommunicator::do_check() {
  const DeviceScope scope(device_);
  TPK_CHECK(!is_being_captured(), "check on group '", label(),
            "': nothing can be waited for while a CUDA graph is captured; check when the graph has been launched");
  run([&] {
    if (eager_.is_there) synchronize();
  });
}

// Leaving must not fail, and nothing that peers still read may go away under them.
void DeviceCommunicator::do_close() {
  if (!eager_.is_there) return;
  try {
    const DeviceScope scope(device_);
    if (!is_being_captured()) TPK_CUDA_CHECK(cudaStreamSynchronize(eager_.stream));
  } catch (const CudaError&) {
  }
}

uint32_t* DeviceCommunicator::bad_ids(int64_t vocab_size) {
  ids_vocab_ = vocab_size;
  return &static_cast<Notes*>(on_device_->notes.on_device())->bad_ids;
}

uint32_t* DeviceCommunicator::bad_targets(int64_t vocab_size) {
  targets_vocab_ = vocab_size;
  return &static_cast<Notes*>(on_device_->notes.on_device())->bad_targets;
}

void DeviceCommunicator::raise_bad(uint32_t& count, const char* what, int64_t vocab_size) {
  const uint32_t bad = __atomic_exchange_n(&count, 0, __ATOMIC_ACQ_REL);
  TPK_CHECK(bad == 0, what, " must be in [0, ", vocab_size, "), got ", bad,
            " outside of it in a call before this one; what was computed from them is wrong");
}

void DeviceCommunicator::raise_failure() {
  raise_given_up();
  FailureRecord& written = notes().failure;
  const auto failure = static_cast<Failure>(__atomic_load_n(&written.failure, __ATOMIC_ACQUIRE));
  if (failure != Failure::None) {
    const FailureRecord record = written;
    if (failure == Failure::Late) raise_late(record);
    __atomic_store_n(&written.failure, static_cast<uint32_t>(Failure::None), __ATOMIC_RELEASE);
    raise_mismatch(record);
  }
  raise_bad(notes().bad_ids, "vocab_embedding: ids", ids_vocab_);
  raise_bad(notes().bad_targets, "vocab_cross_entropy: target", targets_vocab_);
}

void DeviceCommunicator::raise_late(const FailureRecord& record) const {
  std::vector<int> late, came;
  for (int r = 0; r < world_size(); ++r) (record.missing >> r & 1 ? late : came).push_back(r);
  const int first = late.empty() ? rank() : late.front();
  throw TimeoutFailure(
      late_text(static_cast<Op>(record.kind & 255), record.epoch, late, came, record.last_seen[first]));
}

namespace {

CallSpec spec_of(uint32_t kind, uint64_t numel, uint32_t brings) {
  return {static_cast<Op>(kind & 255),
          static_cast<DType>(kind >> 8 & 255),
          static_cast<ReduceOp>(kind >> 16 & 255),
          static_cast<Codec>(kind >> 24),
          numel,
          0,
          static_cast<int64_t>(brings)};
}

}  // namespace

void DeviceCommunicator::raise_mismatch(const FailureRecord& record) const {
  mismatch(record.epoch, spec_of(record.kind, record.numel, 0), static_cast<int>(record.blamed),
           spec_of(record.theirs.kind, record.theirs.numel, record.theirs.brings));
}

namespace {

class LocalDevice final : public DeviceCommunicator {
 public:
  LocalDevice(std::string name, std::string label, int device)
      : DeviceCommunicator(std::move(name), std::move(label), 0, 1, 0.0, device) {}
  const char* transport() const override { return "local"; }
  void* heap_allocate(size_t) override { return nullptr; }
  void heap_free(void*) override {}
  size_t heap_bytes() const override { return 0; }

  void send_all_reduce(const CallSpec&, const Wire& wire, Input in, void* out, size_t n) override {
    take(wire, in, out, n);
  }
  void send_reduce_scatter(const CallSpec&, const Wire& wire, Input in, void* out, const Cut& cut,
                           const Stretch&) override {
    take(wire, in, out, cut.total());
  }
  void send_all_gather(const CallSpec& spec, const Wire& wire, const void* in, void* out, const Cut& cut,
                       const Stretch&) override {
    check_parts(spec, {spec}, cut);
    copy(in, out, cut.total() * wire.value_bytes);
  }

 protected:
  std::vector<int64_t> send_exchange(const CallSpec& spec) override { return {spec.mine}; }

 private:
  static void take(const Wire& wire, const Input& in, void* out, size_t n) {
    if (!in.is_packed()) return copy(in.values(), out, n * wire.value_bytes);
    TPK_CUDA_CHECK(launch_decode(wire.dtype, wire.codec, in.values(), out, n, current_stream()));
  }
  static void copy(const void* in, void* out, size_t bytes) {
    if (in == out || bytes == 0) return;
    TPK_CUDA_CHECK(cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice, current_stream()));
  }
};

}  // namespace

std::shared_ptr<Communicator> make_local(std::string name, std::string label, int device) {
  return std::make_shared<LocalDevice>(std::move(name), std::move(label), device);
}

}  // namespace tpk::cuda
