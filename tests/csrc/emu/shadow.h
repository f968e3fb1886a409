// What the race detector remembers of memory: for every byte the accesses that a later one may race with.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <vector>

#include "clock.h"
#include "emu.h"

namespace tpk::emu {

// By whom, when, how and from where. Id 0 is none.
struct Access {
  uint32_t id = 0;
  uint32_t when = 0;
  uint64_t place : 48 = 0;  // code, or a std::source_location
  uint64_t writes : 1 = 0;
  uint64_t atomic : 1 = 0;
  uint64_t scope : 2 = 0;
  uint64_t in_source : 1 = 0;
  uint64_t async : 1 = 0;  // by the asynchronous proxy: sees what others wrote only behind a fence_async

  uint64_t shared : 1 = 0;  // to the shared memory of a block

  bool operator==(const Access&) const = default;
};
static_assert(sizeof(Access) == 16);

// Those accesses to one place that no later access covers.
class Cell {
 public:
  // Calls conflicts(old) for each kept access that `now` races with unless the two are ordered or both atomic, where
  // `in_one_scope` says whether two atomics see each other as such.
  template <class Conflicts, class InOneScope>
  void access(const Access& now, const Clock& clock, Conflicts conflicts, InOneScope in_one_scope) {
    if (first_[0] == now) return;
    size_t kept = 0;
    const size_t count = size();
    for (size_t i = 0; i < count; ++i) {
      const Access old = at(i);
      const bool known = is_known(old, now, clock);
      bool raced = false;
      if (!known && (old.writes || now.writes) && !(old.atomic && now.atomic && in_one_scope(old, now))) {
        conflicts(old);
        raced = true;
      }
      // Whatever would race with the old one would also race with the new one.
      const bool as_strong = now.writes || !old.writes,
                 as_plain = !now.atomic || (old.atomic && old.scope == now.scope);
      if (raced || (known && as_strong && as_plain)) continue;
      at(kept++) = old;
    }
    resize(kept);
    push(now);
  }

  static bool is_known(const Access& old, const Access& now, const Clock& clock) {
    const bool needs_fence = now.async && !old.async && old.writes;
    const Space space = now.shared ? Space::Shared : Space::Global;
    return clock.knows(old.id, old.when) && (!needs_fence || clock.knows_fenced(space, old.id, old.when));
  }

  void copy_of(const Cell& other) {
    first_ = other.first_;
    if (other.more_ != nullptr) more_ = std::make_unique<std::vector<Access>>(*other.more_);
  }

 private:
  size_t size() const {
    return more_ != nullptr ? 2 + more_->size() : first_[1].id != 0 ? 2 : first_[0].id != 0 ? 1 : 0;
  }
  Access& at(size_t i) { return i < 2 ? first_[i] : (*more_)[i - 2]; }
  void resize(size_t size) {
    if (size <= 2) more_ = nullptr;
    if (more_ != nullptr) more_->resize(size - 2);
    for (size_t i = size; i < 2; ++i) first_[i] = {};
  }
  void push(const Access& access) {
    const size_t end = size();
    if (end < 2) {
      first_[end] = access;
    } else {
      if (more_ == nullptr) more_ = std::make_unique<std::vector<Access>>();
      more_->push_back(access);
    }
  }

  std::array<Access, 2> first_{};
  std::unique_ptr<std::vector<Access>> more_;
};

// The clock that an atomic store has released: joined by a thread that acquires it in a scope of both.
struct Release {
  Snapshot clock;
  Scope scope = Scope::Block;
  int rank = 0;
  uint64_t block = 0;
};

// 64 bytes of memory: cells for each 4 bytes, or for single ones where these were accessed.
class Line {
 public:
  static constexpr uintptr_t kBytes = 64;

  template <class Conflicts, class InOneScope>
  void access(uintptr_t offset, size_t bytes, const Access& now, const Clock& clock, Conflicts conflicts,
              InOneScope in_one_scope) {
    for (uintptr_t at = offset; at < offset + bytes;) {
      Group& group = groups_[at / 4];
      if (at % 4 == 0 && at + 4 <= offset + bytes && group.bytes == nullptr) {
        group.whole.access(now, clock, conflicts, in_one_scope);
        at += 4;
      } else {
        if (group.bytes == nullptr) group.split();
        (*group.bytes)[at % 4].access(now, clock, conflicts, in_one_scope);
        ++at;
      }
    }
    if (now.writes) written_ |= mask(offset, bytes);
  }

  bool is_written(uintptr_t offset, size_t bytes) const {
    return (written_ & mask(offset, bytes)) == mask(offset, bytes);
  }

  // What was released through the atomic word at `offset`.
  std::vector<Release>& releases(uintptr_t offset) {
    if (releases_ == nullptr) releases_ = std::make_unique<std::array<std::vector<Release>, 16>>();
    return (*releases_)[offset / 4];
  }

  void lock() {
    while (busy_.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() { busy_.clear(std::memory_order_release); }

 private:
  struct Group {
    Cell whole;
    std::unique_ptr<std::array<Cell, 4>> bytes;

    void split() {
      bytes = std::make_unique<std::array<Cell, 4>>();
      for (Cell& cell : *bytes) cell.copy_of(whole);
    }
  };

  static uint64_t mask(uintptr_t offset, size_t bytes) {
    return (bytes == 64 ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1) << offset;
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  uint64_t written_ = 0;
  std::array<Group, 16> groups_;
  std::unique_ptr<std::array<std::vector<Release>, 16>> releases_;
};

}  // namespace tpk::emu
