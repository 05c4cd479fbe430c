"""Keys of the rollout: how samples are made, by which engine, and how the learner allows for what the engine did."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from align.config.base import Section, as_section


class TransformersEngine(Section):
    """Sampling with transformers' own generation, in the learner's process."""

    type: Literal["transformers"]
    batch_size: PositiveInt = 256
    """Samples generated at once and process."""


class DirectorySync(Section):
    """Weights go to the servers as safetensors files in a folder that learner and servers share."""

    type: Literal["directory"]
    path: str = "/dev/shm"
    """Where the folder is made: shared memory on one machine, a shared file system for servers on others."""


class TransferSync(Section):
    """Weights go from GPU to GPU, by vLLM's own weight transfer over NCCL."""

    type: Literal["transfer"]
    address: str = "127.0.0.1"
    """Address of the main learner process that the servers can reach."""


class VerifyConfig(Section):
    """Every push of weights is verified: learner and servers score the same few sequences."""

    sequences: PositiveInt = 4
    tokens: int = Field(24, ge=2)
    """Length of each sequence."""
    mean_gap: PositiveFloat | None = None
    """Largest mean difference of the log-probabilities, in nats; by default 0.001 in float32, else 0.05."""
    max_gap: PositiveFloat | None = None
    """Largest single difference; by default 0.01 in float32, else 0.5."""


class VllmEngine(Section):
    """Sampling on vLLM servers: started with the run (`workers`), or running already (`urls`)."""

    type: Literal["vllm"]
    workers: PositiveInt = 1
    """Servers to start on this machine; they end with the run."""
    urls: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    """Servers that run elsewhere, in place of local ones, for example those that `paretune worker` starts."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type the servers compute in; by default `policy.dtype`."""
    max_concurrent: PositiveInt = 256
    """Samples that one server works on at once."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one server's model."""
    gpus: list[NonNegativeInt] = []
    """GPUs of the servers; by default the last ones of the machine, which no learner process may use."""
    gpu_memory: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that a server may take."""
    cpu_cache_gib: PositiveFloat = 1.0
    """Memory for keys and values of a server on a CPU."""
    sync: Annotated[DirectorySync | TransferSync, BeforeValidator(as_section), Field(discriminator="type")] = DirectorySync(
        type="directory"
    )
    verify: VerifyConfig = VerifyConfig()
    request_timeout: PositiveFloat = 600.0
    """Seconds for one sample; a server that takes longer counts as hanging."""
    start_timeout: PositiveFloat = 600.0
    """Seconds for a server to start, and to wait for one to come back when all are gone."""
    restarts: NonNegativeInt = 3
    """Times that each local server is started again after it died."""
    args: dict[str, Any] = {}
    """Further arguments of vLLM's server, by its names, for example `{max_num_batched_tokens: 16384}`."""


def _as_engine(value: Any) -> Any:
    """Lets `engine: vllm` stand for a table, and options without a type be those of the default engine."""
    value = as_section(value)
    return {"type": "transformers"} | value if isinstance(value, dict) else value


EngineConfig = Annotated[TransformersEngine | VllmEngine, BeforeValidator(_as_engine), Field(discriminator="type")]


class CorrectionConfig(Section):
    """Importance weights learner / sampler, for what the engine computes otherwise and for policies that have moved on."""

    type: Literal["none", "truncate", "mask"]
    """`truncate` brings ratios into [min, max], `mask` leaves out what lies beyond."""
    level: Literal["token", "sequence"] = "token"
    """One ratio per token, or one per sample: the product of those of its tokens."""
    max: PositiveFloat = 3.0
    min: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> "CorrectionConfig":
        if self.min >= self.max:
            raise ValueError(f"min {self.min} is not below max {self.max}")
        return self


class RolloutConfig(Section):
    """How samples are made. One batch holds `prompts_per_batch * samples_per_prompt` samples over all processes."""

    engine: EngineConfig = TransformersEngine(type="transformers")
    lookahead: Literal[0, 1] = 0
    """1 samples the next batch while the learner trains on this one, so every batch is one batch old; needs vLLM."""
    correction: Annotated[CorrectionConfig, BeforeValidator(as_section)] = CorrectionConfig(type="none")
    """By default `none` where the learner itself samples, `truncate` with vLLM."""
    prompts_per_batch: PositiveInt = 16
    samples_per_prompt: int = Field(8, ge=2)
    """G, the size of a sample group."""
    max_tokens: PositiveInt = 256
    """Longest completion, in tokens."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """Keep only the k likeliest tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _correction_of_engine(cls, data: Any) -> Any:
        """Where `correction` is left out, the engine chooses it."""
        engine = as_section(data.get("engine")) if isinstance(data, dict) else None
        kind = engine.get("type") if isinstance(engine, dict) else getattr(engine, "type", None)
        return {"correction": {"type": "truncate"}} | data if kind == "vllm" else data
