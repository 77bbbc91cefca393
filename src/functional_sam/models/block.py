"""What the decoder and the ViT share: the pre-LN block of Nanodo, its LayerNorm and the head.

B batch, L sequence, D width, H heads, K width of one head (D / H), F width of the MLP, V outputs.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from functional_sam.errors import UserError

HEAD_DTYPES = ("float32", "bfloat16")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu}
Readout = Callable[[Tensor, Tensor], Any]


def at_least_float32(x: Tensor) -> Tensor:
    """x itself in float32 or float64, a float32 copy of anything narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class LayerNorm(nn.LayerNorm):
    """Scale-only LayerNorm, computed in float32 at least, eps 1e-6 (the default of Flax, which Nanodo uses).

    It is an nn.LayerNorm so that whoever looks for normalization parameters finds it.
    """

    def __init__(self, width: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(width, eps=1e-6, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # The scale stays outside: inside F.layer_norm it makes torch.func.hessian and jvp(jacrev) silently wrong (torch 2.13).
        normal = F.layer_norm(at_least_float32(x), self.normalized_shape, eps=self.eps)
        scaled: Tensor = normal * self.weight
        return scaled.to(self.weight.dtype)


def attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for each head, softmax in float32."""
    L, K = q_BHLK.shape[-2:]
    # The fused kernel, but for short sequences in bfloat16 on a CPU: there its backward takes 2 to 5 times as long as these three
    # lines (torch 2.13, L = 64 to 512; level at 1024). This softmax too sums in float32 and only its result is rounded.
    if q_BHLK.device.type == "cpu" and q_BHLK.dtype == torch.bfloat16 and L <= 512:
        scores_BHLL = (q_BHLK / math.sqrt(K)) @ k_BHLK.mT
        if causal:
            scores_BHLL = scores_BHLL + scores_BHLL.new_full((L, L), -torch.inf).triu(1)
        return scores_BHLL.softmax(-1) @ v_BHLK
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=causal)


class Linear(nn.Linear):
    """nn.Linear without bias and left unwritten: init_weights of its owner draws it, once, from the generator of the model."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=dtype)

    def reset_parameters(self) -> None:
        pass


class Block(nn.Module):
    """x + attention(LN x), then x + mlp(LN x); no bias; tanh GELU unless told otherwise.

    dropout: fraction of a branch's outputs set to zero in training mode; at 0.0 nothing is drawn.
    Raises UserError when the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: int,
        causal: bool,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if width % heads:
            raise UserError(f"heads={heads} does not divide width={width}: choose heads so that width / heads is whole")
        self.heads, self.causal, self.dropout, self.activation = heads, causal, dropout, ACTIVATIONS[activation]
        self.norm_attention = LayerNorm(width, dtype=dtype)
        # q, k, v as one matrix [3D, D]: one product and one cast of its input where three would run.
        self.qkv = Linear(width, 3 * width, dtype=dtype)
        self.out = Linear(width, width, dtype=dtype)
        self.norm_mlp = LayerNorm(width, dtype=dtype)
        self.up = Linear(width, mlp, dtype=dtype)
        self.down = Linear(mlp, width, dtype=dtype)

    def init_weights(self, generator: Generator | None = None) -> None:
        """Xavier uniform with Nanodo's fans: (D, D) for each of q, k, v and the output, (D, F) and (F, D) for the MLP."""
        self.norm_attention.reset_parameters()
        self.norm_mlp.reset_parameters()
        # By blocks, for xavier on the whole [3D, D] would see fans (D, 3D) and draw q, k, v smaller by sqrt(2).
        for weight_DD in self.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(weight_DD, generator=generator)
        for layer in (self.out, self.up, self.down):
            nn.init.xavier_uniform_(layer.weight, generator=generator)

    def attention(self, x_BLD: Tensor) -> Tensor:
        """Every head attends, then the output projection."""
        B, L, D = x_BLD.shape
        # Views only: the fused kernels take the strides as they are, and their output is a transposed [B, L, H, K], so the way
        # back is a view too.
        q_BHLK, k_BHLK, v_BHLK = self.qkv(x_BLD).view(B, L, 3, self.heads, D // self.heads).transpose(1, 3).unbind(2)
        out_BHLK = attend(q_BHLK, k_BHLK, v_BHLK, self.causal)
        out_BLD: Tensor = self.out(out_BHLK.transpose(1, 2).reshape(B, L, D))
        return out_BLD

    def forward(self, x_BLD: Tensor) -> Tensor:
        # Under autocast the branches are bfloat16 and the sum, promoted, stays float32.
        x_BLD = x_BLD + self.dropped(self.attention(self.norm_attention(x_BLD)))
        mlp_BLD: Tensor = self.down(self.activation(self.up(self.norm_mlp(x_BLD))))
        return x_BLD + self.dropped(mlp_BLD)

    def dropped(self, branch_BLD: Tensor) -> Tensor:
        """The branch with dropout, if there is any."""
        return F.dropout(branch_BLD, self.dropout) if self.dropout and self.training else branch_BLD


class Backbone(nn.Module):
    """Blocks, final LayerNorm and head: what is left of a model once it has embedded its inputs.

    Raises UserError for a head_dtype that is not in HEAD_DTYPES.
    """

    has_readout = True

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp: int | None,
        causal: bool,
        head_dtype: str,
        checkpoint_blocks: bool,
        dropout: float,
        dtype: torch.dtype | None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        check_head_dtype(head_dtype)
        self.head_dtype, self.checkpoint_blocks, self.dropout = head_dtype, checkpoint_blocks, dropout
        self.blocks = nn.ModuleList(Block(width, heads, mlp or 4 * width, causal, dropout, dtype, activation) for _ in range(depth))
        self.norm = LayerNorm(width, dtype=dtype)

    def init_weights(self, generator: Generator | None = None) -> None:
        """Draw every parameter anew, in a fixed order, from `generator` (of the device of the parameters) or the global one."""
        for block in self.blocks:
            cast(Block, block).init_weights(generator)
        self.norm.reset_parameters()

    def num_parameters(self, non_embedding: bool = False) -> int:
        """Number of parameters: all, or those of the blocks and the final LayerNorm (no embedding, no head)."""
        parts = [self.blocks, self.norm] if non_embedding else [self]
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    def run_blocks(self, x_BLD: Tensor) -> Tensor:
        """All blocks; with checkpoint_blocks only the input of each is kept, and the rest is computed again in backward."""
        x_BLD = at_least_float32(x_BLD)
        for block in self.blocks:
            if self.checkpoint_blocks:
                # Without dropout there is no random state to preserve.
                x_BLD = checkpoint(block, x_BLD, use_reentrant=False, preserve_rng_state=self.dropout > 0)
            else:
                x_BLD = block(x_BLD)
        return x_BLD

    def read_out(self, h: Tensor, weight_VD: Tensor, readout: Readout | None) -> Any:
        """What the model returns of its last hidden state."""
        return read_out(h, weight_VD, readout, self.head_dtype)


def check_head_dtype(head_dtype: str) -> None:
    """Raise UserError for one that is not in HEAD_DTYPES."""
    if head_dtype not in HEAD_DTYPES:
        raise UserError(f"head_dtype={head_dtype!r}: choose one of {', '.join(HEAD_DTYPES)}")


def read_out(h: Tensor, weight_VD: Tensor, readout: Readout | None, head_dtype: str) -> Any:
    """Logits h @ W.T in float32 at least, or readout(h, W); see functional_sam.models for the protocol."""
    h, device = at_least_float32(h), h.device.type
    outside = head_dtype == "float32" and torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if outside else contextlib.nullcontext():
        if readout is not None:
            return readout(h, weight_VD)
        return at_least_float32(F.linear(h, weight_VD.to(h.dtype)))
