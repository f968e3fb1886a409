// Planted bugs of first light (planted_first_light.cmake), one for each primitive: its check must say which value is
// the first that differs, and what it should be.
#include <gpu/first_light.cu>  // the copy: in quotes it would be the file beside this one
#include "expect.h"

namespace tpk::first_light {
namespace {

struct Found {
  const char *check, *says;
};
constexpr Found kFound[] = {
    {"threads", "thread 77 is 233, not 232"},
    {"clock", "after 2^24 looks at it 7 ns have passed: deadlines would never come"},
    {"words", "word 0 past the cache is 1 1001 2001 3001"},
    {"conversions", "half of 5.73972e-42 is 5.96046e-08, not 0"},
    {"flags", "rank 0 of 2: thread 5, round 3: got 196870, not 196869"},
    {"transactions", "sum of thread 0 is 360, not 369"},
    {"warps", "largest of the warp of thread 0 is 0, not 60"},
    {"tile", "value 0 of row 8 of the tile at row 0, column 0 is 1097, not 1089 (word 0 of its row)"},
    {"products", "bf16 [64, 64] x [128, 64]: row 0, column 0 is 32, not 0"},
    {"transposed", "bf16 [64, 64] x [128, 64]: row 0, column 64 is 0, not 64"},
    {"gather", "thread 3, round 7: got 3588, not 3587"},
    {"bulk", "thread 1, round 1: got 4352, not 4096"},
    {"store", "values at row 0, column 0: thread 0, round 4: got 24576, not 32768"},
};

CASE(every_mistake_is_reported_with_the_first_value_that_differs) {
  EXPECT(std::size(kFound) == std::size(kChecks));
  for (size_t i = 0; i < std::size(kChecks); ++i) {
    EXPECT(std::string(kChecks[i].name) == kFound[i].check, kChecks[i].name);
    const std::string found = kChecks[i].run();
    EXPECT(found == kFound[i].says, kChecks[i].name, " says: ", found);
  }
}

}  // namespace
}  // namespace tpk::first_light
