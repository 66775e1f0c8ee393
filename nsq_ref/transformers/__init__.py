"""A quantized cache for Hugging Face transformers, and an attention that reads it as it is stored.

`NsqCache` is handed to ``model.generate`` in place of a ``DynamicCache``. What a forward pass
brings is attended to as it is, what came before it as it is stored: so no result ever depends on
later tokens, and all results are those of a ``DynamicCache`` until the first block is sealed.

Keys may be coded with feedback (F1), which `query_moments` makes of the queries of some text.

Importing this package registers the attention function ``"nsq"``. With any other function the keys
and values of a layer are decoded, for as long as that layer runs.
"""

from nsq_ref.extras import extra

with extra("transformers", __name__):
    from nsq_ref.transformers.attending import attention
    from nsq_ref.transformers.cache import NsqCache, NsqLayer
    from nsq_ref.transformers.moments import query_moments

__all__ = ["NsqCache", "NsqLayer", "attention", "query_moments"]
