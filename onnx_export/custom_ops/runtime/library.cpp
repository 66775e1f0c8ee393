// The library's one entry point: gives a session all operators of the domain "nsq".
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "operators/operators.h"

#ifdef _WIN32
#define NSQ_EXPORT extern "C" __declspec(dllexport)
#else
#define NSQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace nsq {
namespace {

OrtStatus* fill(OrtCustomOpDomain* domain, const OrtApi* api) {
  for (const Variants* variants :
       {&quantize_operator, &dequantize_operator, &attention_operator,
        &buffer_attention_operator}) {
    for (size_t i = 0; i < variants->count; ++i) {
      OrtStatus* status = api->CustomOpDomain_Add(domain, &variants->first[i].op);
      if (status != nullptr) return status;
    }
  }
  return nullptr;
}

// The domain that all sessions of a runtime share. The runtime wants it to live as long as any
// session, and does not own it: it lives until the library is unloaded.
class Domains {
 public:
  constexpr Domains() = default;
  ~Domains() {
    Entry* entry = first_.load();
    while (entry != nullptr) {
      Entry* next = entry->next;
      release(entry);
      entry = next;
    }
  }

  OrtStatus* of(const OrtApi* api, OrtCustomOpDomain** domain) {
    // More than one runtime may have loaded this library.
    for (Entry* entry = first_.load(); entry != nullptr; entry = entry->next) {
      if (entry->api == api) {
        *domain = entry->domain;
        return nullptr;
      }
    }
    auto* added = static_cast<Entry*>(std::malloc(sizeof(Entry)));
    if (added == nullptr) return api->CreateStatus(ORT_FAIL, "nsq: no memory");
    *added = Entry{api, nullptr, nullptr};
    OrtStatus* status = api->CreateCustomOpDomain("nsq", &added->domain);
    if (status == nullptr) status = fill(added->domain, api);
    if (status != nullptr) {
      release(added);
      return status;
    }
    // If another thread was quicker there are two for this runtime: either is good.
    added->next = first_.load();
    while (!first_.compare_exchange_weak(added->next, added)) {
    }
    *domain = added->domain;
    return nullptr;
  }

 private:
  struct Entry {
    const OrtApi* api;
    OrtCustomOpDomain* domain;
    Entry* next;
  };
  static void release(Entry* entry) {
    if (entry->domain != nullptr) entry->api->ReleaseCustomOpDomain(entry->domain);
    std::free(entry);
  }

  std::atomic<Entry*> first_{nullptr};
};

Domains domains;

// A runtime refuses options that have a domain twice, and does not say what to do. Options remember
// here which library has given them the domain.
constexpr const char* kRegistered = "nsq.registered";

OrtStatus* register_with(OrtSessionOptions* options, const OrtApi* api) {
  char own[32], other[32] = "";
  std::snprintf(own, sizeof(own), "%p", static_cast<void*>(&domains));
  int has = 0;
  OrtStatus* status = api->HasSessionConfigEntry(options, kRegistered, &has);
  if (status != nullptr) return status;
  if (has != 0) {
    size_t size = sizeof(other);
    status = api->GetSessionConfigEntry(options, kRegistered, other, &size);
    if (status != nullptr || std::strcmp(own, other) == 0) return status;
    return api->CreateStatus(ORT_INVALID_ARGUMENT,
                             "nsq: these session options already have the operators from another "
                             "copy of the library; register one copy only");
  }
  OrtCustomOpDomain* domain = nullptr;
  status = domains.of(api, &domain);
  if (status == nullptr) status = api->AddCustomOpDomain(options, domain);
  return status != nullptr ? status : api->AddSessionConfigEntry(options, kRegistered, own);
}

}  // namespace
}  // namespace nsq

NSQ_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                     const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_ABI_VERSION);
  if (api == nullptr) {
    // Of any version, the first functions are the same.
    const OrtApi* oldest = base->GetApi(1);
    return oldest->CreateStatus(ORT_FAIL, "nsq needs onnxruntime 1.18 or newer");
  }
  return nsq::register_with(options, api);
}
