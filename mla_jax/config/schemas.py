"""Typed dataclasses for everything Hydra composes. Values live in `conf/`, types and checks live here.

Shapes that cannot work fail in `__post_init__` with a UsageError, so a bad configuration ends at composition.
"""

from dataclasses import dataclass, field
from typing import Any, Optional, TypeVar, dataclass_transform

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mla_jax.errors import UsageError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def schema(cls: type[T]) -> type[T]:
    """A config dataclass. Annotations stay `Optional[...]` and `list[...]`: OmegaConf reads them at run time.

    Hydra refuses frozen schemas, hence unsafe_hash: configs are never mutated and serve as static jit arguments.
    """
    return dataclass(kw_only=True, unsafe_hash=True)(cls)


def require(condition: bool, message: str) -> None:
    """Raises UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


def require_at_least(minimum: float, **values: float | None) -> None:
    """Raises UsageError for the first value below `minimum`; None passes."""
    for name, value in values.items():
        require(value is None or value >= minimum, f"{name} must be at least {minimum}, got {value}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UsageError unless `value` is one of `choices`."""
    require(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested dicts and lists by its dotted key: `{"train.stages.0.steps": 100}`."""
    if not isinstance(tree, dict | list) or not tree:
        return {prefix[:-1]: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in flatten(value, f"{prefix}{key}.").items()}


@schema
class YarnConfig:
    """YaRN (arXiv 2309.00071) as DeepSeek-V3 configures it; keys are those of Hugging Face's `rope_scaling`."""

    factor: float = MISSING
    original_max_position_embeddings: int = MISSING
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: Optional[float] = None
    mscale_all_dim: Optional[float] = None

    def __post_init__(self):
        require(self.factor >= 1.0, f"model.rope_scaling.factor must be at least 1, got {self.factor}")
        require_at_least(
            1, **{"model.rope_scaling.original_max_position_embeddings": self.original_max_position_embeddings}
        )


NAMES = ("layer_input", "latents", "queries", "latent_attention", "attention_residual", "gate", "up")
"""Results inside a layer that rematerialization can keep: see `ModelConfig.saved`."""
HOW_IT_IS_COMPUTED = ("remat", "saved", "offloaded", "mlp_chunk", "unroll", "attention", "decode")
"""Keys of a model that change neither its weights nor, but for rounding, its results."""


@schema
class ModelConfig:
    """A dense DeepSeek-V3 decoder. The first block of keys carries Hugging Face's DeepseekV3Config names."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    qk_nope_head_dim: int = MISSING
    qk_rope_head_dim: int = MISSING
    v_head_dim: int = MISSING
    kv_lora_rank: int = MISSING
    q_lora_rank: Optional[int] = None
    intermediate_size: int = MISSING
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Optional[YarnConfig] = None
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    dtype: str = "bfloat16"
    """Compute type of activations; parameters are kept in `param_dtype`, softmax, norms and loss in float32."""
    param_dtype: str = "float32"
    remat: str = "full"
    """What the backward pass recomputes in each layer: `none` (nothing), `dots` (all but matrix products), `names` (all
    but what `saved` and `offloaded` name) or `full` (all)."""
    saved: tuple[str, ...] = ()
    """Under `remat=names`: results kept in device memory, of NAMES; `docs/training.md` says what each takes."""
    offloaded: tuple[str, ...] = ()
    """Under `remat=names`: results kept in the host's memory."""
    mlp_chunk: Optional[int] = None
    """Tokens of a sequence whose feed-forward activations exist at one time; None for all."""
    unroll: int = 1
    """Layers of training written out one after the other instead of as a loop: fewer copies of what is kept, more to
    compile. -1 for all."""
    attention: str = "auto"
    """Implementation of attention in training and prefill; see `latent_attention.dispatch`."""
    decode: str = "auto"
    """Implementation of attention over the latent cache."""

    def __post_init__(self):
        for name in (
            "vocab_size hidden_size num_hidden_layers num_attention_heads qk_nope_head_dim qk_rope_head_dim v_head_dim "
            "kv_lora_rank q_lora_rank intermediate_size max_position_embeddings"
        ).split():
            require_at_least(1, **{f"model.{name}": getattr(self, name)})
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim must be even (RoPE rotates pairs), got {self.qk_rope_head_dim}",
        )
        require(self.rope_theta > 1, f"model.rope_theta must be above 1, got {self.rope_theta}")
        require_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        require_choice("model.param_dtype", self.param_dtype, ("float32", "bfloat16"))
        require_choice("model.remat", self.remat, ("none", "dots", "names", "full"))
        self.saved, self.offloaded = tuple(self.saved), tuple(self.offloaded)  # OmegaConf gives lists
        for key in ("saved", "offloaded"):
            for name in getattr(self, key):
                require_choice(f"model.{key}", name, NAMES)
        both = sorted(set(self.saved) & set(self.offloaded))
        require(not both, f"model.saved and model.offloaded both have {', '.join(both)}; choose one")
        named = bool(self.saved or self.offloaded)
        require(self.remat == "names" or not named, "model.saved and model.offloaded need model.remat=names")
        require_at_least(1, **{"model.mlp_chunk": self.mlp_chunk})
        kept = sorted({"gate", "up"} & {*self.saved, *self.offloaded})
        require(
            not (kept and self.mlp_chunk), f"model.mlp_chunk keeps no {' and '.join(kept)}; leave one or the other out"
        )
        require(self.unroll == -1 or self.unroll >= 1, f"model.unroll must be -1 or at least 1, got {self.unroll}")

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers the latent cache holds per token and layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def cache_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """Bytes of latent cache per token over all layers."""
        return self.cache_width * self.num_hidden_layers * bytes_per_number


@schema
class DataConfig:
    """What every data set has in common. `seq_len` and batch size belong to the training stages."""

    tokenizer: str = MISSING
    """`bytes`, `needle-bpe` (built in, see `mla_jax.data.tokenizer`), or the path of a tokenizer.json / HF folder."""
    workers: int = 0
    """Processes that make batches; 0 makes them in a thread of the training process."""

    def __post_init__(self):
        require_at_least(0, **{"data.workers": self.workers})


@schema
class NeedleDataConfig(DataConfig):
    """Synthetic needles in a haystack; weights are relative and need not sum to one."""

    kind: str = "needle"
    tasks: dict[str, float] = MISSING
    """Weight of each task: passkey, single, multi_key, multi_value, multi_query, variable_tracking, absent_key."""
    haystacks: dict[str, float] = MISSING
    """Weight of each filler: noise (repeated sentences), words (random words), needles (only needles), text."""
    text_folder: Optional[str] = None
    """Folder of .txt / .md files for the `text` haystack."""
    max_needles: int = 64
    """Most needles in one sequence; as many as fit are drawn log-uniformly from 1 to this."""
    near_duplicate_fraction: float = 0.5
    """Share of multi_key sequences whose keys differ from another key by one word only."""
    lm_loss_weight: float = 0.0
    """Loss weight of tokens that are not answers (answers have weight 1)."""

    def __post_init__(self):
        super().__post_init__()
        tasks = ("passkey", "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "absent_key")
        for group, known in (("tasks", tasks), ("haystacks", ("noise", "words", "needles", "text"))):
            weights = getattr(self, group)
            for name in weights:
                require_choice(f"data.{group} key", name, known)
            require(
                min(weights.values(), default=0) >= 0 and sum(weights.values()) > 0,
                f"data.{group} needs non-negative weights with a positive sum, got {weights}",
            )
        require(
            not self.haystacks.get("text") or self.text_folder is not None,
            "data.haystacks.text needs data.text_folder=FOLDER",
        )
        require_at_least(1, **{"data.max_needles": self.max_needles})
        require(
            0 <= self.near_duplicate_fraction <= 1,
            f"data.near_duplicate_fraction must be in [0, 1], got {self.near_duplicate_fraction}",
        )
        require_at_least(0, **{"data.lm_loss_weight": self.lm_loss_weight})


@schema
class JsonlDataConfig(DataConfig):
    """A JSONL file of chats ({"messages": [...]}) or completions ({"prompt": ..., "completion": ...})."""

    kind: str = "jsonl"
    path: str = MISSING


@schema
class OptimConfig:
    """Optimizer and learning-rate shape; the peak rate belongs to the training stages."""

    name: str = MISSING
    """`adamw`, or `muon` (matrices by Muon, the rest by AdamW)."""
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    muon_momentum: float = 0.95
    adam_lr_ratio: float = 1.0
    """Under `muon`: AdamW's learning rate as a share of the stage's rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    schedule: str = "wsd"
    """`constant`, `cosine`, or `wsd` (warm-up, stable, decay)."""
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    """Under `wsd`: the share of all steps over which the rate falls linearly."""
    final_ratio: float = 0.0
    """The last step's rate as a share of the stage's rate."""

    def __post_init__(self):
        require_choice("optim.name", self.name, ("adamw", "muon"))
        require_choice("optim.schedule", self.schedule, ("constant", "cosine", "wsd"))
        require_at_least(0, **{"optim.weight_decay": self.weight_decay, "optim.warmup_steps": self.warmup_steps})
        require(self.clip_norm > 0, f"optim.clip_norm must be positive, got {self.clip_norm}")
        for name in ("decay_fraction", "final_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name} must be in [0, 1], got {value}")


@schema
class MeshConfig:
    """Sizes of the device mesh; -1 (at most once) takes the devices that are left."""

    data: int = 1
    """Replicas of the weights (across nodes: HSDP)."""
    fsdp: int = -1
    """Devices over which weights, gradients and optimizer state are shared out, and rows of the batch spread."""
    context: int = 1
    """Devices over which the tokens of each training sequence are spread."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.context)
        require(all(s == -1 or s >= 1 for s in sizes), f"mesh sizes must be -1 or at least 1, got {sizes}")
        require(sizes.count(-1) <= 1, f"at most one mesh size may be -1, got {sizes}")


@schema
class TrackerConfig:
    """Where metrics go besides the terminal."""

    names: list[str] = MISSING
    """Any of `tensorboard`, `wandb`, `mlflow`; empty for none."""
    project: str = "infinitecontext"
    """W&B's project, MLflow's experiment."""
    wandb_mode: Optional[str] = None
    """`online`, or `offline` for files that `wandb sync` uploads; null for what WANDB_MODE says, else online."""
    mlflow_uri: Optional[str] = None
    """MLflow's store; null for MLFLOW_TRACKING_URI, else mlflow.db in the folder that holds the run folder."""

    def __post_init__(self):
        for name in self.names:
            require_choice("tracker.names", name, ("tensorboard", "wandb", "mlflow"))
        require(len(set(self.names)) == len(self.names), f"tracker.names has a name twice: {', '.join(self.names)}")
        if self.wandb_mode is not None:
            require_choice("tracker.wandb_mode", self.wandb_mode, ("online", "offline"))


@schema
class StageConfig:
    """One stage of the length curriculum."""

    seq_len: int = MISSING
    """Tokens per sequence."""
    batch_size: int = MISSING
    """Sequences per optimizer step, over all devices and accumulation steps."""
    steps: int = MISSING
    """The most optimizer steps in this stage."""
    learning_rate: float = MISSING
    accuracy: Optional[float] = None
    """Go on to the next stage as soon as answer-token accuracy over `train.log_every` steps reaches this."""
    previous_fraction: float = 0.0
    """Share of steps taken at the previous stage's length and batch size."""
    position_skip_fraction: float = 0.0
    """Share of steps whose positions jump 1 to 3 times, to train positions beyond `seq_len`."""
    position_skip_max: int = 0
    """The largest total jump, log-uniform; 0 for none."""

    def __post_init__(self):
        require_at_least(2, **{"train.stages.seq_len": self.seq_len})
        require_at_least(1, **{"train.stages.batch_size": self.batch_size, "train.stages.steps": self.steps})
        require(self.learning_rate > 0, f"train.stages.learning_rate must be positive, got {self.learning_rate}")
        for name in ("previous_fraction", "position_skip_fraction", "accuracy"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"train.stages.{name} must be in [0, 1], got {value}")
        require_at_least(0, **{"train.stages.position_skip_max": self.position_skip_max})


@schema
class TrainConfig:
    """The training loop."""

    stages: list[StageConfig] = field(default_factory=list)
    grad_accumulation: int = 1
    """Micro-batches a step; gradients are summed in float32."""
    loss_chunk: int = 1024
    """Tokens of a sequence whose logits exist at one time."""
    log_every: int = 10
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also saved at the end and on Ctrl-C."""
    keep_last: int = 2
    """The newest checkpoints that are kept."""
    keep_best: int = 1
    """The best checkpoints that are kept besides; 0 for none."""
    best_metric: str = "answer_accuracy"
    """What is best over the last `log_every` steps, in the last stage reached: a metric of the loss, such as `loss`."""
    nonfinite: str = "stop"
    """At a step whose loss or gradient is not finite: `stop`, or `skip` it and leave parameters and moments alone."""
    profile: list[int] = field(default_factory=list)
    """[FIRST, LAST]: write a trace of these steps, counted from 1 in each process, to RUN/profile; empty for none."""
    measure_peak: bool = True
    """On a GPU, time a matrix product at the start, to state MFU against the measured peak too."""

    def __post_init__(self):
        require_choice("train.nonfinite", self.nonfinite, ("stop", "skip"))
        require(
            self.profile == [] or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
            f"train.profile must be [FIRST, LAST] with 1 <= FIRST <= LAST, got {self.profile}",
        )
        require(len(self.stages) > 0, "train.stages needs at least one stage")
        for name in ("grad_accumulation", "loss_chunk", "log_every", "checkpoint_every", "keep_last"):
            require_at_least(1, **{f"train.{name}": getattr(self, name)})
        require_at_least(0, **{"train.keep_best": self.keep_best})
        for stage in self.stages:
            require(
                stage.batch_size % self.grad_accumulation == 0,
                f"train.grad_accumulation={self.grad_accumulation} must divide batch_size={stage.batch_size}",
            )
        require(self.stages[0].previous_fraction == 0, "the first of train.stages has no previous stage to mix in")
        require(
            self.stages[-1].accuracy is None,
            "the last of train.stages must not end early (accuracy): the learning rate would never decay",
        )


@schema
class PasskeyConfig:
    """The passkey grid: generation from prompts of each length, the key at each depth."""

    lengths: list[int] = MISSING
    """Prompt lengths in tokens."""
    depths: list[float] = MISSING
    """Where the key lies: 0 at the start, 1 at the end."""
    samples: int = MISSING
    """Prompts in each cell."""
    batch_size: int = 8
    max_new_tokens: int = 10
    cache_dtype: Optional[str] = None
    """`int8` for the 8-bit cache; None for the model's compute type."""
    seed: int = 1_000_003
    """Seed of the prompts; keep it apart from the training seed, so that prompts are held out."""

    def __post_init__(self):
        require(len(self.lengths) > 0, "eval.lengths needs at least one length")
        require(len(self.depths) > 0, "eval.depths needs at least one depth")
        require(all(0 <= d <= 1 for d in self.depths), f"eval.depths must be in [0, 1], got {self.depths}")
        for name in ("samples", "batch_size", "max_new_tokens"):
            require_at_least(1, **{f"eval.{name}": getattr(self, name)})
        if self.cache_dtype is not None:
            require_choice("eval.cache_dtype", self.cache_dtype, ("int8", "bfloat16", "float16", "float32"))


@schema
class SftConfig:
    """`python -m experiments.sft`."""

    name: str = MISSING
    run_dir: str = MISSING
    """Where everything of this run is kept: config, tokenizer, checkpoints, metrics, evaluations."""
    seed: int = 0
    init_from: Optional[str] = None
    """A run whose newest parameters to start from; a checkpoint of this run itself takes precedence."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    mesh: MeshConfig = MISSING
    tracker: TrackerConfig = MISSING
    train: TrainConfig = MISSING

    def __post_init__(self):
        require_choice("train.best_metric", self.train.best_metric, ("answer_accuracy", "loss"))
        longest = max(stage.seq_len for stage in self.train.stages)
        require(
            longest <= self.model.max_position_embeddings,
            f"train.stages has seq_len {longest}, beyond model.max_position_embeddings "
            f"{self.model.max_position_embeddings}",
        )
        for stage in self.train.stages:
            require(
                stage.seq_len + stage.position_skip_max <= self.model.max_position_embeddings,
                f"train.stages: seq_len {stage.seq_len} + position_skip_max {stage.position_skip_max} is beyond "
                f"model.max_position_embeddings {self.model.max_position_embeddings}",
            )


@schema
class EvaluateConfig:
    """`python -m experiments.evaluate run=RUN_DIR`."""

    run: str = MISSING
    step: str = "latest"
    """Which checkpoint: `latest`, `best` by the run's `train.best_metric`, or a step."""
    eval: PasskeyConfig = MISSING

    def __post_init__(self):
        require(
            self.step in ("latest", "best") or self.step.isdigit(),
            f"step must be latest, best or a number, got {self.step!r}",
        )


def register_schemas() -> None:
    """Puts the schemas where the files in `conf/` name them (idempotent)."""
    store = ConfigStore.instance()
    store.store(name="sft_schema", node=SftConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for group, name, node in (
        ("model", "schema", ModelConfig),
        ("model/rope_scaling", "schema", YarnConfig),
        ("data", "needle_schema", NeedleDataConfig),
        ("data", "jsonl_schema", JsonlDataConfig),
        ("optim", "schema", OptimConfig),
        ("mesh", "schema", MeshConfig),
        ("tracker", "schema", TrackerConfig),
        ("train", "schema", TrainConfig),
        ("eval", "passkey_schema", PasskeyConfig),
    ):
        store.store(group=group, name=name, node=node)
