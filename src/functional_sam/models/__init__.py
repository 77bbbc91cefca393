"""Plain modules: inputs -> logits. None of them knows a loss, a task or a method.

The readout protocol. A class with `has_readout = True` also takes `model(inputs, readout=fn)` and then returns `fn(h, W)` in
place of the logits, which are by definition `h @ W.T`:

    h  the last hidden state, after the final LayerNorm: [B, L, D] of a Decoder, [B, D] of a ViT or ConvNet, never below float32;
    W  the weight of the head, the Parameter itself: [V, D] tied to the embedding, [C, D] of its own in vision.

So a loss can be computed inside forward, chunk by chunk, and the logits (V / D times larger than h) never exist whole, while
the hooks of DDP and FSDP still see one forward, with all of its parameters gathered. `fn` runs under the autocast of the head:
switched off when head_dtype is "float32", the caller's own when it is "bfloat16".
"""

from functional_sam.models.block import LayerNorm
from functional_sam.models.convnet import ConvNet
from functional_sam.models.decoder import PUBLISHED, Decoder, Size
from functional_sam.models.vit import ViT

__all__ = ["PUBLISHED", "ConvNet", "Decoder", "LayerNorm", "Size", "ViT"]
