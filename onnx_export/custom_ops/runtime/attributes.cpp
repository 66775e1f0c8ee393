#include "runtime/attributes.h"

#include <cstring>

#include "runtime/tensor.h"

namespace nsq {

Text Attributes::full(const char* name) const {
  Text text;
  text.add("%s%s", prefix_, name);
  return text;
}

bool Attributes::succeeds(OrtStatus* status) const {
  if (status == nullptr) return true;
  api_.ReleaseStatus(status);
  return false;
}

// The runtime answers "absent" and "of another type" with the same code: all types are tried.
bool Attributes::exists(const char* name) const {
  float number = 0;
  int64_t integer = 0;
  size_t size = 0;
  return succeeds(api_.KernelInfoGetAttribute_float(&info_, name, &number)) ||
         succeeds(api_.KernelInfoGetAttribute_int64(&info_, name, &integer)) ||
         succeeds(api_.KernelInfoGetAttribute_string(&info_, name, nullptr, &size)) ||
         succeeds(api_.KernelInfoGetAttributeArray_float(&info_, name, nullptr, &(size = 0))) ||
         succeeds(api_.KernelInfoGetAttributeArray_int64(&info_, name, nullptr, &(size = 0)));
}

Status Attributes::found_unless_absent(OrtStatus* status, const Text& name, const char* type,
                                       bool* found) const {
  *found = succeeds(status);
  if (*found || !exists(name.text)) return Status();
  return Status::error("attribute %s must be %s", name.text, type);
}

Status Attributes::get(const char* name, int64_t* value) const {
  const Text text = full(name);
  int64_t given = 0;
  bool found = false;
  NSQ_TRY(found_unless_absent(api_.KernelInfoGetAttribute_int64(&info_, text.text, &given), text,
                              "an int", &found));
  if (found) *value = given;
  return Status();
}

Status Attributes::get(const char* name, float* value) const {
  const Text text = full(name);
  float given = 0;
  bool found = false;
  NSQ_TRY(found_unless_absent(api_.KernelInfoGetAttribute_float(&info_, text.text, &given), text,
                              "a float", &found));
  if (found) *value = given;
  return Status();
}

Status Attributes::get(const char* name, bool* value) const {
  int64_t given = *value ? 1 : 0;
  NSQ_TRY(get(name, &given));
  if (given != 0 && given != 1) return unsupported(name, given, "choose one of 0, 1");
  *value = given == 1;
  return Status();
}

Status Attributes::get(const char* name, int64_t* value, int64_t least) const {
  NSQ_TRY(get(name, value));
  if (*value >= least) return Status();
  Text remedy;
  remedy.add("give an integer of at least %lld", shown(least));
  return unsupported(name, *value, remedy.text);
}

Status Attributes::get(const char* name, Dtype* dtype) const {
  int64_t given = static_cast<int64_t>(*dtype);
  NSQ_TRY(get(name, &given));
  Text remedy;
  for (Dtype choice : {Dtype::float16, Dtype::bfloat16, Dtype::float32}) {
    const auto number = static_cast<int64_t>(choice);
    if (given == number) {
      *dtype = choice;
      return Status();
    }
    remedy.add("%s%lld (%s)", *remedy.text == 0 ? "choose one of " : ", ", shown(number),
               name_of(element(choice)));
  }
  return unsupported(name, given, remedy.text);
}

Status Attributes::unsupported(const char* name, int64_t given, const char* remedy) const {
  return Status::error("attribute %s=%lld is not supported; %s", full(name).text, shown(given),
                       remedy);
}

Status Attributes::find(const char* name, int* choice,
                        std::initializer_list<const char*> choices) const {
  const Text text = full(name);
  size_t size = 0;
  bool found = false;
  NSQ_TRY(found_unless_absent(
      api_.KernelInfoGetAttribute_string(&info_, text.text, nullptr, &size), text, "a string",
      &found));
  if (!found) return Status();
  char given[32] = "a longer text";
  if (size <= sizeof(given) &&
      succeeds(api_.KernelInfoGetAttribute_string(&info_, text.text, given, &size))) {
    for (size_t i = 0; i < choices.size(); ++i) {
      // Compared as bytes: a string may have a 0 inside.
      const char* one = choices.begin()[i];
      if (size == std::strlen(one) + 1 && std::memcmp(given, one, size) == 0) {
        *choice = static_cast<int>(i);
        return Status();
      }
    }
  }
  Text allowed;
  for (const char* one : choices) allowed.add("%s'%s'", *allowed.text == 0 ? "" : ", ", one);
  return Status::error("attribute %s='%s' is not supported; choose one of %s", text.text, given,
                       allowed.text);
}

}  // namespace nsq
