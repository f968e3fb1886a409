// The communicators of this process by name.
#include <pthread.h>

#include <map>
#include <new>
#include <shared_mutex>

#include "check.h"
#include "communicator.h"
#include "errors.h"

namespace tpk {

namespace {

struct Registry {
  std::shared_mutex mutex;
  std::map<std::string, std::shared_ptr<Communicator>, std::less<>> by_name;
};

// Never destroyed: tensors in an arena may be freed while the interpreter shuts down.
Registry& registry() {
  static Registry* instance = new Registry;
  return *instance;
}
// A fork waits for who holds it, so that the child finds it whole; there the lock is a new one, because who holds a
// shared_mutex is a thread of the parent.
[[maybe_unused]] const int registry_at_fork =
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] { new (&registry().mutex) std::shared_mutex; });

}  // namespace

void register_communicator(const std::shared_ptr<Communicator>& communicator) {
  std::unique_lock lock(registry().mutex);
  const bool added = registry().by_name.emplace(communicator->name(), communicator).second;
  TPK_CHECK(added, "group '", communicator->name(), "' is open already in this process");
}

void unregister_communicator(const std::string& name) {
  std::unique_lock lock(registry().mutex);
  registry().by_name.erase(name);
}

std::shared_ptr<Communicator> find_communicator(const std::string& name, const char* op) {
  std::shared_lock lock(registry().mutex);
  const auto found = registry().by_name.find(name);
  if (found == registry().by_name.end()) {
    throw PeerLost(
        concat(op, ": group '", name,
               "' is not open in this process (it was closed, its process group was destroyed, or it was never opened "
               "here)"));
  }
  found->second->check_process(op);
  return found->second;
}

}  // namespace tpk
