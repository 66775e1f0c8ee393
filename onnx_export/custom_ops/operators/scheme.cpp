#include "operators/operators.h"

namespace nsq {
namespace {

// What would have no effect, or no meaning, beside other attributes.
Status refuse_together(const Attributes& attributes, const Scheme& scheme) {
  const Scheme defaults;
  const char* idle = scheme.balanced                            ? "norm_rule"
                     : scheme.magnitude != defaults.magnitude   ? "magnitude"
                     : scheme.norm_dtype != defaults.norm_dtype ? "norm_dtype"
                                                                : nullptr;
  if (!scheme.separate_norm && idle != nullptr) {
    const Text name = attributes.full(idle), norm = attributes.full("separate_norm");
    return Status::error("attribute %s has no effect with %s=0, which stores no norm; leave %s out "
                         "or set %s=1", name.text, norm.text, name.text, norm.text);
  }
  if (!scheme.balanced) return Status();
  const Text rule = attributes.full("norm_rule"), axis = attributes.full("axis");
  if (scheme.per_token) {
    return Status::error("attribute %s='balanced' is of channels that have scales of their own, "
                         "and with %s='token' none has; set %s='channel' or %s='plain'",
                         rule.text, axis.text, axis.text, rule.text);
  }
  if (scheme.magnitude == Magnitude::norm) {
    const Text magnitude = attributes.full("magnitude");
    return Status::error("attribute %s='balanced' makes norms that are no lengths, and %s='norm' "
                         "stores a length; set %s='gain' or 'lsq', or %s='plain'",
                         rule.text, magnitude.text, magnitude.text, rule.text);
  }
  return Status();
}

}  // namespace

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
  NSQ_TRY(attributes.get("norm_rule", &scheme->balanced, {"plain", "balanced"}));
  NSQ_TRY(attributes.get("magnitude", &scheme->magnitude, {"norm", "gain", "lsq"}));
  NSQ_TRY(attributes.get("block_size", &scheme->block_size, 0));
  NSQ_TRY(attributes.get("sink_tokens", &scheme->sink_tokens, 0));
  NSQ_TRY(attributes.get("outlier_channels", &scheme->outlier_channels, 0));
  NSQ_TRY(attributes.get("scale_dtype", &scheme->scale_dtype));
  NSQ_TRY(attributes.get("norm_dtype", &scheme->norm_dtype));
  return refuse_together(attributes, *scheme);
}

}  // namespace nsq
