"""The attention backends of vLLM with our builder and layers in them, and the others, which only check.

Names are those of vLLM's registry. A class is made when vLLM asks for it, from the one whose place it takes, so that no
backend is imported that an engine does not use. In engines without our settings all of them act as their parents.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.checks import check_engine
from llm_accel.integrations.vllm.layer import CompressedImpl
from llm_accel.integrations.vllm.pages import Pages, SplitPages, VecPages
from llm_accel.integrations.vllm.registration import PARENTS
from llm_accel.integrations.vllm.scheduling import NOT_WHOLE, CompressedSpec, EngineFacts, is_whole
from llm_accel.integrations.vllm.steps import CompressedBuilder

PAGES: dict[str, Pages] = {"CPU_ATTN": VecPages(), "FLASH_ATTN": SplitPages(), "TRITON_ATTN": SplitPages()}
"""The backends that KV methods know, and their pages."""


class VecBuilder(CompressedBuilder):
    """Only the CPU's "vec" kernels have the pages that we know; others pack keys for their instructions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        isa = getattr(self, "isa", None)
        if self._requests is not None and isa != "vec":
            raise ConfigError(
                f"{self.kv_cache_spec.method} cannot run in this engine: CPU_ATTN uses its {isa!r} kernels, whose "
                "pages are packed; give dtype=float32, or a block_size that is a multiple of 32."
            )


def _made(name: str) -> type[Any]:
    path = PARENTS.get(name, AttentionBackendEnum[name].value)
    parent = resolve_obj_by_qualname(path)
    pages = PAGES.get(name) if path == AttentionBackendEnum[name].value else None
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"{parent.__name__}, known to llm_accel."}
    if pages is None:

        def checked() -> Any:
            check_engine(name, takes_kv=False)
            return parent.get_impl_cls()

        members["get_impl_cls"] = staticmethod(checked)
        return type(name, (parent,), members)
    made = type(name, (Compressed, parent), members)
    made.parts = (  # type: ignore[attr-defined]
        type(f"{name}Impl", (CompressedImpl, parent.get_impl_cls()), {"pages": pages, "__module__": __name__}),
        type(
            f"{name}Builder",
            (VecBuilder if name == "CPU_ATTN" else CompressedBuilder, parent.get_builder_cls()),
            {"__module__": __name__},
        ),
    )
    return made


class Compressed:
    """Mixed into backends that KV methods know."""

    parts: tuple[Any, Any]
    # of the engine that was built last: no configuration is current where specs are asked for
    method: str | None = None
    engine = EngineFacts()

    @classmethod
    def get_impl_cls(cls) -> Any:
        config = get_current_vllm_config_or_none()
        if config is not None:
            cls.engine = _engine(config)
            settings = check_engine(cls.get_name(), takes_kv=True)  # type: ignore[attr-defined]
            cls.method = None if settings is None or settings.kv is None else settings.kv.spec()
        return cls.parts[0]

    @classmethod
    def get_builder_cls(cls) -> Any:
        return cls.parts[1]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if cls.method is None:
            return spec
        if not is_whole(spec):
            raise ConfigError(f"{cls.method} cannot run in this engine: {NOT_WHOLE}.")
        compressed = CompressedSpec.of(spec, cls.method, cls.engine)
        assert compressed.policy  # raises where the budget is too small for these blocks
        return compressed


def _engine(config: Any) -> EngineFacts:
    model, parallel = config.model_config, config.parallel_config
    copies = model.hf_text_config.num_hidden_layers * parallel.tensor_parallel_size
    return EngineFacts(parallel.data_parallel_index, str(model.served_model_name), copies)


def __getattr__(name: str) -> type[Any]:
    if name not in AttentionBackendEnum.__members__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _made(name)
    return made
