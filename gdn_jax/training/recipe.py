"""What is trained, and how: the shipped model's sizes, the numbers of its training."""

import dataclasses

from gdn_jax.models.config import Config
from gdn_jax.training.text import SEPARATOR

# Three Gated DeltaNet layers to one of attention, as Qwen3-Next; 3.8 MB in bfloat16.
SMALL = Config(
    model_type="qwen3_next",
    vocab_size=256,
    hidden_size=128,
    layer_types=(*["linear_attention"] * 3, "full_attention") * 2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    intermediate_size=320,
    rope_theta=1e4,
    partial_rotary_factor=0.5,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    num_mtp_layers=1,
    eos_token_id=(SEPARATOR[0],),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a training run. A run is a function of them, its text and config.

    Attributes:
      steps: of the optimiser.
      batch, length: windows of a step, and predicted bytes of each.
      learning_rate: the highest, behind a linear warmup and before a cosine to zero.
      warmup: share of the steps.
      weight_decay: of matrices.
      weight_drop: share of each projection's entries that a step leaves out (Wan et
        al., "DropConnect", ICML 2013): the text is small enough to be learned by heart.
      averaging: share of the running average of parameters that a step keeps.
      drafts: how many tokens ahead the multi-token prediction head learns.
      draft_weight: of its losses, each step's half of the one's before.
      seed: of parameters, windows and what is left out.
    """

    steps: int = 4000
    batch: int = 64
    length: int = 1024
    learning_rate: float = 4e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    weight_drop: float = 0.15
    averaging: float = 0.995
    drafts: int = 3
    draft_weight: float = 0.3
    seed: int = 0
