#include "operators/operators.h"

namespace nsq {

Status read_scheme(const Attributes& attributes, Scheme* scheme) {
  int64_t bits = scheme->bits;
  NSQ_TRY(attributes.get("bits", &bits));
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return attributes.unsupported("bits", bits, "choose one of 2, 3, 4, 8");
  }
  scheme->bits = static_cast<int>(bits);
  NSQ_TRY(attributes.get("separate_norm", &scheme->separate_norm));
  NSQ_TRY(attributes.get("symmetric", &scheme->symmetric));
  NSQ_TRY(attributes.get("axis", &scheme->per_token, {"channel", "token"}));
  NSQ_TRY(attributes.get("scale_rule", &scheme->search, {"range", "search"}));
  NSQ_TRY(attributes.get("magnitude", &scheme->magnitude, {"norm", "gain", "lsq"}));
  NSQ_TRY(attributes.get("block_size", &scheme->block_size, 0));
  NSQ_TRY(attributes.get("sink_tokens", &scheme->sink_tokens, 0));
  NSQ_TRY(attributes.get("outlier_channels", &scheme->outlier_channels, 0));
  NSQ_TRY(attributes.get("scale_dtype", &scheme->scale_dtype));
  NSQ_TRY(attributes.get("norm_dtype", &scheme->norm_dtype));
  const Scheme defaults;
  const char* idle = scheme->magnitude != defaults.magnitude     ? "magnitude"
                     : scheme->norm_dtype != defaults.norm_dtype ? "norm_dtype"
                                                                 : nullptr;
  if (scheme->separate_norm || idle == nullptr) return Status();
  const Text name = attributes.full(idle), norm = attributes.full("separate_norm");
  return Status::error("attribute %s has no effect with %s=0, which stores no norm; leave %s out "
                       "or set %s=1", name.text, norm.text, name.text, norm.text);
}

}  // namespace nsq
