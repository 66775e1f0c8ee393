"""The page that goes through the paper's experiments: what stands for each here, or why nothing."""

from __future__ import annotations

from benchmarks.results.kept import table

LARGE = "needs models of billions of parameters, which cannot be had here"
HIDDEN = "not repeated: it compresses hidden states, and NSQ-1 stores keys and values"

# The paper's file or files, what it asks, and what answers it here.
EXPERIMENTS = (
    ("phase0", "structure of hidden states: first component, norms",
     "of keys and values of a pre-LN and a post-LN model: [Structure](structure.md)"),
    ("phase1, phase2", "compression of hidden states, layer by layer", HIDDEN),
    ("phase4", "principal components of the cache, with norms and without",
     "of keys, ranks 16 to 48: [Structure](structure.md). Random projections: not repeated"),
    ("phase4b_asymmetric_quantization", "bits of keys against bits of values",
     "[Structure](structure.md)"),
    ("phase4b, KL and top-5 overlap", "divergence beside perplexity", "in every table of "
     "[Methods](methods.md); the paper's figures are of other positions: [Errata](errata.md)"),
    ("phase4b_cross_model", "norms a row on three models; cosine of keys and of values",
     "one model: [Methods](methods.md); its "
     "rows in the sweep: [Errata](errata.md). Keys against values by what bits of each are worth: "
     "[Structure](structure.md)"),
    ("phase4c, phase7b", "longer contexts", "the same tokens after 256 tokens and more, up to the "
     "model's context: [Evaluation](../evaluation.md)"),
    ("phase4c; the paper's table of generation", "quality of text that is written freely, trigram "
     "diversity", "first divergence, agreement and diversity, greedily: "
     "[Evaluation](../evaluation.md). On the paper's models: " + LARGE),
    ("phase5, phase5d, phase5e, phase6b to 6f", "models of 2 to 40 billion parameters", LARGE),
    ("phase5b_qwen_anomaly", "INT3 better than INT4; damage by layer",
     "in an injected model: [Causes](causes.md)"),
    ("phase5c_arc_smoothquant", "the ablation", "all eight rows, on three models that differ in "
     "layer 0 alone: [Causes](causes.md)"),
    ("phase6_figure1_wikitext", "distributions; WikiText-2 on GPT-2", "figures 1 and 2, on other "
     "text: [Results](index.md)"),
    ("phase7_appendix", "KIVI-style; memory; latency",
     "KIVI as published and the paper's form of it: [Methods](methods.md). Memory: "
     "[Fidelity](../fidelity.md). Latency: `make benchmark`"),
    ("phase8_postln_control", "post-LN", "a real post-LN encoder: [Structure](structure.md)"),
    ("poc_real_int4, poc_real_int4_7b", "real packing against simulated",
     "nothing is simulated here: every scheme's bytes are packed and read back"),
    ("poc_needle*, poc_multi_needle*, poc_niah*", "needles", "[Needles](needles.md), on a model of "
     "135 million parameters, unchanged and injected. On the paper's models: " + LARGE),
    ("poc_gemma4*, poc_k_vs_v*, poc_phi3*, poc_llama*, poc_catastrophic_hunt, poc_gpt_j*",
     "outlier ratios of many models", LARGE + ". Ours for one model: `facts.json`"),
    ("appendix H, recommendation by profile", "which policy a model's ratios ask for",
     "by the ratio and by the loss, as both must say so: [Audit](../audit.md)"),
    ("poc_layer0_causality", "layer 0 mended and broken", "[Causes](causes.md)"),
    ("poc_layer0_generalize", "the same in models without the outlier",
     "the unchanged model, and the outlier in layer 1: [Causes](causes.md)"),
)  # fmt: skip


def page() -> str:
    """Return the page."""
    rows = [list(row) for row in EXPERIMENTS]
    made = table(["paper's files", "what it asks", "here"], rows).replace("--:", "---")
    return f"""# The paper's experiments, one by one

Files are those of the folder `results/` of metaSATOKEN/norm-separated-quantization.

{made}
"""
