// What a block's asynchronous work belongs to, and what must be over when the block ends.
#include "async.h"

#include "report.h"
#include "stream.h"

namespace tpk::emu {
namespace {

// Registers come from what the block was launched with: of 65536 for each multiprocessor, 8 at a time to a thread.
bool registers_fit(Block& block, const Async& state) {
  const uint32_t threads = block.launch().threads(), share = 65536 / threads / 8 * 8;
  uint32_t all = 0;
  for (uint32_t warpgroup = 0; warpgroup < threads / 128; ++warpgroup) {
    const auto found = state.registers.find(warpgroup);
    all += 128 * (found == state.registers.end() ? share : static_cast<uint32_t>(found->second));
  }
  return all <= share * threads;
}

struct Agents {
  std::mutex mutex;
  std::map<std::array<uint64_t, 3>, Agent> all;  // by the id of the stream, the block's number and the agent's
};
Agents& agents() {
  static auto* const one = new Agents;
  return *one;
}

}  // namespace

uint64_t number_of(Block& block) {
  const uint3 index = block.index();
  const dim3 grid = block.launch().request.grid;
  return index.x + uint64_t{grid.x} * (index.y + uint64_t{grid.y} * index.z);
}

Async& async_of(Block& block) {
  static thread_local Async state;
  const uint64_t number = number_of(block);
  if (state.launch != block.launch().number || state.block != number) {
    state = Async{};
    state.launch = block.launch().number, state.block = number;
    state.random.seed(options().seed * 77777 + state.launch * 131 + number);
  }
  return state;
}

Agent& agent_of(Block& block, uint32_t number, const char* what) {
  const std::lock_guard lock(agents().mutex);
  Agent& agent = agents().all[{block.launch().stream->clock.id, number_of(block), number}];
  if (agent.id == 0) {
    agent.id = detector()->new_id("rank " + std::to_string(block.launch().device->rank) + " block " +
                                  std::to_string(number_of(block)) + ": " + what);
  }
  return agent;
}

void forget_agents() { agents().all.clear(); }

Clock clock_of(const Agent& agent) {
  Clock clock;
  clock.id = agent.id, clock.now = agent.last;
  clock.join(current_thread()->memory.clock.snapshot());
  const auto& at_begin = this_block().launch().base;
  clock.join({nullptr, 0, 0, {at_begin, at_begin}});
  return clock;
}

void misuse(const char* text, const Where& where) {
  report(Kind::Misuse, this_block().name() + ": " + text + " at " + text_of(where));
  this_block().die(cudaErrorIllegalInstruction);
}

char* shared_base() {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(this_block().shared()) / kPattern * kPattern);
}

bool lies_in_shared(const char* from, size_t bytes) {
  const char* const start = this_block().shared();
  return from >= start && from + bytes <= start + this_block().launch().request.shared_bytes;
}

void end_async(Block& block) {
  const Async& state = async_of(block);
  const auto wrong = [&](const std::string& text) { report(Kind::Misuse, block.name() + " has ended " + text); };
  if (!state.tiles.empty()) wrong("while tiles are on their way to its shared memory");
  for (const auto& [thread, stores] : state.stores) {
    if (!stores.asked.empty()) return wrong("while bytes from its shared memory are on their way");
  }
  if (!registers_fit(block, state)) wrong("with more registers asked for than it was launched with");
  for (Thread& thread : block.threads()) {
    const auto requests = state.requests.find(thread.number / 128);
    if (requests == state.requests.end()) continue;
    const auto products = state.products.find(&thread);
    if (products == state.products.end() || requests->second.size() != products->second.asked_for) {
      return report(Kind::Divergence, block.name() + ": threads of a warpgroup ask for different numbers of products");
    }
    if (!products->second.asked.empty()) return wrong("before its products were waited for");
  }
}

}  // namespace tpk::emu
