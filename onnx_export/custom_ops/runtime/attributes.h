// The attributes of a node.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels/scheme.h"
#include "runtime/ort_abi.h"
#include "runtime/status.h"

namespace nsq {

// Where the node has no attribute of a name, the value stays as it was, which makes it the default;
// an attribute of another type is an error.
class Attributes {
 public:
  // All names are what follows the prefix.
  Attributes(const OrtApi& api, const OrtKernelInfo& info, const char* prefix = "")
      : api_(api), info_(info), prefix_(prefix) {}
  Attributes after(const char* prefix) const { return Attributes(api_, info_, prefix); }

  Status get(const char* name, int64_t* value) const;
  Status get(const char* name, float* value) const;
  Status get(const char* name, bool* value) const;  // an int that is 0 or 1
  Status get(const char* name, Dtype* value) const;
  // An int that is at least `least`.
  Status get(const char* name, int64_t* value, int64_t least) const;
  // One of these strings: its number, as an enumerator or a bool.
  template <typename Choice>
  Status get(const char* name, Choice* choice, std::initializer_list<const char*> choices) const {
    int number = static_cast<int>(*choice);
    NSQ_TRY(find(name, &number, choices));
    *choice = static_cast<Choice>(number);
    return Status();
  }
  // For messages: the name with its prefix, and what is said of a number.
  Text full(const char* name) const;
  Status unsupported(const char* name, int64_t given, const char* remedy) const;

 private:
  Status find(const char* name, int* choice, std::initializer_list<const char*> choices) const;
  bool exists(const char* name) const;
  bool succeeds(OrtStatus* status) const;
  Status found_unless_absent(OrtStatus* status, const Text& name, const char* type,
                             bool* found) const;

  const OrtApi& api_;
  const OrtKernelInfo& info_;
  const char* prefix_;
};

}  // namespace nsq
