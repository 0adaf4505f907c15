"""The decoder's call: decode steps run as one compiled graph, everything else as ever."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from llm_accel.errors import UnsupportedModelError
from llm_accel.patches.cache_name import CACHE, named, named_cache
from llm_accel.patches.compiled.cache import GraphCache, fixed
from llm_accel.patches.compiled.pool import Pool
from llm_accel.patches.replay import is_waiting, wants

if TYPE_CHECKING:
    from llm_accel.patches.hook import DecoderHook
    from llm_accel.patches.session import Session

_OWN = "llm_accel.patches."
Step = Callable[[Callable[..., Any], dict[str, Any]], Any]


class DecodeCall:
    """Lies in ``decoder._compiled_call_impl``, which PyTorch calls in place of the module's own call where it is set,
    and which neither copies nor pickles take along: the hook of a copy makes a new one.

    Attributes:
        refusal: why the latest decode step was not compiled, or None.
    """

    def __init__(self, decoder: Any, hook: DecoderHook) -> None:
        self._decoder, self._hook = decoder, hook
        self._steps: dict[Hashable, Step] = {}
        self._proven: set[Hashable] = set()  # graphs that have run
        self._pool = Pool()
        self._broken: str | None = None
        self._searched: int | None = None  # number of the latest hook when the modules were searched for hooks
        self._lock = threading.Lock()  # neither tracing nor a graph that is replayed may run twice at once
        self.refusal: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as the decoder's own call."""
        if torch.compiler.is_compiling():  # part of a larger graph, which the user compiles
            return self._decoder._call_impl(*args, **kwargs)
        given = named_cache(named(type(self._decoder).forward, args, kwargs) if args else kwargs)
        session = self._session(given)
        if session is not None:
            output = self._step(session, given) if self._ready(session, given) else None
            if output is not None:
                return output
            session.end_graph()
        return self._decoder._call_impl(*args, **kwargs)

    def _session(self, kwargs: dict[str, Any]) -> Session | None:
        cache = kwargs.get(CACHE)
        if not self._hook.enabled or not isinstance(cache, Cache):
            return None
        session: Session | None = getattr(cache, "llm_accel", None)
        ours = self._hook.plan
        return session if session is not None and (session.plan is ours or session.plan == ours) else None

    def _ready(self, session: Session, kwargs: dict[str, Any]) -> bool:
        """Whether this call is a decode step that can be compiled."""
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if inputs is None or inputs.shape[1] != 1 or not session.decoding or is_waiting(kwargs[CACHE]):
            return False
        self.refusal = self._broken or session.eager_because or self._why_not(kwargs)
        return self.refusal is None

    def _why_not(self, kwargs: dict[str, Any]) -> str | None:
        decoder = self._decoder
        if decoder.training or torch.is_grad_enabled():
            return "gradients are on; decode under torch.no_grad()"
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if wants(kwargs, decoder, name):
                return f"{name} is on"
        if kwargs.get("return_dict") is False:
            return "return_dict is off"
        if self._observed():
            return "the decoder or a module in it has forward hooks beside those of llm_accel"
        return None

    def _observed(self) -> bool:
        """Whether there are hooks in the decoder that are not ours: a graph would neither call new ones nor forget old
        ones. All modules are searched only when some hook has come anywhere since they were."""
        latest = RemovableHandle.next_id
        if self._searched != latest:
            tables = ((one._forward_pre_hooks, one._forward_hooks) for one in self._decoder.modules())
            if any(not _is_own(hook) for table in tables for hooks in table for hook in hooks.values()):
                return True
            self._searched = latest
        return False

    def _step(self, session: Session, kwargs: dict[str, Any]) -> Any:
        """The output of one compiled step, or None where it cannot be compiled and nothing has happened yet."""
        cache: Any = kwargs[CACHE]
        past = cache.get_seq_length()
        with session.lock:  # whoever reads the layers, for a report in another thread, waits until the step is over
            _, given = self._hook(self._decoder, (), dict(kwargs))
            undo: Callable[[], None] | None = None
            graph, proven, done = None, True, False
            try:
                graph = self._graph(session)
                if given.get("position_ids") is None:
                    graph.seen.fill_(past)
                given |= {CACHE: graph, "llm_accel": graph, "attention_mask": None}
                key, mode = _variant((graph.kind, graph.begin()), graph.seen.device)
                proven = key in self._proven
                undo = None if proven else graph.backup()
                with self._lock:
                    output = self._compiled(key, mode)(self._decoder.forward, given)
                    done = True
                    if graph.seen.device.type == "cuda":  # the next replay writes to the same memory
                        for name, content in output.items():
                            output[name] = content.clone() if isinstance(content, Tensor) else content
                graph.advance()
            except BaseException as error:
                if undo is not None and not done:
                    undo()
                lost = done or (proven and graph is not None and not isinstance(error, TorchDynamoException))
                session.end_graph(broken=lost)
                if lost or not isinstance(error, Exception):
                    raise
                session.unfinished = False
                self._give_up(session, error)
                return None
            session.unfinished = False
        self._proven.add(key)
        if output.get(CACHE) is not None:
            setattr(output, CACHE, cache)
        return output

    def _graph(self, session: Session) -> GraphCache:
        """The session's layers in their fixed form, with headroom for a token."""
        graph = session.graph
        if graph is not None and (graph.headroom == 0 or not graph.whole or not graph.lies_in(self._pool)):
            session.end_graph()
        if session.graph is None:
            session.graph = fixed(session, self._decoder, self._pool)
        return session.graph

    def _give_up(self, session: Session, error: Exception) -> None:
        """Notes why a step was not compiled, although nothing had spoken against it; raises where it had to be."""
        compiler = isinstance(error, TorchDynamoException)
        what = "torch.compile failed" if compiler else f"the first step failed with {type(error).__name__}"
        self.refusal = f"{what}: {_brief(error)}"
        if self._hook.plan.decode != "compiled":
            if isinstance(error, torch.OutOfMemoryError):
                session.eager_because = self.refusal  # another call may be smaller
            else:
                self._broken = self.refusal
        elif compiler:
            raise UnsupportedModelError(
                f"decode='compiled': {self.refusal}. Use decode='auto', which goes on without it, or 'eager'."
            ) from error
        else:
            raise error

    def _compiled(self, key: Hashable, mode: str | None) -> Step:
        """The graph for one kind of cache, in a function of its own: graphs of one function count against one limit,
        and each of them is tried before the next."""
        if key not in self._steps:
            own = types.FunctionType(_step.__code__.replace(), _step.__globals__)
            self._steps[key] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend(), mode=mode)
        return self._steps[key]


def _variant(key: Hashable, device: torch.device) -> tuple[Hashable, str | None]:
    """The graph that this thread uses for a kind of cache, and how it is compiled."""
    if device.type != "cuda":
        return key, None
    # CUDA graphs of PyTorch belong to the thread that made them
    main = threading.current_thread() is threading.main_thread()
    return (key, "reduce-overhead") if main else ((key, "no CUDA graph"), None)


def _step(forward: Callable[..., Any], given: dict[str, Any]) -> Any:
    return forward(**given)


def _is_own(hook: Any) -> bool:
    return type(hook).__module__.startswith(_OWN)


def _brief(error: Exception) -> str:
    """The first lines of a message that goes on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])


def backend() -> Any:
    """The compiler; tests put others in its place."""
    return "inductor"


def arm(decoder: Any, hook: DecoderHook) -> None:
    """Makes the decoder's decode steps compiled, where the plan says so and nobody has compiled the decoder itself."""
    if hook.plan.compiles and decoder._compiled_call_impl is None:
        decoder._compiled_call_impl = DecodeCall(decoder, hook)


def disarm(decoder: Any) -> None:
    """Exact undo of :func:`arm`."""
    if isinstance(decoder._compiled_call_impl, DecodeCall):
        del decoder._compiled_call_impl


def refusal_of(decoder: Any) -> str | None:
    """Why the latest decode step of this decoder was not compiled, or None."""
    call = decoder._compiled_call_impl
    return call.refusal if isinstance(call, DecodeCall) else None
