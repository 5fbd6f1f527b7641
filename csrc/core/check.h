// Error policy: a wrong argument throws fips::Error with a message that names the argument, what
// was given, what is allowed and what to do. Nothing in the library calls exit or abort.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fips {

class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

}  // namespace fips

#define FIPS_CHECK(condition, ...) \
  do {                             \
    if (!(condition)) {            \
      ::fips::fail(__VA_ARGS__);   \
    }                              \
  } while (0)
