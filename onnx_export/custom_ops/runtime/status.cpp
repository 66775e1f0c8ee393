#include "runtime/status.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace nsq {

Status Status::error(const char* format, ...) {
  Status status;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message_, sizeof(status.message_), format, arguments);
  va_end(arguments);
  return status;
}

Status Status::of(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return Status();
  Status result = error("onnxruntime: %s", api.GetErrorMessage(status));
  api.ReleaseStatus(status);
  return result;
}

void Text::add(const char* format, ...) {
  const size_t used = std::strlen(text);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + used, sizeof(text) - used, format, arguments);
  va_end(arguments);
}

}  // namespace nsq
