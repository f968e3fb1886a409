// Stackful fibers and the memory for their stacks. A fiber stays on the OS thread that made it.
#pragma once

#include <cstddef>

namespace tpk::emu {

// A suspended flow of control: an OS thread's own, or a fiber's.
class Context {
 public:
  // The fiber will run entry(argument), which must never return, on this stack.
  void prepare(char* stack, size_t bytes, void (*entry)(void*), void* argument);
  // Suspends this one and resumes `to`. A fiber that leaves for good says so: `done`.
  void switch_to(Context& to, bool done = false);

 private:
  friend void fiber_started(Context& self, Context& from);
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;  // of a fiber; where the sanitizer finds it
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

// First thing in a fiber's entry: tells the sanitizer that the switch is over, and where `from` has its stack.
void fiber_started(Context& self, Context& from);

// Memory for the stacks of one block, kept for the next one.
class Stacks {
 public:
  explicit Stacks(size_t count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  static size_t bytes_of_one();
  char* stack(size_t i) const { return base_ + i * bytes_of_one(); }
  bool contains(const void* address) const { return address >= base_ && address < base_ + count_ * bytes_of_one(); }
  // Whether a fiber has run over the end of stack i.
  bool overrun(size_t i) const;

 private:
  char* base_;
  size_t count_;
};

}  // namespace tpk::emu
