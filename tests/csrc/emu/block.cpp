#include "block.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <map>
#include <sstream>

#include "memory.h"
#include "report.h"

namespace tpk::emu {
namespace {

thread_local Thread* running = nullptr;

std::string text_of(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

uint3 index_of(uint64_t number, const dim3& size) {
  return {static_cast<uint32_t>(number % size.x), static_cast<uint32_t>(number / size.x % size.y),
          static_cast<uint32_t>(number / size.x / size.y)};
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

const char* vote_name(Vote vote) {
  constexpr const char* names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  return names[static_cast<size_t>(vote)];
}

void thread_main(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  thread.block->started(thread);
  thread.block->launch().request.body();
  thread.block->end_thread();
}

}  // namespace

Thread* current_thread() { return running; }

Block::Block(Launch& launch, uint64_t number, const Stacks& stacks)
    : launch_(launch),
      index_(index_of(number, launch.request.grid)),
      stacks_(stacks),
      shared_(nullptr, std::free),
      threads_(launch.threads()),
      random_(options().seed * 0x9e3779b97f4a7c15u + launch.number * 1000003u + number * 101u +
              static_cast<uint64_t>(launch.device->rank)),
      alive_(launch.threads()),
      warps_((launch.threads() + 31) / 32) {
  const size_t bytes = launch.request.shared_bytes;
  shared_.reset(static_cast<char*>(std::malloc(bytes == 0 ? 1 : bytes)));  // exactly: the address sanitizer watches
  std::memset(shared_.get(), kPoison, bytes);
  for (uint32_t i = 0; i < threads_.size(); ++i) {
    threads_[i].block = this;
    threads_[i].number = i;
    threads_[i].index = index_of(i, launch.request.block);
    threads_[i].context.prepare(stacks.stack(i), Stacks::bytes_of_one(), thread_main, &threads_[i]);
  }
  if (detector() != nullptr) shared_memory_ = detector()->enter_block(*this);
}

// ---- the scheduler --------------------------------------------------------------------------------------------------

void Block::run() {
  std::vector<Thread*> ready;
  for (Thread& thread : threads_) ready.push_back(&thread);
  uint64_t idle = 0;
  while (alive_ > 0 && launch_.device->error.load() == cudaSuccess) {
    if (ready.empty()) return diverged("no thread of the block can go on");
    const uint64_t before = progress();
    round(ready);
    idle = progress() == before ? idle + 1 : 0;
    if (idle > 0) wait_for_others(idle);
  }
  if (alive_ == 0) end_async(*this);
}

// Every thread that can run does so until it waits. Those that are still able to run come again.
void Block::round(std::vector<Thread*>& ready) {
  if (options().seed != 0) std::shuffle(ready.begin(), ready.end(), random_);
  std::vector<Thread*> again;
  for (Thread* thread : ready) {
    thread->doing = Doing::Running;
    running = thread;
    scheduler_.switch_to(thread->context);
    running = nullptr;
    if (stacks_.overrun(thread->number)) {
      report(Kind::Overflow,
             name() + " thread " + text_of(thread->index) + ": its stack is too small for the emulator");
      return fail(*launch_.device, cudaErrorLaunchFailure);
    }
    if (launch_.device->error.load() != cudaSuccess) return;
    if (thread->doing == Doing::Running || thread->doing == Doing::Polling) again.push_back(thread);
  }
  ready.swap(again);
  ready.insert(ready.end(), woken_.begin(), woken_.end());
  woken_.clear();
}

// All that can run are waiting for somebody else.
void Block::wait_for_others(uint64_t idle) {
  idle_rounds_.fetch_add(1, std::memory_order_relaxed);
  if (idle < 16) {
    sched_yield();
  } else {
    usleep(idle < 200 ? 20 : 200);
  }
}

void Block::started(Thread& thread) { fiber_started(thread.context, scheduler_); }

void Block::yield(Doing doing) {
  Thread& thread = *running;
  thread.doing = doing;
  thread.context.switch_to(scheduler_);
}

void Block::preempt() {
  if (options().seed == 0) return;
  const uint64_t dice = random_();
  if (dice % 4 == 0) yield(Doing::Running);
  if (dice / 4 % 16 == 0) sched_yield();
  if (dice / 64 % 256 == 0) usleep(50);
}

void Block::end_thread() {
  Thread& thread = *running;
  --alive_;
  thread.doing = Doing::Done;
  moved();
  if (at_barrier_ > 0 && at_barrier_ == alive_) finish_barrier();
  const size_t warp = thread.number / 32;
  for (size_t i = warps_[warp].size(); i-- > 0;) finish_warp(warp, i);
  thread.context.switch_to(scheduler_, true);
  std::abort();  // nobody resumes a thread that is done
}

void Block::die(cudaError_t error) {
  fail(*launch_.device, error);
  running->context.switch_to(scheduler_);
  std::abort();  // nobody resumes a thread of a device that has failed
}

void Block::diverged(const std::string& text) {
  report(Kind::Divergence, text + "\n  " + describe());
  fail(*launch_.device, cudaErrorLaunchFailure);
}

// ---- barriers of blocks and warps -----------------------------------------------------------------------------------

int Block::sync(Vote vote, bool holds, Where where) {
  Thread& thread = *running;
  if (at_barrier_ == 0) {
    vote_ = vote, barrier_ = where, votes_ = 0;
  } else if (vote != vote_ || !same_place(where, barrier_)) {
    diverged("thread " + text_of(thread.index) + " is in " + vote_name(vote) + " at " + text_of(where) +
             " while others are in " + vote_name(vote_) + " at " + text_of(barrier_));
    die(cudaErrorLaunchFailure);
  }
  thread.where = where;
  votes_ += holds;
  ++at_barrier_;
  thread.doing = Doing::AtBarrier;
  if (at_barrier_ == alive_) {
    finish_barrier();
  } else {
    yield(Doing::AtBarrier);
  }
  return static_cast<int>(thread.result);
}

void Block::finish_barrier() {
  const uint64_t result = vote_ == Vote::And ? votes_ == at_barrier_ : vote_ == Vote::Or ? votes_ > 0 : votes_;
  at_barrier_ = 0;
  moved();
  std::vector<Thread*> synchronized;
  for (Thread& thread : threads_) {
    if (thread.doing != Doing::AtBarrier) continue;
    thread.doing = Doing::Running;
    thread.result = result;
    thread.seen.clear();
    synchronized.push_back(&thread);
    if (&thread != running) woken_.push_back(&thread);
  }
  if (detector() != nullptr) detector()->synchronize(synchronized);
}

bool Block::is_any_alive(size_t warp, uint32_t lanes) const {
  for (; lanes != 0; lanes &= lanes - 1) {
    const size_t number = warp * 32 + static_cast<size_t>(std::countr_zero(lanes));
    if (number < threads_.size() && threads_[number].doing != Doing::Done) return true;
  }
  return false;
}

// What would wait for ever on the hardware, or return garbage; empty when all is well.
std::string Block::mask_problem(const Thread& thread, uint32_t mask, Finish finish, const Where& where) const {
  const auto text = [&](const std::string& end) {
    std::ostringstream all;
    all << "thread " << text_of(thread.index) << " comes to a warp operation at " << text_of(where) << " with mask 0x"
        << std::hex << mask << end;
    return all.str();
  };
  if ((mask >> thread.lane() & 1) == 0) return text(", which does not name it");
  for (const WarpOperation& other : warps_[thread.number / 32]) {
    const bool same = other.mask == mask && other.finish == finish && same_place(other.where, where);
    const bool waits_for_me = other.mask >> thread.lane() & 1, is_waited_for = other.arrived & mask;
    if (same || !waits_for_me || !is_waited_for) continue;
    std::ostringstream end;
    end << " while lanes 0x" << std::hex << other.arrived << " wait at " << text_of(other.where) << " with mask 0x"
        << other.mask;
    return text(end.str());
  }
  return "";
}

uint64_t Block::sync_warp(uint32_t mask, Post post, Finish finish, bool fences, Where where) {
  Thread& thread = *running;
  const size_t warp = thread.number / 32;
  {
    const std::string problem = mask_problem(thread, mask, finish, where);
    if (!problem.empty()) diverged(problem);
  }
  if (launch_.device->error.load() != cudaSuccess) die(cudaErrorLaunchFailure);  // leaves nothing on the stack
  std::vector<WarpOperation>& operations = warps_[warp];
  size_t i = 0;
  while (i < operations.size() && operations[i].mask != mask) ++i;
  if (i == operations.size()) {
    operations.emplace_back();
    operations[i].mask = mask, operations[i].finish = finish, operations[i].where = where,
    operations[i].fences = fences;
  }
  operations[i].arrived |= 1u << thread.lane();
  operations[i].posts[thread.lane()] = post;
  thread.where = where;
  thread.doing = Doing::AtWarp;
  finish_warp(warp, i);
  if (thread.doing == Doing::AtWarp) yield(Doing::AtWarp);
  return thread.result;
}

// If all lanes that are meant have come.
void Block::finish_warp(size_t warp, size_t i) {
  const WarpOperation& waiting = warps_[warp][i];
  if (waiting.arrived == 0 || is_any_alive(warp, waiting.mask & ~waiting.arrived)) return;
  const WarpOperation operation = waiting;
  warps_[warp].erase(warps_[warp].begin() + static_cast<ptrdiff_t>(i));
  uint64_t results[32] = {};
  if (operation.finish != nullptr) operation.finish(operation.arrived, operation.posts.data(), results);
  moved();
  std::vector<Thread*> synchronized;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((operation.arrived >> lane & 1) == 0) continue;
    Thread& thread = threads_[warp * 32 + lane];
    thread.doing = Doing::Running;
    thread.result = results[lane];
    synchronized.push_back(&thread);
    if (&thread != running) woken_.push_back(&thread);
  }
  if (operation.fences && detector() != nullptr) detector()->synchronize(synchronized);
}

// ---- for people -----------------------------------------------------------------------------------------------------

std::string Block::name() const {
  return "rank " + std::to_string(launch_.device->rank) + " " +
         text_of_kernel(launch_.request.kernel, launch_.request.name) + " block " + text_of(index_);
}

std::string Block::describe() const {
  std::map<std::string, int> groups;
  for (const Thread& thread : threads_) {
    std::ostringstream text;
    switch (thread.doing) {
      case Doing::Running: text << "able to run"; break;
      case Doing::AtBarrier: text << "in the barrier at " << text_of(thread.where); break;
      case Doing::AtWarp: text << "in the warp operation at " << text_of(thread.where); break;
      case Doing::Done: text << "done"; break;
      case Doing::Polling:
        text << "thread " << text_of(thread.index) << " polls " << describe_address(thread.polled) << " at "
             << text_of(thread.where);
        break;
    }
    ++groups[text.str()];
  }
  std::string all = name() + ":";
  for (const auto& [text, count] : groups) all += " " + std::to_string(count) + "x[" + text + "]";
  return all;
}

// ---- what a thread of a kernel sees ---------------------------------------------------------------------------------

const uint3& thread_index() { return running->index; }
const uint3& block_index() { return running->block->index(); }
const dim3& block_size() { return running->block->launch().request.block; }
const dim3& grid_size() { return running->block->launch().request.grid; }
char* dynamic_shared() { return running->block->shared(); }
int lane_of_thread() { return static_cast<int>(running->lane()); }

int sync_block(Vote vote, bool holds, Where where) { return running->block->sync(vote, holds, where); }
uint64_t sync_warp(uint32_t mask, Post post, Finish finish, Where where) {
  return running->block->sync_warp(mask, post, finish, false, where);
}
void warp_fence(uint32_t mask, Where where) { running->block->sync_warp(mask, {}, nullptr, true, where); }

void finish_shuffle(uint32_t mask, const Post* posts, uint64_t* results) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const int source = posts[lane].argument;
    if (mask >> source & 1) {
      results[lane] = posts[source].value;
    } else {
      report(Kind::Misuse, running->block->name() + ": a shuffle at " + text_of(running->where) + " reads lane " +
                               std::to_string(source) + ", which takes no part in it");
      results[lane] = 0xdeadbeefdeadbeefu;
    }
  }
}

}  // namespace tpk::emu
