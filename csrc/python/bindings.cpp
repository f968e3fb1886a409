#include "bindings.h"

#include <unistd.h>

#include <algorithm>

#include "core/check.h"
#include "core/codec/codec.h"

namespace tpk {
namespace {

// Leaked on purpose: they may be raised during the shutdown of the interpreter.
PyObject* rank_mismatch = nullptr;
PyObject* peer_lost = nullptr;

py::dict stats_of(const OpStats& stats) {
  py::dict row;
  row["calls"] = stats.calls;
  row["wire_bytes"] = stats.wire_bytes;
  row["seconds"] = static_cast<double>(stats.nanoseconds) * 1e-9;
  row["wait_seconds"] = static_cast<double>(stats.wait_nanoseconds) * 1e-9;
  row["heap_inputs"] = stats.heap_inputs;
  return row;
}

py::list codec_list() {
  py::list rows;
#define TPK_CODEC_ROW(name, id, type) rows.append(py::make_tuple(name, type::kBlockValues, type::kBlockBytes));
  TPK_CODECS(TPK_CODEC_ROW)
#undef TPK_CODEC_ROW
  return rows;
}

// (dtype, op, codec) of every reduction that exists.
py::list wire_list() {
  py::list rows;
  for (uint8_t dtype = 0; dtype < static_cast<uint8_t>(DType::Raw1); ++dtype) {
    for (ReduceOp op : {ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min}) {
      for (uint8_t codec = 0; codec < static_cast<uint8_t>(Codec::Count); ++codec) {
        const Wire* const wire = find_wire(static_cast<DType>(dtype), static_cast<Codec>(codec), op);
        if (wire != nullptr) rows.append(py::make_tuple(name_of(wire->dtype), name_of(op), name_of(wire->codec)));
      }
    }
  }
  return rows;
}

}  // namespace

void translate_errors(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const RankMismatch& error) {
    PyErr_SetString(rank_mismatch != nullptr ? rank_mismatch : PyExc_RuntimeError, error.what());
  } catch (const PeerLost& error) {
    PyErr_SetString(peer_lost != nullptr ? peer_lost : PyExc_RuntimeError, error.what());
  } catch (const TimeoutFailure& error) {
    PyErr_SetString(PyExc_TimeoutError, error.what());
  }
}

void throw_as_ours(py::error_already_set& error) {
  const bool late = error.matches(PyExc_TimeoutError);
  const bool lost = error.matches(PyExc_RuntimeError) || (peer_lost != nullptr && error.matches(peer_lost));
  if (!late && !lost) throw error;
  const std::string text = py::str(error.value());
  if (late) throw TimeoutFailure(text);
  throw PeerLost(text);
}

bool handlers_run_here() {
  if (getpid() != gettid()) return false;  // not the main thread
  py::gil_scoped_acquire gil;
  // An interpreter that ends starts no threads, and runs no handlers either.
  return !py::module_::import("sys").attr("is_finalizing")().cast<bool>();
}

void add_basics(py::module_& m) {
  // Registered globally, so that errors of torch.ops calls, which run through torch's own bindings, are translated too.
  py::register_exception_translator(&translate_errors);
  m.def("set_error_types", [](py::object mismatch, py::object lost) {
    rank_mismatch = mismatch.release().ptr();
    peer_lost = lost.release().ptr();
  });
  m.def("op_name", [](uint32_t op) { return name_of(static_cast<Op>(std::min<size_t>(op, kOps))); }, py::arg("op"));
  m.def("codecs", &codec_list, "(name, values a block, bytes a block) of every codec but none.");
  m.def("wires", &wire_list, "(dtype, op, codec) of every reduction that exists.");
}

// Without the GIL: the counters wait for a call in progress, which may need it to come to its end.
py::dict stats_by_op(Communicator& comm) {
  const std::array<OpStats, kOps> all = [&] {
    py::gil_scoped_release release;
    return comm.stats();
  }();
  py::dict rows;
  for (size_t i = 0; i < kOps; ++i) {
    if (all[i].calls > 0) rows[name_of(static_cast<Op>(i))] = stats_of(all[i]);
  }
  return rows;
}

OwnedObject::~OwnedObject() {
  if (!Py_IsInitialized()) {
    object_.release();  // the interpreter has ended, and the object with it
    return;
  }
  py::gil_scoped_acquire gil;
  object_ = py::object();
}

}  // namespace tpk
