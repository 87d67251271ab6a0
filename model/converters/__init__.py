"""Checkpoints of other code bases to ours and back.

* :mod:`model.converters.llava_hf`: transformers' Llava (``llava-hf/...``).
* :mod:`model.converters.official`: the code bases that grew from haotian-liu/LLaVA: LLaVA-1.5, IGVA, DenseConnector, MMFuser.

Weights are read from safetensors, or from ``.bin`` files with ``weights_only=True``: loading never unpickles code. The order in
which a projector expects its slots is a setting that is written down in the result's ``conversion.json``; no tensor tells it.
"""
