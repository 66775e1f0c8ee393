// Success or an error, and the texts of errors. Nothing in this library throws.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/ort_abi.h"

namespace nsq {

// Success, or an error with a sentence for the user.
class [[nodiscard]] Status {
 public:
  Status() { message_[0] = '\0'; }
  __attribute__((format(printf, 1, 2))) static Status error(const char* format, ...);
  // Takes what the runtime answers, and gives it back.
  static Status of(const OrtApi& api, OrtStatus* status);

  bool ok() const { return message_[0] == '\0'; }
  const char* message() const { return message_; }

 private:
  char message_[512];
};

// Returns from the calling function if the expression is an error.
#define NSQ_TRY(expression)                                      \
  do {                                                           \
    if (::nsq::Status status_ = (expression); !status_.ok()) {   \
      return status_;                                            \
    }                                                            \
  } while (false)

// A part of a message; what is beyond its room is cut off.
struct Text {
  char text[192] = "";
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...);
};

// For printf's %lld.
inline long long shown(int64_t number) { return static_cast<long long>(number); }

}  // namespace nsq
