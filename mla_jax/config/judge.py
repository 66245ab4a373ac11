"""Configuration of `experiments.judge`: the judge's endpoint, the answers, and how much is asked to know its error."""

from dataclasses import field
from typing import Optional

from omegaconf import MISSING

from mla_jax.config.schema import require, require_at_least, schema


@schema
class EndpointConfig:
    """A model behind an OpenAI-compatible interface."""

    base_url: str = MISSING
    """The address that `/chat/completions` follows, as http://127.0.0.1:8080/v1."""
    model: str = MISSING
    """The model's name there."""
    api_key_env: Optional[str] = None
    """The environment variable that holds the key, never the key; null for an endpoint that wants none."""
    input_price: Optional[float] = None
    output_price: Optional[float] = None
    """US dollars for a million tokens, for the report; null: unknown."""

    def __post_init__(self):
        require(
            self.base_url.startswith(("http://", "https://", MISSING)),
            f"the base_url of a judge must begin with http:// or https://, got {self.base_url!r}",
        )
        require(self.model.strip() != "", "the model of a judge is empty; name it as its endpoint does")
        require_at_least(0, input_price=self.input_price, output_price=self.output_price)


@schema
class JudgeConfig:
    """Configuration of `python -m experiments.judge answers=FILE judge.base_url=URL judge.model=NAME`."""

    answers: str = MISSING
    """RUN/eval/TASK.json, or a JSONL file of answers."""
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    against: Optional[str] = None
    """Other answers to the same questions, compared with the former in pairs."""
    out: Optional[str] = None
    """The report; null for NAME.judge.json beside the answers."""
    panel: list[EndpointConfig] = field(default_factory=list)
    """More judges: a class, or a preference, counts if more than half of all judges say so."""
    structured: bool = False
    """Ask for JSON of a given schema (response_format), which not every endpoint can, instead of a reason and a class
    in words."""
    temperature: float = 0.0
    max_tokens: int = 400
    """Of a reply."""
    max_connections: int = 8
    """Requests at a time."""
    max_retries: int = 5
    """Of a request, after 429, 5xx, a broken connection or a timeout, with waits that grow from 3 s."""
    timeout: int = 60
    """Seconds for one attempt."""
    agreement: int = 100
    """The most answers that exact match settles and the judge is asked about all the same, for kappa."""
    retest: int = 50
    """Answers that are asked about a second time."""
    planted: int = 10
    """Planted answers of each class."""
    pairs: int = 30
    """Planted pairs of a right and a wrong answer."""
    seed: int = 0
    """Of what is drawn and planted."""

    @property
    def judges(self) -> list[EndpointConfig]:
        """All of them."""
        return [self.judge, *self.panel]

    def __post_init__(self):
        require_at_least(0, temperature=self.temperature, max_retries=self.max_retries)
        for name in ("agreement", "retest", "planted", "pairs"):
            require_at_least(0, **{name: getattr(self, name)})
        names = [endpoint.model for endpoint in self.judges]
        require(len(set(names)) == len(names), f"panel has a model twice: {', '.join(names)}; judges must differ")
        for name in ("max_tokens", "max_connections", "timeout"):
            require_at_least(1, **{name: getattr(self, name)})
