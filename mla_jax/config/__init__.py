"""Typed configs: see `schemas`."""

from mla_jax.config.schemas import (
    HOW_IT_IS_COMPUTED as HOW_IT_IS_COMPUTED,
)
from mla_jax.config.schemas import (
    NAMES as NAMES,
)
from mla_jax.config.schemas import (
    DataConfig as DataConfig,
)
from mla_jax.config.schemas import (
    EvaluateConfig as EvaluateConfig,
)
from mla_jax.config.schemas import (
    JsonlDataConfig as JsonlDataConfig,
)
from mla_jax.config.schemas import (
    MeshConfig as MeshConfig,
)
from mla_jax.config.schemas import (
    ModelConfig as ModelConfig,
)
from mla_jax.config.schemas import (
    NeedleDataConfig as NeedleDataConfig,
)
from mla_jax.config.schemas import (
    OptimConfig as OptimConfig,
)
from mla_jax.config.schemas import (
    PasskeyConfig as PasskeyConfig,
)
from mla_jax.config.schemas import (
    SftConfig as SftConfig,
)
from mla_jax.config.schemas import (
    StageConfig as StageConfig,
)
from mla_jax.config.schemas import (
    TrackerConfig as TrackerConfig,
)
from mla_jax.config.schemas import (
    TrainConfig as TrainConfig,
)
from mla_jax.config.schemas import (
    YarnConfig as YarnConfig,
)
from mla_jax.config.schemas import (
    flatten as flatten,
)
from mla_jax.config.schemas import (
    register_schemas as register_schemas,
)
from mla_jax.config.schemas import (
    require as require,
)
from mla_jax.config.schemas import (
    require_at_least as require_at_least,
)
from mla_jax.config.schemas import (
    require_choice as require_choice,
)
from mla_jax.config.schemas import (
    schema as schema,
)
