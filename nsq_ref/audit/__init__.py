"""What a cache of quantized keys and values would do to a model, told from its arrays.

`audit` takes keys and values, and queries where there are some. It says which channels, heads and
tokens stand out, whether the model has the failure modes that the paper describes, what schemes
would lose in each layer, predicted and measured, and which policy of schemes follows from that, by
the rules of `nsq_ref.audit.policy`. `html_page` shows all of it; ``nsq audit`` does it from files.
"""

from nsq_ref.audit.layers import Layer, as_layers, layers_of_arrays
from nsq_ref.audit.page import html_page
from nsq_ref.audit.policy import Recommendation
from nsq_ref.audit.report import Audit, LayerAudit, audit, audit_layers

__all__ = [
    "Audit", "Layer", "LayerAudit", "Recommendation", "as_layers", "audit", "audit_layers",
    "html_page", "layers_of_arrays",
]  # fmt: skip
